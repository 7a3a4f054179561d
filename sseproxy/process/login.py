"""Who may use the admin listener, where `admin.token` is set: programs with the token, and browsers with a session.

A browser cannot add the token to its requests. So its user logs in once, and the browser gets a cookie. The cookie has
the time until which it is valid, and a code (HMAC) that nobody can make without the token. So it stays valid after a
reload and a restart, and becomes invalid with another token.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from typing import Final

from aiohttp import hdrs, web

from ..wire.credentials import SESSION_COOKIE

# Seconds: a working day.
_SESSION: Final = 12 * 3600
_BEARER: Final = re.compile(r"bearer +([!-~]+) *", re.IGNORECASE)
_CODE: Final = re.compile(r"([0-9]{1,12})\.([0-9a-f]{64})")


def is_token(told: str, token: str) -> bool:
    """Whether `told` is the token. The time that this takes does not depend on either."""
    # Digests have the same length, and `compare_digest` tells lengths.
    ours, theirs = (hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest() for text in (token, told))
    return hmac.compare_digest(ours, theirs)


def _now() -> int:
    return int(time.time())  # noqa: TID251 - a point in time


def _code(token: str, until: int) -> str:
    return hmac.digest(token.encode(), b"admin session until %d" % until, "sha256").hex()


def session(token: str, now: int) -> str:
    """The value of a cookie that is valid for `_SESSION` seconds."""
    until = now + _SESSION
    return f"{until}.{_code(token, until)}"


def is_session(told: str, token: str, now: int) -> bool:
    """Whether `told` is the value of a cookie of this token that is still valid."""
    match = _CODE.fullmatch(told)
    return match is not None and hmac.compare_digest(match[2], _code(token, int(match[1]))) and int(match[1]) > now


def admits(request: web.Request, token: str) -> bool:
    """Whether `request` has the token, or a session."""
    fields = request.headers.getall(hdrs.AUTHORIZATION, [])
    if fields:
        match = _BEARER.fullmatch(fields[0])
        return len(fields) == 1 and match is not None and is_token(match[1], token)
    return is_session(request.cookies.get(SESSION_COOKIE, ""), token, _now())


def log_in(response: web.Response, token: str, *, secure: bool) -> None:
    """Sets the cookie. `secure`: it must not be sent without TLS."""
    response.set_cookie(
        SESSION_COOKIE,
        session(token, _now()),
        max_age=_SESSION,
        path="/",
        httponly=True,
        samesite="Strict",
        secure=secure,
    )
