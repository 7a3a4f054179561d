"""Finds the route of a request, and its path at the upstream.

A path is forwarded byte for byte as it was received. It is matched in its normal form, in which characters that need no
encoding are decoded, because the upstream may read it like that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from ..errors import RequestError
from ..wire.target import split_target
from .globs import within

if TYPE_CHECKING:
    from ..config import Route

OTHER: Final = "other"
"""The label of models that no glob in `metrics.models` matches."""

METHODS: Final = frozenset(
    """
    ACL BIND CHECKOUT CONNECT COPY DELETE GET HEAD LINK LOCK M-SEARCH MERGE MKACTIVITY MKCALENDAR MKCOL MOVE NOTIFY
    OPTIONS PATCH POST PROPFIND PROPPATCH PURGE PUT QUERY REBIND REPORT SEARCH SOURCE SUBSCRIBE TRACE UNBIND UNLINK
    UNLOCK UNSUBSCRIBE
    """.split()
)
"""The methods that aiohttp's parser knows; it refuses a request with any other."""
# TRACE returns the request that was sent, with the upstream's API key (RFC 9110, section 9.3.8). TRACK is the same in
# IIS. CONNECT would open a tunnel to any host.
_REFUSED_METHODS: Final = frozenset({"CONNECT", "TRACE", "TRACK"})
# Characters of the client's text, and number of routes, in an error message.
_MAX_SAID: Final = 100
_MAX_NAMED: Final = 8
_ENCODED: Final = re.compile("%[0-9A-Fa-f]{2}")
# RFC 3986, section 2.3.
_UNRESERVED: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def check_method(method: str) -> None:
    """Raises `RequestError` for a method that is never forwarded, in upper or lower case."""
    if method.upper() in _REFUSED_METHODS:
        raise RequestError("method")


def normal_path(path: str) -> str:
    """`path` in its normal form (RFC 3986, section 6.2.2): unreserved characters decoded, hexadecimal in upper case."""
    return _ENCODED.sub(_normal_triplet, path) if "%" in path else path


def _normal_triplet(match: re.Match[str]) -> str:
    character = chr(int(match[0][1:], 16))
    return character if character in _UNRESERVED else match[0].upper()


def _length(path: str, normal_length: int) -> int:
    """How many characters of `path` correspond to the first `normal_length` characters of its normal form."""
    if "%" not in path:
        return normal_length
    at = 0
    while normal_length > 0:
        encoded = _ENCODED.match(path, at)
        at = encoded.end() if encoded else at + 1
        normal_length -= len(_normal_triplet(encoded)) if encoded else 1
    return at


def _prefix(route: Route) -> str:
    return normal_path(route.match.path).rstrip("/")


def said(name: str) -> str:
    """Text from a client, shortened, and without control characters."""
    return "".join(character if character.isprintable() else "?" for character in name[:_MAX_SAID])


def some(names: Iterable[str]) -> str:
    """The first few of `names`, each once, as text."""
    found = list(dict.fromkeys(names))
    return ", ".join(found[:_MAX_NAMED]) + (f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else "")


def _in_order(routes: Iterable[Route]) -> list[tuple[str, Route]]:
    """Prefixes and routes, in the order in which they are tried: longest prefix first, with a model before without."""
    return sorted(((_prefix(route), route) for route in routes), key=lambda one: (-len(one[0]), not one[1].match.model))


class Router:
    """Tries the routes in this order: the longest prefix first; with the same prefix, routes with a model first."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = [(prefix, prefix + "/", route) for prefix, route in _in_order(routes)]

    def no_route(self, method: str, path: str, model: str | None) -> RequestError:
        """The error for a request without a route. Its text says what was requested and which routes there are."""
        on_path = [route for prefix, above, route in self._routes if path == prefix or path.startswith(above)]
        models = some(glob for route in on_path for glob in route.match.model)
        if any(route.match.methods and method not in route.match.methods for route in on_path):
            methods = some(name for route in on_path for name in route.match.methods)
            return RequestError(
                "no_route", f"No route for {said(method)} {said(path)}; there are routes for {methods}."
            )
        if models:
            named = "No route for a request without a model" if model is None else f"No route for model '{said(model)}'"
            return RequestError("no_route", f"{named}; there are routes for {models}.")
        paths = some(route.match.path for _, _, route in reversed(self._routes))
        return RequestError("no_route", f"No route for {said(method)} {said(path)}; there are routes for {paths}.")

    def candidates(self, method: str, path: str) -> Sequence[Route]:
        """The routes that match `method` and `path`, the best one first, up to the first one that matches any model.

        If one of them has models, `choose` needs the model of the request.
        """
        path = normal_path(path)
        found: list[Route] = []
        for prefix, above, route in self._routes:
            match = route.match
            if (path == prefix or path.startswith(above)) and (not match.methods or method in match.methods):
                found.append(route)
                if not match.model:
                    break
        return found


def unreachable(routes: Sequence[Route]) -> list[tuple[Route, str]]:
    """Those of `routes` that no request can take, and a sentence that says why. They are mistakes, but do no harm.

    A request for the prefix of a route, and nothing below it, takes no route with a longer one. So only routes with the
    same prefix can keep all requests from it.
    """
    found: dict[str, str] = {}
    before: dict[str, list[Route]] = {}
    for prefix, route in _in_order(routes):
        earlier = before.setdefault(prefix, [])
        found[route.name] = _why_unreachable(route, earlier)
        earlier.append(route)
    return [(route, f"no request can take this route: {why}") for route in routes if (why := found[route.name])]


def _why_unreachable(route: Route, earlier: Sequence[Route]) -> str:
    """Why no request takes `route`, which is tried after those that are `earlier` and have its prefix; or empty."""
    match = route.match
    try:
        split_target(match.path)
    except RequestError:
        return "requests for paths with dot segments or control characters are refused"
    methods = METHODS.intersection(match.methods or METHODS) - _REFUSED_METHODS
    if not methods:
        return f"{some(match.methods)} requests are refused"
    if match.model and all(within(glob, ()) for glob in match.model):
        return f"no model matches {some(match.model)}"

    # Methods that no route names are all alike.
    named = {method for one in earlier for method in one.match.methods}
    methods = methods & named | set(sorted(methods - named)[:1])

    def take_all(routes: Sequence[Route]) -> bool:
        return all(
            _take_all_models([one for one in routes if not one.match.methods or method in one.match.methods], route)
            for method in methods
        )

    if not take_all(earlier):
        return ""
    alone = next(([one] for one in earlier if take_all([one])), earlier)
    names = some(one.name for one in alone)
    return f"{names} take{'s'[: len(alone) == 1]} its requests; give it a higher place in the list, or remove it"


def _take_all_models(routes: Sequence[Route], route: Route) -> bool:
    """Whether each model that `route` takes, and none where it takes any, is taken by one of `routes`."""
    if any(not one.match.model for one in routes):
        return True
    globs = [glob for one in routes for glob in one.match.model]
    return bool(route.match.model) and all(within(glob, globs) for glob in route.match.model)


def choose(candidates: Sequence[Route], model: str | None) -> Route | None:
    """The first of `candidates` that matches `model`, or None."""
    for route in candidates:
        globs = route.match.model
        if not globs or (model is not None and any(fnmatchcase(model, glob) for glob in globs)):
            return route
    return None


def model_label(globs: Sequence[str], model: str | None) -> str:
    """The first of `globs` that matches `model`, or `other`. So clients cannot create labels."""
    return next((glob for glob in globs if model is not None and fnmatchcase(model, glob)), OTHER)


def upstream_path(route: Route, base_path: str, path: str) -> str:
    """`path` with the route's prefix, in whatever spelling, replaced by the path of the upstream's URL."""
    return base_path + path[_length(path, len(_prefix(route))) :] or "/"


def client_path(route: Route, base_path: str, path: str) -> str | None:
    """The path that `upstream_path` makes `path` of the upstream from; None if there is none."""
    base = normal_path(base_path)
    if not (normal_path(path) + "/").startswith(base + "/"):
        return None
    here = _prefix(route) + path[_length(path, len(base)) :]
    # Two slashes would begin a host, and browsers take a backslash for a slash.
    return None if here[1:2] in ("/", "\\") else here or "/"
