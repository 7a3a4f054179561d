"""Who calls: finds the client whose key a request has, checks what the client may use, and counts what it uses.

From before it is sent until its end, a request counts as one of the client's active requests, and the tokens that it
may need are reserved.
Then the tokens that the upstream has reported are charged. If it has reported none, an estimate is charged. No stream
is cut because of a limit. So a limit of tokens may be exceeded, if the last requests use more than was reserved.

Without `clients` in the configuration there is none of this. With them, a request needs a key, except on routes that
are open to everybody.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from time import (
    perf_counter,
    time,  # noqa: TID251 - a timestamp is exported
)
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from ..errors import LimitExceeded, RequestError
from ..ledger import windows
from ..ledger.remote import Limits, Machine, Remote, Unavailable
from ..ledger.table import Columns, Count
from ..ledger.windows import Use, Window
from ..wire.credentials import digest, public_part
from ..wire.demand import OUTPUT, Demand
from ..wire.dialects import Allowance, Style, models_in
from ..wire.form import FormReader
from ..wire.headers import Field, Fields, client_block
from ..wire.meaning import OTHER_MODELS
from ..wire.request import ModelAudit, RequestReader
from .routes import said, some

if TYPE_CHECKING:
    from ..config import Client as Options
    from ..config import Route
    from ..config.values import Rate
    from ..ledger.table import Row
    from .exchange import Exchange

log = logging.getLogger(__name__)

# So many wrong keys of one address are answered 401 within so many seconds. A deployment with an old key makes a few.
# Nobody guesses a key of 256 bits: this only keeps those who try from costing much.
_MOST_WRONG: Final = 10
_WRONG_WITHIN: Final = 60.0
# Addresses whose wrong keys are counted at the same time. Each takes about 200 bytes.
_MOST_ADDRESSES: Final = 1_000
# Bytes of a digest by which it is looked up. So many tell nothing about the rest of it, nor about the key.
_PREFIX: Final = 8
_OTHER_MODELS: Final = " and ".join(sorted(OTHER_MODELS))
# As in `wire.demand`, for answers whose tokens are not known.
_BYTES_OF_A_TOKEN: Final = 4


def counted(clients: Iterable[Options]) -> list[str]:
    """The names in the ledger of what is counted of `clients`: of each, only what has a limit."""
    found: list[str] = []
    for client in clients:
        limits = client.limits
        if limits.active_requests is not None:
            found.append(_active(client.name))
        if limits.requests is not None:
            found += windows.names(_requests(client.name), limits.requests.seconds)
        if limits.tokens is not None:
            found += [_reserved(client.name), *windows.names(_tokens(client.name), limits.tokens.seconds)]
    return found


def _active(client: str) -> str:
    return f"client {client}"


def _requests(client: str) -> str:
    return f"requests {client}"


def _tokens(client: str) -> str:
    return f"tokens {client}"


def _reserved(client: str) -> str:
    return f"reserved {client}"


class Uses(msgspec.Struct, frozen=True, gc=False):
    """What a client uses: how many requests are active, and what it has used within a time. None without a limit."""

    active: int
    requests: Use | None
    tokens: Use | None


class Client:
    """One client: its name, which models and routes it may use, and how much. `row` is the worker's in the ledger."""

    __slots__ = (
        "_active",
        "_columns",
        "_requests",
        "_tokens",
        "counts_tokens",
        "has_rates",
        "is_limited",
        "models",
        "name",
        "routes",
    )

    def __init__(self, options: Options, row: Row) -> None:
        self.name = name = options.name
        self.models: Sequence[str] = options.models
        """Globs for the models that it may use. Empty means all."""
        self.routes: Sequence[str] = options.routes
        """The names of those that it may use. Empty means all."""
        # Each limit, with what counts towards it. None if it is off.
        most, columns = options.limits, list[Count]()
        self._active: tuple[int, Count] | None = None
        if most.active_requests is not None:
            self._active = most.active_requests, row.count(_active(name))
            columns.append(self._active[1])
        self._requests: tuple[Rate, Window[Count]] | None = None
        if most.requests is not None:
            self._requests = most.requests, row.window(_requests(name), most.requests.seconds)
            columns += self._requests[1].columns
        self._tokens: tuple[Rate, Window[Count], Count] | None = None
        if most.tokens is not None:
            used, reserved = row.window(_tokens(name), most.tokens.seconds), row.count(_reserved(name))
            self._tokens = most.tokens, used, reserved
            columns += [*used.columns, reserved]
        # All of these, to be read in one step.
        self._columns = Columns(columns) if columns else None
        self.counts_tokens = self._tokens is not None
        """Whether its tokens are limited."""
        self.has_rates = self.counts_tokens or self._requests is not None
        """Whether its requests or tokens are limited within a time."""
        self.is_limited = self.has_rates or self._active is not None
        """Whether it has any limit."""

    def uses(self) -> Uses:
        """What it uses, and has used so far, of what is limited, with what is reserved."""
        if self._columns is None:
            return _NOTHING
        cells, now = iter(self._columns.read()), perf_counter()
        active, requests, tokens = 0, None, None
        if self._active is not None:
            active = sum(next(cells))
        if self._requests is not None:
            requests = self._requests[1].use(next(cells), next(cells), now)
        if self._tokens is not None:
            even, odd, reserved = cells
            # Most of what is reserved will have been used soon.
            tokens = self._tokens[1].use(even, odd, now, sum(reserved))
        return Uses(active, requests, tokens)

    def room(self, uses: Uses, tokens: int) -> int:
        """How many tokens to reserve for a request that may need `tokens`. Raises `LimitExceeded` above a limit.

        Of a request that needs more than the limit, all of the limit is reserved, so that it is not refused for ever.
        """
        if self._active is not None and uses.active >= self._active[0]:
            raise self.exceeded("active_requests", uses, tokens)
        if self._requests is not None and uses.requests is not None:
            if uses.requests.wait(self._requests[0].number, 1):
                raise self.exceeded("requests", uses, tokens)
        if self._tokens is not None and uses.tokens is not None:
            most = self._tokens[0].number
            tokens = min(tokens, most)
            if tokens and uses.tokens.wait(most, tokens):
                raise self.exceeded("tokens", uses, tokens)
        return tokens

    def most(self, tokens: int) -> int:
        """How many of `tokens` are reserved at most."""
        return 0 if self._tokens is None else min(tokens, self._tokens[0].number)

    def room_beside(self, uses: Uses, tokens: int) -> None:
        """As `room`, for a request that is among the active ones already. `uses` was read before it was."""
        if self._active is not None and self._active[1].total() > self._active[0]:
            raise self.exceeded("active_requests", uses, tokens)
        for limit, use, needs in (("requests", uses.requests, 1), ("tokens", uses.tokens, tokens)):
            rate = getattr(self.limits, limit)
            if use is not None and needs and use.wait(rate[0], needs):
                raise self.exceeded(limit, uses, tokens)

    def exceeded(self, limit: str, uses: Uses, tokens: int) -> LimitExceeded:
        """The error for a request that needs `tokens` where `limit` is reached. `uses` is what was used before."""
        if limit == "requests" and self._requests is not None and uses.requests is not None:
            rate = self._requests[0]
            return LimitExceeded(limit, _spelled(rate, limit), uses.requests.wait(rate.number, 1))
        if limit == "tokens" and self._tokens is not None and uses.tokens is not None:
            rate = self._tokens[0]
            return LimitExceeded(limit, _spelled(rate, limit), uses.tokens.wait(rate.number, tokens))
        most = 0 if self._active is None else self._active[0]
        return LimitExceeded(limit, f"{most} active requests", 1.0)

    def count(self) -> None:
        """Counts a request towards the limit on requests."""
        if self._requests is not None:
            self._requests[1].add(1, perf_counter())

    def take(self, tokens: int) -> None:
        """Counts a request as active, and reserves `tokens` for it."""
        if self._active is not None:
            self._active[1].add(1)
        if self._tokens is not None:
            self._tokens[2].add(tokens)

    def machine(self) -> Machine:
        """What it has on this machine now."""
        active = 0 if self._active is None else self._active[1].total()
        return Machine(active, 0 if self._tokens is None else self._tokens[2].total())

    @property
    def limits(self) -> Limits:
        """Its limits, as the server is asked about them."""
        return Limits(
            None if self._active is None else self._active[0],
            None if self._requests is None else self._requests[0],
            None if self._tokens is None else self._tokens[0],
        )

    def give_back(self, reserved: int) -> None:
        """Counts a request as active no more, and releases what was reserved for it."""
        if self._active is not None:
            self._active[1].add(-1)
        if self._tokens is not None:
            self._tokens[2].add(-reserved)

    def charge(self, tokens: int) -> None:
        """Counts `tokens` as used now."""
        if self._tokens is not None and tokens:
            self._tokens[1].add(tokens, perf_counter())

    def allowances(self, uses: Uses, requests: int, tokens: int) -> list[Allowance]:
        """What it may still use, if so many `requests` and `tokens` have been used in addition to `uses`."""
        found: list[Allowance] = []
        if self._requests is not None and uses.requests is not None:
            found.append(_allowance("requests", uses.requests, requests, self._requests[0].number))
        if self._tokens is not None and uses.tokens is not None:
            found.append(_allowance("tokens", uses.tokens, tokens, self._tokens[0].number))
        return found

    def check_route(self, route: Route) -> None:
        """Raises `RequestError` if it may not use `route`."""
        if self.routes and route.name not in self.routes:
            raise RequestError(
                "route_not_allowed",
                f"This key may not use the route {route.name}; it may use {some(self.routes)}.",
            )

    def may_use(self, model: str) -> bool:
        """Whether it may use `model`."""
        return not self.models or any(fnmatchcase(model, glob) for glob in self.models)

    def check_models(self, named: Iterable[str], *, body_needed: bool) -> None:
        """Raises `RequestError` unless it may use all models that are `named`.

        `body_needed`: the request has a body, so it has to name a model.
        """
        names = list(named)
        for name in names:
            if not self.may_use(name):
                message = f"This key may not use the model '{said(name)}'; it may use {some(self.models)}."
                raise RequestError("model_not_allowed", message)
        if body_needed and not names:
            message = f"No model can be read in this request; this key may only use {some(self.models)}."
            raise RequestError("model_not_allowed", message)

    def check_other_models(self, named: Sequence[str] | None) -> None:
        """Raises `RequestError` unless it may use all models that are `named` for the case that the first one fails.

        None: what the body names cannot be read.
        """
        if named is None:
            message = (
                "The models that this body names cannot be read: the body must be a JSON object or a form, "
                f"and {_OTHER_MODELS} must be lists of names, in lower case; "
                f"this key may only use {some(self.models)}."
            )
            raise RequestError("model_not_allowed", message)
        self.check_models(named, body_needed=False)


def _allowance(kind: Literal["requests", "tokens"], use: Use, more: int, limit: int) -> Allowance:
    reset = 2 * use.seconds - use.elapsed if more else use.reset
    return Allowance(kind, limit, max(0, limit - use.total - more), reset)


def _spelled(rate: Rate, what: str) -> str:
    unit = {1: "second", 60: "minute", 3600: "hour"}.get(rate.seconds, "day")
    return f"{rate.number} {what} per {unit}"


def unreported(exchange: Exchange, input: int, output: int) -> int:
    """How many tokens `exchange` has probably used in addition to those that the upstream has reported.

    `input` is what its text has, and `output` is what it may generate. If it was never sent, or was answered with an
    error, it has used none. If it was sent, its input was read, even if the client has left since. Of a stream, each
    event with content counts as a token.

    A request that fetches a response has no input of its own. Only if the response is a stream without usage, because
    the client may have left before the end, its events count, each time that it is fetched.
    """
    if exchange.repeats or (exchange.head_at is not None and not exchange.succeeded):
        return 0
    usage = exchange.usage
    if exchange.fetches:
        return exchange.deltas if usage is None and exchange.is_stream else 0
    if not exchange.request_bytes:
        return 0
    if usage is None or usage.is_zero:
        told_input = told_output = False
    else:
        told_input, told_output = usage.input is not None, usage.output is not None
        if usage.seconds is not None and not told_input:
            # Audio that the API counts in seconds costs no tokens.
            return 0
    if told_output or exchange.head_at is None:
        seen = 0
    elif exchange.is_stream and exchange.unread is None:
        seen = exchange.deltas
    else:
        seen = min(exchange.response_bytes // _BYTES_OF_A_TOKEN, output)
    return (0 if told_input else input) + seen


_NOTHING: Final = Uses(0, None, None)


class Visit:
    """One request of `client`: what it may use, what was reserved for it, and what it has used.

    `server` counts what all machines use. None if there is only this one.
    """

    __slots__ = ("_audit", "_counted", "_demand", "_input", "_output", "_reserved", "_server", "_uses", "client")

    def __init__(self, client: Client, server: Remote | None = None) -> None:
        self.client = client
        self._server = server if client.is_limited else None
        self._audit: ModelAudit | None = None
        self._demand: Demand | None = None
        # What it may need, if it generates anything.
        self._input = self._output = 0
        self._uses = _NOTHING
        # How many tokens are reserved. None if nothing is taken.
        self._reserved: int | None = None
        # Whether the request was let in.
        self._counted = False

    def reads_body(self, *, generates: bool) -> bool:
        """Whether the body has to be read before the request is sent. `generates`: its text is the input of a model."""
        return bool(self.client.models) or (generates and self.client.counts_tokens)

    def feeding(self, reader: RequestReader | FormReader, fields: Fields) -> Callable[[bytes], None]:
        """What takes the parts of the body that `reader` reads, of a request with these `fields`."""
        feed = reader.feed
        if self.client.models:
            self._audit = ModelAudit(reader, fields)
            feed = self._audit.feed
        # A form has files, which are no text.
        if not self.client.counts_tokens or isinstance(reader, FormReader):
            return feed
        self._demand = Demand(reader, feed)
        return self._demand.feed

    def check_model(self, path: str, *, read: bool, has_body: bool) -> None:
        """Raises `RequestError` unless it may use the model in `path` and in the body, if that was `read`."""
        if not self.client.models:
            return
        names = models_in(path)
        if read and self._audit is not None:
            if self._audit.twice:
                raise RequestError("model_twice")
            self.client.check_other_models(self._audit.others)
            if self._audit.model is not None:
                names.append(self._audit.model)
        self.client.check_models(names if read or not has_body else (), body_needed=has_body)

    def begin(self, *, generates: bool, reports: bool) -> Awaitable[None] | None:
        """Counts the request, and reserves what it may need if it `generates` anything. Raises `LimitExceeded`.

        `reports`: its answer may report tokens, as that of embeddings does. So one is reserved: it is refused only if
        none are left. Returns what has to be awaited, if a server has to be asked.
        """
        if generates:
            self._output = OUTPUT
            if self._demand is not None:
                self._input, self._output = self._demand.input, self._demand.output
        self._demand = self._audit = None
        client, tokens = self.client, (self._input + self._output) or int(reports)
        self._uses = client.uses()
        if self._server is not None:
            return self._ask(self._server, client.most(tokens))
        tokens = client.room(self._uses, tokens)
        self._reserved = tokens
        client.take(tokens)
        self._let_in()
        return None

    async def _ask(self, server: Remote, tokens: int) -> None:
        """Takes on this machine what the request needs, and asks the server whether that is within the limits."""
        client, here = self.client, self._uses
        self._reserved = tokens
        client.take(tokens)
        try:
            limit, requests, used = await server.admit(client.name, client.limits, tokens, client.machine)
        except Unavailable:
            if server.refuses:
                raise RequestError("ledger") from None
            client.room_beside(here, tokens)
        else:
            if used is not None:
                # The server's answer includes this request's own tokens.
                used = Use.of(used.present - tokens, used.last, used.elapsed, used.seconds)
            self._uses = Uses(here.active, requests, used)
            if limit:
                raise client.exceeded(limit, self._uses, tokens)
        self._let_in()

    def _let_in(self) -> None:
        self.client.count()
        self._counted = True

    def release(self) -> None:
        """Releases what `begin` has counted and reserved."""
        if self._reserved is not None:
            self.client.give_back(self._reserved)
            self._reserved = None

    def settle(self, exchange: Exchange) -> None:
        """Charges what was used, if the request was counted. Call it before `release`."""
        if self._reserved is None:
            return
        usage = exchange.usage
        if usage is not None and usage.input and usage.output:
            used = usage.input + usage.output
        else:
            if self._output or exchange.fetches:
                exchange.estimated = unreported(exchange, self._input, self._output)
            reported = 0 if usage is None else (usage.input or 0) + (usage.output or 0)
            used = reported + exchange.estimated
        self.client.charge(used)
        if self._server is not None:
            self._server.settle(self.client.name, used if self.client.counts_tokens else 0)

    def allowances(self, style: Style) -> list[Field] | None:
        """The fields that tell the client what it could still use when this request began. None if nothing is limited.

        They are known only after `begin`.
        """
        if not self.client.has_rates:
            return None
        requests, tokens = (1, self._reserved or 0) if self._counted else (0, 0)
        return style.allowances(self.client.allowances(self._uses, requests, tokens), time())


class Clients:
    """All clients of a worker, by the digests of their keys. `row` is the worker's row in the ledger."""

    def __init__(self, clients: Iterable[Options], row: Row, server: Remote | None = None) -> None:
        self.server = server
        self._by_prefix: dict[bytes, list[tuple[bytes, Client]]] = {}
        for options in clients:
            client = Client(options, row)
            for spelled in options.digests:
                known = bytes.fromhex(spelled)
                self._by_prefix.setdefault(known[:_PREFIX], []).append((known, client))
        self._wrong = WrongKeys()

    def with_key(self, key: bytes) -> Client | None:
        """The client that has `key`."""
        asked = digest(key)
        for known, client in self._by_prefix.get(asked[:_PREFIX], ()):
            if hmac.compare_digest(known, asked):
                return client
        return None

    def caller(self, keys: set[bytes], address: Callable[[], str]) -> Client:
        """The client that sends a request with `keys`. `address` returns the address of the client.

        Raises `RequestError` if there is no key, if it is wrong, or if there are different ones.
        """
        if not keys:
            raise RequestError("missing_api_key")
        if len(keys) > 1:
            raise RequestError("invalid_api_key", "There are two different keys in this request.")
        (key,) = keys
        client = self.with_key(key)
        if client is None:
            raise self._wrong.refusal(address(), public_part(key))
        return client


class WrongKeys:
    """Counts the wrong keys of each address, an IPv4 address or a /64 network of IPv6, within a minute.

    Right keys are not looked at here: behind a balancer, all clients may have one address.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        # For each address, how many there were, and when the first one was. The oldest comes first.
        self._of: dict[str, tuple[int, float]] = {}

    def refusal(self, address: str, key: str | None) -> RequestError:
        """The answer to a wrong key from `address`. `key` is what a log may name of it."""
        block, now = client_block(address), self._clock()
        number, since = self._of.get(block, (0, now))
        if now - since >= _WRONG_WITHIN:
            number, since = 0, now
        if not number:
            self._of.pop(block, None)
            if len(self._of) >= _MOST_ADDRESSES:
                del self._of[next(iter(self._of))]
        number += 1
        self._of[block] = number, since
        cause = None if key is None else f"the key {key}"
        if number <= _MOST_WRONG:
            return RequestError("invalid_api_key", cause=cause)
        if number == _MOST_WRONG + 1:
            log.warning(
                "%d wrong keys came from %s within a minute: further ones are answered 429", _MOST_WRONG, block or "?"
            )
        error = RequestError("too_many_wrong_keys", cause=cause)
        error.retry_after = since + _WRONG_WITHIN - now
        return error
