"""Reads files: a configuration, and the keys and certificates that its options name.

No file may block the supervisor: no pipe without a writer, and no device without an end. So keys and certificates must
be regular files, or symbolic links to them, as Kubernetes mounts them. The configuration itself may come from a pipe,
as with `-c <(...)`; this has a timeout.

A worker imports this module, to read certificates. So nothing here may import PyYAML. `ssl` is imported
where it is used, because most configurations have no certificate.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

# Bytes. The certificates of all public authorities take 220 KiB.
_MAX_CERTIFICATES = 4 << 20
# Bytes. A route and its upstream take less than 1 KiB, so this is enough for thousands of them.
_MAX_CONFIGURATION = 4 << 20
# Seconds. The program that writes a configuration into a pipe may have to fetch secrets first.
_PIPE_TIMEOUT = 10.0
_READ_SIZE = 64 << 10


def read_file(path: str, most: int, *, timeout: float | None = None) -> bytes:
    """The content of the file at `path`. Only with a `timeout` it may also be a pipe.

    Raises `OSError` if the file cannot be read, is not a regular file, or is larger than `most` bytes, and
    `TimeoutError` if no bytes come from a pipe for `timeout` seconds.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except ValueError:
        raise OSError(errno.EINVAL, "no path has such a character") from None
    try:
        regular = stat.S_ISREG(os.fstat(file).st_mode)
        if not regular and timeout is None:
            # For a directory, `read` raises the usual error (EISDIR).
            os.read(file, 0)
            raise OSError(errno.EINVAL, "not a regular file")
        return _read(file, most, 0.0 if regular or timeout is None else timeout)
    finally:
        os.close(file)


def _read(file: int, most: int, timeout: float) -> bytes:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    data = b""
    # A pipe without a writer reads as if it had ended. So before the first byte, this is not taken for the end.
    begun = not timeout
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
        elif poll.poll(timeout * 1000):
            begun = True
        else:
            raise TimeoutError(errno.ETIMEDOUT, f"nothing came out of it for {timeout:g} seconds")
    raise OSError(errno.EFBIG, f"larger than {f'{most >> 20}MiB' if most >> 20 else f'{most >> 10}KiB'}")


def read_configuration(path: str) -> bytes:
    """The bytes of a configuration. Raises `OSError`."""
    return read_file(path, _MAX_CONFIGURATION, timeout=_PIPE_TIMEOUT)


def digest(path: str) -> bytes:
    """A digest of the file at `path`, by which a change is noticed. Empty if it cannot be read."""
    try:
        return hashlib.sha256(read_file(path, max(_MAX_CERTIFICATES, _MAX_CONFIGURATION))).digest()
    except OSError:
        return b""


def trusting(ca_file: str | None) -> ssl.SSLContext:
    """A TLS context for clients that trusts the authorities in `ca_file`, or else the system's. Raises `OSError`."""
    import ssl

    if ca_file is not None:
        # OpenSSL opens the file by its name, and would block on a pipe. So it is checked first.
        read_file(ca_file, _MAX_CERTIFICATES)
    return ssl.create_default_context(cafile=ca_file)


def for_upstream(ca_file: str | None, cert_file: str | None, key_file: str | None) -> ssl.SSLContext:
    """A TLS context for connections to an upstream. Raises `OSError`, or `ValueError` for a key with a password."""
    context = trusting(ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if cert_file is not None:
        _load_certificate(context, cert_file, key_file)
    return context


def for_clients(cert_file: str, key_file: str | None, min_version: str) -> ssl.SSLContext:
    """A TLS context for listeners. Raises `OSError`, or `ValueError` for a key with a password."""
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if min_version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, cert_file, key_file)
    return context


def _load_certificate(context: ssl.SSLContext, cert_file: str, key_file: str | None) -> None:
    def no_password() -> bytes:
        raise ValueError("the private key has a password")

    # OpenSSL opens the files by their names, and would block on a pipe. So they are checked first.
    for path in (cert_file, key_file):
        if path is not None:
            read_file(path, _MAX_CERTIFICATES)
    context.load_cert_chain(cert_file, key_file, no_password)
