"""The types of options: how a value of each type is read, how it is written, and its JSON schema.

A value that is not valid raises an `expected` error, which says what was expected. No error shows a value that may be
secret.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from operator import itemgetter
from typing import Annotated, Final, Literal, NamedTuple, cast

from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PositiveInt,
    SecretStr,
    ValidationInfo,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import plain_serializer_function_ser_schema
from yarl import URL

from .addresses import Address, Listen, PassedSocket, UnixAddress
from .plain import Rate

DOCUMENT: Final = object()
"""Validation context for values from a file. In a file, durations and sizes need a unit; in code they are numbers."""

API_KEY = re.compile(r"[!-~]+")
# A random token of 16 characters cannot be guessed over a network.
_LONG_TOKEN = re.compile(r"[!-~]{16,1024}")
KEY_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_DURATION = re.compile(r"(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?(?:([0-9]{1,9})ms)?")
_DURATION_MS = (3_600_000, 60_000, 1_000, 1)
# A token (RFC 9110, section 5.6.2): a method, or the name of a header field.
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_LEDGER_URL = re.compile(r"(?:rediss?://[!-~]+|unix:///[!-~]+)")
_HOST_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,252}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PATH = re.compile(r"(?:/(?!\.{0,2}(?:/|$))[^/?#\x00-\x20\x7f-\U0010ffff]+)+/?|/")
_RATE = re.compile(r"([1-9][0-9]{0,11})/1([smhd])")
_RATE_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SIZE = re.compile(r"([0-9]{1,9})(B|KiB|MiB|GiB)")
RETRIES: Final = ("connect", "429", "503", "529", "reset", "timeout", "500", "502", "504", "same")
"""What a route's `retry.on` may name."""
MAX_PREFIX: Final = 64 << 10
"""Bytes. A longer prefix of messages would not tell conversations apart better."""
_SIZE_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Source(NamedTuple):
    """The part of a request by which it is assigned to an endpoint.

    `kind` is `header`, `field` or `prefix`; `what` is the name of the header field or of the member of the body, or
    the number of bytes.
    """

    kind: str
    what: str


def expected(what: str, *, show: bool = True) -> PydanticCustomError:
    """The error for a value that is not `what`. With `show`, the message may contain the value."""
    return PydanticCustomError("expected" if show else "expected_secret", "expected {what}", {"what": what})


def read_address(value: object) -> Listen:
    if isinstance(value, Listen):
        return value
    for kind in (PassedSocket, UnixAddress, Address):
        try:
            if isinstance(value, str):
                return kind.parse(value)
        except ValueError:
            continue
    raise expected("HOST:PORT, [IPV6]:PORT or :PORT with a port from 0 to 65535, unix:/PATH, systemd or systemd:NAME")


def _addresses(value: object) -> object:
    return value if isinstance(value, tuple) else (value,)


def _secret(what: str) -> Callable[[object], SecretStr | None]:
    """A reader of a secret, which is `what`."""

    def read(value: object) -> SecretStr | None:
        if value is None:
            return None
        if isinstance(value, str):
            value = SecretStr(value)
        if isinstance(value, SecretStr) and API_KEY.fullmatch(value.get_secret_value()):
            return value
        raise expected(f"{what}: text of visible ASCII characters", show=False)

    return read


def _token(value: object) -> SecretStr:
    if isinstance(value, str):
        value = SecretStr(value)
    if isinstance(value, SecretStr) and _LONG_TOKEN.fullmatch(value.get_secret_value()):
        return value
    raise expected("a token: at least 16 visible ASCII characters", show=False)


def _header(value: object) -> str:
    if isinstance(value, str) and _TOKEN.fullmatch(value):
        return value
    raise expected("the name of a header field such as Authorization or x-api-key")


def _file_path(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise expected("the path of a file")


def _file_path_or_none(value: object) -> str | None:
    return None if value is None else _file_path(value)


def _tls_version(value: object) -> str:
    if value in ("1.2", "1.3"):
        return str(value)
    raise expected('"1.2" or "1.3", in quotes')


def _seconds(value: object, info: ValidationInfo) -> float | None:
    seconds = math.nan
    if isinstance(value, str):
        if match := _DURATION.fullmatch(value):
            seconds = sum(int(n or 0) * ms for n, ms in zip(match.groups(), _DURATION_MS, strict=True)) / 1000
    elif isinstance(value, int | float) and not isinstance(value, bool) and info.context is not DOCUMENT:
        seconds = float(value)
    return seconds if 0 < seconds < math.inf else None


def _duration(value: object, info: ValidationInfo) -> float:
    seconds = _seconds(value, info)
    if seconds is None:
        raise expected("a duration such as 30s or 5m")
    return seconds


def _duration_or_off(value: object, info: ValidationInfo) -> float | None:
    if value is None or value is False or value == "off":
        return None
    seconds = _seconds(value, info)
    if seconds is None:
        raise expected("a duration such as 30s or 5m, or off")
    return seconds


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise expected("a number from 1 up")


def _count_or_off(value: object) -> int | None:
    if value is None or value is False or value == "off":
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise expected("a number from 1 up, or off")


def _rate_or_off(value: object) -> Rate | None:
    if value is None or value is False or value == "off":
        return None
    if isinstance(value, Rate):
        return value
    if isinstance(value, str) and (match := _RATE.fullmatch(value)):
        return Rate(int(match[1]), _RATE_SECONDS[match[2]])
    raise expected("a number within a time, such as 600/1m, with 1s, 1m, 1h or 1d, or off")


def _size(value: object, info: ValidationInfo) -> int:
    size = 0
    if isinstance(value, str):
        if match := _SIZE.fullmatch(value):
            size = int(match[1]) * _SIZE_BYTES[match[2]]
    elif isinstance(value, int) and not isinstance(value, bool) and info.context is not DOCUMENT:
        size = value
    if size <= 0:
        raise expected("a size such as 512KiB or 32MiB")
    return size


def _size_or_off(value: object, info: ValidationInfo) -> int | None:
    return None if value is None or value is False or value == "off" else _size(value, info)


def _dialect(value: object) -> str:
    if value == "auto":
        return "auto"
    names = _dialect_names()
    if value in names:
        return str(value)
    raise expected(f"auto or the name of a dialect ({', '.join(names)})")


def _dialect_names() -> tuple[str, ...]:
    # Imported only if a configuration names a dialect, because this import takes a fifth of the time of a check.
    from ..wire.dialects import DIALECT_NAMES

    return DIALECT_NAMES


def _glob(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise expected("the name of a model or a glob such as gpt-4*")


def _host_name(value: object) -> str:
    if isinstance(value, str) and _HOST_NAME.fullmatch(value):
        return value.lower()
    raise expected("the name of a host such as proxy.example.org, without port")


def _listed(value: object) -> tuple[object, ...]:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, tuple):
        return value
    raise expected("text or a list")


def _method(value: object) -> str:
    if isinstance(value, str) and _TOKEN.fullmatch(value):
        return value.upper()
    raise expected("an HTTP method such as POST")


def _network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    try:
        if isinstance(value, str):
            return ipaddress.ip_network(value)
    except ValueError:
        pass
    raise expected("an address or a network such as 10.0.0.0/8")


def _name(value: object) -> str:
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise expected("a name: 1 to 64 of the characters A-Z a-z 0-9 _ . -")


def _path(value: object) -> str:
    if isinstance(value, str) and _PATH.fullmatch(value):
        return value.removesuffix("/") or "/"
    raise expected("a path such as /v1, without query, empty segments and dot segments")


def _one_of(*names: str) -> Callable[[object], str]:
    """A reader that accepts one of `names`. YAML 1.1 reads a plain `off` as False; this is `off` again."""

    def read(value: object) -> str:
        if value in names or (value is False and "off" in names):
            return str(value) if value else "off"
        raise expected(f"{', '.join(names[:-1])} or {names[-1]}")

    return read


def _retry_on(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value in RETRIES:
        return str(value)
    raise expected(f"one of {', '.join(RETRIES)}")


def _affinity(value: object) -> Source:
    if isinstance(value, Source):
        return value
    kind, _, what = value.partition(":") if isinstance(value, str) else ("", "", "")
    size = _SIZE.fullmatch(what) if kind == "prefix" else None
    if (kind == "header" and _TOKEN.fullmatch(what)) or (kind == "field" and what):
        return Source(kind, what)
    if size is not None and 0 < (number := int(size[1]) * _SIZE_BYTES[size[2]]) <= MAX_PREFIX:
        return Source(kind, str(number))
    raise expected("header:NAME, field:NAME, or prefix:SIZE with at most 64KiB, such as prefix:1KiB")


def _format_source(source: Source) -> str:
    return f"{source.kind}:{format_size(int(source.what)) if source.kind == 'prefix' else source.what}"


def _key_digest(value: object) -> str:
    if isinstance(value, str) and KEY_DIGEST.fullmatch(value):
        return value
    # The value is not shown, because somebody may have put the key itself there.
    raise expected("the digest of a key, as sseproxy key prints it: sha256: and 64 hexadecimal digits", show=False)


def _ledger_url(value: object) -> SecretStr | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = SecretStr(value)
    if isinstance(value, SecretStr) and _LEDGER_URL.fullmatch(value.get_secret_value()):
        return value
    # The value is not shown, because it may have a password.
    raise expected("a URL such as redis://127.0.0.1:6379/0, with redis, rediss or unix", show=False)


def _share(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise expected("a share above 0, up to 1")


def read_url(value: object) -> str:
    """A canonical URL. A message never shows a URL that may have userinfo or a query, because these hold secrets."""
    text = value if isinstance(value, str) and value.isprintable() and " " not in value else ""
    show = not (isinstance(value, str) and re.search("[@?#]", value))
    try:
        url = URL(text)
        usable = url.scheme in ("http", "https") and bool(url.host) and bool(url.port)
    except ValueError:
        usable = False
    if not usable:
        raise expected("a URL such as https://api.openai.com/v1", show=show)
    if re.match("[^/]*//[^/]*@", text):
        raise expected("a URL without user name and password; a key belongs into api_key", show=show)
    if "?" in text or "#" in text:
        raise expected("a URL without query and fragment", show=show)
    return str(url).rstrip("/")


def is_address(url: str) -> bool:
    """Whether the host of `url` is an IP address."""
    try:
        return bool(ipaddress.ip_address(URL(url).host or ""))
    except ValueError:
        return False


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise expected("text")


def _model_or_none(value: object) -> str | None:
    if value is None or (isinstance(value, str) and value and value.isprintable()):
        return value
    raise expected("the name of a model")


def read_workers(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise expected("auto or a number of processes from 1 up")


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return "off"
    rest, parts = max(1, round(seconds * 1000)), []
    for ms, unit in zip(_DURATION_MS, ("h", "m", "s", "ms"), strict=True):
        number, rest = divmod(rest, ms)
        parts += [f"{number}{unit}"] * bool(number)
    return "".join(parts)


def format_rate(rate: Rate | None) -> str:
    if rate is None:
        return "off"
    unit = next(unit for unit, seconds in _RATE_SECONDS.items() if seconds == rate.seconds)
    return f"{rate.number}/1{unit}"


def format_size(size: int | None) -> str:
    if size is None:
        return "off"
    unit, factor = max((item for item in _SIZE_BYTES.items() if not size % item[1]), key=itemgetter(1))
    return f"{size // factor}{unit}"


NONE: Final[JsonSchemaValue] = {"type": "null"}
TEXT: Final[JsonSchemaValue] = {"type": "string"}
_NUMBER: Final[JsonSchemaValue] = {"type": "integer", "minimum": 1}
_IN_TIME: Final[JsonSchemaValue] = {"type": "string", "pattern": "^([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$"}
_IN_BYTES: Final[JsonSchemaValue] = {"type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)$"}
_VARIABLE: Final[JsonSchemaValue] = {"type": "string", "pattern": r"\$\{"}


def _as_in_yaml(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _enum(*values: str | bool | int) -> JsonSchemaValue:
    return {"enum": list(values)}


# YAML 1.1 reads a plain `off` as false.
_OFF: Final = _enum("off", False)


def _one_or_more(item: JsonSchemaValue) -> JsonSchemaValue:
    return {"anyOf": [item, {"type": "array", "items": item}]}


class AlsoAs:
    """Adds `schema` to the JSON schema of a type: values may be written in that form, too."""

    def __init__(self, schema: JsonSchemaValue) -> None:
        self._schema = schema

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [self._schema, handler(schema)]}


class Option:
    """A type of option: `read` validates a value, `schemas` describe it to editors, and `write` turns it into text.

    A schema that needs an import is a function, which is called only when the schema is printed.
    """

    def __init__(
        self,
        read: Callable[..., object],
        *schemas: JsonSchemaValue | Callable[[], JsonSchemaValue],
        write: Callable[..., object] | None = None,
    ) -> None:
        self._reader = BeforeValidator(read)
        # Any value may also be text with ${VAR}.
        self._schemas = list(schemas) if TEXT in schemas else [*schemas, _VARIABLE]
        self._write = write

    def __get_pydantic_core_schema__(self, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = self._reader.__get_pydantic_core_schema__(source, handler)
        if self._write is None:
            return schema
        return cast(CoreSchema, {**schema, "serialization": plain_serializer_function_ser_schema(self._write)})

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schemas = [known() if callable(known) else known for known in self._schemas]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


Duration = Annotated[float, Option(_duration, _IN_TIME, write=_format_duration)]
"""Seconds. Written as `250ms`, `30s`, `5m`, `1h` or a combination in descending units, such as `1m30s`."""

DurationOrOff = Annotated[float | None, Option(_duration_or_off, _IN_TIME, _OFF, NONE, write=_format_duration)]
"""A `Duration`, or `None`, which is written as `off`."""

Size = Annotated[int, Option(_size, _IN_BYTES, write=format_size)]
"""Bytes. Written as `512B`, `16KiB`, `1MiB` or `2GiB`."""

SizeOrOff = Annotated[int | None, Option(_size_or_off, _IN_BYTES, _OFF, NONE, write=format_size)]
"""A `Size`, or `None`, which is written as `off`."""

Count = Annotated[int, Option(_count, _NUMBER)]

CountOrOff = Annotated[int | None, Option(_count_or_off, _NUMBER, _OFF, NONE, write=lambda n: n or "off")]
"""A number from 1 up, or `None`, which is written as `off`."""

RateOrOff = Annotated[
    Rate | None,
    Option(_rate_or_off, {"type": "string", "pattern": f"^{_RATE.pattern}$"}, _OFF, NONE, write=format_rate),
]
"""A number within a time, written as `600/1m`, or `None`, which is written as `off`."""

Share = Annotated[float, Option(_share, {"type": "number", "exclusiveMinimum": 0, "maximum": 1})]

Workers = Annotated[PositiveInt | Literal["auto"], Option(read_workers, _NUMBER, _enum("auto"))]

Network = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, Option(_network, TEXT, write=str)]

Networks = Annotated[tuple[Network, ...], Option(_listed, _one_or_more(TEXT))]

ListenAddress = Annotated[Listen, Option(read_address, TEXT, write=str)]

ListenAddresses = Annotated[tuple[ListenAddress, ...], Option(_addresses, _one_or_more(TEXT)), Field(min_length=1)]

URLText = Annotated[str, Option(read_url, TEXT)]
"""The URL of an API, canonical, without trailing slash."""

URLOrNone = Annotated[str | None, Option(lambda value: None if value is None else read_url(value), TEXT, NONE)]

Retries = Annotated[
    tuple[Annotated[str, Option(_retry_on, _enum(*map(_as_in_yaml, RETRIES)), write=_as_in_yaml)], ...],
    Option(_listed, _one_or_more(_enum(*map(_as_in_yaml, RETRIES)))),
]

Until = Annotated[
    Literal["head", "first_token", "end"],
    Option(_one_of("head", "first_token", "end"), _enum("head", "first_token", "end")),
]

Affinity = Annotated[
    tuple[Annotated[Source, Option(_affinity, TEXT, write=_format_source)], ...], Option(_listed, _one_or_more(TEXT))
]

ApiKey = Annotated[SecretStr | None, Option(_secret("an API key"), TEXT, NONE)]

AdminToken = Annotated[SecretStr | None, Option(_secret("a token"), TEXT, NONE)]

Token = Annotated[SecretStr, Option(_token, TEXT)]

LedgerURL = Annotated[SecretStr | None, Option(_ledger_url, TEXT, NONE)]
"""The URL of a server, with its password if it needs one."""

OnFailure = Annotated[Literal["local", "refuse"], Option(_one_of("local", "refuse"), _enum("local", "refuse"))]

FieldName = Annotated[str, Option(_header, TEXT)]

Text = Annotated[str, Option(_text, TEXT)]

ModelName = Annotated[str | None, Option(_model_or_none, TEXT, NONE)]

RequiredPath = Annotated[str, Option(_file_path, TEXT)]
"""The path of a file. A relative path starts at the working directory."""

FilePath = Annotated[str | None, Option(_file_path_or_none, TEXT, NONE)]

Name = Annotated[str, Option(_name, {"type": "string", "pattern": f"^{_NAME.pattern}$"})]
"""A name is the value of a metric label, so it is short and has no special characters."""

PathPrefix = Annotated[str, Option(_path, {"type": "string", "pattern": r"^/|\$\{"})]

Globs = Annotated[tuple[Annotated[str, BeforeValidator(_glob)], ...], Option(_listed, _one_or_more(TEXT))]

Names = Annotated[tuple[Annotated[str, BeforeValidator(_name)], ...], Option(_listed, _one_or_more(TEXT))]

KeyDigests = Annotated[
    tuple[Annotated[str, BeforeValidator(_key_digest)], ...],
    Option(_listed, _one_or_more({"type": "string", "pattern": f"^{KEY_DIGEST.pattern}$"})),
]
"""Digests of keys. The keys themselves are never in a file."""

HostNames = Annotated[tuple[Annotated[str, BeforeValidator(_host_name)], ...], Option(_listed, _one_or_more(TEXT))]

Methods = Annotated[tuple[Annotated[str, BeforeValidator(_method)], ...], Option(_listed, _one_or_more(TEXT))]

DialectName = Annotated[str, Option(_dialect, lambda: _enum("auto", *_dialect_names()))]

TLSVersion = Annotated[Literal["1.2", "1.3"], Option(_tls_version, _enum("1.2", "1.3"))]

Exchanges = Annotated[
    Literal["all", "errors", "off"], Option(_one_of("all", "errors", "off"), _enum("all", "errors", "off", False))
]

LoggedPaths = Annotated[
    Literal["known", "all", "off"], Option(_one_of("known", "all", "off"), _enum("known", "all", "off", False))
]

MetricsDetail = Annotated[Literal["full", "basic"], Option(_one_of("full", "basic"), _enum("full", "basic"))]

LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    Option(_one_of("debug", "info", "warning", "error"), _enum("debug", "info", "warning", "error")),
]

LogFormat = Annotated[
    Literal["auto", "json", "text"], Option(_one_of("auto", "json", "text"), _enum("auto", "json", "text"))
]


# How messages show locations and values.

Loc = tuple[str | int, ...]
"""The location of a part of a configuration: keys and indices, from the top."""

_NOT_IN_WORD = re.compile(r"[^A-Za-z0-9_-]")


def dotted(loc: Loc) -> str:
    """A location as text: `path.to[0].key`.

    Only the first word of a key is shown, and nothing below an `api_key` or a `token`, because both may contain a
    secret: the YAML `{api_key:secret}` has one key that includes it.
    """
    path = ""
    for key in loc:
        if isinstance(key, int):
            path += f"[{key}]"
            continue
        word = _NOT_IN_WORD.split(key)[0][:64]
        path += f".{word}" if word == key else f".{word}\N{HORIZONTAL ELLIPSIS}"
        if key in ("api_key", "token"):
            break
    return path.removeprefix(".")


def quoted(text: str) -> str:
    return repr(shortened(text))


def shortened(text: str) -> str:
    return text if len(text) <= 64 else text[:63] + "\N{HORIZONTAL ELLIPSIS}"
