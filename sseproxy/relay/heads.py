"""Parses message heads with aiohttp's C parser: requests from clients, responses from upstreams.

aiohttp's parser gets only heads. This module finds the end of a head, and `wire.framing` finds the end of a body. So no
two parsers can disagree about where a message ends.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import BadHttpMessage, BadHttpMethod, HttpProcessingError, InvalidURLError, LineTooLong
from aiohttp.http_parser import (
    HttpRequestParser,
    HttpRequestParserPy,
    HttpResponseParser,
    RawRequestMessage,
    RawResponseMessage,
)

from ..errors import ParserError, ProtocolError, RequestError
from ..wire import headers
from ..wire.framing import Framing, response_framing

if TYPE_CHECKING:
    from ..config import Limits

MAX_RESPONSE_FIELDS = 200

_BLANK_LINE = b"\r\n\r\n"
# A byte in the `repr` of bytes.
_BYTE: Final = re.compile(r"\\x..|\\?.")
# Errors whose text is only a rule, if no quoted line follows.
_HAVE_A_RULE: Final = (ProtocolError, BadHttpMessage, BadHttpMethod)
# How many bytes of a body aiohttp would buffer. It never gets a body.
_UNUSED_LIMIT = 2**16


def check_parser() -> None:
    """Raises `ParserError` if aiohttp has only its parser in Python, which is less strict, and slow."""
    if HttpRequestParser is HttpRequestParserPy:
        raise ParserError


class RequestHead:
    """A request head. `problem` is the error if the request must be refused, because other parsers may read it
    differently.
    """

    __slots__ = ("fields", "framing", "keep_alive", "method", "problem", "size", "target", "version")

    def __init__(self, message: RawRequestMessage, size: int) -> None:
        self.method = message.method
        self.target = message.path
        self.version: tuple[int, int] = message.version
        self.fields = headers.Fields(message.raw_headers)
        self.size = size
        self.framing: Framing | None = None
        self.problem: RequestError | None = None
        self.keep_alive = not message.should_close
        try:
            headers.check_request(self.version, self.fields)
        except ProtocolError:
            self.problem = RequestError("bad_request")
        if self.version not in ((1, 0), (1, 1)):
            self.problem = RequestError("bad_request")
        # The parser's own decision is not used: it ignores a coding that is followed by white space.
        coded, length = self.fields.named(b"transfer-encoding"), message.headers.get("Content-Length")
        if coded and length is not None:
            self.problem = RequestError("bad_request")
        if self.problem is None:
            self.framing = "chunked" if coded else None if length is None else int(length)


def rule_of(error: Exception) -> str:
    """What is wrong with bytes that are not valid HTTP, in words: the rule, and the byte that violates it.

    The text of the parser's error is not used as it is: it quotes the line or the target, which may contain a key.
    """
    text = str(getattr(error, "message", None) or error)
    rule, _, quoted = text.partition("\n\n")
    if not quoted and type(error) not in _HAVE_A_RULE:
        return "the target is not a valid URL" if isinstance(error, InvalidURLError) else "the head is not valid HTTP"
    rule = " ".join(line.strip() for line in rule.splitlines()).rstrip(":")
    line, _, mark = quoted.partition("\n")
    byte = _BYTE.match(line, mark.find("^")) if mark.strip() == "^" else None
    return f"{rule}, at the byte {byte[0]}" if byte else rule


class RequestHeads:
    """Parses the request heads of one connection. `feed` takes bytes, however they are split.

    `size` is the number of bytes of the current head, or 0 between heads.
    """

    __slots__ = ("_limits", "_loop", "_parser", "_protocol", "_tail", "size")

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: BaseProtocol, limits: Limits) -> None:
        self._loop = loop
        self._protocol = protocol
        self._limits = limits
        self._parser: HttpRequestParser | None = None
        self._tail = b""
        self.size = 0

    @property
    def begun(self) -> bool:
        """Whether a head has begun. Empty lines before a head do not count."""
        return self._parser is not None

    def feed(self, data: bytes, start: int) -> tuple[RequestHead | None, int]:
        """Parses `data` from `start`. Returns the head that ends in it, or None, and the position after it.

        Raises `RequestError` as soon as the bytes cannot become a valid head.
        """
        if self._parser is None:
            # RFC 9112, section 2.2: empty lines before a request line are ignored.
            blank = len(data) - start - len(data[start:].lstrip(b"\r\n"))
            self.size += blank
            start += blank
            if start == len(data):
                self._check_size()
                return None, start
            self._parser = self._new()
        end = self._end(data, start)
        part = data[start:end]
        self.size += len(part)
        self._check_size()
        try:
            messages, _, _ = self._parser.feed_data(part)
        except LineTooLong:
            raise RequestError("head_too_large") from None
        except (HttpProcessingError, ValueError) as error:
            raise RequestError("bad_request", cause=rule_of(error)) from None
        if not messages:
            self._tail = (self._tail + part)[1 - len(_BLANK_LINE) :]
            return None, end
        head = RequestHead(messages[0][0], self.size)
        self._parser, self._tail, self.size = None, b"", 0
        return head, end

    def _new(self) -> HttpRequestParser:
        return HttpRequestParser(
            self._protocol,
            self._loop,
            _UNUSED_LIMIT,
            max_line_size=self._limits.request_head,
            max_headers=self._limits.request_fields,
            max_field_size=self._limits.request_head,
            response_with_body=False,
            auto_decompress=False,
        )

    def _end(self, data: bytes, start: int) -> int:
        """The end of the current head in `data`, or the end of `data`. `start` is where to search from."""
        if self._tail:
            end = (self._tail + data[start : start + len(_BLANK_LINE) - 1]).find(_BLANK_LINE)
            if end >= 0:
                return start + end + len(_BLANK_LINE) - len(self._tail)
        end = data.find(_BLANK_LINE, start)
        return end + len(_BLANK_LINE) if end >= 0 else len(data)

    def _check_size(self) -> None:
        if self.size > self._limits.request_head:
            raise RequestError("head_too_large")


class ResponseHead:
    """A response head, with the framing of the body."""

    __slots__ = ("fields", "framing", "reason", "reusable", "status")

    def __init__(self, method: str, message: RawResponseMessage) -> None:
        self.status = message.code
        self.reason = message.reason.encode("utf-8", "surrogateescape")
        self.fields = headers.Fields(message.raw_headers)
        self.framing: Framing | None = response_framing(method, message.code, message.version, self.fields)
        # After a response without a body (HEAD, 204, 304) the connection is not reused: an upstream may send a body by
        # mistake, and it would be taken for the next response.
        self.reusable = not message.should_close and self.framing is not None and self.framing != "close"


class ResponseHeads:
    """Parses whole response heads of at most `limit` bytes, for all connections to an upstream."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self.limit = limit
        self._loop = loop
        self._parser: HttpResponseParser | None = None

    def _new(self) -> HttpResponseParser:
        return HttpResponseParser(
            BaseProtocol(self._loop),
            self._loop,
            _UNUSED_LIMIT,
            max_line_size=self.limit,
            max_field_size=self.limit,
            max_headers=MAX_RESPONSE_FIELDS,
            # The parser gets only heads, so for the parser every message ends with its head.
            response_with_body=False,
            read_until_eof=False,
            auto_decompress=False,
        )

    def parse(self, raw: bytes) -> RawResponseMessage:
        """Parses one head. Raises `ProtocolError`, `ValueError`, or aiohttp's `HttpProcessingError`."""
        headers.check_head(raw)
        parser = self._parser or self._new()
        # A parser cannot be used again after an error, a protocol switch, or a message that closes the connection.
        self._parser = None
        messages, _, _ = parser.feed_data(raw)
        if len(messages) != 1:
            raise ProtocolError("the response head is not one message")
        message: RawResponseMessage = messages[0][0]
        if message.code == 101 or message.version not in ((1, 0), (1, 1)):
            raise ProtocolError("the upstream switched protocols")
        if not message.should_close:
            self._parser = parser
        return message
