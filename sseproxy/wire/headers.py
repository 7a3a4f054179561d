"""HTTP header fields that pass through: which are hop-by-hop, and which ones sseproxy adds.

Fields are pairs of raw bytes, as they were received. So their order, repetition, case and unusual bytes are kept.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from operator import methodcaller
from typing import Final, Literal

from ..errors import ProtocolError
from .credentials import CREDENTIALS, has_secret, without_session
from .target import ABSOLUTE

Field = tuple[bytes, bytes]

BodyKind = Literal["events", "json", "open", "other"]
"""The Content-Type of a body. `open` is one that does not say much: none, text, or bytes."""

# Hop-by-hop fields: RFC 9110, section 7.6.1, and fields that older implementations treat in the same way. sseproxy sets
# the framing on each side itself, and answers Expect itself.
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
# Fields of a request that sseproxy sets itself, in addition.
_REPLACED: Final = _HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"expect",
    b"x-request-id",
    b"x-forwarded-for",
    b"forwarded",
}
# Fields that tell the upstream where a request comes from. sseproxy adds its own values after those of a trusted proxy.
_FORWARDING: Final = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"})
# Fields that a server may trust about the client's identity, its address, or the original URL. Only a proxy in front of
# sseproxy may set them, so they are removed from the requests of clients that are not trusted.
# Families of fields, by the beginning of their names:
_PROXY_ONLY_FAMILIES: Final = (
    b"x-forwarded-",  # For, Host, Proto, Port, Prefix, Ssl, User, Client-Cert: all proxies; Spring, Rack, Django
    b"x-envoy-",  # what Envoy removes from external requests
    b"x-original-",  # URL, Host, Forwarded-For, Remote-Addr: IIS, ingress-nginx, Azure
    b"x-remote-",  # User, Group, Extra-: Kubernetes' authenticating proxy
    b"x-auth-request-",  # User, Email, Groups: oauth2-proxy
    b"remote-",  # User, Groups, Email: Authelia
    b"ssl-client-",  # Cert, Verify, Subject-Dn: ingress-nginx
    b"x-ssl-client-",  # the same, as nginx and HAProxy are usually configured
    b"x-client-cert",
    b"x-amzn-mtls-",  # AWS, of client certificates
    b"x-amzn-oidc-",
    b"x-goog-authenticated-user-",  # Google's Identity-Aware Proxy
    b"cf-access-authenticated-",  # Cloudflare Access
    b"tailscale-user-",
)
# Single fields:
_PROXY_ONLY: Final = frozenset(
    {
        b"forwarded",
        b"x-forwarded",
        b"x-real-ip",  # nginx, Traefik
        b"client-ip",
        b"x-client-ip",
        b"x-cluster-client-ip",
        b"true-client-ip",  # Akamai, Cloudflare
        b"cf-connecting-ip",
        b"cf-connecting-ipv6",
        b"cf-pseudo-ipv4",
        b"fastly-client-ip",
        b"fly-client-ip",
        b"x-appengine-user-ip",
        b"x-azure-clientip",
        b"x-azure-socketip",
        b"client-cert",  # RFC 9440
        b"client-cert-chain",
        b"x-scheme",  # ingress-nginx
        b"x-url-scheme",
        b"front-end-https",  # Microsoft
        b"x-rewrite-url",  # IIS
        b"script-name",  # gunicorn
        b"path-info",
    }
)
# To servers that pass fields as variables (CGI, RFC 3875, section 4.1.18, and WSGI), - and _ are the same.
_FOLDED: Final = bytes(range(256)).lower().replace(b"_", b"-")
# RFC 9110, section 7.6.3: the version of the message that was received. A pseudonym is used, so no host name is
# disclosed.
_VIA: Final = {(1, 0): b"1.0 sseproxy", (1, 1): b"1.1 sseproxy"}
# A larger Max-Forwards is lowered to this. No chain of proxies is as long.
_MAX_FORWARDS: Final = 255
# Whether a field tells a client its limits: OpenAI's and Anthropic's.
_TELLS_LIMIT: Final = methodcaller("startswith", (b"x-ratelimit-", b"anthropic-ratelimit-"))
_STREAM_POLICY: Final = frozenset({b"cache-control", b"x-accel-buffering"})
# What of a request is not forwarded, by whether the client's credentials are, and whether the response is inspected.
_NOT_UP: Final = {
    (credentials, inspect): _REPLACED.union(
        () if credentials else CREDENTIALS, (b"accept-encoding",) if inspect else ()
    )
    for credentials in (False, True)
    for inspect in (False, True)
}
# What of a response is not forwarded, by whether its length is set here, and whether it is an event stream.
_NOT_DOWN: Final = {
    (framed, event_stream): _HOP_BY_HOP.union(
        (b"content-length",) if framed else (), _STREAM_POLICY if event_stream else ()
    )
    for framed in (False, True)
    for event_stream in (False, True)
}

# RFC 9112, sections 2.2, 4, 5.1 and 5.2: a status line, then lines with a name and a colon, with no space between them.
# No bare CR or LF, no control characters, no folded lines. The quantifiers are possessive, so there is no backtracking,
# and a head that does not match costs hardly more than one that does.
_HEAD: Final = re.compile(
    rb"(?:[\t\x20-\x7e\x80-\xff]++\r\n)(?:[\x21-\x39\x3b-\x7e]++:[\t\x20-\x7e\x80-\xff]*+\r\n)*\r\n"
)
# RFC 9110, section 4.2.3: a name, an IPv4 or an IPv6 address, and a port. No user, no list, not empty.
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_TRACEPARENT: Final = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
# RFC 7239, section 4: a value that is not a token is quoted.
_TOKEN: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
# How many hops of X-Forwarded-For are read, from the nearest on. No chain of trusted proxies is longer, but a client
# can write thousands.
_MAX_HOPS: Final = 32
# Bytes of one hop. An IPv6 address with brackets, a scope and a port is shorter.
_MAX_HOP: Final = 128
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# The upstream's id of a request, in the fields of OpenAI, Anthropic, Azure and Amazon. The first one counts.
_UPSTREAM_IDS: Final = (b"x-request-id", b"request-id", b"apim-request-id", b"x-amzn-requestid")


class Fields:
    """The fields of a head: `all` has them as they were received; methods find them by name, in lower case."""

    __slots__ = ("all", "by_name")

    def __init__(self, fields: Sequence[Field]) -> None:
        self.all = fields
        self.by_name: dict[bytes, list[bytes]] = {}
        for name, value in fields:
            self.by_name.setdefault(name.lower(), []).append(value)

    def named(self, name: bytes) -> Sequence[bytes]:
        """The values of the field `name` (in lower case), in order."""
        return self.by_name.get(name, ())

    def without(self, names: Collection[bytes]) -> Fields:
        """These fields without those called `names` (in lower case)."""
        return Fields([field for field in self.all if field[0].lower() not in names])

    def with_only(self, name: bytes, value: bytes) -> Fields:
        """These fields with one field `name`, which has this `value`, before all others."""
        return Fields([(name, value), *[field for field in self.all if field[0].lower() != name.lower()]])

    def tokens(self, name: bytes) -> list[bytes]:
        """The members of the comma-separated list in the field `name`, in lower case."""
        if name not in self.by_name:
            return []
        return [
            member
            for value in self.by_name[name]
            for token in value.split(b",")
            if (member := token.strip(b" \t").lower())
        ]


def credential(name: str, key: str) -> Field:
    """The field `name` with an API key. Authorization gets `Bearer` and the key (RFC 6750, section 2.1)."""
    return name.encode(), (f"Bearer {key}" if name.lower() == "authorization" else key).encode()


def to_upstream(
    fields: Fields,
    *,
    version: tuple[int, int],
    host: bytes,
    framing: Sequence[Field],
    peer: bytes,
    trusted: bool,
    scheme: bytes,
    request_id: bytes,
    credentials: bool,
    credential: Field | None,
    inspect: bool,
) -> list[Field]:
    """The fields of the request to the upstream. The client's request came in `version`.

    `framing` has the fields for the request's body. `peer` is the client's address, or `unknown`; if it is `trusted`,
    its forwarding fields are kept. Without `credentials`, all credentials of the client are dropped; a `credential` is
    sent instead. With `inspect`, no content coding is requested, because a compressed response cannot be inspected.

    A field is also dropped if its name is spelled with `_`. Fields that only a proxy may set are dropped in this
    spelling even if the client is trusted: a proxy in front that removes them from its clients' requests may not know
    this spelling.
    """
    said = {name: values for name in _FORWARDING if (values := fields.named(name))} if trusted else {}
    drop = _NOT_UP[credentials, inspect]
    named = [] if credential is None else [credential[0]]
    if b"connection" in fields.by_name:
        named += fields.tokens(b"connection")
    if named:
        drop = drop.union([name.translate(_FOLDED) for name in named])
    out = [(b"Host", host)]
    for field in fields.all if b"cookie" not in fields.by_name else without_session(fields.all):
        name = field[0].translate(_FOLDED)
        if name in drop:
            continue
        if name in _PROXY_ONLY or name.startswith(_PROXY_ONLY_FAMILIES):
            if not trusted or b"_" in field[0]:
                continue
        out.append(field)
    if credential is not None:
        out.append(credential)
    if inspect:
        out.append((b"Accept-Encoding", b"identity"))
    out += framing
    if b"forwarded" in said:
        ours = forwarded_element(peer, fields.named(b"host"), scheme)
        out.append((b"Forwarded", b", ".join([*said[b"forwarded"], ours])))
    out.append((b"X-Forwarded-For", b", ".join([*said.get(b"x-forwarded-for", ()), peer])))
    if b"x-forwarded-proto" not in said:
        out.append((b"X-Forwarded-Proto", scheme))
    if b"x-forwarded-host" not in said:
        out += [(b"X-Forwarded-Host", value) for value in fields.named(b"host")]
    out += [
        (b"X-Request-Id", request_id),
        (b"Via", _VIA[version]),
    ]
    return out


def forwarded_element(peer: bytes, host: Sequence[bytes], scheme: bytes) -> bytes:
    """The element that sseproxy adds to `Forwarded` (RFC 7239, section 4): a request from `peer`, to `host` if known.

    `peer` is an address or `unknown`, with or without a port. An IPv6 address with a port has brackets.
    """
    if peer.count(b":") > 1 and not peer.startswith(b"["):
        peer = b"[%b]" % peer
    pairs = [(b"for", peer), *[(b"host", value) for value in host], (b"proto", scheme)]
    return b";".join(b"%b=%b" % (name, value if _TOKEN.fullmatch(value) else _quoted(value)) for name, value in pairs)


def _quoted(text: bytes) -> bytes:
    """A quoted-string (RFC 9110, section 5.6.4)."""
    return b'"%b"' % text.replace(b"\\", b"\\\\").replace(b'"', b'\\"')


def to_downstream(
    fields: Fields,
    *,
    version: tuple[int, int],
    framing: Sequence[Field] | None,
    event_stream: bool,
    request_id: bytes,
    connection: bytes | None,
    date: bytes | None,
    allowances: Sequence[Field] | None = None,
) -> list[Field]:
    """The fields of the response to the client. The upstream's response came in `version`.

    `allowances` tell the client its own limits; they replace those of the upstream. `framing` has the fields for its
    body. None leaves a Content-Length unchanged, as needed for HEAD and 304. A response without a Date gets `date`,
    unless that is None (RFC 9110, section 6.6.1).
    """
    drop = _NOT_DOWN[framing is not None, event_stream]
    if b"connection" in fields.by_name:
        drop = drop.union(fields.tokens(b"connection"))
    if allowances is not None:
        drop = drop.union(filter(_TELLS_LIMIT, fields.by_name))
    out = [field for field in fields.all if field[0].lower() not in drop]
    if allowances is not None:
        out += allowances
    if event_stream:
        out += [(b"Cache-Control", b"no-cache, no-transform"), (b"X-Accel-Buffering", b"no")]
    if date is not None and (b"date" not in fields.by_name or b"date" in drop):
        out.append((b"Date", date))
    if b"x-request-id" not in fields.by_name or b"x-request-id" in drop:
        out.append((b"X-Request-Id", request_id))
    out.append((b"Via", _VIA[version]))
    out += framing or ()
    if connection is not None:
        out.append((b"Connection", connection))
    return out


def serialize(start_line: bytes, fields: Iterable[Field]) -> bytes:
    """A message head, with the blank line at its end."""
    return b"\r\n".join((start_line, *map(b": ".join, fields), b"\r\n"))


def passes(fields: Fields) -> int:
    """How often the message has already passed through an sseproxy."""
    members = fields.tokens(b"via")
    return members.count(_VIA[1, 0]) + members.count(_VIA[1, 1])


def one_hop_less(fields: Fields) -> Fields | None:
    """`fields` with Max-Forwards lowered by one (RFC 9110, section 7.6.2), or None if it is 0.

    Raises `ProtocolError` if it is not one number.
    """
    values = fields.named(b"max-forwards")
    if not values:
        return fields
    if len(values) > 1 or not values[0].isdigit():
        raise ProtocolError("Max-Forwards is not one number")
    digits = values[0].lstrip(b"0")
    if not digits:
        return None
    # Python refuses to parse numbers of thousands of digits.
    left = int(digits) - 1 if len(digits) <= len(str(_MAX_FORWARDS)) else _MAX_FORWARDS
    return fields.with_only(b"Max-Forwards", b"%d" % min(left, _MAX_FORWARDS))


def check_request(version: tuple[int, int], target: str, fields: Fields) -> Fields:
    """Returns the fields of a request. With a target in absolute form, its host replaces Host (RFC 9112, 3.2.2).

    Raises `ProtocolError` for fields that other parsers may read differently: a transfer coding other than chunked, or
    any in HTTP/1.0 (sections 6.1 and 6.3); a Host that is missing, repeated or not valid (section 3.2); and a target
    without a host, or with a user (RFC 9110, sections 4.2.1 and 4.2.4).
    """
    codings, hosts = fields.named(b"transfer-encoding"), fields.named(b"host")
    if codings and (fields.tokens(b"transfer-encoding") != [b"chunked"] or version == (1, 0)):
        raise ProtocolError("the transfer coding is not chunked")
    if len(hosts) > 1 or (not hosts and version != (1, 0)) or not all(map(_HOST.fullmatch, hosts)):
        raise ProtocolError("there is not one valid Host")
    absolute = None if target[0] == "/" else ABSOLUTE.match(target)
    if absolute is None:
        return fields
    host = absolute[2].encode("ascii", "replace")
    if _HOST.fullmatch(host) is None:
        raise ProtocolError("the target has no valid host")
    return fields.with_only(b"Host", host)


def check_beginning(part: bytes) -> None:
    """Refuses what cannot become a response head, as far as it has come. Raises `ProtocolError`."""
    if not part.startswith(b"HTTP/"[: len(part)]):
        raise ProtocolError("the response does not begin with a status line")
    if part.count(b"\n") != part.count(b"\r\n"):
        raise ProtocolError("the response head has a bare LF")


def check_head(head: bytes) -> None:
    """Raises `ProtocolError` for a response head that parsers may read differently."""
    if _HEAD.fullmatch(head) is None:
        raise ProtocolError("the response head has an invalid field line, a bare CR or LF, or a control character")


def _types(fields: Fields) -> list[bytes]:
    return [value.split(b";")[0].strip().lower() for value in fields.named(b"content-type")]


def is_json(fields: Fields) -> bool:
    return b"application/json" in _types(fields)


def is_form(fields: Fields) -> bool:
    return b"multipart/form-data" in _types(fields)


def body_kind(fields: Fields) -> BodyKind:
    """What the Content-Type says that a body is."""
    types = _types(fields)
    if b"text/event-stream" in types:
        return "events"
    kind = types[0] if len(types) == 1 else b""
    if kind in (b"application/json", b"text/json") or kind.endswith(b"+json"):
        return "json"
    return "open" if not kind or kind.startswith(b"text/") or kind == b"application/octet-stream" else "other"


def accepts_events(fields: Fields) -> bool:
    return b"text/event-stream" in [token.split(b";")[0].strip() for token in fields.tokens(b"accept")]


def is_encoded(fields: Fields) -> bool:
    """Whether the body is compressed, and so cannot be inspected. `none` is not a coding, but some servers send it."""
    return not {b"identity", b"none"}.issuperset(fields.tokens(b"content-encoding"))


def client_address(fields: Fields, peer: str, trusts: Callable[[str], bool]) -> str:
    """The address of the client: the first one that `trusts` does not accept, from `peer` back through X-Forwarded-For.

    https://developer.mozilla.org/en-US/docs/Web/HTTP/Reference/Headers/X-Forwarded-For, "Trusted proxy list"
    """
    address = plain_address(peer)
    if not trusts(address):
        return address
    for hop in islice(_hops(fields.named(b"x-forwarded-for")), _MAX_HOPS):
        claimed = _address(hop)
        if claimed is None:
            break
        address = claimed
        if not trusts(address):
            break
    return address


def _hops(values: Sequence[bytes]) -> Iterator[bytes]:
    """The members of X-Forwarded-For, from the nearest on. They are found one by one, only when they are needed."""
    for value in reversed(values):
        end = len(value)
        while end >= 0:
            comma = value.rfind(b",", 0, end)
            yield value[comma + 1 : end]
            end = comma


def _address(hop: bytes) -> str | None:
    """The address in a member of X-Forwarded-For, without its port."""
    if len(hop) > _MAX_HOP:
        return None
    text = hop.strip().decode("latin-1")
    for part in (text, text.rpartition(":")[0]):
        if (address := _parsed(part.removeprefix("[").removesuffix("]"))) is not None:
            return str(address)
    return None


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in `text`, or None. An IPv4-mapped IPv6 address becomes an IPv4 address. A scope is removed.

    The scope would be the name of an interface of this machine, or any text from a client (RFC 4007, section 11).
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if address.version == 4:
        return address
    return address.ipv4_mapped or (ipaddress.IPv6Address(int(address)) if address.scope_id else address)


def plain_address(address: str) -> str:
    """`address` in its canonical form, without a scope. Other text is returned unchanged."""
    parsed = _parsed(address) if ":" in address else None
    return address if parsed is None else str(parsed)


def is_within(address: str, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    """Whether `address` is in one of `networks`. The empty address of a Unix socket's peer is in none."""
    parsed = _parsed(address)
    return parsed is not None and any(parsed in network for network in networks)


def client_block(address: str) -> str:
    """The block that counts as one client: an IPv4 address itself, or the /64 network of an IPv6 address.

    A client with one address of a /64 usually has all of them (RFC 4291, section 2.5.4; RFC 6177). Link-local addresses
    are an exception, because all of a link are in the same /64. Other text is returned unchanged.
    """
    parsed = _parsed(address) if ":" in address else None
    if parsed is None:
        return address
    if parsed.version == 4 or parsed.is_link_local:
        return str(parsed)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))


def traceparent(fields: Fields) -> str | None:
    """The value of `traceparent`, if it is valid (https://www.w3.org/TR/trace-context/)."""
    found = fields.named(b"traceparent")
    return found[0].decode() if len(found) == 1 and _TRACEPARENT.fullmatch(found[0]) else None


def request_id(fields: Fields) -> bytes | None:
    """The client's own id of the request, if it is safe to be logged and forwarded."""
    ids = fields.named(b"x-request-id")
    return ids[0] if len(ids) == 1 and _REQUEST_ID.fullmatch(ids[0]) and not has_secret(ids[0]) else None


def upstream_request_id(fields: Fields) -> bytes | None:
    """The upstream's id of the request."""
    if fields.by_name.keys().isdisjoint(_UPSTREAM_IDS):
        return None
    for name in _UPSTREAM_IDS:
        ids = fields.named(name)
        if ids and _REQUEST_ID.fullmatch(ids[0]):
            return ids[0]
    return None
