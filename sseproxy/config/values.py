"""The types of options: how a value of each type is read, how it is written, and its JSON schema.

A reader raises `Expected` for a value that is not valid. No error shows a value that may be secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from operator import itemgetter
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

from .addresses import Address, Listen, PassedSocket, UnixAddress
from .options import TEXT, Expected, ListOf, Option, OrNone, Schema, Secret, Value, text_or_list

T = TypeVar("T")

API_KEY: Final = r"[!-~]+"
# A random token of 16 characters cannot be guessed over a network.
_LONG_TOKEN: Final = r"[!-~]{16,1024}"
KEY_DIGEST: Final = "sha256:[0-9a-f]{64}"
_DURATION: Final = r"(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?(?:([0-9]{1,9})ms)?"
_DURATION_MS = (3_600_000, 60_000, 1_000, 1)
# A token (RFC 9110, section 5.6.2): a method, or the name of a header field.
_TOKEN: Final = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
# URLs that yarl does not change: without IDNA, dots in the path, and the ports 80 and 443, which it may remove. For
# these, yarl is not imported: its import takes a tenth of the time of a check of a configuration.
_CANONICAL_URL: Final = r"https?://(?!.*xn--)[a-z0-9.-]+(?::(?:[1-5][0-9]{4}|[1-9][0-9]{3}))?(?:/[A-Za-z0-9_-]+)*/?"
_LEDGER_URL: Final = r"(?:rediss?://[!-~]+|unix:///[!-~]+)"
_HOST_NAME: Final = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,252}"
_NAME: Final = r"[A-Za-z0-9_.-]{1,64}"
# Visible ASCII characters without slash, `?` and `#`.
_PATH: Final = r"(?:/(?!\.{0,2}(?:/|$))[!\"$-.0->@-~]+)+/?|/"
_RATE: Final = r"([1-9][0-9]{0,11})/1([smhd])"
_RATE_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SIZE: Final = r"([0-9]{1,9})(B|KiB|MiB|GiB)"
RETRIES: Final = ("connect", "429", "503", "529", "reset", "timeout", "500", "502", "504", "same")
"""What a route's `retry.on` may name."""
MAX_PREFIX: Final = 64 << 10
"""Bytes. A longer prefix of messages would not tell conversations apart better."""
_SIZE_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Rate(NamedTuple):
    """At most `number` within so many seconds."""

    number: int
    seconds: int


class Source(NamedTuple):
    """The part of a request by which it is assigned to an endpoint.

    `kind` is `header`, `field` or `prefix`; `what` is the name of the header field or of the member of the body, or
    the number of bytes.
    """

    kind: str
    what: str


def _or_off(read: Callable[[Any], T]) -> Callable[[object], T | None]:
    """A reader that also accepts `off`. YAML 1.1 reads a plain `off` as False."""

    def read_or_off(value: object) -> T | None:
        if value is None or value is False or value == "off":
            return None
        try:
            return read(value)
        except Expected as error:
            raise Expected(f"{str(error).removeprefix('expected ')}, or off") from None

    return read_or_off


def read_address(value: object) -> Listen:
    for kind in (PassedSocket, UnixAddress, Address):
        try:
            if isinstance(value, str):
                return kind.parse(value)
        except ValueError:
            continue
    raise Expected("HOST:PORT, [IPV6]:PORT or :PORT with a port from 0 to 65535, unix:/PATH, systemd or systemd:NAME")


def _addresses(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def _secret(what: str, allowed: str) -> Callable[[object], Secret]:
    """A reader of a secret, which is `what`."""

    def read(value: object) -> Secret:
        if isinstance(value, str) and re.fullmatch(allowed, value):
            return Secret(value)
        raise Expected(what, "nothing")

    return read


_api_key = _secret("an API key: text of visible ASCII characters", API_KEY)
_admin_token = _secret("a token: text of visible ASCII characters", API_KEY)
_token = _secret("a token: at least 16 visible ASCII characters", _LONG_TOKEN)
_ledger_url = _secret("a URL such as redis://127.0.0.1:6379/0, with redis, rediss or unix", _LEDGER_URL)


def _header(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(_TOKEN, value):
        return value
    raise Expected("the name of a header field such as Authorization or x-api-key")


def _file_path(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise Expected("the path of a file")


def _tls_version(value: object) -> str:
    if value in ("1.2", "1.3"):
        return str(value)
    raise Expected('"1.2" or "1.3", in quotes')


def _duration(value: object) -> float:
    match = re.fullmatch(_DURATION, value) if isinstance(value, str) else None
    ms = sum(int(n or 0) * ms for n, ms in zip(match.groups(), _DURATION_MS, strict=True)) if match else 0
    if not ms:
        raise Expected("a duration such as 30s or 5m")
    return ms / 1000


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise Expected("a number from 1 up")


def _rate(value: object) -> Rate:
    if isinstance(value, str) and (match := re.fullmatch(_RATE, value)):
        return Rate(int(match[1]), _RATE_SECONDS[match[2]])
    raise Expected("a number within a time, such as 600/1m, with 1s, 1m, 1h or 1d")


def read_size(value: object) -> int:
    match = re.fullmatch(_SIZE, value) if isinstance(value, str) else None
    size = int(match[1]) * _SIZE_BYTES[match[2]] if match else 0
    if not size:
        raise Expected("a size such as 512KiB or 32MiB")
    return size


def _dialect(value: object) -> str:
    if value == "auto":
        return "auto"
    names = _dialect_names()
    if value in names:
        return str(value)
    raise Expected(f"auto or the name of a dialect ({', '.join(names)})")


def _dialect_names() -> tuple[str, ...]:
    # Imported only if a configuration names a dialect, because this import takes a fifth of the time of a check.
    from ..wire.dialects import DIALECT_NAMES

    return DIALECT_NAMES


def _glob(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise Expected("the name of a model or a glob such as gpt-4*")


def _host_name(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(_HOST_NAME, value):
        return value.lower()
    raise Expected("the name of a host such as proxy.example.org, without port")


def _method(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(_TOKEN, value):
        return value.upper()
    raise Expected("an HTTP method such as POST")


def _network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        if isinstance(value, str):
            return ipaddress.ip_network(value)
    except ValueError:
        pass
    raise Expected("an address or a network such as 10.0.0.0/8")


def read_name(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(_NAME, value):
        return value
    raise Expected("a name: 1 to 64 of the characters A-Z a-z 0-9 _ . -")


def read_path(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(_PATH, value):
        return value.removesuffix("/") or "/"
    raise Expected("a path such as /v1, without query, empty segments and dot segments")


def _retry_on(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value in RETRIES:
        return str(value)
    raise Expected(f"one of {', '.join(RETRIES)}")


def _affinity(value: object) -> Source:
    kind, _, what = value.partition(":") if isinstance(value, str) else ("", "", "")
    size = re.fullmatch(_SIZE, what) if kind == "prefix" else None
    if (kind == "header" and re.fullmatch(_TOKEN, what)) or (kind == "field" and what):
        return Source(kind, what)
    if size is not None and 0 < (number := int(size[1]) * _SIZE_BYTES[size[2]]) <= MAX_PREFIX:
        return Source(kind, str(number))
    raise Expected("header:NAME, field:NAME, or prefix:SIZE with at most 64KiB, such as prefix:1KiB")


def _format_source(source: Source) -> str:
    return f"{source.kind}:{format_size(int(source.what)) if source.kind == 'prefix' else source.what}"


def _key_digest(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(KEY_DIGEST, value):
        return value
    # The value is not shown, because somebody may have put the key itself there.
    raise Expected("the digest of a key, as sseproxy key prints it: sha256: and 64 hexadecimal digits", "nothing")


def _share(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise Expected("a share above 0, up to 1")


def read_url(value: object) -> str:
    """A canonical URL. A message never shows a URL that may have userinfo or a query, because these hold secrets."""
    if isinstance(value, str) and re.fullmatch(_CANONICAL_URL, value):
        return value.rstrip("/")
    from yarl import URL

    text = value if isinstance(value, str) and value.isprintable() and " " not in value else ""
    show = not (isinstance(value, str) and re.search("[@?#]", value))
    try:
        url = URL(text)
        usable = url.scheme in ("http", "https") and bool(url.host) and bool(url.port)
    except ValueError:
        usable = False
    if not usable:
        raise Expected("a URL such as https://api.openai.com/v1", "value" if show else "nothing")
    if re.match("[^/]*//[^/]*@", text):
        raise Expected(
            "a URL without user name and password; a key belongs into api_key", "value" if show else "nothing"
        )
    if "?" in text or "#" in text:
        raise Expected("a URL without query and fragment", "value" if show else "nothing")
    return str(url).rstrip("/")


def is_address(url: str) -> bool:
    """Whether the host of `url` is an IP address."""
    from yarl import URL

    try:
        return bool(ipaddress.ip_address(URL(url).host or ""))
    except ValueError:
        return False


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise Expected("text")


def _model(value: object) -> str:
    if isinstance(value, str) and value and value.isprintable():
        return value
    raise Expected("the name of a model")


def read_workers(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise Expected("auto or a number of processes from 1 up")


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


_NULL: Final[Schema] = {"type": "null"}
_NUMBER: Final[Schema] = {"type": "integer", "minimum": 1}
_IN_TIME: Final[Schema] = {"type": "string", "pattern": "^([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$"}
_IN_BYTES: Final[Schema] = {"type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)$"}


def _as_in_yaml(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _enum(*values: str | bool | int) -> Schema:
    return {"enum": list(values)}


# YAML 1.1 reads a plain `off` as false.
_OFF: Final = _enum("off", False)


def _one_of(*names: str) -> Option:
    """An option that is one of `names`. YAML 1.1 reads a plain `off` as False; this is `off` again."""

    def read(value: object) -> str:
        if value in names or (value is False and "off" in names):
            return str(value) if value else "off"
        raise Expected(f"{', '.join(names[:-1])} or {names[-1]}")

    return Value(read, _enum(*names, *([False] if "off" in names else [])))


Duration = Annotated[float, Value(_duration, _IN_TIME, write=_format_duration)]
"""Seconds. Written as `250ms`, `30s`, `5m`, `1h` or a combination in descending units, such as `1m30s`."""

DurationOrOff = Annotated[float | None, Value(_or_off(_duration), _IN_TIME, _OFF, _NULL, write=_format_duration)]
"""A `Duration`, or `None`, which is written as `off`."""

Size = Annotated[int, Value(read_size, _IN_BYTES, write=format_size)]
"""Bytes. Written as `512B`, `16KiB`, `1MiB` or `2GiB`."""

SizeOrOff = Annotated[int | None, Value(_or_off(read_size), _IN_BYTES, _OFF, _NULL, write=format_size)]
"""A `Size`, or `None`, which is written as `off`."""

Count = Annotated[int, Value(_count, _NUMBER)]

CountOrOff = Annotated[int | None, Value(_or_off(_count), _NUMBER, _OFF, _NULL, write=lambda n: n or "off")]
"""A number from 1 up, or `None`, which is written as `off`."""

RateOrOff = Annotated[
    Rate | None,
    Value(_or_off(_rate), {"type": "string", "pattern": f"^{_RATE}$"}, _OFF, _NULL, write=format_rate),
]
"""A number within a time, written as `600/1m`, or `None`, which is written as `off`."""

Share = Annotated[float, Value(_share, {"type": "number", "exclusiveMinimum": 0, "maximum": 1})]

Workers = Annotated[int | Literal["auto"], Value(read_workers, _NUMBER, _enum("auto"))]

Networks = Annotated[
    tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...],
    ListOf(Value(_network, TEXT, write=str), text_or_list),
]

_LISTEN: Final = Value(read_address, TEXT, write=str)

ListenAddress = Annotated[Listen, _LISTEN]

ListenAddresses = Annotated[tuple[Listen, ...], ListOf(_LISTEN, _addresses, least=1)]

URLText = Annotated[str, Value(read_url, TEXT)]
"""The URL of an API, canonical, without trailing slash."""

URLOrNone = Annotated[str | None, OrNone(Value(read_url, TEXT))]

Retries = Annotated[
    tuple[str, ...],
    ListOf(Value(_retry_on, _enum(*map(_as_in_yaml, RETRIES)), write=_as_in_yaml), text_or_list),
]

Until = Annotated[Literal["head", "first_token", "end"], _one_of("head", "first_token", "end")]

Affinity = Annotated[tuple[Source, ...], ListOf(Value(_affinity, TEXT, write=_format_source), text_or_list)]

ApiKey = Annotated[Secret | None, OrNone(Value(_api_key, TEXT))]

AdminToken = Annotated[Secret | None, OrNone(Value(_admin_token, TEXT))]

Token = Annotated[Secret, Value(_token, TEXT)]

LedgerURL = Annotated[Secret | None, OrNone(Value(_ledger_url, TEXT))]
"""The URL of a server, with its password if it needs one."""

OnFailure = Annotated[Literal["local", "refuse"], _one_of("local", "refuse")]

FieldName = Annotated[str, Value(_header, TEXT)]

Text = Annotated[str, Value(_text, TEXT)]

ModelName = Annotated[str | None, OrNone(Value(_model, TEXT))]

RequiredPath = Annotated[str, Value(_file_path, TEXT)]
"""The path of a file. A relative path starts at the working directory."""

FilePath = Annotated[str | None, OrNone(Value(_file_path, TEXT))]

_NAMED: Final = Value(read_name, {"type": "string", "pattern": f"^{_NAME}$"})

Name = Annotated[str, _NAMED]
"""A name is the value of a metric label, so it is short and has no special characters."""

Names = Annotated[tuple[str, ...], ListOf(_NAMED, text_or_list)]

PathPrefix = Annotated[str, Value(read_path, {"type": "string", "pattern": r"^/|\$\{"})]

Globs = Annotated[tuple[str, ...], ListOf(Value(_glob, TEXT), text_or_list)]

KeyDigests = Annotated[
    tuple[str, ...],
    ListOf(Value(_key_digest, {"type": "string", "pattern": f"^{KEY_DIGEST}$"}), text_or_list),
]
"""Digests of keys. The keys themselves are never in a file."""

HostNames = Annotated[tuple[str, ...], ListOf(Value(_host_name, TEXT), text_or_list)]

Methods = Annotated[tuple[str, ...], ListOf(Value(_method, TEXT), text_or_list)]

DialectName = Annotated[str, Value(_dialect, lambda: _enum("auto", *_dialect_names()))]

TLSVersion = Annotated[Literal["1.2", "1.3"], Value(_tls_version, _enum("1.2", "1.3"))]

Exchanges = Annotated[Literal["all", "errors", "off"], _one_of("all", "errors", "off")]

LoggedPaths = Annotated[Literal["known", "all", "off"], _one_of("known", "all", "off")]

MetricsDetail = Annotated[Literal["full", "basic"], _one_of("full", "basic")]

LogLevel = Annotated[Literal["debug", "info", "warning", "error"], _one_of("debug", "info", "warning", "error")]

LogFormat = Annotated[Literal["auto", "json", "text"], _one_of("auto", "json", "text")]
