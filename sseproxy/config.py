"""The configuration: its model, and how it is read from YAML and from command-line flags.

Everything wrong with a document is reported at once: what `document` finds, what the model does not take, and what does
not fit together.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeVar, cast, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PositiveInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import plain_serializer_function_ser_schema
from yarl import URL

from .document import INVALID, Document, Loc, dotted, position, quoted
from .errors import ConfigError
from .wire.dialects import DIALECT_NAMES

T = TypeVar("T")

_DOCUMENT: Final = object()
"""Validation context of text written by an operator: there, numbers need a unit."""

_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[A-Za-z0-9._-]*)):(?P<port>[0-9]{1,5})")
_API_KEY = re.compile(r"[!-~]+")
# No key is longer; a file that is was named by mistake.
_MAX_KEY_FILE = 16 << 10
_DURATION = re.compile(r"(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?(?:([0-9]{1,9})ms)?")
_DURATION_MS = (3_600_000, 60_000, 1_000, 1)
# A method, and the name of a field (RFC 9110, section 5.6.2).
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PATH = re.compile(r"(?:/(?!\.{0,2}(?:/|$))[^/?#\x00-\x20\x7f-\U0010ffff]+)+/?|/")
_PASSED_SOCKET = re.compile(r"systemd(?::(?P<name>[A-Za-z0-9_.@-]+))?")
_SIZE = re.compile(r"([0-9]{1,9})(B|KiB|MiB|GiB)")
_UNIX_ADDRESS = re.compile(r"unix:(?P<path>/[^|\x00]*[^/|\x00])(?:\|(?P<mode>0?[0-7]{3}))?")
# sun_path without its final zero byte (unix(7)).
_MAX_UNIX_PATH = 107
_SIZE_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _expected(what: str, *, show: bool = True) -> PydanticCustomError:
    """The error of a value that is not `what`. `show` tells whether a message may contain the value."""
    return PydanticCustomError("expected" if show else "expected_secret", "expected {what}", {"what": what})


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. An empty host is all interfaces, port 0 any free port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `HOST:PORT`, `[IPV6]:PORT` or `:PORT`; the inverse of `str`. Raises `ValueError`."""
        match = _ADDRESS.fullmatch(text)
        if match is None or int(match["port"]) > 65535:
            raise ValueError("not HOST:PORT")
        if match["v6"] is not None:
            ipaddress.IPv6Address(match["v6"])
        return cls(match["v6"] or match["host"], int(match["port"]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """Where to listen in the file system. `mode` are the socket's permissions, which are needed to connect."""

    path: str
    mode: int = 0o660

    @classmethod
    def parse(cls, text: str) -> UnixAddress:
        """Read `unix:PATH` or `unix:PATH|MODE` with an octal mode; the inverse of `str`. Raises `ValueError`."""
        match = _UNIX_ADDRESS.fullmatch(text)
        if match is None or len(os.fsencode(match["path"])) > _MAX_UNIX_PATH:
            raise ValueError("not unix:PATH")
        return cls(match["path"], int(match["mode"], 8)) if match["mode"] else cls(match["path"])

    def __str__(self) -> str:
        return f"unix:{self.path}|{self.mode:04o}"


@dataclass(frozen=True, slots=True)
class PassedSocket:
    """Sockets that the service manager listens on: those of `name`, or all that it passes (sd_listen_fds(3))."""

    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> PassedSocket:
        """Read `systemd` or `systemd:NAME`; the inverse of `str`. Raises `ValueError`."""
        match = _PASSED_SOCKET.fullmatch(text)
        if match is None:
            raise ValueError("not systemd or systemd:NAME")
        return cls(match["name"])

    def __str__(self) -> str:
        return "systemd" if self.name is None else f"systemd:{self.name}"


Listen = Address | UnixAddress | PassedSocket
"""Where to listen."""


def _address(value: object) -> Listen:
    if isinstance(value, Listen):
        return value
    for kind in (PassedSocket, UnixAddress, Address):
        try:
            if isinstance(value, str):
                return kind.parse(value)
        except ValueError:
            continue
    raise _expected("HOST:PORT, [IPV6]:PORT or :PORT with a port from 0 to 65535, unix:/PATH, systemd or systemd:NAME")


def _addresses(value: object) -> object:
    return value if isinstance(value, tuple) else (value,)


def _api_key(value: object) -> SecretStr | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = SecretStr(value)
    if isinstance(value, SecretStr) and _API_KEY.fullmatch(value.get_secret_value()):
        return value
    raise _expected("an API key: text of visible ASCII characters", show=False)


@dataclass(frozen=True, slots=True)
class KeyFile:
    """An API key that was read from the file at `path`."""

    path: str
    key: SecretStr


def _api_key_file(value: object) -> KeyFile | None:
    if value is None or isinstance(value, KeyFile):
        return value
    if not isinstance(value, str) or not value:
        raise _expected("the path of a file with an API key", show=False)
    try:
        with open(value, encoding="ascii") as file:
            text = file.read(_MAX_KEY_FILE).strip()
    except OSError as error:
        # What it is not shown for: it may be the key itself.
        raise _expected(f"a readable file with an API key ({(error.strerror or '').lower()})", show=False) from None
    except UnicodeDecodeError:
        text = ""
    if not _API_KEY.fullmatch(text):
        raise _expected("a file with an API key: one line of visible ASCII characters", show=False)
    return KeyFile(value, SecretStr(text))


def _spell_file(file: KeyFile | None) -> str | None:
    return None if file is None else file.path


def _header(value: object) -> str:
    if isinstance(value, str) and _TOKEN.fullmatch(value):
        return value
    raise _expected("the name of a header field such as Authorization or x-api-key")


def _ca_file(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and value:
        try:
            ssl.create_default_context(cafile=value)
            return value
        except OSError as error:
            # An SSLError is one as well.
            why = "no certificate is in it" if isinstance(error, ssl.SSLError) else (error.strerror or "").lower()
            raise _expected(f"a readable file of PEM certificates ({why})") from None
    raise _expected("the path of a file of PEM certificates")


def _file_path(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise _expected("the path of a file")


def _file_path_or_none(value: object) -> str | None:
    return None if value is None else _file_path(value)


def _load_certificate(context: ssl.SSLContext, cert_file: str, key_file: str | None) -> None:
    def no_password() -> bytes:
        raise _expected("a private key without password", show=False)

    try:
        context.load_cert_chain(cert_file, key_file, no_password)
    except ssl.SSLError:
        raise _expected(
            "a certificate and its private key in PEM, in cert_file and key_file, that belong together", show=False
        ) from None
    except OSError as error:
        why = (error.strerror or "").lower()
        raise _expected(f"readable files in cert_file and key_file ({why})", show=False) from None


def _tls_version(value: object) -> str:
    if value in ("1.2", "1.3"):
        return str(value)
    raise _expected('"1.2" or "1.3", in quotes')


def _seconds(value: object, info: ValidationInfo) -> float | None:
    seconds = math.nan
    if isinstance(value, str):
        if match := _DURATION.fullmatch(value):
            seconds = sum(int(n or 0) * ms for n, ms in zip(match.groups(), _DURATION_MS, strict=True)) / 1000
    elif isinstance(value, int | float) and not isinstance(value, bool) and info.context is not _DOCUMENT:
        seconds = float(value)
    return seconds if 0 < seconds < math.inf else None


def _duration(value: object, info: ValidationInfo) -> float:
    seconds = _seconds(value, info)
    if seconds is None:
        raise _expected("a duration such as 30s or 5m")
    return seconds


def _duration_or_off(value: object, info: ValidationInfo) -> float | None:
    if value is None or value is False or value == "off":
        return None
    seconds = _seconds(value, info)
    if seconds is None:
        raise _expected("a duration such as 30s or 5m, or off")
    return seconds


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise _expected("a number from 1 up")


def _count_or_off(value: object) -> int | None:
    if value is None or value is False or value == "off":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise _expected("a number from 1 up, or off")


def _size_or_off(value: object, info: ValidationInfo) -> int | None:
    return None if value is None or value is False or value == "off" else _size(value, info)


def _dialect(value: object) -> str:
    if value == "auto" or value in DIALECT_NAMES:
        return str(value)
    raise _expected(f"auto or the name of a dialect ({', '.join(DIALECT_NAMES)})")


def _glob(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise _expected("the name of a model or a glob such as gpt-4*")


def _listed(value: object) -> tuple[object, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, tuple):
        return value
    raise _expected("text or a list")


def _method(value: object) -> str:
    if isinstance(value, str) and _TOKEN.fullmatch(value):
        return value.upper()
    raise _expected("an HTTP method such as POST")


def _network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    try:
        if isinstance(value, str):
            return ipaddress.ip_network(value)
    except ValueError:
        pass
    raise _expected("an address or a network such as 10.0.0.0/8")


def _name(value: object) -> str:
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise _expected("a name: 1 to 64 of the characters A-Z a-z 0-9 _ . -")


def _path(value: object) -> str:
    if isinstance(value, str) and _PATH.fullmatch(value):
        return value.removesuffix("/") or "/"
    raise _expected("a path such as /v1, without query, empty segments and dot segments")


def _exchanges(value: object) -> str:
    if value is False:
        return "off"
    if value in ("all", "errors", "off"):
        return str(value)
    raise _expected("all, errors or off")


def _log_format(value: object) -> str:
    if value in ("auto", "json", "text"):
        return str(value)
    raise _expected("auto, json or text")


def _share(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise _expected("a share above 0, up to 1")


def _size(value: object, info: ValidationInfo) -> int:
    size = 0
    if isinstance(value, str):
        if match := _SIZE.fullmatch(value):
            size = int(match[1]) * _SIZE_BYTES[match[2]]
    elif isinstance(value, int) and not isinstance(value, bool) and info.context is not _DOCUMENT:
        size = value
    if size <= 0:
        raise _expected("a size such as 512KiB or 32MiB")
    return size


def _url(value: object) -> str:
    """A canonical URL. Userinfo and queries hold secrets, so a URL that might have one is never shown."""
    text = value if isinstance(value, str) and value.isprintable() and " " not in value else ""
    show = not (isinstance(value, str) and re.search("[@?#]", value))
    try:
        url = URL(text)
        usable = url.scheme in ("http", "https") and bool(url.host) and bool(url.port)
    except ValueError:
        usable = False
    if not usable:
        raise _expected("a URL such as https://api.openai.com/v1", show=show)
    if re.match("[^/]*//[^/]*@", text):
        raise _expected("a URL without user name and password; a key belongs into api_key", show=show)
    if "?" in text or "#" in text:
        raise _expected("a URL without query and fragment", show=show)
    return str(url).rstrip("/")


def _workers(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise _expected("auto or a number of processes from 1 up")


def _spell_duration(seconds: float | None) -> str:
    if seconds is None:
        return "off"
    rest, parts = max(1, round(seconds * 1000)), []
    for ms, unit in zip(_DURATION_MS, ("h", "m", "s", "ms"), strict=True):
        number, rest = divmod(rest, ms)
        parts += [f"{number}{unit}"] * bool(number)
    return "".join(parts)


def _spell_size(size: int | None) -> str:
    if size is None:
        return "off"
    unit, factor = max((item for item in _SIZE_BYTES.items() if not size % item[1]), key=itemgetter(1))
    return f"{size // factor}{unit}"


_NONE: Final[JsonSchemaValue] = {"type": "null"}
_TEXT: Final[JsonSchemaValue] = {"type": "string"}
_NUMBER: Final[JsonSchemaValue] = {"type": "integer", "minimum": 1}
_IN_TIME: Final[JsonSchemaValue] = {"type": "string", "pattern": "^([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$"}
_IN_BYTES: Final[JsonSchemaValue] = {"type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)$"}
_VARIABLE: Final[JsonSchemaValue] = {"type": "string", "pattern": r"\$\{"}


def _enum(*values: str | bool) -> JsonSchemaValue:
    return {"enum": list(values)}


# YAML 1.1 reads a plain off as false.
_OFF: Final = _enum("off", False)


def _one_or_more(item: JsonSchemaValue) -> JsonSchemaValue:
    return {"anyOf": [item, {"type": "array", "items": item}]}


class _Option:
    """How an option is `read`, what it may look like to an editor, and how it is written again (`spell`)."""

    def __init__(
        self, read: Callable[..., object], *schemas: JsonSchemaValue, spell: Callable[..., object] | None = None
    ) -> None:
        self._reader = BeforeValidator(read)
        # Text from the environment may stand in the place of any value.
        self._schemas = list(schemas) if _TEXT in schemas else [*schemas, _VARIABLE]
        self._spell = spell

    def __get_pydantic_core_schema__(self, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = self._reader.__get_pydantic_core_schema__(source, handler)
        if self._spell is None:
            return schema
        return cast(CoreSchema, {**schema, "serialization": plain_serializer_function_ser_schema(self._spell)})

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return self._schemas[0] if len(self._schemas) == 1 else {"anyOf": self._schemas}


Duration = Annotated[float, _Option(_duration, _IN_TIME, spell=_spell_duration)]
"""Seconds. Written as `250ms`, `30s`, `5m`, `1h` or a combination in descending units, such as `1m30s`."""

DurationOrOff = Annotated[float | None, _Option(_duration_or_off, _IN_TIME, _OFF, _NONE, spell=_spell_duration)]
"""A `Duration`, or `None`, which is written as `off`."""

Network = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, _Option(_network, _TEXT, spell=str)]

ListenAddress = Annotated[Listen, _Option(_address, _TEXT, spell=str)]

RequiredPath = Annotated[str, _Option(_file_path, _TEXT)]
"""The path of a file, from the working directory if it is relative."""

FilePath = Annotated[str | None, _Option(_file_path_or_none, _TEXT, _NONE)]

Name = Annotated[str, _Option(_name, {"type": "string", "pattern": f"^{_NAME.pattern}$"})]
"""Names are metric label values, hence short and plain."""

Size = Annotated[int, _Option(_size, _IN_BYTES, spell=_spell_size)]
"""Bytes. Written as `512B`, `16KiB`, `1MiB` or `2GiB`."""

SizeOrOff = Annotated[int | None, _Option(_size_or_off, _IN_BYTES, _OFF, _NONE, spell=_spell_size)]
"""A `Size`, or `None`, which is written as `off`."""

Count = Annotated[int, _Option(_count, _NUMBER)]

CountOrOff = Annotated[int | None, _Option(_count_or_off, _NUMBER, _OFF, _NONE, spell=lambda n: n or "off")]
"""A number from 1 up, or `None`, which is written as `off`."""


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )


def _part(limit: int | None, workers: int) -> int | None:
    return None if limit is None else -(-limit // workers)


class Limits(_Model):
    """What is accepted and held at most. Numbers of things are for all workers together; each has its share of them."""

    connections: Count = 10_000
    """Clients' connections; requests on more are answered 503."""
    connections_per_client: CountOrOff = None
    """Connections from one address; requests on more are answered 429."""
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
    response_head: Size = 32 << 10
    """An upstream's response head; larger ones are answered 502."""
    event: Size = 4 << 20
    """Events that are read in passing, six times that where they may carry images; larger ones pass all the same."""

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


class UpstreamTLS(_Model):
    """How an `https` upstream is verified, and how this side is."""

    ca_file: Annotated[str | None, _Option(_ca_file, _TEXT, _NONE)] = None
    """The certificates of the authorities that are trusted; `None` are the system's."""
    cert_file: FilePath = None
    """The certificate, with its chain, that is shown to an upstream that asks for one."""
    key_file: FilePath = None
    """Its private key; `None` if it is in `cert_file` as well."""

    @model_validator(mode="after")
    def _loads(self) -> Self:
        if self.key_file is not None and self.cert_file is None:
            raise _expected("cert_file beside key_file", show=False)
        if self.cert_file is not None:
            self.context()
        return self

    def context(self) -> ssl.SSLContext:
        """For connections to an upstream. Raises what is wrong with the files, as pydantic wants it."""
        context = ssl.create_default_context(cafile=self.ca_file)
        context.set_alpn_protocols(["http/1.1"])
        if self.cert_file is not None:
            _load_certificate(context, self.cert_file, self.key_file)
        return context


class TLS(_Model):
    """How clients' connections are encrypted."""

    cert_file: RequiredPath
    """The certificate, with its chain, in PEM."""
    key_file: FilePath = None
    """Its private key; `None` if it is in `cert_file` as well."""
    min_version: Annotated[Literal["1.2", "1.3"], _Option(_tls_version, _enum("1.2", "1.3"))] = "1.2"

    @model_validator(mode="after")
    def _loads(self) -> Self:
        self.context()
        return self

    def context(self) -> ssl.SSLContext:
        """For listeners. Raises what is wrong with the files, as pydantic wants it."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_3 if self.min_version == "1.3" else ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        _load_certificate(context, self.cert_file, self.key_file)
        return context


class Upstream(_Model):
    """A server that requests are relayed to."""

    name: Name
    url: Annotated[str, _Option(_url, _TEXT)]
    """Canonical, without trailing slash. Its path takes the place of the matched prefix."""
    api_key: Annotated[SecretStr | None, _Option(_api_key, _TEXT, _NONE)] = None
    """Sent instead of the client's credentials."""
    api_key_file: Annotated[KeyFile | None, _Option(_api_key_file, _TEXT, _NONE, spell=_spell_file)] = None
    """Where the key is read from instead, at the start and at each reload."""
    api_key_header: Annotated[str, _Option(_header, _TEXT)] = "Authorization"
    """The field that the key is sent in; in `Authorization` it is a bearer token, in others it stands alone."""
    tls: UpstreamTLS = UpstreamTLS()

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key is not None and self.api_key_file is not None:
            raise _expected("either api_key or api_key_file, not both", show=False)
        return self

    @property
    def key(self) -> SecretStr | None:
        """The key, from wherever it is."""
        return self.api_key_file.key if self.api_key_file is not None else self.api_key


class Reload(_Model):
    """How a new configuration takes the place of the old one."""

    watch: DurationOrOff = None
    """Look at the content of the file, and of the files it names, this often, and reload when it has changed."""
    drain_timeout: DurationOrOff = None
    """How long exchanges that began on the old configuration may go on; `None` is to their end."""


class AccessLog(_Model):
    """A line for each exchange, on standard output."""

    exchanges: Annotated[Literal["all", "errors", "off"], _Option(_exchanges, _enum("all", "errors", "off", False))] = (
        "all"
    )
    """Which are written; `errors` are those that did not complete, or were answered 400 and above."""
    sample: Annotated[float, _Option(_share, {"type": "number", "exclusiveMinimum": 0, "maximum": 1})] = 1.0
    """The share of those without an error that is written."""
    format: Annotated[Literal["auto", "json", "text"], _Option(_log_format, _enum("auto", "json", "text"))] = "auto"
    """`auto` is `text` on a terminal, and `json` elsewhere."""


class Metrics(_Model):
    """What is measured beyond what always is."""

    models: Annotated[tuple[Annotated[str, BeforeValidator(_glob)], ...], _Option(_listed, _one_or_more(_TEXT))] = ()
    """Globs for models; the first that takes a request's model is its label, as it is written. The rest is `other`."""


class Match(_Model):
    """The requests that belong to a route."""

    path: Annotated[str, _Option(_path, {"type": "string", "pattern": r"^/|\$\{"})]
    """Prefix of the path, on segment boundaries; the longest one wins. No trailing slash, except `/`, which is all."""
    model: Annotated[tuple[Annotated[str, BeforeValidator(_glob)], ...], _Option(_listed, _one_or_more(_TEXT))] = ()
    """Globs for the `model` of the request body, of which one has to match. None: any body."""
    methods: Annotated[tuple[Annotated[str, BeforeValidator(_method)], ...], _Option(_listed, _one_or_more(_TEXT))] = ()
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
    dialect: Annotated[str, _Option(_dialect, _enum("auto", *DIALECT_NAMES))] = "auto"
    """As what responses are read; `auto` goes by the path on the upstream's side."""
    heartbeat: DurationOrOff = None
    """Write a comment into an event stream that has been silent for so long, in seconds; `None` writes none."""
    usage: UsageOptions = UsageOptions()
    limits: RouteLimits = RouteLimits()
    timeouts: Timeouts = Timeouts()


class Config(_Model):
    """All that can be configured. Immutable, and picklable for worker processes."""

    listen: Annotated[tuple[ListenAddress, ...], _Option(_addresses, _one_or_more(_TEXT)), Field(min_length=1)] = (
        Address("127.0.0.1", 8080),
    )
    tls: TLS | None = None
    """`None` is plain text."""
    admin: Admin = Admin()
    workers: Annotated[PositiveInt | Literal["auto"], _Option(_workers, _NUMBER, _enum("auto"))] = "auto"
    """Worker processes; `auto` is one per usable core."""
    drain_timeout: Duration = 30.0
    """How long running streams may go on after SIGTERM, in seconds."""
    reload: Reload = Reload()
    max_body: Size = 32 << 20
    """The largest request body that is read in advance, in bytes: where a route matches on its `model`, where usage is
    asked for, and where models are labels."""
    trusted_proxies: Annotated[tuple[Network, ...], _Option(_listed, _one_or_more(_TEXT))] = ()
    """Where clients' `Forwarded` and `X-Forwarded-*` are believed, and added to instead of replaced."""
    access_log: AccessLog = AccessLog()
    metrics: Metrics = Metrics()
    limits: Limits = Limits()
    upstreams: Annotated[tuple[Upstream, ...], Field(min_length=1)]
    routes: Annotated[tuple[Route, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        conflicts = [
            f"{dotted(loc)}: {message}"
            for loc, message in _conflicts(
                [upstream.name for upstream in self.upstreams],
                [route.name for route in self.routes],
                [route.match for route in self.routes],
                [route.upstream for route in self.routes],
                spell=lambda _, name: name,
            )
        ]
        if conflicts:
            raise PydanticCustomError("conflict", "{conflicts}", {"conflicts": "; ".join(conflicts)})
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


def schema() -> dict[str, object]:
    """The JSON Schema of a configuration file, for editors."""
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "sseproxy",
        **{key: value for key, value in Config.model_json_schema().items() if key != "title"},
    }


def resolved(config: Config) -> str:
    """`config` as a file, every option with its value. What is secret is not in it."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)
    return text


def load(path: str | os.PathLike[str], env: Mapping[str, str] = os.environ) -> Config:
    """Read a configuration file. Raises `ConfigError`, also if the file cannot be read or is not UTF-8."""
    source = os.fspath(path)
    problem = ""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        problem = f"{source}: cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        line, column = position(data[: error.start].decode("utf-8-sig"))
        problem = f"{source}:{line}:{column}: expected UTF-8 text"
    if problem:
        raise ConfigError([problem])
    return parse(text, source, env)


def parse(text: str, source: str, env: Mapping[str, str] = os.environ) -> Config:
    """Read the text of a configuration file, called `source` in messages. Raises `ConfigError` with all its problems.

    `${VAR}`, `${VAR:-default}` and `$$` are expanded in values, after the YAML is parsed.
    """
    document = Document(text, env)
    config = _validate(document)
    if config is None or document.problems:
        raise ConfigError(
            [
                f"{source}:{line}:{column}: {problem}"
                for (line, column), problem in sorted(document.problems, key=itemgetter(0))
            ]
        )
    return config


def single(
    url: str, *, listen: str | None = None, admin: str | None = None, workers: str | int | None = None
) -> Config:
    """The configuration of a proxy for one upstream, without a file. Raises `ConfigError` whose problems name flags.

    Requests below `/v1` go to the path of `url`; if it has none, all requests do, with their path unchanged.
    """
    problems: list[str] = []
    target = _flag(problems, "--upstream", _url, url)
    changes = _changes(problems, listen, admin, workers)
    if problems or target is None:
        raise ConfigError(problems)
    path = "/" if URL(target).raw_path == "/" else "/v1"
    return Config(
        upstreams=(Upstream(name="upstream", url=target),),
        routes=(Route(name="api", match=Match(path=path), upstream="upstream"),),
    ).model_copy(update=changes)


def override(
    config: Config, *, listen: str | None = None, admin: str | None = None, workers: str | int | None = None
) -> Config:
    """`config` with the values of the command-line flags that are given. Raises `ConfigError` that names flags."""
    problems: list[str] = []
    changes = _changes(problems, listen, admin, workers)
    if problems:
        raise ConfigError(problems)
    return config.model_copy(update=changes)


def _changes(
    problems: list[str], listen: str | None, admin: str | None, workers: str | int | None
) -> dict[str, object]:
    changes: dict[str, object] = {}
    if listen is not None:
        address = _flag(problems, "--listen", _address, listen)
        changes["listen"] = (address,)
    if admin is not None and (place := _flag(problems, "--admin", _address, admin)):
        changes["admin"] = Admin(listen=place)
    if workers is not None:
        number = isinstance(workers, str) and re.fullmatch("[0-9]{1,9}", workers)
        changes["workers"] = _flag(problems, "--workers", _workers, int(workers) if number else workers)
    return changes


def _flag(problems: list[str], flag: str, read: Callable[[object], T], value: object) -> T | None:
    try:
        return read(value)
    except PydanticCustomError as error:
        got = f", got {quoted(str(value))}" if error.type == "expected" else ""
        problems.append(f"{flag}: {error.message()}{got}")
        return None


def _conflicts(
    upstreams: Sequence[str | None],
    routes: Sequence[str | None],
    matches: Sequence[Match | None],
    uses: Sequence[str | None],
    spell: Callable[[Loc, str], str],
) -> Iterator[tuple[Loc, str]]:
    """What is wrong between the parts: repeated names and matches, and names of upstreams (`uses`) that do not exist.

    `None` stands for a part that is itself wrong. `spell` gives a name as it may be shown.
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

    names = [name for name in upstreams if name is not None]
    if not names or len(names) < len(upstreams):
        return
    known = ", ".join(quoted(spell(("upstreams", index, "name"), name))[1:-1] for index, name in enumerate(names))
    for index, use in enumerate(uses):
        if use is not None and use not in names:
            loc = ("routes", index, "upstream")
            yield loc, f"expected the name of an upstream ({known}), got {quoted(spell(loc, use))}"


_TYPE_PROBLEMS = {
    "model_type": "expected a mapping",
    "tuple_type": "expected a list",
    "string_type": "expected text",
}


def _report_invalid(document: Document, kind: str, loc: Loc, message: str) -> None:
    """Add the problem that pydantic calls `kind`, unless there is one already: conflicts are found without it."""
    if kind == "conflict":
        return
    if kind == "missing":
        document.report(loc, "required key is missing", document.parts[loc[:-1]].node.start_mark)
        return
    if kind == "extra_forbidden":
        known = sorted(_model_at(loc[:-1]).model_fields)
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        document.report(loc, f"unknown key; expected one of {', '.join(known)}{hint}")
        return

    while loc not in document.parts:  # the item of a list that is written as a single text
        loc = loc[:-1]
    part = document.parts[loc]
    if part.value is INVALID:
        return
    if kind == "too_short":
        if part.value == ():  # and not for the items that are not valid
            document.report(loc, "expected at least one entry")
    elif kind == "expected_secret":
        document.report(loc, message)
    elif kind in _TYPE_PROBLEMS:
        document.report(loc, f"{_TYPE_PROBLEMS[kind]}, got {part.kind()}")
    else:
        document.report(loc, f"{message}, got {part.spelled()}")


def _validate(document: Document) -> Config | None:
    """The configuration, or `None` after adding to `problems` what keeps the data from being one."""
    data = document.data
    if data is None:
        return None
    upstreams, routes = _entries(data, "upstreams"), _entries(data, "routes")
    for loc, message in _conflicts(
        [_text(upstream.get("name")) for upstream in upstreams],
        [_text(route.get("name")) for route in routes],
        [_valid_match(route.get("match")) for route in routes],
        [_text(route.get("upstream")) for route in routes],
        spell=lambda loc, _: str(document.parts[loc].node.value),
    ):
        document.report(loc, message)
    try:
        return Config.model_validate(data, context=_DOCUMENT)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            _report_invalid(document, detail["type"], detail["loc"], detail["msg"])
    return None


def _entries(data: Mapping[str, object], section: str) -> list[dict[str, object]]:
    entries = data.get(section)
    if not isinstance(entries, tuple):
        return []
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def _model_at(loc: Loc) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for key in loc:
        if isinstance(key, str):
            annotation = model.model_fields[key].annotation
            (model, *_) = get_args(annotation) or (annotation,)
    return model


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _valid_match(value: object) -> Match | None:
    try:
        return Match.model_validate(value, context=_DOCUMENT)
    except ValidationError:
        return None
