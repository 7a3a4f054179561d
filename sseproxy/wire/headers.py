"""HTTP fields on their way through: what is hop-by-hop, what we say of ourselves.

Fields are the raw pairs that arrived, bytes for bytes, so that order, repetition, case and odd bytes survive.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, Literal

from ..errors import ProtocolError

Field = tuple[bytes, bytes]

BodyKind = Literal["events", "json", "open", "other"]
"""What a body is labelled as. `open` is a label that does not tell: none, text, or bytes."""

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
# What we tell the upstream of where a request comes from; what a trusted proxy said of it goes before it.
_FORWARDING: Final = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"})
# What a server may believe of who its client is, where a request comes from, or which URL it was for: only a proxy in
# front is supposed to say it, so nobody who is not trusted says it through us. Families, by how their names begin:
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
# and one by one:
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
_CREDENTIALS: Final = frozenset({b"authorization", b"api-key", b"x-api-key", b"x-goog-api-key"})
# Servers that hand fields on as variables (CGI, RFC 3875, section 4.1.18, and WSGI) take - and _ for one.
_FOLDED: Final = bytes(range(256)).lower().replace(b"_", b"-")
# RFC 9110, section 7.6.3; the pseudonym tells no host name.
_VIA: Final = b"1.1 sseproxy"
_STREAM_POLICY: Final = frozenset({b"cache-control", b"x-accel-buffering"})

# RFC 9112, sections 2.2, 4, 5.1 and 5.2: a status line, then lines that begin with a name and its colon, with no space
# between them; no bare CR or LF, no control characters, no folding. Within a line nothing that matched is given back,
# so that a head that does not match costs hardly more than one that does.
_HEAD: Final = re.compile(
    rb"(?:[\t\x20-\x7e\x80-\xff]++\r\n)(?:[\x21-\x39\x3b-\x7e]++:[\t\x20-\x7e\x80-\xff]*+\r\n)*\r\n"
)
# RFC 9110, section 4.2.3: a name, an IPv4 or an IPv6 address, and a port; no user, no list, not empty.
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_TRACEPARENT: Final = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
# RFC 7239, section 4: what is no token is quoted.
_TOKEN: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
# The nearest hops of a request that are looked at. No chain of proxies that somebody trusts is as long; a client can
# write thousands.
_MAX_HOPS: Final = 32
# An IPv6 address with brackets, a scope and a port is shorter.
_MAX_HOP: Final = 128
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
    inspect: bool,
) -> list[Field]:
    """The fields of the request that goes upstream.

    `framing` announces the request's body, `peer` is the client's address, or `unknown`; if it is `trusted`, what it
    says of where the request comes from is kept. With a `credential` none of the client's goes along. Where the
    response is to be `inspect`ed, no content coding is asked for.

    A field is dropped in its spellings with `_` as well. What only a proxy says is in such a spelling from nobody: a
    proxy in front that removes what its clients claim may not know of it.
    """
    said = {name: fields.named(name) if trusted else [] for name in _FORWARDING}
    drop = {
        *_HOP_BY_HOP,
        *[name.translate(_FOLDED) for name in fields.tokens(b"connection")],
        b"host",
        b"content-length",
        b"expect",
        b"x-request-id",
        b"x-forwarded-for",
        b"forwarded",
    }
    drop |= {name for name, values in said.items() if not values}
    if credential is not None:
        drop |= {*_CREDENTIALS, credential[0].translate(_FOLDED)}
    if inspect:
        drop.add(b"accept-encoding")
    out = [(b"Host", host)]
    for field in fields.all:
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
    if said[b"forwarded"]:
        ours = forwarded_element(peer, fields.named(b"host"), scheme)
        out.append((b"Forwarded", b", ".join([*said[b"forwarded"], ours])))
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


def forwarded_element(peer: bytes, host: Sequence[bytes], scheme: bytes) -> bytes:
    """What we add to a `Forwarded` (RFC 7239, section 4): a request from `peer`, for `host` if it had one.

    `peer` is an address, `unknown`, or one of both with a port, with brackets around IPv6.
    """
    if peer.count(b":") > 1 and not peer.startswith(b"["):
        peer = b"[%b]" % peer
    pairs = [(b"for", peer), *[(b"host", value) for value in host], (b"proto", scheme)]
    return b";".join(b"%b=%b" % (name, value if _TOKEN.fullmatch(value) else _quoted(value)) for name, value in pairs)


def _quoted(text: bytes) -> bytes:
    """A quoted-string (RFC 9110, section 5.6.4)."""
    return b'"%b"' % text.replace(b"\\", b"\\\\").replace(b'"', b'\\"')


def to_downstream(
    fields: Fields, *, framing: Sequence[Field] | None, event_stream: bool, request_id: bytes, connection: bytes | None
) -> list[Field]:
    """The fields of the response that goes to the client.

    `framing` announces its body; None leaves a Content-Length as it came, which is right for HEAD and 304.
    """
    drop = _HOP_BY_HOP.union(fields.tokens(b"connection"), () if framing is None else (b"content-length",))
    if event_stream:
        drop |= _STREAM_POLICY
    out = [field for field in fields.all if field[0].lower() not in drop]
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
    if _HEAD.fullmatch(head) is None:
        raise ProtocolError("the response head has a line that is no field, a bare CR or LF, or a control character")


def _has_type(fields: Fields, media_type: bytes) -> bool:
    return media_type in [value.split(b";")[0].strip().lower() for value in fields.named(b"content-type")]


def is_json(fields: Fields) -> bool:
    return _has_type(fields, b"application/json")


def body_kind(fields: Fields) -> BodyKind:
    """What a body is labelled as."""
    values = fields.named(b"content-type")
    kind = values[0].split(b";")[0].strip().lower() if len(values) == 1 else b""
    if _has_type(fields, b"text/event-stream"):
        return "events"
    if kind in (b"application/json", b"text/json") or kind.endswith(b"+json"):
        return "json"
    return "open" if not kind or kind.startswith(b"text/") or kind == b"application/octet-stream" else "other"


def accepts_events(fields: Fields) -> bool:
    return b"text/event-stream" in [token.split(b";")[0].strip() for token in fields.tokens(b"accept")]


def is_encoded(fields: Fields) -> bool:
    """True if the body is compressed, and so cannot be read in passing. `none` is no coding, and often said."""
    return not {b"identity", b"none"}.issuperset(fields.tokens(b"content-encoding"))


def client_address(fields: Fields, peer: str, trusts: Callable[[str], bool]) -> str:
    """Where a request comes from: `peer`, or whom those say that `trusts` believes, the nearest that it does not.

    https://developer.mozilla.org/en-US/docs/Web/HTTP/Reference/Headers/X-Forwarded-For, "Trusted proxy list"
    """
    address = plain_address(peer)
    hops = islice(_hops(fields.named(b"x-forwarded-for")), _MAX_HOPS)
    while trusts(address) and (hop := next(hops, None)) is not None:
        claimed = _address(hop)
        if claimed is None:
            break
        address = claimed
    return address


def _hops(values: Sequence[bytes]) -> Iterator[bytes]:
    """The members of X-Forwarded-For from the nearest on; what is not asked for is not looked at."""
    for value in reversed(values):
        end = len(value)
        while end >= 0:
            comma = value.rfind(b",", 0, end)
            yield value[comma + 1 : end]
            end = comma


def _address(hop: bytes) -> str | None:
    """The address in a member of X-Forwarded-For, which may have a port."""
    if len(hop) > _MAX_HOP:
        return None
    text = hop.strip().decode("latin-1")
    for part in (text, text.rpartition(":")[0]):
        if (address := _parsed(part.removeprefix("[").removesuffix("]"))) is not None:
            return str(address)
    return None


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that `text` is; an IPv4 one in IPv6's clothes as itself, and a scoped one without its scope.

    The scope is the name of an interface of this machine, or whatever a client wrote (RFC 4007, section 11).
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if address.version == 4:
        return address
    return address.ipv4_mapped or (ipaddress.IPv6Address(int(address)) if address.scope_id else address)


def plain_address(address: str) -> str:
    """`address` as it is compared, written and told: canonical and without a scope. What is none stays as it is."""
    parsed = _parsed(address) if ":" in address else None
    return address if parsed is None else str(parsed)


def is_within(address: str, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    """Whether `address` is in one of `networks`. What is no address, as of a Unix socket's peer, is in none."""
    parsed = _parsed(address)
    return parsed is not None and any(parsed in network for network in networks)


def client_block(address: str) -> str:
    """Whom `address` is counted as: an IPv4 address stands for itself, an IPv6 one for its /64.

    Who has one address of a /64 has all of them (RFC 4291, section 2.5.4; RFC 6177), except on a link, where everybody
    is in the same. What is no address, as of a Unix socket's peer, stands for itself.
    """
    parsed = _parsed(address) if ":" in address else None
    if parsed is None:
        return address
    if parsed.version == 4 or parsed.is_link_local:
        return str(parsed)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))


def traceparent(fields: Fields) -> str | None:
    """The trace that the request is part of, if it is told in order (https://www.w3.org/TR/trace-context/)."""
    found = fields.named(b"traceparent")
    return found[0].decode() if len(found) == 1 and _TRACEPARENT.fullmatch(found[0]) else None


def request_id(fields: Fields) -> bytes | None:
    """The client's own id for the request, if it is harmless enough to be logged and sent on."""
    ids = fields.named(b"x-request-id")
    return ids[0] if len(ids) == 1 and _REQUEST_ID.fullmatch(ids[0]) else None


def upstream_request_id(fields: Fields) -> bytes | None:
    """What the upstream calls the request: OpenAI's name for it, Anthropic's, Azure's, Amazon's."""
    for name in (b"x-request-id", b"request-id", b"apim-request-id", b"x-amzn-requestid"):
        ids = fields.named(name)
        if ids and _REQUEST_ID.fullmatch(ids[0]):
            return ids[0]
    return None
