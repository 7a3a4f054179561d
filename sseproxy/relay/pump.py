"""The hot path: forwards a response body from the upstream's transport to the client's, with no task in between.

A read that consists of whole HTTP chunks, as LLM servers send them, is validated and written as it is. For everything
else, the framing is removed and a new one is added. Only after the write, the inspector gets the payload. When a read
was one delta, a `_Run` recognises similar reads by their bytes. `Pump.done` is resolved once: with None when the body
is complete, or with the `ExchangeError` that ended it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter

from ..errors import BrokenBodyError, ExchangeError, InternalError, Truncated, UpstreamError
from ..wire.deltas import DeltaMatcher
from ..wire.framing import LAST_CHUNK, ChunkedDecoder, Framing, decoder, frame, payload_of, whole_chunks
from ..wire.sse import MarkStripper, Stripper
from .clock import Clock
from .downstream import DownstreamProtocol
from .exchange import Exchange
from .inspect import Inspector
from .reads import PlainReads
from .upstream import RelayProtocol, UpstreamConnection

log = logging.getLogger(__name__)


# In a run, the forwarding time is measured for one of so many reads.
_MEASURED = 16


class _Run(PlainReads):
    """A run of similar reads: each is one HTTP chunk with one delta and nothing else, and is forwarded as it is."""

    __slots__ = ("_broke", "_clock", "_exchange", "_upstream", "_write", "matcher")

    def __init__(
        self,
        upstream: RelayProtocol,
        write: Callable[[bytes], None],
        exchange: Exchange,
        clock: Clock,
        broke: Callable[[], None],
    ) -> None:
        super().__init__(upstream)
        self._upstream = upstream
        self._write = write
        self._exchange = exchange
        self._clock = clock
        self._broke = broke
        self.matcher: DeltaMatcher

    def data_received(self, data: bytes) -> None:
        try:
            read_at = perf_counter()
            size = self.matcher.size_of(data)
            if not size:
                self._upstream.read_bounded().take(data)
                return
            # Python 3.11 calls a local variable faster than an attribute that is a slot.
            write, exchange = self._write, self._exchange
            write(data)
            if not exchange.events % _MEASURED:
                exchange.observer.forwarded(perf_counter() - read_at)
            self._clock.touched = read_at
            exchange.generated(size, read_at)
        except Exception:
            # The transport would only log it, and the body would lack what was read.
            log.exception("internal error while a response body was being forwarded")
            self._broke()


class Pump:
    """Forwards one body. `framing_in` is the framing from the upstream, `framing_out` the one to the client. The
    attempt that it comes from began at `began_at`.

    With a `heartbeat`, an event stream that has been silent for so many seconds gets the heartbeat of its API.
    With a `stripper`, usage that the client has not requested is removed.
    """

    __slots__ = (
        "_awaits_token",
        "_began_at",
        "_body",
        "_chunked_out",
        "_clock",
        "_downstream",
        "_exchange",
        "_extendable",
        "_forwarded",
        "_head",
        "_heartbeat",
        "_heartbeat_timer",
        "_inspector",
        "_loop",
        "_reusable",
        "_run",
        "_stripper",
        "_upstream",
        "_verbatim",
        "_write",
        "_written_at",
        "done",
    )

    def __init__(
        self,
        upstream: UpstreamConnection,
        downstream: DownstreamProtocol,
        exchange: Exchange,
        inspector: Inspector,
        clock: Clock,
        *,
        framing_in: Framing,
        framing_out: Framing,
        reusable: bool,
        began_at: float,
        heartbeat: float | None = None,
        stripper: Stripper | None = None,
    ) -> None:
        assert downstream.transport is not None
        self._loop = clock.loop
        self.done: asyncio.Future[None] = self._loop.create_future()
        self._upstream = upstream
        self._downstream = downstream
        self._write = downstream.transport.write
        self._exchange = exchange
        self._forwarded = exchange.observer.forwarded
        self._inspector = inspector
        self._clock = clock
        self._awaits_token = inspector.awaits_token
        self._body = decoder(framing_in)
        self._head = b""
        self._chunked_out = framing_out == "chunked"
        self._extendable = exchange.is_stream and not isinstance(framing_out, int)
        self._reusable = reusable
        self._began_at = began_at
        self._stripper = stripper
        self._heartbeat = heartbeat if self._extendable else None
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._written_at = perf_counter()
        # Whether the next byte from the upstream starts an HTTP chunk, and whole chunks may be forwarded as they are.
        self._verbatim = self._chunked_out and isinstance(self._body, ChunkedDecoder)
        self._run: _Run | None = None

    def start(self, head: bytes) -> None:
        """Takes over both connections. Sends `head`, the response head, in one write with bytes of the body if there
        are some already.
        """
        self._head = head
        self._downstream.pump = self
        if self._heartbeat is not None:
            self._heartbeat_timer = self._loop.call_later(self._heartbeat, self._beat, self._heartbeat)
        if self._awaits_token:
            self._clock.enter("first_token", self._began_at)
        else:
            self._clock.enter("idle", perf_counter())
        self._upstream.protocol.feed_to(self)
        if self._body.done and not self.done.done():
            # It has no bytes, so none will come.
            self._walk(b"", perf_counter())
        self._send_head()

    def _send_head(self) -> None:
        if self._head:
            self._write(self._head)
            self._head = b""

    def data_received(self, data: bytes) -> None:
        """Forwards bytes of the body, as they were read from the upstream, with their framing."""
        try:
            read_at = perf_counter()
            chunks = whole_chunks(data) if self._verbatim else []
            if not chunks:
                self._walk(data, read_at)
                return
            payloads = [payload_of(chunk) for chunk in chunks]
            payload = kept = b"".join(payloads)
            if self._stripper is not None:
                kept = self._stripper.feed(payload)
            if kept:
                # If the framing is larger than the payload, as that of many tiny chunks is, they become one chunk.
                as_it_is = kept == payload and len(data) <= 2 * len(payload)
                self._forward(data if as_it_is else frame(kept), len(kept), read_at)
            matcher, known = self._inspector.matcher, 0
            while matcher is not None and known < len(chunks) and matcher.size_of(chunks[known]):
                self._clock.touched = read_at
                self._exchange.generated(0, read_at)
                known += 1
            if payloads[known:-1]:
                self._look(b"".join(payloads[known:-1]), read_at)
            if payloads[known:]:
                # By itself, so that the inspector can make a matcher of it.
                self._look(payloads[-1], read_at)
            if kept == payload and self._verbatim and self._inspector.matcher is not None:
                self._begin_run(self._inspector.matcher)
        except Exception:
            # The transport would only log it, and the body would lack what was read.
            log.exception("internal error while a response body was being forwarded")
            self._broke()

    def _broke(self) -> None:
        """Ends the body after an internal error. With TLS, uvloop would go on reading, and bytes would be missing."""
        self.fail(InternalError())

    def _begin_run(self, matcher: DeltaMatcher) -> None:
        upstream = self._upstream.protocol
        if self._run is None:
            self._run = _Run(upstream, self._write, self._exchange, self._clock, self._broke)
        self._run.matcher = matcher
        upstream.read_plainly(self._run)

    def _walk(self, data: bytes, read_at: float) -> None:
        body, broken = self._body, ""
        try:
            payload = body.feed(data)
        except BrokenBodyError as error:
            payload, broken = error.payload, str(error)
        kept = payload
        if self._stripper is not None:
            kept = self._stripper.feed(payload)
            if body.done:
                kept += self._stripper.end()
        out = frame(kept) if self._chunked_out and kept else kept
        if body.done and self._chunked_out:
            out += LAST_CHUNK
        if out:
            self._forward(out, len(kept), read_at)
        if payload:
            self._look(payload, read_at)
        if broken:
            self.fail(UpstreamError("protocol", cause=broken))
        elif body.done:
            self._complete(reusable=self._reusable and not body.excess)
        else:
            self._verbatim = self._chunked_out and isinstance(body, ChunkedDecoder) and body.at_start

    def _forward(self, out: bytes, size: int, read_at: float) -> None:
        """Writes `out` to the client: `size` bytes of the body, with framing."""
        if self._head:
            out, self._head = self._head + out, b""
        self._write(out)
        self._written_at = read_at
        self._forwarded(perf_counter() - read_at)
        self._exchange.response_bytes += size

    def _look(self, payload: bytes, read_at: float) -> None:
        try:
            progress = self._inspector.look(payload, read_at)
        except Exception:
            # An error of the inspector must not stop the bytes.
            log.exception("internal error while a response body was being inspected; it is still forwarded")
            self._inspector = self._inspector.failed()
            progress = True
        if progress and self._awaits_token:
            self._awaits_token = False
            self._clock.enter("idle", read_at)
        elif progress:
            self._clock.touched = read_at

    def _beat(self, interval: float) -> None:
        now = perf_counter()
        due = max(self._written_at, self._clock.touched) + interval
        if now >= due:
            due = now + interval
            beat = self._inspector.heartbeat()
            if beat and not self._downstream.writing_paused:
                if not self._inspector.begun and not isinstance(self._stripper, MarkStripper):
                    self._stripper = MarkStripper(self._stripper)
                self._write(frame(beat) if self._chunked_out else beat)
                self._exchange.response_bytes += len(beat)
                self._written_at = now
        self._heartbeat_timer = self._loop.call_later(due - now, self._beat, interval)

    def connection_lost(self, clean: bool) -> None:
        """The upstream's connection has ended."""
        if clean and self._body.end():
            held = self._stripper.end() if self._stripper is not None else b""
            out = (frame(held) if self._chunked_out and held else held) + (LAST_CHUNK if self._chunked_out else b"")
            if out:
                self._forward(out, len(held), perf_counter())
            self._complete(reusable=False)
        else:
            self.fail(Truncated("the connection was closed" if clean else "the connection was reset"))

    def pause_writing(self) -> None:
        """The client's write buffer is full: stops reading from the upstream."""
        if not self.done.done():
            self._upstream.protocol.pause()
            self._clock.client_blocked(self._downstream.stall_detector())

    def resume_writing(self) -> None:
        if not self.done.done():
            self._clock.client_unblocked()
            self._upstream.protocol.resume()

    def _complete(self, *, reusable: bool) -> None:
        if not self.done.done():
            self.stop()
            self._upstream.release(reusable=reusable)
            try:
                self._inspector.end()
            except Exception:
                # The body is complete, so this is not an error of the exchange.
                log.exception("internal error while the end of a response body was being inspected; it was forwarded")
                self._inspector.failed()
            self.done.set_result(None)

    def fail(self, error: ExchangeError) -> None:
        """Ends the body early, with `error`. The client will notice that it is not complete.

        In an event stream, an error event is sent first, if the bytes so far end where an event can begin. Nothing is
        sent if all of the body has been read: the client may have its end already.
        """
        if self.done.done():
            return
        try:
            self.stop()
            self._send_head()
            self._upstream.abort()
            if self._extendable and not self._body.done and self._downstream.gone_at is None:
                event = self._inspector.error_event(error)
                if event:
                    self._write(frame(event) if self._chunked_out else event)
                    self._exchange.response_bytes += len(event)
        finally:
            self.done.set_exception(error)

    def stop(self) -> None:
        """Stops forwarding, whether the body has ended or not."""
        self._downstream.pump = None
        self._verbatim = False
        # This breaks a reference cycle.
        self._run = None
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()


class Peek:
    """Reads the beginning of a body. After `put_back`, the next sink gets the same bytes again."""

    def __init__(self, upstream: UpstreamConnection, framing: Framing, limit: int) -> None:
        self._protocol = upstream.protocol
        self._limit = limit
        self._body = decoder(framing)
        self._raw = self._payload = b""
        self._seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def look(self) -> bytes:
        """Waits for the whole body, or for `limit` bytes of it, and returns that without its framing."""
        self._protocol.feed_to(self)
        await self._seen
        return self._payload

    def put_back(self) -> None:
        self._protocol.unread(self._raw)

    @property
    def whole(self) -> bool:
        """Whether the whole body has been read, and no bytes came after it."""
        return self._body.done and not self._body.excess

    def data_received(self, data: bytes) -> None:
        self._raw += data
        try:
            self._payload += self._body.feed(data)
        except BrokenBodyError as error:
            self._payload += error.payload
            self._enough()
        if self._body.done or len(self._raw) >= self._limit:
            self._enough()

    def connection_lost(self, clean: bool) -> None:
        self._enough()

    def _enough(self) -> None:
        if not self._seen.done():
            self._seen.set_result(None)
