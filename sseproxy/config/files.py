"""How files are read: a configuration, and the keys and certificates that its options name.

A supervisor that reads them again has other things to do meanwhile, so no file may keep it: no pipe that nobody writes
into, no device without an end. Keys and certificates are in regular files, or symbolic links to them, as Kubernetes
mounts them. The configuration itself may come out of a pipe, as with `-c <(...)`, which is waited for a while.

A worker reads certificates too, and checks no options: nothing here needs what does. `ssl` is imported where it is
used, because most configurations name no certificate.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

# The certificates of all public authorities are 220 KiB.
_MAX_CERTIFICATES = 4 << 20
# A route and its upstream take less than 1 KiB: thousands of them.
_MAX_CONFIGURATION = 4 << 20
# Who writes a configuration into a pipe may have to fetch its secrets first.
_PIPE_PATIENCE = 10.0
_READ_SIZE = 64 << 10


def read_file(path: str, most: int, *, patience: float | None = None) -> bytes:
    """What is in the regular file at `path`, or, with `patience`, comes out of a pipe.

    Raises `OSError` for what cannot be read, is no such file, has more than `most` bytes, or is a pipe out of which
    nothing comes for `patience` seconds.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except ValueError:
        raise OSError(errno.EINVAL, "no path has such a character") from None
    try:
        regular = stat.S_ISREG(os.fstat(file).st_mode)
        if not regular and patience is None:
            # This raises what is said of a directory everywhere.
            os.read(file, 0)
            raise OSError(errno.EINVAL, "not a regular file")
        return _read(file, most, 0.0 if regular or patience is None else patience)
    finally:
        os.close(file)


def _read(file: int, most: int, patience: float) -> bytes:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    data = b""
    # Nothing comes out of a pipe as long as nobody has opened it to write, either.
    begun = not patience
    while len(data) <= most:
        try:
            part: bytes | None = os.read(file, _READ_SIZE)
        except BlockingIOError:
            part = None
        if part:
            data += part
            begun = True
        elif part is not None and begun:
            return data
        elif poll.poll(patience * 1000):
            begun = True
        else:
            raise TimeoutError(errno.ETIMEDOUT, f"nothing came out of it for {patience:g} seconds")
    raise OSError(errno.EFBIG, f"larger than {f'{most >> 20}MiB' if most >> 20 else f'{most >> 10}KiB'}")


def read_configuration(path: str) -> bytes:
    """The text of a configuration. Raises `OSError`."""
    return read_file(path, _MAX_CONFIGURATION, patience=_PIPE_PATIENCE)


def trusting(ca_file: str | None) -> ssl.SSLContext:
    """For connections to whom the authorities in `ca_file`, or else the system's, vouch for. Raises `OSError`."""
    import ssl

    if ca_file is not None:
        # OpenSSL opens it by its name, and would wait for a pipe.
        read_file(ca_file, _MAX_CERTIFICATES)
    return ssl.create_default_context(cafile=ca_file)


def for_upstream(ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """For connections to an upstream. Raises `OSError`, or `ValueError` for a key with a password."""
    context = trusting(ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if cert_file is not None:
        _load_certificate(context, cert_file, key_file)
    return context


def for_clients(cert_file: str, key_file: str | None, min_version: str) -> ssl.SSLContext:
    """For listeners. Raises `OSError`, or `ValueError` for a key with a password."""
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if min_version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, cert_file, key_file)
    return context


def _load_certificate(context: ssl.SSLContext, cert_file: str, key_file: str | None) -> None:
    def no_password() -> bytes:
        raise ValueError("the private key has a password")

    # OpenSSL opens them by their names, and would wait for a pipe.
    for path in (cert_file, key_file):
        if path is not None:
            read_file(path, _MAX_CERTIFICATES)
    context.load_cert_chain(cert_file, key_file, no_password)
