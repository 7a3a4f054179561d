"""HTTP fields on their way through: what is hop-by-hop, what we say of ourselves.

Fields are the raw pairs that arrived, bytes for bytes, so that order, repetition, case and odd bytes survive.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Final

from ..errors import ProtocolError

Field = tuple[bytes, bytes]

# RFC 9110, section 7.6.1, and what older implementations treat alike. Framing is ours on each side; Expect is
# answered here.
_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# A client can claim anything in these; what we forward is what we saw ourselves.
_FORWARDING: Final = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"})
_CREDENTIALS: Final = frozenset({b"authorization", b"api-key", b"x-api-key", b"x-goog-api-key"})
# RFC 9110, section 7.6.3; the pseudonym tells no host name.
_VIA: Final = b"1.1 sseproxy"
_STREAM_POLICY: Final = frozenset({b"cache-control", b"x-accel-buffering"})

# RFC 9112, sections 2.2, 5.1 and 5.2: no bare CR or LF, no control characters, no folding.
_BROKEN_HEAD: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n)|\r\n[ \t]")
# RFC 9110, section 4.2.3: a name, an IPv4 or an IPv6 address, and a port; no user, no list, not empty.
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_TRACEPARENT: Final = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Fields:
    """The fields of a head: `all` of them as they came, and by name."""

    __slots__ = ("_by_name", "all")

    def __init__(self, fields: Sequence[Field]) -> None:
        self.all = fields
        self._by_name: dict[bytes, list[bytes]] = {}
        for name, value in fields:
            self._by_name.setdefault(name.lower(), []).append(value)

    def named(self, name: bytes) -> Sequence[bytes]:
        """The values of the field `name` (in lower case), in order."""
        return self._by_name.get(name, ())

    def tokens(self, name: bytes) -> list[bytes]:
        """The members of the comma-separated list in the field `name`, in lower case."""
        if name not in self._by_name:
            return []
        return [
            member
            for value in self._by_name[name]
            for token in value.split(b",")
            if (member := token.strip(b" \t").lower())
        ]


def _end_to_end(fields: Fields, dropped: Set[bytes]) -> list[Field]:
    drop = _HOP_BY_HOP.union(dropped, fields.tokens(b"connection"))
    return [field for field in fields.all if field[0].lower() not in drop]


def to_upstream(
    fields: Fields,
    *,
    host: bytes,
    framing: Sequence[Field],
    peer: bytes,
    trusted: bool,
    scheme: bytes,
    request_id: bytes,
    credential: Field | None,
    read: bool,
) -> list[Field]:
    """The fields of the request that goes upstream.

    `framing` announces the request's body, `peer` is the client's address; if it is `trusted`, what it says of where
    the request comes from is kept. With a `credential` none of the client's goes along. Where the response is to
    be `read`, no content coding is asked for.
    """
    said = {name: fields.named(name) if trusted else [] for name in _FORWARDING}
    dropped = {b"host", b"content-length", b"expect", b"x-request-id", b"x-forwarded-for"}
    dropped |= {name for name, values in said.items() if not values}
    if credential is not None:
        dropped |= {*_CREDENTIALS, credential[0].lower()}
    if read:
        dropped.add(b"accept-encoding")
    out = [(b"Host", host), *_end_to_end(fields, dropped)]
    if credential is not None:
        out.append(credential)
    if read:
        out.append((b"Accept-Encoding", b"identity"))
    if b"trailers" in fields.tokens(b"te"):
        out += [(b"TE", b"trailers"), (b"Connection", b"TE")]
    out += framing
    out.append((b"X-Forwarded-For", b", ".join([*said[b"x-forwarded-for"], peer])))
    if not said[b"x-forwarded-proto"]:
        out.append((b"X-Forwarded-Proto", scheme))
    if not said[b"x-forwarded-host"]:
        out += [(b"X-Forwarded-Host", value) for value in fields.named(b"host")]
    out += [
        (b"X-Request-Id", request_id),
        (b"Via", _VIA),
    ]
    return out


def to_downstream(
    fields: Fields, *, framing: Sequence[Field] | None, event_stream: bool, request_id: bytes, connection: bytes | None
) -> list[Field]:
    """The fields of the response that goes to the client.

    `framing` announces its body; None leaves a Content-Length as it came, which is right for HEAD and 304.
    """
    dropped: set[bytes] = set() if framing is None else {b"content-length"}
    if event_stream:
        dropped |= _STREAM_POLICY
    out = _end_to_end(fields, dropped)
    if event_stream:
        out += [(b"Cache-Control", b"no-cache, no-transform"), (b"X-Accel-Buffering", b"no")]
    if not any(name.lower() == b"x-request-id" for name, _ in out):
        out.append((b"X-Request-Id", request_id))
    out.append((b"Via", _VIA))
    out += framing or ()
    if connection is not None:
        out.append((b"Connection", connection))
    return out


def serialize(start_line: bytes, fields: Iterable[Field]) -> bytes:
    """A message head, with its blank line."""
    return b"".join((start_line, b"\r\n", *[b"%b: %b\r\n" % field for field in fields], b"\r\n"))


def passes(fields: Fields) -> int:
    """How often the message has come through an sseproxy already."""
    return fields.tokens(b"via").count(_VIA)


def check_request(version: tuple[int, int], fields: Fields) -> None:
    """Raises `ProtocolError` for fields that others could read in another way than we do.

    A transfer coding other than chunked, or in HTTP/1.0 (RFC 9112, sections 6.1 and 6.3); a Host that is missing, not
    the only one, or no host (section 3.2).
    """
    codings, hosts = fields.named(b"transfer-encoding"), fields.named(b"host")
    if codings and (fields.tokens(b"transfer-encoding") != [b"chunked"] or version == (1, 0)):
        raise ProtocolError("the transfer coding is not chunked")
    if len(hosts) > 1 or (not hosts and version != (1, 0)) or not all(map(_HOST.fullmatch, hosts)):
        raise ProtocolError("there is not one valid Host")


def check_head(head: bytes) -> None:
    """Refuses a response head that parsers may read in more than one way. Raises `ProtocolError`."""
    if _BROKEN_HEAD.search(head) is not None:
        raise ProtocolError("the response head has a bare CR or LF, a control character or a folded line")


def _has_type(fields: Fields, media_type: bytes) -> bool:
    return media_type in [value.split(b";")[0].strip().lower() for value in fields.named(b"content-type")]


def is_event_stream(fields: Fields) -> bool:
    return _has_type(fields, b"text/event-stream")


def is_json(fields: Fields) -> bool:
    return _has_type(fields, b"application/json")


def is_encoded(fields: Fields) -> bool:
    """True if the body is compressed, and so cannot be read in passing."""
    return not {b"identity"}.issuperset(fields.tokens(b"content-encoding"))


def client_address(fields: Fields, peer: str, trusts: Callable[[str], bool]) -> str:
    """Where a request comes from: `peer`, or whom those say that `trusts` believes, the nearest that it does not.

    https://developer.mozilla.org/en-US/docs/Web/HTTP/Reference/Headers/X-Forwarded-For, "Trusted proxy list"
    """
    hops = [hop.strip().decode("latin-1") for value in fields.named(b"x-forwarded-for") for hop in value.split(b",")]
    address = peer
    while hops and trusts(address):
        hop = _address(hops.pop())
        if hop is None:
            break
        address = hop
    return address


def _address(hop: str) -> str | None:
    """The address in a member of X-Forwarded-For, which may have a port."""
    for text in (hop, hop.rpartition(":")[0]):
        try:
            return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
        except ValueError:
            continue
    return None


def traceparent(fields: Fields) -> str | None:
    """The trace that the request is part of, if it is told in order (https://www.w3.org/TR/trace-context/)."""
    found = fields.named(b"traceparent")
    return found[0].decode() if len(found) == 1 and _TRACEPARENT.fullmatch(found[0]) else None


def request_id(fields: Fields) -> bytes | None:
    """The client's own id for the request, if it is harmless enough to be logged and sent on."""
    ids = fields.named(b"x-request-id")
    return ids[0] if len(ids) == 1 and _REQUEST_ID.fullmatch(ids[0]) else None
