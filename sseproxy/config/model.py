"""All options: a frozen, typed model, and the rules between options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec.structs import replace

from .addresses import Address
from .files import for_clients, for_upstream
from .named import ApiKeyFile, CAFile, KeysFile, check_certificate
from .options import Expected, ListOf, Loc, OrNone, Schema, Secret, Section, SectionOf, dotted, quoted
from .values import (
    AdminToken,
    Affinity,
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
    KeyDigests,
    LedgerURL,
    ListenAddress,
    ListenAddresses,
    LogFormat,
    LoggedPaths,
    LogLevel,
    Methods,
    MetricsDetail,
    ModelName,
    Name,
    Names,
    Networks,
    OnFailure,
    PathPrefix,
    RateOrOff,
    RequiredPath,
    Retries,
    Share,
    Size,
    SizeOrOff,
    Text,
    TLSVersion,
    Token,
    Until,
    URLOrNone,
    URLText,
    Workers,
    is_address,
)

if TYPE_CHECKING:
    import ssl


class Limits(Section):
    """Upper limits. Counts are for all workers together, old ones that are still finishing included. Sizes are in
    bytes."""

    connections: Count = 10_000
    """Client connections. Requests on further connections are answered 503."""
    connections_per_client: CountOrOff = None
    """Connections from one client: an IPv4 address, or a /64 network of IPv6. Requests on further connections are
    answered 429. With TLS, further connections are closed before the handshake."""
    active_requests: CountOrOff = None
    """Requests that are being answered. Further requests are answered 503."""
    lag: DurationOrOff = 1.0
    """If the timers of a worker fire this late, the worker is overloaded. Until it catches up, requests are answered
    503."""
    pending_connects: Count = 1_000
    """Connections to one upstream that are being established. Requests that would need one more go to the next upstream
    of their route, or are answered 503."""
    request_head: Size = 32 << 10
    """The request line and the header fields. Larger ones are answered 431."""
    request_fields: Count = 100
    """Header fields of a request. Requests with more are answered 400."""
    request_head_time: Duration = 10.0
    """Seconds from the first byte of a request head to its last. Slower requests are answered 408."""
    request_body: SizeOrOff = 1 << 30
    """A request body. Larger ones are answered 413, even if a part has been relayed already."""
    request_body_rate: SizeOrOff = 240
    """The average bytes per second that a client has to send of its body, after `timeouts.body` has passed."""
    held: Size = 64 << 20
    """Memory for request bodies that are read in advance, for each worker. Requests that need more are answered 503."""
    response_head: Size = 32 << 10
    """The head of an upstream's response. Larger ones are answered 502."""
    event: Size = 32 << 20
    """An event that is inspected. Larger events are forwarded without inspection. No more than 64 KiB of one is
    kept."""


class RouteLimits(Section):
    """Limits of one route, in addition to the general limits."""

    active_requests: CountOrOff = None
    """Requests of this route that are being answered. Further requests are answered 503."""


class Admin(Section):
    """The listener for metrics and health checks. It is separate from the listener for clients."""

    listen: ListenAddress = Address("127.0.0.1", 9464)
    hosts: HostNames = ()
    """Further host names that requests may have in `Host`. IP addresses, `localhost` and the name of this machine are
    always allowed."""
    token: AdminToken = None
    """The token that requests need, except health checks. `None` means that none is needed."""
    cancel: bool = False
    """Whether an operator may end a request from the live view. This needs a `token`."""

    def check(self) -> None:
        if self.cancel and self.token is None:
            raise Expected("token beside cancel: true, because without one anybody could end requests", "nothing")


class UpstreamTLS(Section):
    """TLS with an `https` upstream."""

    ca_file: CAFile = None
    """The CA certificates that are trusted, in PEM. `None` means the system's."""
    cert_file: FilePath = None
    """The client certificate with its chain, in PEM, for upstreams that request one."""
    key_file: FilePath = None
    """The private key of the certificate. `None` if it is in `cert_file`."""

    def check(self) -> None:
        if self.key_file is not None and self.cert_file is None:
            raise Expected("cert_file beside key_file", "nothing")
        if self.cert_file is not None:
            check_certificate(self.context)

    def context(self) -> ssl.SSLContext:
        """A context for connections to an upstream. Raises `OSError`, or `ValueError` for a key with a password."""
        return for_upstream(self.ca_file, self.cert_file, self.key_file)


class TLS(Section):
    """TLS with clients."""

    cert_file: RequiredPath
    """The server certificate with its chain, in PEM."""
    key_file: FilePath = None
    """The private key of the certificate. `None` if it is in `cert_file`."""
    min_version: TLSVersion = "1.2"

    def check(self) -> None:
        check_certificate(self.context)

    def context(self) -> ssl.SSLContext:
        """A context for listeners. Raises `OSError`, or `ValueError` for a key with a password."""
        return for_clients(self.cert_file, self.key_file, self.min_version)


class _WithKey(Section):
    """What may have an API key."""

    # The sections declare them, each with its own docstring.
    if TYPE_CHECKING:
        api_key: ApiKey
        api_key_file: ApiKeyFile

    def check(self) -> None:
        if self.api_key is not None and self.api_key_file is not None:
            raise Expected("either api_key or api_key_file, not both", "nothing")

    @property
    def key(self) -> Secret | None:
        """The API key, from `api_key` or `api_key_file`."""
        return self.api_key_file.key if self.api_key_file is not None else self.api_key


class Endpoint(_WithKey):
    """One address that serves an upstream."""

    url: URLText
    """The base URL."""
    api_key: ApiKey = None
    """The API key of this endpoint. `None` means that of the upstream."""
    api_key_file: ApiKeyFile = None
    """A file with the API key of this endpoint."""


class Health(Section):
    """Active checks of the endpoints of an upstream: a GET that has to be answered with a status from 200 to 299."""

    path: PathPrefix
    """The path that is requested. It starts at the host, not at the base URL."""
    interval: Duration = 5.0
    """Seconds between two checks of an endpoint."""
    timeout: Duration = 2.0
    """Seconds until a check that is not answered has failed."""


class Ejection(Section):
    """When an endpoint that fails is not used for a while."""

    failures: Count = 5
    """So many failures since the last success, of all workers together."""
    time: Duration = 10.0
    """Seconds until it is tried again. Multiplied by how often it was ejected in a row, up to 60 seconds, or up to 20
    seconds if no connection could be made."""


class Upstream(_WithKey):
    """A named API. It has one base URL, or several that serve the same API."""

    described: ClassVar[Schema] = {"anyOf": [{"required": ["url"]}, {"required": ["urls"]}]}

    name: Name
    url: URLOrNone = None
    """The base URL. Its path replaces the prefix that `match.path` of the route has matched."""
    urls: Annotated[tuple[Endpoint, ...], ListOf(SectionOf(Endpoint, text="url"))] = ()
    """Instead of `url`: the base URLs of endpoints that serve the same API. Each request goes to the one with the
    fewest active requests. An endpoint with a key of its own is written as `{url: URL, api_key: KEY}`."""
    resolve: DurationOrOff = None
    """Each address of the host in `url` is an endpoint. They are looked up this often. `None` means that a connection
    goes to any address of the host."""
    affinity: Affinity = ()
    """Requests that have the same value go to the same endpoint, as long as it does not have more than 1.25 times the
    mean of active requests. The first of these that a request has counts: `header:NAME`, `field:NAME` (a member of the
    JSON body), `prefix:SIZE` (the first bytes of the messages)."""
    health: Health | None = None
    """Active checks. `None` means none."""
    ejection: Ejection = Ejection()
    api_key: ApiKey = None
    """The API key that is sent instead of the client's credentials."""
    api_key_file: ApiKeyFile = None
    """A file with the API key, as an alternative to `api_key`. It is read at the start and at each reload."""
    api_key_header: FieldName = "Authorization"
    """The header field for the API key. `Authorization` gets `Bearer` and the key, other fields get only the key."""
    max_connection_age: DurationOrOff = None
    """A connection of this age, or up to a tenth less, gets no further requests. Running responses are not cut."""
    tls: UpstreamTLS = UpstreamTLS()

    def check(self) -> None:
        super().check()
        if (self.url is None) == (not self.urls):
            raise Expected("either url or urls", "nothing")
        if self.resolve is not None and (self.url is None or is_address(self.url)):
            raise Expected("url with the name of a host beside resolve", "nothing")

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Its endpoints, as they are configured: `url`, or `urls`. Keys of the upstream are not repeated in them."""
        return self.urls or (Endpoint(url=self.url or ""),)


class Reload(Section):
    """How a new configuration, or new code, replaces the old one."""

    watch: DurationOrOff = None
    """Seconds between two checks of the configuration file, and the files that it names. If the content of one has
    changed, the configuration is reloaded. `None` means no checks."""
    drain_timeout: DurationOrOff = None
    """Seconds that exchanges of the old configuration may go on. `None` means no limit."""
    generations: Count = 4
    """How many earlier configurations may have exchanges. If there are more, the exchanges of the oldest are ended."""


class Log(Section):
    """The log on standard error. Its lines are JSON if those of the access log are."""

    level: LogLevel = "info"
    """Only lines of this level and above are written."""


class AccessLog(Section):
    """The access log on standard output: one line for each exchange."""

    exchanges: Exchanges = "all"
    """Which exchanges are logged. `errors` means those that did not complete, or whose status is 400 or higher."""
    sample: Share = 1.0
    """The share of the exchanges without an error that is logged."""
    format: LogFormat = "auto"
    """`auto` means `text` on a terminal, and `json` otherwise."""
    path: LoggedPaths = "known"
    """How a path is logged. `known`: with `*` for each segment that is not a word of a known API. `all`: as it was
    received. `off`: not at all."""


class Metrics(Section):
    """Which labels the metrics have."""

    models: Globs = ()
    """Globs for models. The first glob that matches the model of a request is its label `model`. Requests that no glob
    matches have the label `other`."""
    detail: MetricsDetail = "full"
    """`full`: all labels. `basic`: fewer series. Then only tokens and the times of tokens have a model, and durations
    have neither `stream` nor `outcome`."""


class Probe(Section, kw_only=True):
    """The probe for `sseproxy doctor`, which answers in the place of an API. `None` means no probe."""

    path: PathPrefix = "/sseproxy-probe"
    """The prefix of its path. The doctor takes it with `/v1` after it as the base URL."""
    token: Token
    """A secret of at least 16 characters. Only requests of the doctor that have it are answered."""


class Match(Section):
    """The conditions of a route. A request must meet all of them."""

    path: PathPrefix
    """A prefix of the path, in whole segments. The longest prefix wins. `/` matches all paths."""
    model: Globs = ()
    """Globs for the `model` in the request body. One of them has to match. An empty list matches any body. The model is
    read in JSON and in forms, also if they are compressed with gzip or deflate."""
    methods: Methods = ()
    """HTTP methods. An empty list matches any method."""


class Timeouts(Section):
    """Timeouts for the phases of an exchange, in seconds."""

    connect: Duration = 10.0
    """To connect to the upstream: DNS, TCP and TLS."""
    body: Duration = 30.0
    """How long a client may send no byte of its request body. Then it is disconnected."""
    head: Duration = 600.0
    """From the request sent to the response head received. Reasoning models may take minutes."""
    first_token: Duration = 900.0
    """From the request head received to the first generated token of an event stream."""
    idle: Duration = 300.0
    """In an event stream, between two data events after the first token; comments do not count. In other bodies,
    between two reads."""
    total: DurationOrOff = None
    """For the whole exchange. `None` means no limit."""
    write: Duration = 60.0
    """How long a client may accept no byte. Then it is disconnected."""


class UsageOptions(Section):
    """Options for token counts."""

    request: bool = False
    """Request the usage of a stream from the upstream if the client has not, and remove it from the response. Some
    backends then add `"usage": null` to all other chunks, which are forwarded unchanged."""


class Target(Section):
    """An upstream of a route, and the model that requests to it get."""

    name: Text
    """The name of an upstream."""
    model: ModelName = None
    """Replaces the model in the request. `None` leaves it as it is."""


def _targets(value: object) -> tuple[object, ...]:
    if isinstance(value, str | dict):
        return (value,)
    if isinstance(value, tuple):
        return value
    raise Expected("the name of an upstream, or a list of them")


class Retry(Section):
    """When a request is sent again, to another endpoint or upstream. Never after a byte of an answer was sent."""

    on: Retries = ("connect", "429", "503", "529")
    """What is tried again elsewhere. `connect`: no connection could be made. `429`, `503`, `529`, `500`, `502`, `504`:
    the status. `reset`: the connection ended before the response. `timeout`: the response did not begin in time. `same`
    allows the same endpoint once more, if there is no other. With `reset`, `timeout`, `500`, `502`, `504`, the first
    answer may have been generated, and is then paid for twice."""
    attempts: Count = 2
    """At most so many attempts at each upstream."""
    until: Until = "head"
    """Until when another attempt is possible: until the response `head`, the `first_token`, or the `end`. What has come
    until then is held back. `first_token` and `end` include `reset` and `timeout`."""
    wait: Duration = 3.0
    """Seconds of a `retry-after` that are waited for before the same endpoint is asked again. With a longer one, the
    next upstream is asked."""
    within: Duration = 30.0
    """No attempt begins later than so many seconds after the request. With `until: end` they may."""
    max_body: Size = 1 << 20
    """The largest request body that is kept to be sent again, in bytes."""
    hold: Size = 1 << 20
    """With `until: end`: the largest answer that is held back, in bytes. A larger one is sent from then on."""


class Route(Section):
    """Sends requests that match to an upstream."""

    name: Name
    match: Match
    upstream: Annotated[tuple[Target, ...], ListOf(SectionOf(Target, text="name"), _targets, least=1)]
    """The name of an upstream, or a list. The next one in the list is asked where the one before has no endpoint left
    for a request. In the list, `{name: NAME, model: MODEL}` also replaces the model in the request. The client's
    credentials go to the first one only, so others need an `api_key` if they want one."""
    retry: Retry = Retry()
    merge_models: bool = False
    """Answer `GET .../models` with the models of all endpoints of the route. A request for a model that only some of
    its upstreams have goes to these."""
    open: bool = False
    """Whether requests need no key, if there are `clients`. For health checks of others."""
    dialect: DialectName = "auto"
    """The API whose format responses have, and errors and heartbeats get. `auto` finds it by the path of the request
    to the upstream."""
    heartbeat: DurationOrOff = None
    """Send a comment, or for Gemini a blank line, to the client when an event stream has been silent for so many
    seconds. `None` sends none."""
    usage: UsageOptions = UsageOptions()
    limits: RouteLimits = RouteLimits()
    timeouts: Timeouts = Timeouts()


PROBE = "sseproxy-probe"
"""The name of the route and of the upstream of the probe, in metrics and in the access log."""
# Seconds. A probe may be silent for 300.
_PROBE_TIMEOUT = 360.0


class ClientLimits(Section):
    """Limits of one client, over all routes, workers and configurations together. Requests above one are answered
    429."""

    active_requests: CountOrOff = None
    """Its requests that are being answered."""
    requests: RateOrOff = None
    """Its requests within a sliding window of time. Requests that are refused do not count."""
    tokens: RateOrOff = None
    """Its tokens within a sliding window of time: input and output, cached input included. What a request may need is
    reserved before it is sent."""


class Client(Section):
    """A client that may send requests: its keys, what it may use, and its limits."""

    name: Name
    """A label of the metrics, and in the access log."""
    keys: KeyDigests = ()
    """Digests of its keys, as `sseproxy key` prints them. Several, so that a key can be replaced by another one."""
    keys_file: KeysFile = None
    """A file with further digests, one in a line. `#` begins a comment. It is read at the start and at each reload."""
    models: Globs = ()
    """Globs for the models that it may use. An empty list allows all. Otherwise a request with a body has to name its
    model."""
    routes: Names = ()
    """The names of the routes that it may use. An empty list allows all."""
    limits: ClientLimits = ClientLimits()

    def check(self) -> None:
        if not self.keys and self.keys_file is None:
            raise Expected("keys or keys_file; sseproxy key prints an entry with a new key", "nothing")

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of all its keys, in hexadecimal."""
        written = (*self.keys, *(self.keys_file.digests if self.keys_file is not None else ()))
        return tuple(one.removeprefix("sha256:") for one in written)


class Ledger(Section):
    """Where the limits of clients are counted."""

    url: LedgerURL = None
    """A Redis or Valkey server, for limits that hold over several machines. `None`: on this machine. Needs the extra
    `redis`."""
    on_failure: OnFailure = "local"
    """What happens while the server does not answer. `local`: each machine has the limits for itself. `refuse`:
    requests of clients with limits are answered 503."""

    def check(self) -> None:
        if self.url is not None and find_spec("redis") is None:
            raise Expected(
                "no url, because the package redis is not installed beside sseproxy: pip install redis", "nothing"
            )


class Config(Section, kw_only=True):
    """The whole configuration. It is immutable, and can be pickled for workers."""

    listen: ListenAddresses = (Address("127.0.0.1", 8080),)
    tls: TLS | None = None
    """TLS with clients. `None` means no TLS."""
    admin: Admin = Admin()
    workers: Workers = "auto"
    """The number of worker processes. `auto` means one per usable core."""
    drain_timeout: Duration = 30.0
    """Seconds that exchanges may go on after SIGTERM."""
    reload: Reload = Reload()
    max_body: Size = 32 << 20
    """The largest request body that is read in advance, in bytes, before and after decompression. A body is read in
    advance if a route matches on its `model`, if usage is requested, or if the model is a label."""
    trusted_proxies: Networks = ()
    """Networks of the proxies in front of sseproxy. Their `Forwarded` and `X-Forwarded-*` are believed and extended.
    From other clients these fields are replaced, and further fields that only proxies send are removed."""
    log: Log = Log()
    access_log: AccessLog = AccessLog()
    metrics: Metrics = Metrics()
    limits: Limits = Limits()
    upstreams: Annotated[tuple[Upstream, ...], ListOf(SectionOf(Upstream), least=1)]
    routes: Annotated[tuple[Route, ...], ListOf(SectionOf(Route), least=1)]
    probe: Probe | None = None
    clients: Annotated[tuple[Client, ...] | None, OrNone(ListOf(SectionOf(Client), least=1))] = None
    """Who may call. `None` means everybody. With clients, each request needs a key, which never goes upstream."""
    ledger: Ledger = Ledger()

    no_options: ClassVar = frozenset({"variables", "places"})
    variables: frozenset[str] = frozenset()
    """The environment variables that the file uses. They may hold keys, so workers do not inherit them."""
    places: tuple[str, ...] = ()
    """Where the match of each route is in the file: `line:col`."""

    def place(self, route: Route, file: str | None) -> str:
        """Where in the `file` that this was read from the match of `route` is: `file:line:col: routes[0].match`."""
        index = self.routes.index(route)
        loc = dotted(("routes", index, "match"))
        return f"{file}:{self.places[index]}: {loc}" if self.places else loc

    def exposed_keys(self) -> str | None:
        """A warning if everybody who can reach a listener from another machine can spend a key, or None.

        A firewall or a container may keep others out. The configuration does not tell.
        """
        if self.clients is not None:
            return None
        open_to_others = [str(each) for each in self.listen if isinstance(each, Address) and not each.is_loopback]
        spent = [one.name for one in self.upstreams if one.key or any(each.key for each in one.urls)]
        if not open_to_others or not spent:
            return None
        return (
            f"listen: everybody who can reach {' or '.join(open_to_others)} spends the key of {', '.join(spent)}; "
            "name clients (sseproxy key NAME), or make sure that only a private network reaches it"
        )

    def for_workers(self) -> Config:
        """This configuration without the admin token, which workers do not need."""
        return replace(self, admin=replace(self.admin, token=None))

    def with_probe(self) -> Config:
        """This configuration with the route and the upstream of the probe, if there is one.

        Each worker has a probe of its own, and sets the port in the URL.
        """
        if self.probe is None:
            return self
        upstream = Upstream(name=PROBE, url="http://127.0.0.1")
        route = Route(
            name=PROBE,
            match=Match(path=self.probe.path),
            upstream=(Target(name=PROBE),),
            timeouts=Timeouts(head=_PROBE_TIMEOUT, first_token=_PROBE_TIMEOUT, idle=_PROBE_TIMEOUT),
        )
        return replace(self, upstreams=(*self.upstreams, upstream), routes=(*self.routes, route))

    def files(self) -> list[str]:
        """The files that this configuration names, as certificates and keys."""
        named = [self.tls.cert_file, self.tls.key_file] if self.tls is not None else []
        for upstream in self.upstreams:
            keys = [each.api_key_file for each in (upstream, *upstream.urls)]
            named += [upstream.tls.ca_file, upstream.tls.cert_file, upstream.tls.key_file]
            named += [key.path for key in keys if key is not None]
        named += [client.keys_file.path for client in self.clients or () if client.keys_file is not None]
        return [path for path in named if path is not None]

    def upstream(self, name: str) -> Upstream:
        """The upstream called `name`. Raises `KeyError` if there is none; for the names in routes there always is."""
        for upstream in self.upstreams:
            if upstream.name == name:
                return upstream
        raise KeyError(name)


def conflicts(
    upstreams: Sequence[str | None],
    routes: Sequence[str | None],
    matches: Sequence[Match | None],
    uses: Sequence[Sequence[str | None]],
    max_body: int | None,
    held: int | None,
    probe: str | None,
    shown: Callable[[Loc, str | int], str],
) -> Iterator[tuple[Loc, str]]:
    """Conflicts between options, as locations and messages.

    These are: names and matches that occur twice, upstreams of routes (`uses`) that do not exist, a `max_body` that is
    larger than `limits.held`, and a path or a name of the `probe` that others have. `None` stands for an option that is
    not valid by itself, and for no probe. `shown` returns a name or a size as a message may show it.
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
        most, least = shown(("limits", "held"), held), shown(("max_body",), max_body)
        yield ("limits", "held"), f"expected at least max_body ({least}), got {most}"

    if probe is not None:
        for index, match in enumerate(matches):
            if match is not None and match.path == probe:
                yield ("probe", "path"), f"expected a path that no route has, got that of routes[{index}]"
        for section, column in (("upstreams", upstreams), ("routes", routes)):
            if PROBE in column:
                loc = (section, column.index(PROBE), "name")
                yield loc, f"expected another name: {PROBE} is the name of the probe"

    names = [name for name in upstreams if name is not None]
    if not names or len(names) < len(upstreams):
        return
    known = ", ".join(quoted(shown(("upstreams", index, "name"), name))[1:-1] for index, name in enumerate(names))
    for index, targets in enumerate(uses):
        for number, use in enumerate(targets):
            place: Loc = ("routes", index, "upstream", number)
            if use is not None and use not in names:
                yield place, f"expected the name of an upstream ({known}), got {quoted(shown(place, use))}"
            elif use is not None and use in targets[:number]:
                yield place, f"expected each upstream once, got {quoted(shown(place, use))} again"


def conflicts_of_clients(clients: Sequence[Client | None], routes: Sequence[Route | None]) -> Iterator[tuple[Loc, str]]:
    """Conflicts between clients, and between clients and routes, as locations and messages.

    These are: names and keys that occur twice, routes that do not exist, and a limit of tokens where the tokens of
    streams are not known. `None` stands for a client or a route that is not valid by itself.
    """
    names: dict[str, int] = {}
    owners: dict[str, int] = {}
    known = [route.name for route in routes if route is not None]
    for index, client in enumerate(clients):
        if client is None:
            continue
        if (first := names.setdefault(client.name, index)) != index:
            yield ("clients", index, "name"), f"expected a unique name, got that of clients[{first}]"
        shared = [first for digest in client.digests if (first := owners.setdefault(digest, index)) != index]
        if shared:
            option = "keys" if client.keys else "keys_file"
            yield ("clients", index, option), f"expected keys of its own, got one of clients[{shared[0]}]"
        missing = [name for name in client.routes if name not in known]
        if missing and None not in routes:
            written = f"the names of routes ({', '.join(known)}), got {quoted(missing[0])}"
            yield ("clients", index, "routes"), f"expected {written}"
    for index, route in enumerate(routes):
        # What has no limit of tokens, or is never chat, may go without.
        if route is None or route.open or route.usage.request or route.dialect not in ("auto", "chat", "completions"):
            continue
        for client in clients:
            if client is not None and client.limits.tokens and (not client.routes or route.name in client.routes):
                yield (
                    ("routes", index, "name"),
                    f"expected usage: {{request: true}}, because client {client.name} has a limit of tokens",
                )
                break
