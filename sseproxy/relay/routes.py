"""Which route a request takes, and where it goes from there.

The one policy of paths: what is matched is what is forwarded, byte for byte. A path that an upstream could resolve to
something else than it looks like, dot segments in any spelling, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import unquote

from ..config import Route
from ..errors import RequestError

OTHER: Final = "other"
"""The label of the models that the configuration does not name."""

_ABSOLUTE: Final = re.compile(r"https?://[^/?#]*", re.IGNORECASE)


def split_target(target: str) -> tuple[str, str]:
    """The path and the query (with its `?`, or empty) of a request target.

    The authority of an absolute-form target (RFC 9112, section 3.2.2) is dropped: it never picks the upstream.
    Raises `RequestError` for anything that is not a plain path.
    """
    if not target.startswith("/"):
        absolute = _ABSOLUTE.match(target)
        if absolute is None:
            raise RequestError("bad_target")
        target = target[absolute.end() :]
        if not target.startswith("/"):
            target = "/" + target
    path, mark, query = target.partition("?")
    if "#" in target:
        raise RequestError("bad_target")
    decoded = unquote(path, errors="surrogateescape").replace("\\", "/")
    if not decoded.isprintable() or (
        "/." in decoded and any(segment.partition(";")[0] in (".", "..") for segment in decoded.split("/"))
    ):
        raise RequestError("bad_target")
    return path, mark + query


def _prefix(route: Route) -> str:
    return route.match.path.rstrip("/")


class Router:
    """The routes, in the order in which they are tried: longest prefix first, with a model before without."""

    def __init__(self, routes: Iterable[Route]) -> None:
        ordered = sorted(routes, key=lambda route: (-len(_prefix(route)), not route.match.model))
        self._routes = [(_prefix(route), _prefix(route) + "/", route) for route in ordered]

    def candidates(self, method: str, path: str) -> Sequence[Route]:
        """The routes for `path`, best first; which one it is may still depend on the request's model."""
        return [
            route
            for prefix, above, route in self._routes
            if (path == prefix or path.startswith(above)) and (not route.match.methods or method in route.match.methods)
        ]


def choose(candidates: Sequence[Route], model: str | None) -> Route:
    """The first of `candidates` that takes `model`. Raises `RequestError` if none does."""
    for route in candidates:
        globs = route.match.model
        if not globs or (model is not None and any(fnmatchcase(model, glob) for glob in globs)):
            return route
    raise RequestError("no_route")


def model_label(globs: Sequence[str], model: str | None) -> str:
    """The first of `globs` that takes `model`, or `other`: clients name models, the configuration names labels."""
    return next((glob for glob in globs if model is not None and fnmatchcase(model, glob)), OTHER)


def upstream_path(route: Route, base_path: str, path: str) -> str:
    """`path` with the route's prefix replaced by the upstream's."""
    return base_path + path[len(_prefix(route)) :] or "/"
