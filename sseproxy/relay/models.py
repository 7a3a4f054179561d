"""The models of all endpoints of a route, as one list. It is fetched when a client asks, and kept for a while."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from time import perf_counter
from typing import Final, NamedTuple

import msgspec

from ..errors import ExchangeError, UpstreamError
from ..wire import headers
from ..wire.meaning import UNREADABLE
from .heads import ResponseHead
from .pool import Upstream
from .pump import Peek
from .upstream import Endpoint

log = logging.getLogger(__name__)

# Seconds. A list is fetched again when it is older than this and somebody asks. Requests are routed by it until then.
_FRESH: Final = 10.0
# Seconds that one endpoint may take to list its models.
_TIMEOUT: Final = 5.0
# Bytes of a list, and endpoints of an upstream that are asked at most. Those of one upstream have the same models.
_MAX_LIST: Final = 1024 * 1024
_MAX_ASKED: Final = 16
# Lists for different credentials that are kept.
_MAX_KEPT: Final = 64
_PATH: Final = re.compile(r"/models/?")
_CREDENTIALS: Final = (b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key")


class _Model(msgspec.Struct, gc=False):
    id: str


class _Models(msgspec.Struct, gc=False):
    data: list[msgspec.Raw]


_decode_models: Final = msgspec.json.Decoder(_Models).decode
_decode_model: Final = msgspec.json.Decoder(_Model).decode


class Listed(NamedTuple):
    """The models of each upstream that has told them, by its name: each model's object, by its id."""

    at: float
    of: dict[str, dict[str, bytes]]

    @property
    def is_fresh(self) -> bool:
        return perf_counter() - self.at < _FRESH

    def upstreams_with(self, model: str) -> set[str]:
        """The upstreams that have `model`."""
        return {name for name, models in self.of.items() if model in models}


def asks_for_models(method: str, path: str, prefix: str) -> bool:
    """Whether a request for `path`, on a route with `prefix`, asks for the list of models."""
    return method == "GET" and _PATH.fullmatch(path.removeprefix(prefix.rstrip("/"))) is not None


class ModelLists:
    """The lists of models of the `upstreams` of one route.

    The credentials of clients are sent to the upstream `meant` only, or to none.
    """

    def __init__(self, upstreams: Sequence[Upstream], meant: str | None) -> None:
        self._upstreams = upstreams
        self._meant = meant
        self._ours = all(
            endpoint.credential is not None for up in upstreams if up.name == meant for endpoint in up.endpoints
        )
        self._kept: dict[bytes, Listed] = {}
        self._fetching: dict[bytes, asyncio.Task[Listed]] = {}

    @property
    def differ(self) -> bool:
        """Whether there are several upstreams, whose models may differ."""
        return len(self._upstreams) > 1

    async def get(self, fields: headers.Fields) -> Listed:
        """The lists, not older than ten seconds, as the client with these `fields` may see them."""
        credentials = self._credentials(fields)
        key = _key_of(credentials)
        kept = self._kept.get(key)
        if kept is not None and kept.of and kept.is_fresh:
            return kept
        fetching = self._fetching.get(key)
        if fetching is None:
            fetching = asyncio.get_running_loop().create_task(self._fetch(key, credentials))
            self._fetching[key] = fetching
            fetching.add_done_callback(lambda _: self._fetching.pop(key, None))
        # A client that leaves does not end what others wait for, too.
        return await asyncio.shield(fetching)

    def known(self, fields: headers.Fields) -> Listed | None:
        """The lists as they are known, however old. Empty if they were asked for lately and nobody has told any."""
        kept = self._kept.get(_key_of(self._credentials(fields)))
        return kept if kept is not None and (kept.of or kept.is_fresh) else None

    async def close(self) -> None:
        for task in list(self._fetching.values()):
            task.cancel()
        await asyncio.gather(*self._fetching.values(), return_exceptions=True)

    def _credentials(self, fields: headers.Fields) -> list[headers.Field]:
        """What of the client's credentials its list depends on: nothing if all endpoints have a key of ours."""
        if self._ours:
            return []
        return [(name, value) for name in _CREDENTIALS for value in fields.named(name)]

    async def _fetch(self, key: bytes, credentials: Sequence[headers.Field]) -> Listed:
        asked = [(up, endpoint) for up in self._upstreams for endpoint in up.usable()[:_MAX_ASKED]]
        lists = await asyncio.gather(
            *(_models_of(endpoint, credentials if up.name == self._meant else []) for up, endpoint in asked)
        )
        found: dict[str, dict[str, bytes]] = {}
        for (upstream, _), models in zip(asked, lists, strict=True):
            if models is not None:
                found[upstream.name] = models | found.get(upstream.name, {})
        listed, before = Listed(perf_counter(), found), self._kept.get(key)
        # What was told before is better than nothing. Nothing is kept as well, so that not each request asks again.
        if found or before is None or not before.of:
            while key not in self._kept and len(self._kept) >= _MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = listed
        if not found:
            raise UpstreamError("answer", "No endpoint has listed its models.")
        return listed


def merged(lists: Iterable[dict[str, bytes]], allowed: Callable[[str], bool] | None = None) -> bytes:
    """One list in the format of OpenAI's API. Of models with the same id, the first one is in it.

    If only some are `allowed`, the others are left out.
    """
    models: dict[str, bytes] = {}
    for more in lists:
        models |= {name: said for name, said in more.items() if name not in models}
    if allowed is not None:
        models = {name: said for name, said in models.items() if allowed(name)}
    return b'{"object":"list","data":[' + b",".join(models.values()) + b"]}\n"


def _key_of(credentials: Sequence[headers.Field]) -> bytes:
    return blake2b(repr(credentials).encode(), digest_size=16).digest() if credentials else b""


async def _models_of(endpoint: Endpoint, credentials: Sequence[headers.Field]) -> dict[str, bytes] | None:
    """The models of `endpoint`, by their ids. None if it does not tell them."""
    try:
        async with asyncio.timeout(_TIMEOUT):
            return _read(await _body_of(endpoint, credentials))
    except (TimeoutError, ExchangeError, *UNREADABLE) as error:
        log.warning("%s has not listed its models: %s", endpoint.label, type(error).__name__)
        return None


async def _body_of(endpoint: Endpoint, credentials: Sequence[headers.Field]) -> bytes:
    connection = endpoint.reuse(lambda: None) or await endpoint.connect(lambda: None)
    try:
        sent = [endpoint.credential] if endpoint.credential is not None else credentials
        fields = [(b"Host", endpoint.host), (b"Accept", b"application/json"), *sent]
        connection.protocol.expect_head("GET", lambda head: None)
        path = (endpoint.base_path + "/models").encode("utf-8", "surrogateescape")
        connection.transport.write(headers.serialize(b"GET %b HTTP/1.1" % path, fields))
        head: ResponseHead = await connection.protocol.head()
        if head.status != 200 or not head.framing:
            raise UpstreamError("answer")
        peek = Peek(connection, head.framing, _MAX_LIST)
        body = await peek.look()
        if peek.whole:
            connection.release(reusable=head.reusable)
        return body
    finally:
        connection.abort()


def _read(body: bytes) -> dict[str, bytes]:
    return {_decode_model(raw).id: bytes(raw) for raw in _decode_models(body).data}
