"""The keys of clients: what one looks like, where the SDKs of each API put it, and how it is removed from a request."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, unquote_to_bytes

if TYPE_CHECKING:
    from .headers import Fields

CREDENTIALS: Final = frozenset({b"authorization", b"api-key", b"x-api-key", b"x-goog-api-key"})
"""The fields that hold a key, in lower case: of OpenAI and Anthropic, of Azure, of Anthropic, and of Google."""
SESSION_COOKIE: Final = "sseproxy_admin"
"""The cookie of an operator who has logged in to the admin listener. Browsers send it to all ports of a host."""
_SESSION: Final = re.compile(rb"(?:^|;)[ \t]*%b=[^;]*" % SESSION_COOKIE.encode())
# Parameters of a query that hold a key or a token: Google's, and RFC 6750, section 2.3.
_PARAMETERS: Final = frozenset({"key", "$key", "access_token"})
_SEPARATOR: Final = re.compile("([&;])")

# GitHub's advice for keys: a prefix by which scanners find one, and no character at which a double click ends.
# https://github.blog/engineering/behind-githubs-new-authentication-token-formats/
_ALPHABET: Final = string.digits + string.ascii_letters
# 43 characters of 62 have 256 bits. The public part has 71, so two keys never share it.
_PUBLIC, _SECRET = 12, 43
_PREFIX: Final = "sseproxy_"
_KEY: Final = re.compile(rb"(%b[0-9A-Za-z]{%d})_[0-9A-Za-z]{%d}" % (_PREFIX.encode(), _PUBLIC, _SECRET))


def new_key() -> str:
    """A new random key, `sseproxy_PUBLIC_SECRET`. Logs may name what is before the secret."""
    public, secret = ("".join(secrets.choice(_ALPHABET) for _ in range(size)) for size in (_PUBLIC, _SECRET))
    return f"{_PREFIX}{public}_{secret}"


def public_part(key: bytes) -> str | None:
    """What logs may name of `key`. None unless it has the form of a key that sseproxy has made."""
    found = _KEY.fullmatch(key)
    return found[1].decode() if found else None


def has_secret(text: bytes) -> bool:
    """Whether a key that sseproxy has made is in `text`."""
    return _KEY.search(text) is not None


def without_secrets(text: str) -> str:
    """`text` with only the public part of each key that sseproxy has made: clients also put them where none belongs."""
    if _PREFIX not in text:
        return text
    return _KEY.sub(rb"\1", text.encode(errors="surrogatepass")).decode(errors="surrogatepass")


def digest(key: bytes) -> bytes:
    """What is stored of a key. Keys are random, so nobody can try them out, and a fast digest is enough."""
    return sha256(key).digest()


def without_session(fields: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """`fields` without the session of the admin listener, which is nobody else's business."""
    for name, value in fields:
        if name.lower() != b"cookie" or not _SESSION.search(value):
            yield name, value
        elif left := _SESSION.sub(b"", value).lstrip(b"; \t"):
            yield name, left


def keys_in(fields: Fields, query: str) -> list[bytes]:
    """The keys in a request, each as often as it is there. `query` begins with its `?`, or is empty.

    A key is in `Authorization: Bearer` (RFC 6750, section 2.1), in another field of `CREDENTIALS`, or in a parameter of
    the query.
    """
    found: list[bytes] = []
    for name in CREDENTIALS & fields.by_name.keys():
        for value in fields.by_name[name]:
            key = value
            if name == b"authorization":
                scheme, _, key = value.partition(b" ")
                if scheme.lower() != b"bearer":
                    continue
            if key := key.strip(b" \t"):
                found.append(key)
    if query and _may_have_key(query):
        told = [
            unquote_to_bytes(part.partition("=")[2].encode(errors="surrogateescape"))
            for part in _SEPARATOR.split(query[1:])[::2]
            if _is_key(part)
        ]
        found += filter(None, told)
    return found


def _may_have_key(query: str) -> bool:
    return "%" in query or any(name in query.lower() for name in _PARAMETERS)


def _is_key(parameter: str) -> bool:
    return unquote(parameter.partition("=")[0]).lower() in _PARAMETERS


def without_key(query: str, other: bytes | None = None) -> str:
    """`query` (with its `?`, or empty) without the client's key. All other bytes stay.

    The name of a parameter is found in any spelling, and whether it is separated by `&` or by `;`, because some servers
    split a query at both. A separator beside the parameter is removed, too: a `;` rather than a `&`. If the key is
    `other`, parameters of any name that have it in their value are removed as well.
    """
    if not query or (other is None and not _may_have_key(query)):
        return query
    kept: list[str] = []
    between = ""
    for index, part in enumerate(_SEPARATOR.split(query[1:])):
        if index % 2:
            between += part
        elif not _is_key(part) and not (other is not None and has_key(part, other)):
            kept += ["&" if "&" in between else between[:1], part] if kept else ["?", part]
            between = ""
    return "".join(kept)


def has(text: bytes, key: bytes) -> bool:
    """Whether `text` has `key` in it. The operator `in` of bytes takes many times as long: it tries a number first."""
    return text.find(key) >= 0


def has_key(text: str, key: bytes) -> bool:
    """Whether a path or a part of a query has `key` in it, in any spelling."""
    if not text:
        return False
    spelled = text.encode(errors="surrogateescape")
    return has(unquote_to_bytes(spelled) if "%" in text else spelled, key)


def is_astray(key: bytes, expected: int, fields: Fields, target: bytes) -> bool:
    """Whether `key` may be in a head more often than in the `expected` places, which `keys_in` has found.

    This is exact if nothing in the `target` is percent-encoded.
    """
    return b"\n".join((target, *chain.from_iterable(fields.all))).count(key) != expected


def strays(fields: Fields, key: bytes) -> set[bytes]:
    """The names of fields that have `key` in their value and are not known to hold one."""
    return {name.lower() for name, value in fields.all if has(value, key)} - CREDENTIALS
