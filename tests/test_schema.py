"""What editors and people are told about a configuration: its schema, the examples, and what it comes to."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from sseproxy import config
from sseproxy.config import Address, Config, Limits, Match, Route, Target, Timeouts, Upstream
from sseproxy.config.options import Secret
from sseproxy.config.values import Rate

from .served import run

CONFIGS = Path(__file__).parent.parent / "configs"
EXAMPLES = sorted(CONFIGS.glob("*.yaml"))
ENVIRONMENT = {
    **{f"{name}_API_KEY": f"sk-{name}" for name in ("OPENAI", "AZURE_OPENAI", "ANTHROPIC", "GEMINI")},
    "AZURE_RESOURCE": "resource",
}
SCHEMA = json.loads(json.dumps(config.schema()))


class _Loader(yaml.SafeLoader):
    """Reads a plain `on` as text, as editors do, which know YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if first not in "oO" or tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

LEAST: dict[str, Any] = {
    "upstreams": [{"name": "up", "url": "http://h"}],
    "routes": [{"name": "api", "match": {"path": "/"}, "upstream": "up"}],
}


def test_the_schema_that_editors_get_is_the_codes() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads((CONFIGS / "schema.json").read_text()) == SCHEMA


async def test_the_schema_is_printed() -> None:
    status, out, _ = await run("schema")
    assert (status, json.loads(out)) == (0, SCHEMA)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_and_is_what_the_schema_says(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    VALIDATOR.validate(yaml.load(text, _Loader))
    assert config.load(path, ENVIRONMENT).routes


@pytest.mark.parametrize(
    "wrong",
    [
        {"lsten": ":80"},
        {"workers": 0},
        {"workers": "many"},
        {"drain_timeout": 30},
        {"drain_timeout": "30 seconds"},
        {"max_body": "1GB"},
        {"limits": {"request_fields": "some"}},
        {"access_log": {"sample": 2}},
        {"access_log": {"exchanges": "some"}},
        {"tls": {"key_file": "k"}},
        {"upstreams": []},
        {"upstreams": [{"name": "up"}]},
        {"upstreams": [{"name": "u p", "url": "http://h"}]},
        {"routes": [{"name": "api", "match": {"path": "v1"}, "upstream": "up"}]},
        {"routes": [{"name": "api", "match": {"path": "/"}, "upstream": "up", "dialect": "klingon"}]},
    ],
    ids=str,
)
def test_what_an_editor_can_see_to_be_wrong_it_says(wrong: dict[str, Any]) -> None:
    VALIDATOR.validate(LEAST)
    assert not VALIDATOR.is_valid(LEAST | wrong)


def test_variables_may_stand_anywhere() -> None:
    options = {"workers": "${WORKERS:-2}", "drain_timeout": "${DRAIN}", "access_log": {"sample": "${SAMPLE}"}}
    VALIDATOR.validate(LEAST | options)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
async def test_what_a_file_comes_to_is_a_file_with_the_same_meaning(path: Path) -> None:
    status, out, _ = await run("check-config", "--resolved", str(path), **ENVIRONMENT)
    assert status == 0
    assert "sk-" not in out
    loaded = config.load(path, ENVIRONMENT)
    again = config.parse(out, "resolved", {})
    assert without_keys(again) == without_keys(loaded)
    assert not again.variables


def without_keys(settings: Config) -> dict[str, Any]:
    keyless = tuple(replace(upstream, api_key=None) for upstream in settings.upstreams)
    return asdict(settings) | {"upstreams": keyless, "variables": None, "places": None}


TIMES = st.integers(1, 10**10).map(lambda ms: ms / 1000)
SIZES = st.integers(1, 999_999_999)


@given(TIMES, st.none() | TIMES, SIZES, st.none() | SIZES, st.none() | st.integers(1, 10**6))
def test_every_value_is_written_as_it_is_read(
    time: float, optional_time: float | None, size: int, optional_size: int | None, number: int | None
) -> None:
    settings = Config(
        listen=(Address("::1", 80), config.UnixAddress("/s"), config.PassedSocket("x")),
        drain_timeout=time,
        limits=Limits(request_head=size, request_body=optional_size, active_requests=number),
        upstreams=(Upstream(name="up", url="http://h"),),
        routes=(
            Route(
                name="r", match=Match(path="/"), upstream=(Target(name="up"),), timeouts=Timeouts(total=optional_time)
            ),
        ),
    )
    text = config.resolved(settings)
    assert replace(config.parse(text, "resolved", {}), places=()) == settings
    VALIDATOR.validate(yaml.load(text, _Loader))


EVERYTHING = """\
listen: [':80', 'unix:/s|0600', systemd:x]
trusted_proxies: [10.0.0.0/8, "::1/128"]
admin: {listen: ':1', hosts: [a.b]}
access_log: {exchanges: off, sample: 0.5, path: off}
metrics: {models: ["gpt-*"], detail: basic}
log: {level: error}
upstreams:
  - name: up
    urls: ['http://a', {url: 'http://b:1/v1', api_key: sk-b}]
    affinity: [header:x-session-id, field:prompt_cache_key, prefix:1KiB]
    health: {path: /health, interval: 1s, timeout: 500ms}
    ejection: {failures: 2, time: 1m30s}
    api_key_header: x-api-key
    max_connection_age: off
  - {name: down, url: 'http://c', resolve: 10s}
routes:
  - name: r
    match: {path: /v1, model: [a, b*], methods: [get, POST]}
    upstream: [up, {name: down, model: m}]
    retry: {on: [429, connect, same], until: end, max_body: 2KiB}
    usage: {request: true}
    dialect: chat
    heartbeat: 15s
    timeouts: {total: 1h}
    limits: {active_requests: off}
clients:
  - name: team
    keys: "sha256:KEY"
    models: [a]
    routes: [r]
    limits: {active_requests: 1, requests: 600/1m, tokens: off}
""".replace("KEY", "0" * 64)


def test_options_of_every_kind_are_written_as_they_are_read() -> None:
    settings = config.parse(EVERYTHING, "f", {})
    text = config.resolved(settings)
    assert "sk-b" not in text
    again = config.parse(text.replace("'**********'", "sk-b"), "f", {})
    assert replace(again, places=()) == replace(settings, places=())
    VALIDATOR.validate(yaml.load(text, _Loader))
    VALIDATOR.validate(yaml.load(EVERYTHING, _Loader))


def test_what_a_worker_is_handed_has_all_options_but_the_admin_token_and_cannot_change() -> None:
    upstream = Upstream(name="up", url="http://h", api_key=Secret("sk-x"))
    limits = config.ClientLimits(active_requests=5, requests=Rate(600, 60))
    digest = f"sha256:{'a' * 64}"
    settings = Config(
        admin=config.Admin(token=Secret("t")),
        upstreams=(upstream,),
        routes=(Route(name="r", match=Match(path="/"), upstream=(Target(name="up"),)),),
        clients=(config.Client(name="a", keys=(digest,), limits=limits),),
    )
    handed = pickle.loads(pickle.dumps(settings.for_workers()))
    assert handed == replace(settings, admin=config.Admin())
    key = handed.upstreams[0].key
    assert key.reveal() == "sk-x"
    assert "sk-x" not in repr(handed)
    assert handed.clients[0].digests == ("a" * 64,)
    with pytest.raises(AttributeError, match="immutable"):
        handed.limits.lag = 3.0
