"""Who calls: finds the client whose key a request has, and checks what the client may use.

Without `clients` in the configuration there is none of this. With them, a request needs a key, except on routes that
are open to everybody.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from time import perf_counter
from typing import TYPE_CHECKING, Final

from ..errors import RequestError
from ..wire.credentials import digest, public_part
from ..wire.dialects import models_in
from ..wire.form import FormReader
from ..wire.headers import client_block
from ..wire.request import ModelAudit, RequestReader
from .routes import said, some

if TYPE_CHECKING:
    from ..config import Client as Options
    from ..config import Route

log = logging.getLogger(__name__)

# So many wrong keys of one address are answered 401 within so many seconds. A deployment with an old key makes a few.
# Nobody guesses a key of 256 bits: this only keeps those who try from costing much.
_MOST_WRONG: Final = 10
_WRONG_WITHIN: Final = 60.0
# Addresses whose wrong keys are counted at the same time. Each takes about 200 bytes.
_MOST_ADDRESSES: Final = 1_000
# Bytes of a digest by which it is looked up. So many tell nothing about the rest of it, nor about the key.
_PREFIX: Final = 8


class Client:
    """One client: its name, and which models and routes it may use."""

    __slots__ = ("_routes", "models", "name")

    def __init__(self, options: Options) -> None:
        self.name = options.name
        self.models: Sequence[str] = options.models
        """Globs for the models that it may use. Empty means all."""
        self._routes: Sequence[str] = options.routes

    def check_route(self, route: Route) -> None:
        """Raises `RequestError` if it may not use `route`."""
        if self._routes and route.name not in self._routes:
            raise RequestError(
                "route_not_allowed",
                f"This key may not use the route {route.name}; it may use {some(self._routes)}.",
            )

    def check_models(self, named: Iterable[str], *, body_needed: bool) -> None:
        """Raises `RequestError` unless it may use all models that are `named`.

        `body_needed`: the request has a body, so it has to name a model.
        """
        allowed, names = some(self.models), list(named)
        for name in names:
            if not any(fnmatchcase(name, glob) for glob in self.models):
                message = f"This key may not use the model '{said(name)}'; it may use {allowed}."
                raise RequestError("model_not_allowed", message)
        if body_needed and not names:
            message = f"No model can be read in this request; this key may only use {allowed}."
            raise RequestError("model_not_allowed", message)


class Visit:
    """One request of `client`."""

    __slots__ = ("_audit", "client")

    def __init__(self, client: Client) -> None:
        self.client = client
        self._audit: ModelAudit | None = None

    @property
    def reads_body(self) -> bool:
        """Whether the body has to be read before the request is sent."""
        return bool(self.client.models)

    def feeding(self, reader: RequestReader | FormReader) -> Callable[[bytes], None]:
        """What takes the parts of the body that `reader` reads."""
        if not self.client.models:
            return reader.feed
        self._audit = ModelAudit(reader)
        return self._audit.feed

    def check_model(self, path: str, *, read: bool, has_body: bool) -> None:
        """Raises `RequestError` unless it may use the model in `path` and in the body, if that was `read`."""
        if not self.client.models:
            return
        names = models_in(path)
        if read and self._audit is not None:
            if self._audit.twice:
                raise RequestError("model_twice")
            if self._audit.model is not None:
                names.append(self._audit.model)
        self.client.check_models(names if read or not has_body else (), body_needed=has_body)


class Clients:
    """All clients of a worker, by the digests of their keys."""

    def __init__(self, clients: Iterable[Options]) -> None:
        self._by_prefix: dict[bytes, list[tuple[bytes, Client]]] = {}
        for options in clients:
            client = Client(options)
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
