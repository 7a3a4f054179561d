"""Options that name a file. The file is read and checked when the configuration is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import SecretStr

from .files import read_file, trusting
from .values import API_KEY, KEY_DIGEST, NONE, TEXT, Option, expected

if TYPE_CHECKING:
    import ssl

# Bytes. No key is longer, so a larger file was named by mistake.
_MAX_KEY_FILE = 16 << 10
# Bytes. Enough for ten thousand digests.
_MAX_DIGESTS_FILE = 1 << 20


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
        # The value is not shown, because somebody may have put the key itself there.
        raise expected(f"a readable file with an API key ({_why(error)})", show=False) from None
    except UnicodeDecodeError:
        text = ""
    if not API_KEY.fullmatch(text):
        raise expected("a file with an API key: one line of visible ASCII characters", show=False)
    return KeyFile(value, SecretStr(text))


@dataclass(frozen=True, slots=True)
class DigestsFile:
    """Digests of the keys of a client, which were read from the file at `path`."""

    path: str
    digests: tuple[str, ...]


def _digests_file(value: object) -> DigestsFile | None:
    if value is None or isinstance(value, DigestsFile):
        return value
    what = "a file with the digests of keys, one in a line, as sseproxy key prints them"
    if not isinstance(value, str) or not value:
        raise expected(f"the path of {what}", show=False)
    try:
        text = read_file(value, _MAX_DIGESTS_FILE).decode()
    except OSError as error:
        raise expected(f"{what} ({_why(error)})", show=False) from None
    except UnicodeDecodeError:
        raise expected(what, show=False) from None
    found = [word for line in text.splitlines() if (word := line.partition("#")[0].strip())]
    if not all(map(KEY_DIGEST.fullmatch, found)):
        raise expected(what, show=False)
    return DigestsFile(value, tuple(found))


def _format_file(file: KeyFile | DigestsFile | None) -> str | None:
    return None if file is None else file.path


def _ca_file(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and value:
        import ssl

        try:
            trusting(value)
            return value
        except OSError as error:
            # ssl.SSLError is a subclass of OSError.
            why = "no certificate is in it" if isinstance(error, ssl.SSLError) else _why(error)
            raise expected(f"a readable file of PEM certificates ({why})") from None
    raise expected("the path of a file of PEM certificates")


def check_certificate(load: Callable[[], ssl.SSLContext]) -> None:
    """Calls `load`, and turns its errors about a certificate into errors for pydantic."""
    import ssl

    try:
        load()
    except ValueError:
        raise expected("a private key without password", show=False) from None
    except ssl.SSLError:
        raise expected(
            "a certificate and its private key in PEM, in cert_file and key_file, that belong together", show=False
        ) from None
    except OSError as error:
        raise expected(f"readable files in cert_file and key_file ({_why(error)})", show=False) from None


ApiKeyFile = Annotated[KeyFile | None, Option(_api_key_file, TEXT, NONE, write=_format_file)]

KeysFile = Annotated[DigestsFile | None, Option(_digests_file, TEXT, NONE, write=_format_file)]

CAFile = Annotated[str | None, Option(_ca_file, TEXT, NONE)]
