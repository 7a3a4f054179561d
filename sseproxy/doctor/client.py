"""The doctor's HTTP client: it sends one request, and notes when exactly each byte of the answer came.

It speaks HTTP/1.1, as most SDKs do, and offers what they offer. HTTP libraries would hide what matters here: when the
head came, where a read ended, whether the connection was closed or reset.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import zlib
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import Final, NamedTuple, cast

import msgspec
from yarl import URL

from ..errors import BrokenBodyError, CannotExamine, ProtocolError
from ..wire.dialects import dialect_of
from ..wire.framing import BodyDecoder, decoder, response_framing
from ..wire.headers import Fields, check_head
from ..wire.sse import EventParser
from .observed import End, Event, Stream
from .script import Asked, Mark, Writer, is_unaltered, mark_in, text_in

# Seconds, for DNS, TCP and TLS.
_CONNECT_TIME: Final = 10.0
# Bytes. A longer head or event, or a larger answer, is none that was asked for.
_MAX_HEAD: Final = 64 * 1024
_MAX_EVENT: Final = 1 << 20
_MAX_ANSWER: Final = 16 << 20
# Characters of an error page that are shown.
_SHOWN: Final = 200
# A cookie may let somebody in, and nothing here depends on one.
_UNTOLD: Final = frozenset({b"set-cookie"})
_STATUS_LINE: Final = re.compile(rb"HTTP/(1\.[01]) ([0-9]{3})[ \r]")
_CHAT: Final = dialect_of("/chat/completions")


class _Said(msgspec.Struct):
    message: str


class _Error(msgspec.Struct):
    """An error in the style of OpenAI's API."""

    error: _Said


class Target(NamedTuple):
    """Where to ask: the URL for chat completions, a TLS context for https, a key for the API, and the probe's token."""

    url: URL
    tls: ssl.SSLContext | None
    key: str | None
    token: str

    @property
    def secrets(self) -> list[str]:
        """The texts that no report may have."""
        return [secret for secret in (self.key, self.token) if secret]

    def head(self, length: int, *, expect: bool = False) -> bytes:
        """The head of a request with a body of `length` bytes."""
        lines = [
            f"POST {self.url.raw_path_qs} HTTP/1.1",
            f"Host: {self.url.raw_authority}",
            "User-Agent: sseproxy-doctor",
            "Accept: text/event-stream, application/json",
            # What SDKs offer.
            "Accept-Encoding: gzip, deflate",
            "Content-Type: application/json",
            f"Content-Length: {length}",
            *(["Expect: 100-continue"] if expect else []),
            *([f"Authorization: Bearer {self.key}"] if self.key else []),
        ]
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1", "replace")


class Answer:
    """An answer as it arrives. `sent` is when its request was sent, by `perf_counter`.

    `asked`: what the probe was asked for; None for an API. `secrets` are never shown, even if a hop sends them back.
    """

    def __init__(self, sent: float, asked: Asked | None, secrets: Sequence[str] = ()) -> None:
        self.sent = sent
        self._secrets = secrets
        self.status = 0
        self.events: list[Event] = []
        self.continued = False
        """Whether there was a `100 Continue`."""
        self.end: End = "unread"
        self.progress = asyncio.Event()
        """Set with each read, and at the end."""
        self.problem = ""
        """Why the answer cannot be read further; empty if it can."""
        self.body = bytearray()
        """What came, without framing and compression."""
        self._asked = asked
        self._raw = bytearray()
        self._fields = Fields(())
        self._version = ""
        self._head_at: float | None = None
        self._ended_at = 0.0
        self._decoder: BodyDecoder | None = None
        self._inflater: zlib._Decompress | None = None
        self._parser = EventParser(_MAX_EVENT)
        self._marks: list[Mark] = []
        self._error_event = False
        self.reusable = False
        """Whether another request may be sent on the connection."""

    @property
    def over(self) -> bool:
        return bool(self._ended_at)

    def feed(self, data: bytes) -> None:
        """Takes bytes of the connection."""
        now = perf_counter() - self.sent
        try:
            if not self.status:
                self._raw += data
                data = self._read_head(now)
            if self.status and not self.over:
                self._read_body(data, now)
        except (ProtocolError, zlib.error) as error:
            self.problem = f"the answer is not valid: {error}"
            self._finish("unread", now)
        self.progress.set()

    def _read_head(self, now: float) -> bytes:
        while (end := self._raw.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._raw[: end + 4])
            del self._raw[: end + 4]
            status = _STATUS_LINE.match(head)
            if status is None:
                raise ProtocolError("it is not HTTP/1.1")
            check_head(head)
            code = int(status[2])
            if 100 <= code < 200:
                self.continued = self.continued or code == 100
                continue
            lines = head[:-4].split(b"\r\n")[1:]
            self._fields = Fields(
                [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
            )
            version = (1, int(status[1][2:]))
            framing = response_framing("POST", code, version, self._fields)
            self.status, self._version, self._head_at = code, status[1].decode(), now
            self._decoder = decoder(framing) if framing is not None else None
            options = self._fields.tokens(b"connection")
            self.reusable = framing != "close" and (
                b"keep-alive" in options if version == (1, 0) else b"close" not in options
            )
            if self._fields.tokens(b"content-encoding") in ([b"gzip"], [b"deflate"]):
                # 32: the kind of the header is found out.
                self._inflater = zlib.decompressobj(32 + zlib.MAX_WBITS)
            rest = bytes(self._raw)
            self._raw.clear()
            if self._decoder is None or self._decoder.done:
                self._finish("complete", now)
            return rest
        if len(self._raw) > _MAX_HEAD:
            raise ProtocolError("the response head does not end")
        return b""

    def _read_body(self, data: bytes, now: float) -> None:
        assert self._decoder is not None
        broken = False
        try:
            payload = self._decoder.feed(data)
        except BrokenBodyError as error:
            payload, broken = error.payload, True
        if self._inflater is not None and payload:
            payload = self._inflater.decompress(payload, _MAX_ANSWER)
        self.body += payload
        for kind, text in self._parser.feed(payload):
            self._take(kind, text or b"", now)
        if broken or len(self.body) > _MAX_ANSWER:
            self.problem = "its framing is invalid" if broken else "it is too large"
            self._finish("unread", now)
        elif self._decoder.done:
            self._finish("complete", now)

    def _take(self, kind: bytes, data: bytes, now: float) -> None:
        meaning = _CHAT.meaning_of(kind, data)
        self._error_event = self._error_event or meaning.error
        if self._asked is None:
            if meaning.delta:
                self.events.append(Event(None, now, len(data) + 8))
            return
        mark = mark_in(text_in(data))
        if mark is not None:
            self._marks.append(mark)
            self.events.append(Event(mark.sent, now, len(data) + 8))

    def lost(self, error: BaseException | None) -> None:
        """The connection has ended."""
        if not self.over:
            by_close = self._decoder is not None and error is None and self._decoder.end()
            now = perf_counter() - self.sent
            self._finish("complete" if by_close else "fin" if error is None else "reset", now)
        self.reusable = False
        self.progress.set()

    def _finish(self, end: End, now: float) -> None:
        self.end, self._ended_at = end, max(now, 1e-6)
        self.reusable = self.reusable and end == "complete"
        self.progress.set()

    def stream(self) -> Stream:
        """What was observed so far."""
        asked, marks = self._asked, self._marks
        whole = self.status == 200 and self.end == "complete"
        garbled = rewritten = False
        if asked is not None and marks:
            writer = Writer(asked.size, marks[0].version)
            expected = [mark_in(text_in(writer.event(mark.sent)[6:-2])) for mark in marks]
            count = asked.events if asked.cut is None else min(asked.cut, asked.events)
            garbled = marks != expected or (whole and not self._error_event and len(marks) < count)
            rewritten = not is_unaltered(bytes(self.body), asked.size, marks, ended=whole)
        named = [(name, values) for name, values in self._fields.by_name.items() if name not in _UNTOLD]
        fields = {self._told(name): self._told(b", ".join(values)) for name, values in named}
        return Stream(
            status=self.status,
            version=self._version,
            fields=fields,
            head_at=self._head_at,
            events=list(self.events),
            end=self.end,
            ended_at=self._ended_at or perf_counter() - self.sent,
            comments=self._parser.comments,
            rewritten=rewritten,
            garbled=garbled,
            error_event=self._error_event,
            asked_in=marks[0].version if marks else "",
            message=self._message(),
        )

    def _told(self, data: bytes) -> str:
        """`data` as text for a report: in one line, without secrets and without what a terminal would obey."""
        text = data.decode(errors="replace")
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join("".join(one if one.isprintable() else " " for one in text).split())

    def _message(self) -> str:
        """The beginning of an answer that is not a stream, as one line."""
        if self.status == 200 and self.events:
            return ""
        try:
            message = msgspec.json.decode(self.body, type=_Error).error.message.encode(errors="replace")
        except ValueError:
            message = re.sub(rb"<[^>]*>", b" ", self.body[: 20 * _SHOWN])
        line = self._told(message)
        return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "\N{HORIZONTAL ELLIPSIS}"


class Connection(asyncio.Protocol):
    """A connection to a hop. Its requests are sent one after the other."""

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        self._secrets = secrets
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self.closed = False

    @classmethod
    async def open(cls, target: Target) -> Connection:
        """Raises `CannotExamine`."""
        url = target.url
        assert url.host is not None
        assert url.port is not None
        try:
            async with asyncio.timeout(_CONNECT_TIME):
                _, protocol = await asyncio.get_running_loop().create_connection(
                    lambda: cls(target.secrets),
                    url.host,
                    url.port,
                    ssl=target.tls,
                    server_hostname=url.host if target.tls is not None else None,
                )
        except TimeoutError:
            raise CannotExamine(
                f"it does not accept a connection within {_CONNECT_TIME:g} s; is the address right?"
            ) from None
        except ssl.SSLCertVerificationError as error:
            why = error.verify_message or "verification failed"
            raise CannotExamine(f"its certificate is not trusted ({why}); name its authority with --ca-file") from None
        except ssl.SSLError as error:
            raise CannotExamine(f"no TLS connection can be made ({error.reason or error}); is it http?") from None
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise CannotExamine(
                f"it cannot be connected to ({why}); is it running, and is the address right?"
            ) from None
        return protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # `drained` waits until the kernel has taken everything.
        self._transport.set_write_buffer_limits(high=0)

    def data_received(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._writable.set()
        if self._answer is not None:
            self._answer.lost(exc)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def ask(self, data: bytes, asked: Asked | None = None) -> Answer:
        """Sends a request, or its beginning. Returns its answer, which has not come yet."""
        self._answer = Answer(perf_counter(), asked, self._secrets)
        if self.closed:
            self._answer.lost(None)
        self.send(data)
        return self._answer

    def send(self, data: bytes) -> None:
        """Sends more of the request."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drained(self) -> None:
        """Waits until the kernel has taken all that was sent, or the connection has ended."""
        await self._writable.wait()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort() if self._transport.get_write_buffer_size() else self._transport.close()


async def until(answer: Answer, seconds: float, *, events: int | None = None) -> None:
    """Waits until the answer is over, or has so many events, for so many seconds at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not (answer.over or (events is not None and len(answer.events) >= events)):
                answer.progress.clear()
                await answer.progress.wait()
