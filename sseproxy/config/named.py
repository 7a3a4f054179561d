"""Options that name a file. The file is read and checked when the configuration is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated

from .files import read_file, trusting
from .options import TEXT, Expected, OrNone, Secret, Value
from .values import API_KEY, KEY_DIGEST

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
    key: Secret


def _why(error: OSError) -> str:
    text = error.strerror or ""
    return text[:1].lower() + text[1:]


def _api_key_file(value: object) -> KeyFile:
    if not isinstance(value, str) or not value:
        raise Expected("the path of a file with an API key", "nothing")
    try:
        text = read_file(value, _MAX_KEY_FILE).decode("ascii").strip()
    except OSError as error:
        # The value is not shown, because somebody may have put the key itself there.
        raise Expected(f"a readable file with an API key ({_why(error)})", "nothing") from None
    except UnicodeDecodeError:
        text = ""
    if not re.fullmatch(API_KEY, text):
        raise Expected("a file with an API key: one line of visible ASCII characters", "nothing")
    return KeyFile(value, Secret(text))


@dataclass(frozen=True, slots=True)
class DigestsFile:
    """Digests of the keys of a client, which were read from the file at `path`."""

    path: str
    digests: tuple[str, ...]


def _digests_file(value: object) -> DigestsFile:
    what = "a file with the digests of keys, one in a line, as sseproxy key prints them"
    if not isinstance(value, str) or not value:
        raise Expected(f"the path of {what}", "nothing")
    try:
        text = read_file(value, _MAX_DIGESTS_FILE).decode()
    except OSError as error:
        raise Expected(f"{what} ({_why(error)})", "nothing") from None
    except UnicodeDecodeError:
        raise Expected(what, "nothing") from None
    found = [word for line in text.splitlines() if (word := line.partition("#")[0].strip())]
    if not all(re.fullmatch(KEY_DIGEST, one) for one in found):
        raise Expected(what, "nothing")
    return DigestsFile(value, tuple(found))


def _ca_file(value: object) -> str:
    if isinstance(value, str) and value:
        import ssl

        try:
            trusting(value)
            return value
        except OSError as error:
            # ssl.SSLError is a subclass of OSError.
            why = "no certificate is in it" if isinstance(error, ssl.SSLError) else _why(error)
            raise Expected(f"a readable file of PEM certificates ({why})") from None
    raise Expected("the path of a file of PEM certificates")


def check_certificate(load: Callable[[], ssl.SSLContext]) -> None:
    """Calls `load`, and raises `Expected` for its errors about a certificate."""
    import ssl

    try:
        load()
    except ValueError:
        raise Expected("a private key without password", "nothing") from None
    except ssl.SSLError:
        raise Expected(
            "a certificate and its private key in PEM, in cert_file and key_file, that belong together", "nothing"
        ) from None
    except OSError as error:
        raise Expected(f"readable files in cert_file and key_file ({_why(error)})", "nothing") from None


ApiKeyFile = Annotated[KeyFile | None, OrNone(Value(_api_key_file, TEXT, write=attrgetter("path")))]

KeysFile = Annotated[DigestsFile | None, OrNone(Value(_digests_file, TEXT, write=attrgetter("path")))]

CAFile = Annotated[str | None, OrNone(Value(_ca_file, TEXT))]
