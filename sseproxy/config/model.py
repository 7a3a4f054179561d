"""The options: a frozen, typed model, and what has to fit together in it.

It reads no YAML, so that a worker, which is handed its configuration, does not import a parser for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Self, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_core import PydanticCustomError

from .addresses import Address
from .files import for_clients, for_upstream
from .named import ApiKeyFile, CAFile, check_certificate
from .plain import TLS as PlainTLS
from .plain import Options, Secret
from .plain import UpstreamTLS as PlainUpstreamTLS
from .values import (
    ApiKey,
    Count,
    CountOrOff,
    DialectName,
    Duration,
    DurationOrOff,
    Exchanges,
    FieldName,
    FilePath,
    Globs,
    HostNames,
    ListenAddress,
    ListenAddresses,
    Loc,
    LogFormat,
    LoggedPaths,
    LogLevel,
    Methods,
    MetricsDetail,
    Name,
    Networks,
    PathPrefix,
    RequiredPath,
    Share,
    Size,
    SizeOrOff,
    TLSVersion,
    URLText,
    Workers,
    dotted,
    expected,
    quoted,
    spell_size,
)

if TYPE_CHECKING:
    import ssl


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    _kind: ClassVar[type[Options]] = Options

    def plain(self) -> Self:
        """The same, as a worker is handed it."""
        return cast("Self", self._kind({name: _plain(getattr(self, name)) for name in self._handed()}))

    @classmethod
    def _handed(cls) -> Iterable[str]:
        return cls.model_fields


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, SecretStr):
        return Secret(value.get_secret_value())
    return value.plain() if isinstance(value, _Model) else value


def _part(limit: int | None, workers: int) -> int | None:
    return None if limit is None else -(-limit // workers)


class Limits(_Model):
    """What is accepted and held at most. Numbers of things are for all workers together; each has its share of them."""

    connections: Count = 10_000
    """Clients' connections; requests on more are answered 503."""
    connections_per_client: CountOrOff = None
    """Connections from one client, an IPv4 address or a /64 of IPv6; requests on more are answered 429.
    With TLS, more are closed before the handshake."""
    active_requests: CountOrOff = None
    """Exchanges under way; more are answered 503."""
    lag: DurationOrOff = 1.0
    """A worker whose timers fire so late has more to do than it can; requests are answered 503 until it catches up."""
    pending_connects: Count = 1_000
    """Connections to one upstream that are being made; requests that want more are answered 503."""
    request_head: Size = 32 << 10
    """A request line and its fields; larger ones are answered 431."""
    request_fields: Count = 100
    """Fields of a request; more are answered 400."""
    request_head_time: Duration = 10.0
    """From the first byte of a request head to its last; slower ones are answered 408."""
    request_body: SizeOrOff = 1 << 30
    """A request body; larger ones are answered 413, also while they are relayed."""
    request_body_rate: SizeOrOff = 240
    """Bytes a second that a client has to send of its body on average, once it has had `timeouts.body` to begin."""
    held: Size = 64 << 20
    """Request bodies that are read in advance, in bytes, for each worker; requests that need more are answered 503."""
    response_head: Size = 32 << 10
    """An upstream's response head; larger ones are answered 502."""
    event: Size = 32 << 20
    """The largest event that is read; larger ones are forwarded and not read. No more than 64 KiB of one is kept."""

    def share(self, workers: int) -> Limits:
        """What one of `workers` accepts and holds at most: its part of the whole, rounded up."""
        names = ("connections", "connections_per_client", "active_requests", "pending_connects")
        shared = self.model_copy(update={name: _part(getattr(self, name), workers) for name in names})
        # What was set stays so, and what was not.
        shared.__pydantic_fields_set__ = self.model_fields_set
        return shared


class RouteLimits(_Model):
    """What a route has of the whole."""

    active_requests: CountOrOff = None
    """Exchanges under way; more are answered 503."""

    def share(self, workers: int) -> RouteLimits:
        return self.model_copy(update={"active_requests": _part(self.active_requests, workers)})


class Admin(_Model):
    """The listener for metrics and health, apart from the clients' one."""

    listen: ListenAddress = Address("127.0.0.1", 9464)
    hosts: HostNames = ()
    """Names in `Host` that are served, beside IP addresses, `localhost` and this machine's name."""


class UpstreamTLS(_Model):
    """How an `https` upstream is verified, and how this side is."""

    ca_file: CAFile = None
    """The certificates of the authorities that are trusted; `None` are the system's."""
    cert_file: FilePath = None
    """The certificate, with its chain, that is shown to an upstream that asks for one."""
    key_file: FilePath = None
    """Its private key; `None` if it is in `cert_file` as well."""

    _kind: ClassVar = PlainUpstreamTLS

    @model_validator(mode="after")
    def _loads(self) -> Self:
        if self.key_file is not None and self.cert_file is None:
            raise expected("cert_file beside key_file", show=False)
        if self.cert_file is not None:
            check_certificate(self.context)
        return self

    def context(self) -> ssl.SSLContext:
        """For connections to an upstream. Raises `OSError`, or `ValueError` for a key with a password."""
        return for_upstream(self.ca_file, self.cert_file, self.key_file)


class TLS(_Model):
    """How clients' connections are encrypted."""

    cert_file: RequiredPath
    """The certificate, with its chain, in PEM."""
    key_file: FilePath = None
    """Its private key; `None` if it is in `cert_file` as well."""
    min_version: TLSVersion = "1.2"

    _kind: ClassVar = PlainTLS

    @model_validator(mode="after")
    def _loads(self) -> Self:
        check_certificate(self.context)
        return self

    def context(self) -> ssl.SSLContext:
        """For listeners. Raises `OSError`, or `ValueError` for a key with a password."""
        return for_clients(self.cert_file, self.key_file, self.min_version)


class Upstream(_Model):
    """A server that requests are relayed to."""

    name: Name
    url: URLText
    """Canonical, without trailing slash. Its path takes the place of the matched prefix."""
    api_key: ApiKey = None
    """Sent instead of the client's credentials."""
    api_key_file: ApiKeyFile = None
    """Where the key is read from instead, at the start and at each reload."""
    api_key_header: FieldName = "Authorization"
    """The field that the key is sent in; in `Authorization` it is a bearer token, in others it stands alone."""
    tls: UpstreamTLS = UpstreamTLS()

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key is not None and self.api_key_file is not None:
            raise expected("either api_key or api_key_file, not both", show=False)
        return self

    @classmethod
    def _handed(cls) -> Iterable[str]:
        return (*(name for name in cls.model_fields if name not in ("api_key", "api_key_file")), "key")

    @property
    def key(self) -> SecretStr | None:
        """The key, from wherever it is."""
        return self.api_key_file.key if self.api_key_file is not None else self.api_key


class Reload(_Model):
    """How a new configuration, or new code, takes the place of the old one."""

    watch: DurationOrOff = None
    """Look at the content of the file, and of the files it names, this often, and reload when it has changed."""
    drain_timeout: DurationOrOff = None
    """How long exchanges that began on the old configuration may go on; `None` is to their end."""
    generations: Count = 4
    """Earlier configurations that may still be finishing; where there are more, the exchanges of the oldest end."""


class Log(_Model):
    """What the processes say of themselves, on standard error: as JSON where the access log is JSON."""

    level: LogLevel = "info"
    """The least that is written."""


class AccessLog(_Model):
    """A line for each exchange, on standard output."""

    exchanges: Exchanges = "all"
    """Which are written; `errors` are those that did not complete, or were answered 400 and above."""
    sample: Share = 1.0
    """The share of those without an error that is written."""
    format: LogFormat = "auto"
    """`auto` is `text` on a terminal, and `json` elsewhere."""
    path: LoggedPaths = "known"
    """`known`: words of known APIs are written, any other segment is `*`; `all`: the path as it came; or `off`."""


class Metrics(_Model):
    """What is measured beyond what always is."""

    models: Globs = ()
    """Globs for models; the first that takes a request's model is its label, as it is written. The rest is `other`."""
    detail: MetricsDetail = "full"
    """`full`: all labels. `basic`: fewer series; only tokens and the times of tokens have a model, and durations
    neither `stream` nor `outcome`."""


class Match(_Model):
    """The requests that belong to a route."""

    path: PathPrefix
    """Prefix of the path, on segment boundaries; the longest one wins. No trailing slash, except `/`, which is all."""
    model: Globs = ()
    """Globs for the `model` of the request body, of which one has to match. None: any body."""
    methods: Methods = ()
    """Upper-case HTTP methods. None: any method."""


class Timeouts(_Model):
    """How long each phase of an exchange may take, in seconds."""

    connect: Duration = 10.0
    """DNS, TCP and TLS to the upstream."""
    body: Duration = 30.0
    """A client that sends nothing of its request body for that long is cut."""
    head: Duration = 600.0
    """From the request being sent to the response head, which reasoning models may hold for minutes."""
    first_token: Duration = 900.0
    """From the request head being received to the first generated token of an event stream."""
    idle: Duration = 300.0
    """The longest silence: after the first token between data events (comments do not count), for bodies other than
    event streams between reads."""
    total: DurationOrOff = None
    """The whole exchange; `None` is without limit."""
    write: Duration = 60.0
    """A client that takes no byte for that long is cut."""


class UsageOptions(_Model):
    """What is done for the sake of token counts."""

    request: bool = False
    """Ask the upstream for the usage of streams whose request does not, and keep it from the client."""


class Route(_Model):
    """Sends the requests that `match` to an upstream."""

    name: Name
    match: Match
    upstream: str
    """The name of an upstream."""
    dialect: DialectName = "auto"
    """As what responses are read; `auto` goes by the path on the upstream's side."""
    heartbeat: DurationOrOff = None
    """Write a comment into an event stream that has been silent for so long, in seconds; `None` writes none."""
    usage: UsageOptions = UsageOptions()
    limits: RouteLimits = RouteLimits()
    timeouts: Timeouts = Timeouts()


class Config(_Model):
    """All that can be configured. Immutable, and picklable for worker processes."""

    listen: ListenAddresses = (Address("127.0.0.1", 8080),)
    tls: TLS | None = None
    """`None` is plain text."""
    admin: Admin = Admin()
    workers: Workers = "auto"
    """Worker processes; `auto` is one per usable core."""
    drain_timeout: Duration = 30.0
    """How long running streams may go on after SIGTERM, in seconds."""
    reload: Reload = Reload()
    max_body: Size = 32 << 20
    """The largest request body that is read in advance, in bytes: where a route matches on its `model`, where usage is
    asked for, and where models are labels."""
    trusted_proxies: Networks = ()
    """Where clients' `Forwarded` and `X-Forwarded-*` are believed, and added to. From others they are replaced, and no
    other field passes that only a proxy says."""
    log: Log = Log()
    access_log: AccessLog = AccessLog()
    metrics: Metrics = Metrics()
    limits: Limits = Limits()
    upstreams: Annotated[tuple[Upstream, ...], Field(min_length=1)]
    routes: Annotated[tuple[Route, ...], Field(min_length=1)]

    _variables: frozenset[str] = frozenset()

    @property
    def variables(self) -> frozenset[str]:
        """The environment variables whose values the file took. They may hold keys, which no worker needs again."""
        return self._variables

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = [
            f"{dotted(loc)}: {message}"
            for loc, message in conflicts(
                [upstream.name for upstream in self.upstreams],
                [route.name for route in self.routes],
                [route.match for route in self.routes],
                [route.upstream for route in self.routes],
                self.max_body,
                self.limits.held,
                spell=lambda _, value: value if isinstance(value, str) else spell_size(value),
            )
        ]
        if found:
            raise PydanticCustomError("conflict", "{conflicts}", {"conflicts": "; ".join(found)})
        return self

    def share(self, workers: int) -> Config:
        """The configuration of one of `workers`, with its share of the limits."""
        routes = tuple(route.model_copy(update={"limits": route.limits.share(workers)}) for route in self.routes)
        return self.model_copy(update={"limits": self.limits.share(workers), "routes": routes})

    def files(self) -> list[str]:
        """The files that this configuration was read from, beside its own."""
        named = [self.tls.cert_file, self.tls.key_file] if self.tls is not None else []
        for upstream in self.upstreams:
            key = upstream.api_key_file
            named += [upstream.tls.ca_file, upstream.tls.cert_file, upstream.tls.key_file, key.path if key else None]
        return [path for path in named if path is not None]

    def upstream(self, name: str) -> Upstream:
        """Raises `KeyError` for a name that no upstream has; those of routes always exist."""
        for upstream in self.upstreams:
            if upstream.name == name:
                return upstream
        raise KeyError(name)


def conflicts(
    upstreams: Sequence[str | None],
    routes: Sequence[str | None],
    matches: Sequence[Match | None],
    uses: Sequence[str | None],
    max_body: int | None,
    held: int | None,
    spell: Callable[[Loc, str | int], str],
) -> Iterator[tuple[Loc, str]]:
    """What is wrong between the parts: repeated names and matches, names of upstreams (`uses`) that do not exist, and a
    body that would never fit.

    `None` stands for a part that is itself wrong. `spell` gives a name or a size as it may be shown.
    """
    identities = [match and (match.path, frozenset(match.model), frozenset(match.methods)) for match in matches]
    columns: tuple[tuple[str, str, Sequence[object]], ...] = (
        ("upstreams", "name", upstreams),
        ("routes", "name", routes),
        ("routes", "match", identities),
    )
    for section, key, column in columns:
        for index, item in enumerate(column):
            first = column.index(item)
            if item is not None and first < index:
                yield (section, index, key), f"expected a unique {key}, got that of {section}[{first}]"

    if max_body is not None and held is not None and max_body > held:
        most, least = spell(("limits", "held"), held), spell(("max_body",), max_body)
        yield ("limits", "held"), f"expected at least max_body ({least}), got {most}"

    names = [name for name in upstreams if name is not None]
    if not names or len(names) < len(upstreams):
        return
    known = ", ".join(quoted(spell(("upstreams", index, "name"), name))[1:-1] for index, name in enumerate(names))
    for index, use in enumerate(uses):
        if use is not None and use not in names:
            loc = ("routes", index, "upstream")
            yield loc, f"expected the name of an upstream ({known}), got {quoted(spell(loc, use))}"
