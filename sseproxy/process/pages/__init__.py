"""The pages of the admin listener. Each is sent as one file that needs nothing else. They are read at the start.

`base.css` has the colors, and is in the style of each page.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from aiohttp import hdrs, web


class Page:
    """A page from the file `name`. Its style and script are the only ones that a browser runs in it.

    Content-Security-Policy (https://www.w3.org/TR/CSP3/) names them by their digests. Nothing is loaded from elsewhere,
    no other page may frame this one, and no script may turn text into HTML (Trusted Types).
    """

    def __init__(self, name: str) -> None:
        self._text = _read(name).replace("{{base}}", _read("base.css"))
        policy = [
            "default-src 'none'",
            *(f"{kind}-src {' '.join(_digests(kind, self._text))}" for kind in ("script", "style")),
            "img-src data:",
            "connect-src 'self'",
            "form-action 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
        self._fields = {
            "Content-Security-Policy": "; ".join(policy),
            "X-Content-Type-Options": "nosniff",
            # With `no-referrer`, a form would be sent with `Origin: null`, as from another site.
            "Referrer-Policy": "same-origin",
            hdrs.CACHE_CONTROL: "no-store",
            hdrs.VARY: f"{hdrs.ACCEPT}, {hdrs.COOKIE}",
        }

    def response(self, status: int = 200, **values: str) -> web.Response:
        """The page, with `values` for its placeholders, such as `{{name}}`. They are text of ours, not of others."""
        text = self._text
        for name, value in values.items():
            text = text.replace(f"{{{{{name}}}}}", value)
        return web.Response(status=status, text=text, content_type="text/html", headers=self._fields)


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _digests(element: str, text: str) -> Iterator[str]:
    found = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    for content in found:
        yield f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    if not found:
        yield "'none'"


INDEX: Final = Page("index.html")
LIVE: Final = Page("live.html")
LOGIN: Final = Page("login.html")
