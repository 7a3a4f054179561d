"""The files that a configuration is, and that its options name: keys and certificates.

A supervisor that reads them again has other things to do meanwhile, so no file may keep it: no pipe that nobody writes
into, no device without an end. Keys and certificates are in regular files, or symbolic links to them, as Kubernetes
mounts them. The configuration itself may come out of a pipe, as with `-c <(...)`, which is waited for a while.
"""

from __future__ import annotations

import errno
import os
import select
import ssl
import stat
from dataclasses import dataclass
from typing import Annotated

from pydantic import SecretStr

from .values import API_KEY, NONE, TEXT, Option, expected, spell_size

# No key is longer; a file that is was named by mistake.
_MAX_KEY_FILE = 16 << 10
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
    raise OSError(errno.EFBIG, f"larger than {spell_size(most)}")


def read_configuration(path: str) -> bytes:
    """The text of a configuration. Raises `OSError`."""
    return read_file(path, _MAX_CONFIGURATION, patience=_PIPE_PATIENCE)


@dataclass(frozen=True, slots=True)
class KeyFile:
    """An API key that was read from the file at `path`."""

    path: str
    key: SecretStr


def _why(error: OSError) -> str:
    text = error.strerror or ""
    return text[:1].lower() + text[1:]


def _api_key_file(value: object) -> KeyFile | None:
    if value is None or isinstance(value, KeyFile):
        return value
    if not isinstance(value, str) or not value:
        raise expected("the path of a file with an API key", show=False)
    try:
        text = read_file(value, _MAX_KEY_FILE).decode("ascii").strip()
    except OSError as error:
        # What it is not shown for: it may be the key itself.
        raise expected(f"a readable file with an API key ({_why(error)})", show=False) from None
    except UnicodeDecodeError:
        text = ""
    if not API_KEY.fullmatch(text):
        raise expected("a file with an API key: one line of visible ASCII characters", show=False)
    return KeyFile(value, SecretStr(text))


def _spell_file(file: KeyFile | None) -> str | None:
    return None if file is None else file.path


def trusting(ca_file: str | None) -> ssl.SSLContext:
    """For connections to whom the authorities in `ca_file`, or else the system's, vouch for. Raises `OSError`."""
    if ca_file is not None:
        # OpenSSL opens it by its name, and would wait for a pipe.
        read_file(ca_file, _MAX_CERTIFICATES)
    return ssl.create_default_context(cafile=ca_file)


def _ca_file(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and value:
        try:
            trusting(value)
            return value
        except OSError as error:
            # An SSLError is one as well.
            why = "no certificate is in it" if isinstance(error, ssl.SSLError) else _why(error)
            raise expected(f"a readable file of PEM certificates ({why})") from None
    raise expected("the path of a file of PEM certificates")


def load_certificate(context: ssl.SSLContext, cert_file: str, key_file: str | None) -> None:
    def no_password() -> bytes:
        raise expected("a private key without password", show=False)

    try:
        # OpenSSL opens them by their names, and would wait for a pipe.
        for path in (cert_file, key_file):
            if path is not None:
                read_file(path, _MAX_CERTIFICATES)
        context.load_cert_chain(cert_file, key_file, no_password)
    except ssl.SSLError:
        raise expected(
            "a certificate and its private key in PEM, in cert_file and key_file, that belong together", show=False
        ) from None
    except OSError as error:
        raise expected(f"readable files in cert_file and key_file ({_why(error)})", show=False) from None


ApiKeyFile = Annotated[KeyFile | None, Option(_api_key_file, TEXT, NONE, spell=_spell_file)]

CAFile = Annotated[str | None, Option(_ca_file, TEXT, NONE)]
