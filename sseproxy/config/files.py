"""The files that options name: keys and certificates."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Annotated

from pydantic import SecretStr

from .values import API_KEY, NONE, TEXT, Option, expected

# No key is longer; a file that is was named by mistake.
_MAX_KEY_FILE = 16 << 10


@dataclass(frozen=True, slots=True)
class KeyFile:
    """An API key that was read from the file at `path`."""

    path: str
    key: SecretStr


def _api_key_file(value: object) -> KeyFile | None:
    if value is None or isinstance(value, KeyFile):
        return value
    if not isinstance(value, str) or not value:
        raise expected("the path of a file with an API key", show=False)
    try:
        with open(value, encoding="ascii") as file:
            text = file.read(_MAX_KEY_FILE).strip()
    except OSError as error:
        # What it is not shown for: it may be the key itself.
        raise expected(f"a readable file with an API key ({(error.strerror or '').lower()})", show=False) from None
    except UnicodeDecodeError:
        text = ""
    if not API_KEY.fullmatch(text):
        raise expected("a file with an API key: one line of visible ASCII characters", show=False)
    return KeyFile(value, SecretStr(text))


def _spell_file(file: KeyFile | None) -> str | None:
    return None if file is None else file.path


def _ca_file(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and value:
        try:
            ssl.create_default_context(cafile=value)
            return value
        except OSError as error:
            # An SSLError is one as well.
            why = "no certificate is in it" if isinstance(error, ssl.SSLError) else (error.strerror or "").lower()
            raise expected(f"a readable file of PEM certificates ({why})") from None
    raise expected("the path of a file of PEM certificates")


def load_certificate(context: ssl.SSLContext, cert_file: str, key_file: str | None) -> None:
    def no_password() -> bytes:
        raise expected("a private key without password", show=False)

    try:
        context.load_cert_chain(cert_file, key_file, no_password)
    except ssl.SSLError:
        raise expected(
            "a certificate and its private key in PEM, in cert_file and key_file, that belong together", show=False
        ) from None
    except OSError as error:
        why = (error.strerror or "").lower()
        raise expected(f"readable files in cert_file and key_file ({why})", show=False) from None


ApiKeyFile = Annotated[KeyFile | None, Option(_api_key_file, TEXT, NONE, spell=_spell_file)]

CAFile = Annotated[str | None, Option(_ca_file, TEXT, NONE)]
