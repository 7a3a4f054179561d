"""The target of a request (RFC 9112, section 3.2): its path and its query.

A path that an upstream could resolve to another one, with dot segments in any spelling, is refused.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote

from ..errors import RequestError

ABSOLUTE: Final = re.compile(r"(https?)://([^/?#]*)", re.IGNORECASE)
"""The scheme and the authority of a target in absolute form."""
# Unicode's category Cc. All other characters occur in names of files.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f]")
# ASCII in more bytes than it has in UTF-8 (RFC 3629, section 10); what is no UTF-8 stands here as Python escapes it.
_OVERLONG: Final = re.compile("[\udcc0\udcc1][\udc80-\udcbf]|\udce0[\udc80\udc81]|\udcf0\udc80[\udc80\udc81]")


def split_target(target: str) -> tuple[str, str]:
    """The path and the query (with its `?`, or empty) of a request target.

    The authority of a target in absolute form (RFC 9112, section 3.2.2) is dropped: it does not select the upstream.
    Raises `RequestError` for anything that is not a plain path.
    """
    if not target.startswith("/"):
        absolute = ABSOLUTE.match(target)
        if absolute is None:
            raise RequestError("bad_target")
        target = target[absolute.end() :]
        if not target.startswith("/"):
            target = "/" + target
    path, mark, query = target.partition("?")
    if "#" in target:
        raise RequestError("bad_target")
    decoded = unquote(path, errors="surrogateescape").replace("\\", "/")
    if (not decoded.isprintable() and (_CONTROL.search(decoded) or _OVERLONG.search(decoded))) or (
        "/." in decoded and any(segment.partition(";")[0] in (".", "..") for segment in decoded.split("/"))
    ):
        raise RequestError("bad_target")
    return path, mark + query


def without_host(target: str) -> str:
    """What may be told of a target that is no path: the path and the query of one in absolute form, or a `*`."""
    absolute = ABSOLUTE.match(target)
    return target if target == "*" else "" if absolute is None else target[absolute.end() :]


def is_for_the_server(target: str) -> bool:
    """Whether an OPTIONS request with this target asks about the server, not about a resource (RFC 9112, 3.2.4)."""
    return target == "*" or (target[0] != "/" and ABSOLUTE.fullmatch(target) is not None)
