from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme
import yarl
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sseproxy import config
from sseproxy.config import (
    Address,
    Admin,
    Config,
    Match,
    PassedSocket,
    Route,
    Target,
    Timeouts,
    UnixAddress,
    Upstream,
    files,
    values,
)
from sseproxy.config.document import Document
from sseproxy.config.options import Loc, Secret, Section, options_of
from sseproxy.errors import ConfigError
from sseproxy.wire.dialects import DIALECT_NAMES

CONFIGS = Path(__file__).parent.parent / "configs"
SECRET = "sk-5ecret"

UPSTREAMS = """\
upstreams:
  - name: openai
    url: https://api.openai.com/v1
  - name: vllm
    url: http://vllm:8000/v1
"""
ROUTES = """\
routes:
  - name: api
    match: {path: /v1}
    upstream: openai
"""
VALID = UPSTREAMS + ROUTES
NAMES = [*options_of(Config)]

TOP_KEYS = (
    "access_log, admin, clients, drain_timeout, ledger, limits, listen, log, max_body, metrics, probe, reload, routes, "
    "tls, trusted_proxies, upstreams, workers"
)
TIMEOUT_KEYS = "body, connect, first_token, head, idle, total, write"
HOST_PORT = "expected HOST:PORT, [IPV6]:PORT or :PORT with a port from 0 to 65535, unix:/PATH, systemd or systemd:NAME"
DURATION = "expected a duration such as 30s or 5m"
SIZE = "expected a size such as 512KiB or 32MiB"
NAME = "expected a name: 1 to 64 of the characters A-Z a-z 0-9 _ . -"
URL = "expected a URL such as https://api.openai.com/v1"
PATH = "expected a path such as /v1, without query, empty segments and dot segments"
API_KEY = "expected an API key: text of visible ASCII characters"
CA_FILE = "expected a readable file of PEM certificates"
LIST = "expected a list (each entry begins with a dash and a space)"
AT_THE_TOP = "expected options with values, such as {upstreams: ..., routes: ...}"
FOR_ADMIN = "expected options with values, such as {listen: ..., hosts: ...}"
FOR_AN_UPSTREAM = "expected options with values, such as {name: ..., url: ...}"
NO_SPACE = "is a space missing after a colon?"
ALIAS = "anchors and aliases are not supported; text that starts with & or * has to be put in quotes"
TAG = "tags are not supported; text that starts with ! has to be put in quotes"


def problems(text: str, env: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "f", env or {})
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert caught.value.__cause__ is caught.value.__context__ is None
    return list(caught.value.problems)


def upstream(line: str) -> str:
    return f"upstreams:\n  - name: openai\n    url: http://h\n    {line}\n{ROUTES}"


def route(line: str) -> str:
    return f"{VALID}    {line}\n"


def match(text: str) -> str:
    return f"routes:\n  - name: api\n    match: {text}\n    upstream: openai\n{UPSTREAMS}"


TOKEN = "that cannot start any token, while scanning for the next token"
COLON = "mapping values are not allowed here"
IN_BLOCK = "while parsing a block mapping"
OPTION = "write `option: value`, with a colon and a space"
FOLLOWS = "nothing can follow a closing quote or bracket: remove it, or put the whole value in quotes"
COLON_IN_TEXT = "put text that contains a colon and a space, or ends with a colon, in quotes"
INDENT = "indent this line like the lines that it belongs to"
# Text that is not YAML: where the mistake is, what to do, and what the parser says.
NOT_YAML = {
    "tab": ("a:\n\tb: c", "2:1", "use spaces, not tabs", f"found character '\\t' {TOKEN}"),
    "tab_after_dash": ("a:\n  -\tb: c", "2:4", "use spaces, not tabs", f"found character '\\t' {TOKEN}"),
    "no_space_in_the_first_line": ("a:1\nb: 2", "1:1", OPTION, COLON),
    "no_space_in_the_first_option_of_an_entry": ("a:\n  - b:1\n    c: 2", "2:3", OPTION, COLON),
    "no_space_above_a_comment": (
        "a:1\n\n# why\nb: 2",
        "1:1",
        OPTION,
        "expected '<document start>', but found '<block mapping start>'",
    ),
    "no_space": ("a:\n  b: 1\n  c:d\ne: f", "3:3", OPTION, "could not find expected ':', while scanning a simple key"),
    "no_space_before_a_quote": (
        "a: 1\nb:'c'\n",
        "2:1",
        OPTION,
        "could not find expected ':', while scanning a simple key",
    ),
    "no_space_after_dash": ("a:\n  -b: 1\n    c: 2", "2:3", "put a space after the dash", COLON),
    "equals": ("a = 1\nb: 2", "1:1", OPTION, COLON),
    "long_option": (f"{'a' * 2000}: b", "1:2001", OPTION, COLON),
    "colon": ("a: b: c", "1:5", COLON_IN_TEXT, COLON),
    "colon_at_the_end": ("a: b:", "1:5", COLON_IN_TEXT, COLON),
    "too_far": ("a: 1\n  b: 2", "2:3", "this line is indented too far", COLON),
    "too_far_in_an_entry": ("a:\n  - b: 1\n      c: 2", "3:7", "this line is indented too far", COLON),
    "not_far_enough": (
        "a:\n  b: 1\n c: 2",
        "3:2",
        INDENT,
        f"expected <block end>, but found '<block mapping start>', {IN_BLOCK}",
    ),
    "option_under_its_dash": (
        "a:\n  - b: 1\n  c: 2",
        "3:3",
        INDENT,
        "expected <block end>, but found '?', while parsing a block collection",
    ),
    "indentation": (
        "a:\n  - b: 1\n   - c",
        "3:4",
        INDENT,
        "expected <block end>, but found '<block sequence start>', while parsing a block collection",
    ),
    "unindented_entry": (
        "a:\n  - b: 1\n- b: 2",
        "3:1",
        "indent this entry like the other entries of its list",
        f"expected <block end>, but found '-', {IN_BLOCK}",
    ),
    "list_in_the_line_of_its_option": (
        "a: - b",
        "1:4",
        "begin the list in a line of its own",
        "sequence entries are not allowed here",
    ),
    "quote": (
        "a: 'b\nc: d",
        "1:4",
        "a closing quote is missing",
        "found unexpected end of stream, while scanning a quoted scalar",
    ),
    "quote_that_the_next_one_closes": (
        "a: 'b\nc: 'd'",
        "2:5",
        "a closing quote is missing in an earlier line",
        f"expected <block end>, but found '<scalar>', {IN_BLOCK}",
    ),
    "quote_inside": ("a: 'b'c'", "1:7", FOLLOWS, f"expected <block end>, but found '<scalar>', {IN_BLOCK}"),
    "backslash": (
        'a: "C:\\d"',
        "1:8",
        "put text that contains \\ in single quotes",
        "found unknown escape character 'd', while scanning a double-quoted scalar",
    ),
    "brace": (
        "a: {b: c\nd: e",
        "1:4",
        "a comma or the closing } is missing",
        "expected ',' or '}', but got ':', while parsing a flow mapping",
    ),
    "bracket": (
        "a: [b\nc: d",
        "1:4",
        "a comma or the closing ] is missing",
        "expected ',' or ']', but got ':', while parsing a flow sequence",
    ),
    "bracket_at_the_end": (
        "a: [b\n",
        "1:4",
        "a comma or the closing ] is missing",
        "expected ',' or ']', but got '<stream end>', while parsing a flow sequence",
    ),
    "comma": (
        '{"a": 1,\n  "b": "2"\n  "c": 3}',
        "3:3",
        "a comma or the closing } is missing, or text with a special character needs quotes",
        "expected ',' or '}', but got '<scalar>', while parsing a flow mapping",
    ),
    "bracket_too_many": ("a: {b: c}}", "1:10", FOLLOWS, f"expected <block end>, but found '}}', {IN_BLOCK}"),
    "bracket_too_many_in_its_line": ("a: b\n}", "2:1", FOLLOWS, f"expected <block end>, but found '}}', {IN_BLOCK}"),
    "option_after_the_last_bracket": (
        "{a: b}\nc: d",
        "2:1",
        "nothing can follow the last bracket",
        "expected '<document start>', but found '<block mapping start>'",
    ),
    "variable_in_braces": (
        "a: {b: ${C}}",
        "1:9",
        "put ${VAR} in quotes between brackets",
        "expected ',' or '}', but got '{', while parsing a flow mapping",
    ),
    "ipv6": (
        "a: [::1]:80",
        "1:5",
        "a value is missing before this, or text that starts with [ or { needs quotes",
        "expected the node content, but found ':', while parsing a flow node",
    ),
    "template_with_more": (
        "a: {{ b }}/c",
        "1:11",
        FOLLOWS,
        f"expected <block end>, but found '<scalar>', {IN_BLOCK}",
    ),
    "template_line": (
        "{{ if a }}\nb: c",
        "1:1",
        OPTION,
        "expected '<document start>', but found '<block mapping start>'",
    ),
    "at": ("a: @b", "1:4", "put text that starts with @ in quotes", f"found character '@' {TOKEN}"),
    "percent": ("a: %b", "1:4", "put text that starts with % in quotes", f"found character '%' {TOKEN}"),
    "percent_line": (
        "%: b",
        "1:2",
        "put text that starts with % in quotes",
        "expected alphabetic or numeric character, but found ':', while scanning a directive",
    ),
    "backtick": ("a: `b`", "1:4", "put text that starts with ` in quotes", f"found character '`' {TOKEN}"),
    "comma_first": (
        "a: ,b",
        "1:4",
        "put text that starts with , in quotes",
        "expected the node content, but found ',', while parsing a block node",
    ),
    "greater": (
        "a: >b",
        "1:5",
        "put text that starts with > or | in quotes",
        "expected chomping or indentation indicators, but found 'b', while scanning a block scalar",
    ),
    "star": (
        "a: {b: *}",
        "1:9",
        "put text that starts with * in quotes",
        "expected alphabetic or numeric character, but found '}', while scanning an alias",
    ),
    "ampersand": (
        "a: & b",
        "1:5",
        "put text that starts with & in quotes",
        "expected alphabetic or numeric character, but found ' ', while scanning an anchor",
    ),
    "tag_handle": (
        "a: !secret!x",
        "1:4",
        "put text that starts with ! in quotes",
        "found undefined tag, while parsing a node",
    ),
}
MISTAKES = {
    name: (text, f"f:{place}: {advice} (not valid YAML: {words})")
    for name, (text, place, advice, words) in NOT_YAML.items()
} | {
    "empty": ("", f"f:1:1: {AT_THE_TOP}, got nothing"),
    "comment": ("# nothing", f"f:1:1: {AT_THE_TOP}, got nothing"),
    "null": ("--- ~", f"f:1:5: {AT_THE_TOP}, got nothing"),
    "top_list": ("- a", f"f:1:1: {AT_THE_TOP}, got a list"),
    "top_text": ("api_key:secret", f"f:1:1: {AT_THE_TOP}, got text; {NO_SPACE}"),
    "unprintable": ("a: 1\nb: \x07", "f:2:4: remove this unprintable character"),
    "template": (
        f"workers: {{{{ workers }}}}\n{VALID}",
        "f:1:1: workers: text that starts with {{ has to be put in quotes",
    ),
    "two_documents": (f"{VALID}---\na: 1\n", "f:10:1: expected a single YAML document"),
    "nested_deeply": ("[" * 10_000, "f:1:33: not valid YAML: nested too deeply"),
    "alias": (f"workers: &w 2\n{VALID}", f"f:1:1: workers: {ALIAS}"),
    "anchored_root": (f"&a\n{VALID}", f"f:1:1: {ALIAS}"),
    "tag": (f"workers: !!int '2'\n{VALID}", f"f:1:1: workers: {TAG}"),
    "tagged_mapping": (f"admin: !!set {{}}\n{VALID}", f"f:1:1: admin: {TAG}"),
    "merge": (f"<<: {{workers: 2}}\n{VALID}", "f:1:1: merge keys (<<) are not supported"),
    "key_number": (f"1: 2\n{VALID}", "f:1:1: expected a key that is text"),
    "key_boolean": (
        f"admin:\n  on: 2\n{VALID}",
        "f:2:3: admin.on: unknown key; expected one of cancel, hosts, listen, token",
    ),
    "key_list": (f"? [a]\n: 2\n{VALID}", "f:1:3: expected a key that is text"),
    "key_alias": (f"*a : 2\n{VALID}", "f:1:1: expected a key that is text"),
    "duplicate_key": (
        f"workers: 2\n{VALID}workers: 3\n",
        "f:11:1: workers: duplicate key; the first one is in line 1",
    ),
    "unknown_key": (f"colour: red\n{VALID}", f"f:1:1: colour: unknown key; expected one of {TOP_KEYS}"),
    "misspelt_key": (
        f"lsten: :80\n{VALID}",
        f"f:1:1: lsten: unknown key; expected one of {TOP_KEYS}; did you mean 'listen'?",
    ),
    "misspelt_inner_key": (
        route("timeouts: {idel: 1s}"),
        f"f:10:16: routes[0].timeouts.idel: unknown key; expected one of {TIMEOUT_KEYS}; did you mean 'idle'?",
    ),
    "odd_key": (f'"a\\nb": 1\n{VALID}', f"f:1:1: a…: unknown key; expected one of {TOP_KEYS}"),
    "long_key": (f"{'k' * 99}: 1\n{VALID}", f"f:1:1: {'k' * 64}…: unknown key; expected one of {TOP_KEYS}"),
    "missing_section": (ROUTES, "f:1:1: upstreams: required key is missing"),
    "missing_key": (
        f"routes:\n  - name: api\n    upstream: openai\n{UPSTREAMS}",
        "f:2:5: routes[0].match: required key is missing",
    ),
    "missing_path": (match("{model: x}"), "f:3:12: routes[0].match.path: required key is missing"),
    "no_upstreams": (f"upstreams: []\n{ROUTES}", "f:1:1: upstreams: expected at least one entry"),
    "no_routes": (f"{UPSTREAMS}routes: []\n", "f:6:1: routes: expected at least one entry"),
    "null_section": (f"admin:\n{VALID}", f"f:1:1: admin: {FOR_ADMIN}, got nothing"),
    "text_section": (f"admin: here\n{VALID}", f"f:1:1: admin: {FOR_ADMIN}, got text"),
    "text_section_without_space": (
        f"admin:\n  token:secret\n{VALID}",
        f"f:1:1: admin: {FOR_ADMIN}, got text; {NO_SPACE}",
    ),
    "boolean_section": (f"admin: yes\n{VALID}", f"f:1:1: admin: {FOR_ADMIN}, got yes"),
    "boolean": (f"admin: {{cancel: 1}}\n{VALID}", "f:1:9: admin.cancel: expected true or false, got a number"),
    "mapping_of_upstreams": (
        f"upstreams:\n  openai: {{url: http://h}}\n{ROUTES}",
        f"f:1:1: upstreams: {LIST}, got options with values",
    ),
    "number_for_upstream": (f"upstreams: [5]\n{ROUTES}", f"f:1:13: upstreams[0]: {FOR_AN_UPSTREAM}, got a number"),
    "text_for_upstream": (
        f"upstreams: ['api_key:secret']\n{ROUTES}",
        f"f:1:13: upstreams[0]: {FOR_AN_UPSTREAM}, got text; {NO_SPACE}",
    ),
    "listen_port_only": (f"listen: 8080\n{VALID}", f"f:1:1: listen: {HOST_PORT}, got a number (8080)"),
    "listen_without_port": (f"listen: localhost\n{VALID}", f"f:1:1: listen: {HOST_PORT}, got 'localhost'"),
    "listen_bare_ipv6": (f"listen: '::1:80'\n{VALID}", f"f:1:1: listen: {HOST_PORT}, got '::1:80'"),
    "listen_in_list": (f"listen: [':80', ':81x']\n{VALID}", f"f:1:17: listen[1]: {HOST_PORT}, got ':81x'"),
    "listen_nowhere": (f"listen: []\n{VALID}", "f:1:1: listen: expected at least one entry"),
    "listen_unix_relative": (f"listen: unix:x.sock\n{VALID}", f"f:1:1: listen: {HOST_PORT}, got 'unix:x.sock'"),
    "listen_unix_too_long": (
        f"listen: unix:/{'x' * 107}\n{VALID}",
        f"f:1:1: listen: {HOST_PORT}, got 'unix:/{'x' * 57}…'",
    ),
    "tls_without_certificate": (f"tls: {{}}\n{VALID}", "f:1:6: tls.cert_file: required key is missing"),
    "tls_version": (
        f"tls: {{cert_file: c, min_version: 1.2}}\n{VALID}",
        'f:1:21: tls.min_version: expected "1.2" or "1.3", in quotes, got a number (1.2)',
    ),
    "tls_file_missing": (
        f"tls: {{cert_file: /nowhere.pem}}\n{VALID}",
        "f:1:1: tls: expected readable files in cert_file and key_file (no such file or directory)",
    ),
    "watch_without_unit": (
        f"reload: {{watch: 5}}\n{VALID}",
        "f:1:10: reload.watch: expected a duration such as 30s or 5m, or off, got a number (5)",
    ),
    "log_level": (
        f"log: {{level: loud}}\n{VALID}",
        "f:1:7: log.level: expected debug, info, warning or error, got 'loud'",
    ),
    "logged_paths": (
        f"access_log: {{path: some}}\n{VALID}",
        "f:1:14: access_log.path: expected known, all or off, got 'some'",
    ),
    "log_of_nothing_known": (
        f"access_log: {{exchanges: some}}\n{VALID}",
        "f:1:14: access_log.exchanges: expected all, errors or off, got 'some'",
    ),
    "log_share": (
        f"access_log: {{sample: 0}}\n{VALID}",
        "f:1:14: access_log.sample: expected a share above 0, up to 1, got a number (0)",
    ),
    "log_format": (
        f"access_log: {{format: xml}}\n{VALID}",
        "f:1:14: access_log.format: expected auto, json or text, got 'xml'",
    ),
    "key_file_is_a_device": (
        upstream("api_key_file: /dev/null"),
        "f:4:5: upstreams[0].api_key_file: expected a readable file with an API key (not a regular file)",
    ),
    "key_file_with_a_zero_byte": (
        upstream('api_key_file: "/k\\0"'),
        "f:4:5: upstreams[0].api_key_file: expected a readable file with an API key (no path has such a character)",
    ),
    "key_file_missing": (
        upstream("api_key_file: /nowhere.key"),
        "f:4:5: upstreams[0].api_key_file: expected a readable file with an API key (no such file or directory)",
    ),
    "client_key_without_certificate": (
        upstream("tls: {key_file: /k}"),
        "f:4:5: upstreams[0].tls: expected cert_file beside key_file",
    ),
    "admin_port": (f"admin: {{listen: ':65536'}}\n{VALID}", f"f:1:9: admin.listen: {HOST_PORT}, got ':65536'"),
    "workers_zero": (
        f"workers: 0\n{VALID}",
        "f:1:1: workers: expected auto or a number of processes from 1 up, got a number (0)",
    ),
    "workers_boolean": (
        f"workers: yes\n{VALID}",
        "f:1:1: workers: expected auto or a number of processes from 1 up, got yes",
    ),
    "workers_not_an_int": (
        f"workers: 0x_\n{VALID}",
        "f:1:1: workers: expected auto or a number of processes from 1 up, got '0x_'",
    ),
    "workers_huge": (
        f"workers: {'1' * 5000}\n{VALID}",
        f"f:1:1: workers: expected auto or a number of processes from 1 up, got '{'1' * 63}…'",
    ),
    "duration_number": (f"drain_timeout: 30\n{VALID}", f"f:1:1: drain_timeout: {DURATION}, got a number (30)"),
    "duration_float": (f"drain_timeout: 1.5\n{VALID}", f"f:1:1: drain_timeout: {DURATION}, got a number (1.5)"),
    "duration_zero": (f"drain_timeout: 0s\n{VALID}", f"f:1:1: drain_timeout: {DURATION}, got '0s'"),
    "duration_unit": (f"drain_timeout: 3 days\n{VALID}", f"f:1:1: drain_timeout: {DURATION}, got '3 days'"),
    "duration_off": (
        route("timeouts: {idle: off}"),
        f"f:10:16: routes[0].timeouts.idle: {DURATION}, got off",
    ),
    "total": (
        route("timeouts: {total: 5}"),
        f"f:10:16: routes[0].timeouts.total: {DURATION}, or off, got a number (5)",
    ),
    "size_number": (f"max_body: 1024\n{VALID}", f"f:1:1: max_body: {SIZE}, got a number (1024)"),
    "size_unit": (f"max_body: 1MB\n{VALID}", f"f:1:1: max_body: {SIZE}, got '1MB'"),
    "size_zero": (f"max_body: 0B\n{VALID}", f"f:1:1: max_body: {SIZE}, got '0B'"),
    "url_scheme": (
        upstream("").replace("http://h", "api.openai.com"),
        f"f:3:5: upstreams[0].url: {URL}, got 'api.openai.com'",
    ),
    "url_number": (upstream("").replace("http://h", "1"), f"f:3:5: upstreams[0].url: {URL}, got a number (1)"),
    "url_userinfo": (
        upstream("").replace("http://h", "http://u:secret@h"),
        "f:3:5: upstreams[0].url: expected a URL without user name and password; a key belongs into api_key",
    ),
    "url_userinfo_empty": (
        upstream("").replace("http://h", "http://@h"),
        "f:3:5: upstreams[0].url: expected a URL without user name and password; a key belongs into api_key",
    ),
    "url_userinfo_and_port": (
        upstream("").replace("http://h", "http://u:secret@h:0"),
        f"f:3:5: upstreams[0].url: {URL}",
    ),
    "url_query": (
        upstream("").replace("http://h", "http://h?key=secret"),
        "f:3:5: upstreams[0].url: expected a URL without query and fragment",
    ),
    "api_key_number": (upstream("api_key: 1234"), f"f:4:5: upstreams[0].api_key: {API_KEY}"),
    "api_key_list": (upstream("api_key: [secret]"), f"f:4:5: upstreams[0].api_key: {API_KEY}"),
    "api_key_space": (upstream("api_key: secret key"), f"f:4:5: upstreams[0].api_key: {API_KEY}"),
    "api_key_empty": (upstream("api_key: ''"), f"f:4:5: upstreams[0].api_key: {API_KEY}"),
    "api_key_alias": (upstream("api_key: *secret"), f"f:4:5: upstreams[0].api_key: {ALIAS}"),
    "api_key_tag": (upstream("api_key: !secret x"), f"f:4:5: upstreams[0].api_key: {TAG}"),
    "api_key_unset": (
        upstream("api_key: ${KEY}"),
        "f:4:5: upstreams[0].api_key: environment variable KEY is not set",
    ),
    "api_key_without_space": (
        f"upstreams: [{{name: openai, url: 'http://h', api_key:secret}}]\n{ROUTES}",
        (
            "f:1:45: upstreams[0].api_key…: unknown key; expected one of affinity, api_key, api_key_file, "
            f"api_key_header, ejection, health, max_connection_age, name, resolve, tls, url, urls; {NO_SPACE}"
        ),
    ),
    "ca_file_missing": (
        upstream("tls: {ca_file: /nowhere/ca.pem}"),
        f"f:4:11: upstreams[0].tls.ca_file: {CA_FILE} (no such file or directory), got '/nowhere/ca.pem'",
    ),
    "ca_file_directory": (
        upstream("tls: {ca_file: /}"),
        f"f:4:11: upstreams[0].tls.ca_file: {CA_FILE} (is a directory), got '/'",
    ),
    "ca_file_without_certificates": (
        upstream("tls: {ca_file: /dev/null}"),
        f"f:4:11: upstreams[0].tls.ca_file: {CA_FILE} (not a regular file), got '/dev/null'",
    ),
    "ca_file_number": (
        upstream("tls: {ca_file: 1}"),
        "f:4:11: upstreams[0].tls.ca_file: expected the path of a file of PEM certificates, got a number (1)",
    ),
    "name": (match("{path: /v1}").replace("api", "my api", 1), f"f:2:5: routes[0].name: {NAME}, got 'my api'"),
    "name_number": (match("{path: /v1}").replace("api", "1", 1), f"f:2:5: routes[0].name: {NAME}, got a number (1)"),
    "name_long": (
        match("{path: /v1}").replace("api", "n" * 65, 1),
        f"f:2:5: routes[0].name: {NAME}, got '{'n' * 63}…'",
    ),
    "path_relative": (match("{path: v1}"), f"f:3:13: routes[0].match.path: {PATH}, got 'v1'"),
    "path_query": (match("{path: '/v1?a'}"), f"f:3:13: routes[0].match.path: {PATH}, got '/v1?a'"),
    "path_dots": (match("{path: /a/../v1}"), f"f:3:13: routes[0].match.path: {PATH}, got '/a/../v1'"),
    "path_slashes": (match("{path: /v1//}"), f"f:3:13: routes[0].match.path: {PATH}, got '/v1//'"),
    "model_number": (
        match("{path: /v1, model: [o1, 4]}"),
        "f:3:36: routes[0].match.model[1]: expected the name of a model or a glob such as gpt-4*, got a number (4)",
    ),
    "model_empty": (
        match("{path: /v1, model: ''}"),
        "f:3:24: routes[0].match.model: expected the name of a model or a glob such as gpt-4*, got ''",
    ),
    "model_mapping": (
        match("{path: /v1, model: {a: b}}"),
        "f:3:24: routes[0].match.model: expected text or a list, got options with values",
    ),
    "method": (
        match("{path: /v1, methods: [post, 'a b']}"),
        "f:3:40: routes[0].match.methods[1]: expected an HTTP method such as POST, got 'a b'",
    ),
    "upstream_number": (
        match("{path: /v1}").replace("upstream: openai", "upstream: 5"),
        "f:4:5: routes[0].upstream: expected the name of an upstream, or a list of them, got a number (5)",
    ),
    "upstream_without_name": (
        match("{path: /v1}").replace("upstream: openai", "upstream: {model: o1}"),
        "f:4:15: routes[0].upstream.name: required key is missing",
    ),
    "upstream_with_unknown_key": (
        match("{path: /v1}").replace("upstream: openai", "upstream: {name: openai, x: 1}"),
        "f:4:30: routes[0].upstream.x: unknown key; expected one of model, name",
    ),
    "upstream_name_number": (
        match("{path: /v1}").replace("upstream: openai", "upstream: {name: 5}"),
        "f:4:16: routes[0].upstream.name: expected text, got a number (5)",
    ),
    "unknown_upstream": (
        VALID.replace("upstream: openai", "upstream: opnai"),
        "f:9:5: routes[0].upstream: expected the name of an upstream (openai, vllm), got 'opnai'",
    ),
    "duplicate_upstream": (
        VALID.replace("vllm", "openai", 1),
        "f:4:5: upstreams[1].name: expected a unique name, got that of upstreams[0]",
    ),
    "duplicate_route": (
        f"{VALID}  - {{name: api, match: {{path: /}}, upstream: vllm}}\n",
        "f:10:6: routes[1].name: expected a unique name, got that of routes[0]",
    ),
    "duplicate_match": (
        f"{VALID}  - {{name: b, match: {{path: /v1/, model: []}}, upstream: vllm}}\n",
        "f:10:15: routes[1].match: expected a unique match, got that of routes[0]",
    ),
    "variable_unset": (f"listen: $A:${{PORT}}\n{VALID}", "f:1:1: listen: environment variable PORT is not set"),
    "variable_unclosed": (
        f"listen: :${{PORT\n{VALID}",
        "f:1:1: listen: expected ${NAME} or ${NAME:-default}; a literal ${ is written as $${",
    ),
    "variable_bad_name": (
        f"listen: :${{1PORT}}\n{VALID}",
        "f:1:1: listen: expected ${NAME} or ${NAME:-default}; a literal ${ is written as $${",
    ),
    "variable_nested": (
        f"listen: :${{PORT:-${{X:-80}}}}\n{VALID}",
        "f:1:1: listen: expected ${NAME} or ${NAME:-default}; a literal ${ is written as $${",
    ),
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_each_mistake_has_one_exact_message(text: str, expected: str) -> None:
    assert "\n".join(problems(text)) == expected
    assert "secret" not in expected


def test_everything_wrong_is_reported_at_once_in_order() -> None:
    text = """\
lsten: 127.0.0.1:8080
workers: ${WORKERS}
drain_timeout: 30
drain_timeout: 40
upstreams:
  - name: openai
    url: ftp://${HOST}
    api_key: [x, "${KEY}"]
  - name: openai
  - {name: "${NAME}", url: http://h}
routes:
  - name: a
    match: {path: /v1, mehods: GET, model: gpt-*}
    upstream: opnai
    timeouts: {idle: 5, head: off}
  - name: a
    match: {path: /v1, model: [gpt-*]}
    upstream: ${USE}
  - name: c
    match: {path: /v1/, model: gpt-*}
    upstream: openai
  - 7
"""
    assert problems(text, {"HOST": "h", "NAME": "hidden", "USE": "concealed"}) == [
        f"f:1:1: lsten: unknown key; expected one of {TOP_KEYS}; did you mean 'listen'?",
        "f:2:1: workers: environment variable WORKERS is not set",
        f"f:3:1: drain_timeout: {DURATION}, got a number (30)",
        "f:4:1: drain_timeout: duplicate key; the first one is in line 3",
        f"f:7:5: upstreams[0].url: {URL}, got 'ftp://${{HOST}}'",
        f"f:8:5: upstreams[0].api_key: {API_KEY}",
        "f:8:18: upstreams[0].api_key: environment variable KEY is not set",
        "f:9:5: upstreams[1].name: expected a unique name, got that of upstreams[0]",
        "f:9:5: upstreams[1]: expected either url or urls",
        "f:13:24: routes[0].match.mehods: unknown key; expected one of methods, model, path; did you mean 'methods'?",
        "f:14:5: routes[0].upstream: expected the name of an upstream (openai, openai, ${NAME}), got 'opnai'",
        f"f:15:16: routes[0].timeouts.idle: {DURATION}, got a number (5)",
        f"f:15:25: routes[0].timeouts.head: {DURATION}, got off",
        "f:16:5: routes[1].name: expected a unique name, got that of routes[0]",
        "f:18:5: routes[1].upstream: expected the name of an upstream (openai, openai, ${NAME}), got '${USE}'",
        "f:20:5: routes[2].match: expected a unique match, got that of routes[1]",
        "f:22:5: routes[3]: expected options with values, such as {name: ..., match: ..., upstream: ...}, got a number",
    ]


def test_unknown_key_whose_value_is_unset_has_both_problems() -> None:
    assert problems(f"x: ${{Y}}\n{VALID}") == [
        "f:1:1: x: environment variable Y is not set",
        f"f:1:1: x: unknown key; expected one of {TOP_KEYS}",
    ]


def test_unknown_upstream_is_left_open_while_a_name_is_unreadable() -> None:
    text = VALID.replace("name: vllm", "name: ${N}").replace("upstream: openai", "upstream: opnai")
    assert problems(text) == ["f:4:5: upstreams[1].name: environment variable N is not set"]


def test_names_in_messages_stay_on_one_line() -> None:
    text = VALID.replace("name: vllm", r'name: "v\nllm"').replace("upstream: openai", r'upstream: "x\ny"')
    assert problems(text) == [
        rf"f:4:5: upstreams[1].name: {NAME}, got 'v\nllm'",
        r"f:9:5: routes[0].upstream: expected the name of an upstream (openai, v\nllm), got 'x\ny'",
    ]


def test_aliases_do_not_expand() -> None:
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
    assert f"f:20:1: a19: {ALIAS}" in problems(laughs)
    assert f"f:1:1: a: {ALIAS}" in problems("a: &a [*a]")


@pytest.mark.parametrize(
    ("written", "env", "host"),
    [
        ("${HOST}", {"HOST": "h"}, "h"),
        ("${HOST:-d}", {"HOST": "h"}, "h"),
        ("${HOST:-d}", {"HOST": ""}, "d"),
        ("${HOST:-d}", {}, "d"),
        ("a${A}${B}", {"A": "1", "B": "2"}, "a12"),
        ("${A}", {"A": ""}, ""),
        ("'${HOST}'", {"HOST": "h"}, "h"),
    ],
)
def test_variables_are_replaced(written: str, env: dict[str, str], host: str) -> None:
    written = f"{written[:-1]}:1'" if written.endswith("'") else f"{written}:1"
    assert config.parse(f"listen: {written}\n{VALID}", "f", env).listen == (Address(host, 1),)


@pytest.mark.parametrize(
    ("written", "model"),
    [
        ("$$", "$"),
        ("$${A}", "${A}"),
        ("$$$$A", "$$A"),
        ("a$", "a$"),
        ("$A", "$A"),
        ("${UNSET:-$$}", "$$"),
        ("${A}", "${B}"),
        ("${UNSET:-a:-b}", "a:-b"),
        ("${UNSET:-a\n        b}", "a b"),
        ("${STRUCTURE}", "x: [1, {2: 3}] # no\n- y"),
    ],
)
def test_expansion_happens_once_and_within_the_value(written: str, model: str) -> None:
    env = {"A": "${B}", "STRUCTURE": "x: [1, {2: 3}] # no\n- y"}
    text = (
        f"routes:\n  - name: api\n    upstream: openai\n    match:\n      path: /\n      model: {written}\n{UPSTREAMS}"
    )
    assert config.parse(text, "f", env).routes[0].match.model == (model,)


def test_plain_scalars_get_their_type_after_expansion_and_quoted_ones_stay_text() -> None:
    assert config.parse(f"workers: ${{N:-2}}\n{VALID}", "f", {}).workers == 2
    assert config.parse(f"workers: ${{N:-2}}\n{VALID}", "f", {"N": "auto"}).workers == "auto"
    assert config.parse(route("timeouts: {total: '${T}'}"), "f", {"T": "off"}).routes[0].timeouts.total is None
    assert config.parse(upstream("api_key: ${KEY:-}"), "f", {"KEY": ""}).upstreams[0].api_key is None
    assert problems(f"workers: '${{N:-2}}'\n{VALID}") == [
        "f:1:1: workers: expected auto or a number of processes from 1 up, got '${N:-2}'"
    ]


def test_keys_are_not_expanded() -> None:
    assert problems(f"${{A}}: 1\n{VALID}", {"A": "listen"}) == [f"f:1:1: …: unknown key; expected one of {TOP_KEYS}"]


@pytest.mark.parametrize("total", ["off", "no", "false", "~", "'off'", ""])
def test_total_can_be_off(total: str) -> None:
    assert config.parse(route(f"timeouts:\n      total: {total}"), "f", {}).routes[0].timeouts.total is None


@pytest.mark.parametrize(
    "line",
    [
        "api_key: {KEY}",
        "api_key: [KEY]",
        "api_key: {KEY: 1, KEY: 2}",
        "api_key: *KEY",
        "api_key: &KEY x",
        "api_key: !KEY x",
        "api_key: !KEY!x y",
        "api_key: 'KEY KEY'",
        "api_key: ' KEY'",
        "api_key: KEY${",
        "api_key: {KEY: '${'}",
        "api_key:KEY",
        "- api_key:KEY",
        "apikey: KEY",
        "url: KEY@h",
        "url: http://h/?KEY",
        "url: http://:KEY@h/",
        "url: http://:KEY@h:x/",
    ],
)
def test_secrets_are_in_no_message(line: str) -> None:
    text = upstream("").replace("    url: http://h\n", f"    {line}\n") if "url" in line else upstream(line)
    assert SECRET not in "\n".join(problems(text.replace("KEY", SECRET)))


@pytest.mark.parametrize("mistake", ["listen", "workers", "drain_timeout", "max_body", "admin", "upstreams", "routes"])
@pytest.mark.parametrize("value", ["hidden value", "123456789", "yes", "[hidden]"])
def test_values_of_variables_are_in_no_message(mistake: str, value: str) -> None:
    text = "".join(f"{key}: ${{V}}\n" for key in NAMES if key != mistake) + f"{mistake}: '${{V}}'\n"
    assert value not in "\n".join(problems(text, {"V": value}))


@pytest.mark.parametrize("key", ["name", "url", "api_key"])
def test_values_of_variables_in_entries_are_in_no_message(key: str) -> None:
    text = f"upstreams: [{{name: a, url: 'http://h', {key}1: '${{V}}'}}, '${{V}}', {{{key}: '${{V}}'}}]\nroutes: 1"
    assert "hidden" not in "\n".join(problems(text, {"V": "hidden value"}))


def test_api_key_is_in_no_repr() -> None:
    loaded = config.parse(upstream("api_key: ${KEY}"), "f", {"KEY": SECRET})
    assert loaded.upstreams[0].api_key == Secret(SECRET)
    assert SECRET not in repr(loaded) + str(loaded)


def test_a_configuration_knows_the_variables_whose_values_it_took() -> None:
    env = {"PORT": "1", "KEY": SECRET, "EMPTY": "", "OTHER": "x"}
    models = "metrics: {models: ['${EMPTY:-a}', '${NONE:-b}', $$]}"
    text = f"listen: 'h:${{PORT}}'\n{models}\n{upstream('api_key: ${KEY}')}"
    loaded = config.parse(text, "f", env)
    assert loaded.variables == config.override(loaded, workers=2).variables == {"PORT", "KEY", "EMPTY"}
    assert "variables" not in config.resolved(loaded) + json.dumps(config.schema())
    assert config.single("http://h").variables == frozenset()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("max_body: 65MiB", "f:1:1: limits.held: expected at least max_body (65MiB), got its default of 64MiB"),
        ("limits: {held: 1KiB}", "f:1:10: limits.held: expected at least max_body (its default of 32MiB), got 1KiB"),
        (
            "max_body: ${BODY}\nlimits:\n  held: 4KiB",
            "f:3:3: limits.held: expected at least max_body (${BODY}), got 4KiB",
        ),
    ],
)
def test_a_body_that_would_never_fit_is_a_conflict(options: str, expected: str) -> None:
    assert problems(f"{options}\n{VALID}", {"BODY": "1GiB"}) == [expected]


@pytest.mark.parametrize("options", ["max_body: 64MiB", "max_body: 1B\nlimits: {held: 1B}", "limits: {held: 1GiB}"])
def test_a_body_that_fits_is_none(options: str) -> None:
    assert config.parse(f"{options}\n{VALID}", "f", {})


@pytest.mark.parametrize(
    "wrong", ["max_body: 1", "limits: 1", "limits: {held: 1}", "max_body: ${NONE}", "limits: {held: !x 1}"]
)
def test_a_size_that_is_wrong_conflicts_with_nothing(wrong: str) -> None:
    (problem,) = problems(f"{wrong}\n{VALID}")
    assert "at least" not in problem


def test_config_survives_pickling() -> None:
    loaded = config.load(CONFIGS / "reference.yaml", {"OPENAI_API_KEY": SECRET})
    again = pickle.loads(pickle.dumps(loaded))
    assert again == loaded
    assert again.variables == {"OPENAI_API_KEY"}
    assert again.upstreams[0].api_key.reveal() == SECRET


def test_minimal_config_loads() -> None:
    loaded = config.load(CONFIGS / "minimal.yaml", {"OPENAI_API_KEY": SECRET})
    assert replace(loaded, places=()) == Config(
        upstreams=(Upstream(name="openai", url="https://api.openai.com/v1", api_key=Secret(SECRET)),),
        routes=(Route(name="api", match=Match(path="/v1"), upstream=(Target(name="openai"),)),),
        variables=frozenset({"OPENAI_API_KEY"}),
    )
    assert problems((CONFIGS / "minimal.yaml").read_text()) == [
        "f:8:5: upstreams[0].api_key: environment variable OPENAI_API_KEY is not set"
    ]


def assert_complete_with_defaults(section: Section, loc: Loc, document: Document) -> None:
    for name, option in options_of(type(section)).items():
        place, value = (*loc, name), getattr(section, name)
        assert place in document.parts
        # One of url and urls is required.
        if not option.required and name != "url":
            assert value == option.default, place
        if isinstance(value, Section):
            assert_complete_with_defaults(value, place, document)
        for index, item in enumerate(value if isinstance(value, tuple) else ()):
            # A target without a model is written as its name.
            if isinstance(item, Section) and not isinstance(item, config.Target):
                assert_complete_with_defaults(item, (*place, index), document)


def test_reference_config_has_every_option_with_its_default() -> None:
    text = (CONFIGS / "reference.yaml").read_text()
    loaded = config.parse(text, "f", {})
    assert loaded.upstreams
    assert loaded.routes
    assert_complete_with_defaults(loaded, (), Document(text, {}))


def test_reference_config_has_what_is_only_there_if_it_is_wanted() -> None:
    lines = (CONFIGS / "reference.yaml").read_text().splitlines()
    for name, part in (("tls", config.TLS), ("probe", config.Probe)):
        section = lines[lines.index(f"{name}:") :]
        for option, declared in options_of(part).items():
            line = next(line for line in section if line.startswith(f"  # {option}: "))
            optional = not declared.required and declared.default is not None
            assert not optional or line.replace('"', "") == f"  # {option}: {declared.default}"


def test_a_key_is_read_from_its_file_and_shown_nowhere(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-from-file\n")
    loaded = config.parse(upstream(f"api_key_file: {tmp_path / 'key'}"), "f", {})
    key = loaded.upstreams[0].key
    assert key is not None
    assert key.reveal() == "sk-from-file"
    assert loaded.files() == [str(tmp_path / "key")]
    assert "sk-from" not in repr(loaded)
    with pytest.raises(ConfigError) as raised:
        config.parse(upstream(f"api_key_file: {tmp_path / 'key'}\n    api_key: sk-x"), "f", {})
    assert raised.value.problems == ("f:2:5: upstreams[0]: expected either api_key or api_key_file, not both",)


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("unix:/run/s", UnixAddress("/run/s")),
        ("unix:/run/s|0666", UnixAddress("/run/s", 0o666)),
        ("systemd", PassedSocket()),
        ("systemd:http", PassedSocket("http")),
    ],
)
def test_addresses_that_are_none_of_tcp(written: str, address: config.Listen) -> None:
    loaded = config.parse(f"listen: ['{written}', ':1']\n{VALID}", "f", {})
    assert loaded.listen == (address, Address("", 1))
    assert type(address).parse(str(address)) == address


def test_defaults_are_the_documented_ones() -> None:
    loaded = config.parse(VALID, "f", {})
    assert (loaded.listen, loaded.admin.listen) == ((Address("127.0.0.1", 8080),), Address("127.0.0.1", 9464))
    assert (loaded.workers, loaded.drain_timeout, loaded.max_body) == ("auto", 30, 32 * 1024 * 1024)
    assert loaded.routes[0].timeouts == Timeouts(connect=10, head=600, first_token=900, idle=300, total=None, write=60)


def test_match_accepts_one_text_or_a_list_and_normalizes() -> None:
    loaded = config.parse(match("{path: /v1/, model: gpt-*, methods: [get, POST]}"), "f", {})
    assert loaded.routes[0].match == Match(path="/v1", model=("gpt-*",), methods=("GET", "POST"))
    assert Match(path="/").path == "/"


def test_routes_that_differ_in_model_or_methods_are_no_conflict() -> None:
    text = VALID + "".join(
        f"  - {{name: {name}, upstream: vllm, match: {{path: /v1, {more}}}}}\n"
        for name, more in [("a", "model: x"), ("b", "model: [x, y]"), ("c", "methods: GET")]
    )
    assert [route.name for route in config.parse(text, "f", {}).routes] == ["api", "a", "b", "c"]
    assert problems(f"{text}  - {{name: d, upstream: vllm, match: {{path: /v1, model: [y, x]}}}}\n") == [
        "f:13:31: routes[4].match: expected a unique match, got that of routes[2]"
    ]


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/", "http://localhost:8000"),
        ("HTTP://[::1]:8000/a/b", "http://[::1]:8000/a/b"),
        ("http://h/a@b", "http://h/a@b"),
    ],
)
def test_urls_are_canonical_and_without_trailing_slash(written: str, url: str) -> None:
    loaded = config.parse(upstream("").replace("http://h", written), "f", {})
    assert loaded.upstreams[0].url == url


@settings(max_examples=50)
@given(st.from_regex(values._CANONICAL_URL, fullmatch=True))
def test_a_url_that_is_taken_as_it_is_is_canonical(written: str) -> None:
    assert values.read_url(written) == str(yarl.URL(written)).rstrip("/")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("localhost:0", "localhost", 0),
        ("[::1]:8080", "::1", 8080),
        ("[fe80::1%eth0]:65535", "fe80::1%eth0", 65535),
        (":8080", "", 8080),
    ],
)
def test_address_round_trip(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)
    assert str(Address(host, port)) == text


@pytest.mark.parametrize(
    "text",
    ["", "80", ":", "h:", "h:65536", "h:-1", "h:٣", "::1:80", "[]:80", "[h]:80", "[::1]", "a b:1", "h:80\n", "*:80"],
)
def test_address_refuses_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Address.parse(text)


def test_a_configuration_knows_its_upstreams_and_cannot_change() -> None:
    loaded = config.parse(VALID, "f", {})
    assert loaded.upstream("vllm") is loaded.upstreams[1]
    with pytest.raises(KeyError):
        loaded.upstream("b")
    with pytest.raises(AttributeError, match="immutable"):
        loaded.workers = 3  # type: ignore[misc]


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sseproxy.yaml"
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert caught.value.problems == (f"{path}: cannot be read: No such file or directory",)

    path.write_bytes(b"workers: 2\nlisten: \xe9\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert caught.value.problems == (f"{path}:2:9: expected UTF-8 text",)

    path.write_text(VALID, "utf-8-sig")
    assert config.load(str(path)) == config.parse(VALID, "f")

    path.write_text(f"workers: no\n{VALID}")
    with pytest.raises(ConfigError, match=f"^{path}:1:1: workers: expected"):
        config.load(path)


def test_environment_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSEPROXY_TEST_WORKERS", "7")
    assert config.parse(f"workers: ${{SSEPROXY_TEST_WORKERS}}\n{VALID}", "f").workers == 7


@pytest.mark.parametrize(
    ("url", "target", "path"),
    [
        ("http://vllm:8000", "http://vllm:8000", "/"),
        ("http://vllm:8000/", "http://vllm:8000", "/"),
        ("https://api.openai.com/v1", "https://api.openai.com/v1", "/v1"),
        ("https://h/openai/v1/", "https://h/openai/v1", "/v1"),
    ],
)
def test_single_upstream(url: str, target: str, path: str) -> None:
    assert config.single(url) == Config(
        upstreams=(Upstream(name="upstream", url=target),),
        routes=(Route(name="api", match=Match(path=path), upstream=(Target(name="upstream"),)),),
    )


def test_single_upstream_takes_the_other_flags() -> None:
    built = config.single("http://h", listen=":1", admin="[::1]:2", workers="3")
    assert (built.listen, built.admin.listen, built.workers) == ((Address("", 1),), Address("::1", 2), 3)


def test_problems_of_flags_name_the_flags() -> None:
    with pytest.raises(ConfigError) as caught:
        config.single("localhost:8000", listen="8080", admin="", workers="0")
    assert caught.value.problems == (
        f"--upstream: {URL}, got 'localhost:8000'",
        f"--listen: {HOST_PORT}, got '8080'",
        f"--admin: {HOST_PORT}, got ''",
        "--workers: expected auto or a number of processes from 1 up, got '0'",
    )
    with pytest.raises(ConfigError) as caught:
        config.single(f"http://{SECRET}@h")
    assert SECRET not in str(caught.value)


def test_override_changes_only_what_is_given() -> None:
    loaded = config.parse(f"listen: :1\nworkers: 2\n{VALID}", "f", {})
    assert config.override(loaded) == loaded
    assert config.override(loaded, listen="h:5") == replace(loaded, listen=(Address("h", 5),))
    assert config.override(loaded, admin=":6").admin == Admin(listen=Address("", 6))
    assert config.override(loaded, workers="auto").workers == "auto"
    assert config.override(loaded, workers=4).workers == config.override(loaded, workers="4").workers == 4
    with pytest.raises(ConfigError) as caught:
        config.override(loaded, listen="x", workers="many")
    assert caught.value.problems == (
        f"--listen: {HOST_PORT}, got 'x'",
        "--workers: expected auto or a number of processes from 1 up, got 'many'",
    )


@settings(deadline=None)
@given(st.tuples(*[st.none() | st.integers(0, 999_999_999)] * 4).filter(any))
def test_duration_round_trip(counts: tuple[int | None, ...]) -> None:
    text = "".join(
        f"{count}{unit}" for count, unit in zip(counts, ("h", "m", "s", "ms"), strict=True) if count is not None
    )
    ms = sum((count or 0) * unit for count, unit in zip(counts, (3_600_000, 60_000, 1_000, 1), strict=True))
    assert config.parse(f"drain_timeout: {text}\n{VALID}", "f", {}).drain_timeout == ms / 1000


@pytest.mark.parametrize("text", ["", "s", "1", "-1s", "1.5s", "1s1m", "1s1s", "1 s", "1S", "٣s", "1s\n", "0h0ms"])
def test_duration_refuses_what_is_none(text: str) -> None:
    assert problems(f"drain_timeout: {json.dumps(text)}\n{VALID}") == [
        f"f:1:1: drain_timeout: {DURATION}, got {text!r}"
    ]


@settings(deadline=None)
@given(st.integers(1, 999_999_999), st.sampled_from(["B", "KiB", "MiB", "GiB"]))
def test_size_round_trip(count: int, unit: str) -> None:
    size = count * 1024 ** ["B", "KiB", "MiB", "GiB"].index(unit)
    assert config.parse(f"limits: {{event: {count}{unit}}}\n{VALID}", "f", {}).limits.event == size


SYNTAX = [": ", "\n", "\n  ", "\n    - ", "- ", "{", "}", "[", "]", ", ", "'", '"', "# ", "|", ">", "? ", "---", "..."]
REFUSED = ["&a ", "*a", "!!int ", "!x!y ", "<<", "%YAML 1.1\n", "${", "\ufeff", "\x85", "\x00"]
SCALARS = [
    "${A}",
    "${B:-",
    "$$",
    "0x_",
    "1:30",
    ".1e+999",
    "1e5",
    "2001-99-99",
    "off",
    "~",
    "=",
    "30s",
    "1MiB",
    "/v1",
    ":80",
]
KEYS = [name for section in (Config, Upstream, Route, Match, Timeouts) for name in options_of(section)]
FRAGMENTS = st.sampled_from(SYNTAX + REFUSED + SCALARS + KEYS)


@settings(deadline=None)
@given(st.text() | st.lists(FRAGMENTS | st.text(max_size=3)).map("".join), st.text())
def test_text_is_a_config_or_a_config_error(text: str, value: str) -> None:
    try:
        config.parse(text, "f", {"A": value})
    except ConfigError as error:
        assert error.problems
        assert all(problem.startswith("f:") and len(problem.splitlines()) == 1 for problem in error.problems)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | FRAGMENTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | FRAGMENTS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1))
def test_any_structure_is_a_config_or_a_config_error(data: dict[str, object]) -> None:
    try:
        config.parse(json.dumps(data), "f", {})
    except ConfigError as error:
        assert all(problem.startswith("f:") and len(problem.splitlines()) == 1 for problem in error.problems)


def test_an_unknown_dialect_names_the_known_ones() -> None:
    text = """\
upstreams: [{name: up, url: "http://h"}]
routes:
  - {name: api, match: {path: /}, upstream: up, dialect: chatty}
"""
    with pytest.raises(ConfigError) as raised:
        config.parse(text, "f", {})
    assert str(raised.value) == (
        "f:3:49: routes[0].dialect: expected auto or the name of a dialect (chat, completions, responses, assistants, "
        "messages, gemini, speech, transcriptions, images, generic), got 'chatty'"
    )
    reference = Path(__file__).parent.parent / "configs" / "reference.yaml"
    assert all(name in reference.read_text() for name in DIALECT_NAMES)


# Where an option names a file: what a configuration has before and after the file's name, and what is expected there.
NAMED_FILES = {
    "api_key_file": (upstream("api_key_file: FILE"), "a readable file with an API key"),
    "ca_file": (upstream("tls: {ca_file: FILE}"), "a readable file of PEM certificates"),
    "cert_file": (upstream("tls: {cert_file: FILE}"), "readable files in cert_file and key_file"),
    "key_file": (upstream("tls: {cert_file: GOOD, key_file: FILE}"), "readable files in cert_file and key_file"),
    "clients_cert_file": (f"tls: {{cert_file: FILE}}\n{VALID}", "readable files in cert_file and key_file"),
    "clients_key_file": (
        f"tls: {{cert_file: GOOD, key_file: FILE}}\n{VALID}",
        "readable files in cert_file and key_file",
    ),
}


@pytest.mark.parametrize("option", NAMED_FILES)
def test_a_file_that_would_keep_whoever_reads_it_is_refused(option: str, tmp_path: Path) -> None:
    text, expected = NAMED_FILES[option]
    (tmp_path / "good").write_text("x")
    (tmp_path / "large").write_bytes(b"x" * ((4 << 20) + 1))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    for file, why in {
        "pipe": "not a regular file",
        "link": "not a regular file",
        "/dev/zero": "not a regular file",
        "socket": "no such device or address",
        "loop": "too many levels of symbolic links",
        ".": "is a directory",
        "missing": "no such file or directory",
        "large": f"larger than {'16KiB' if option == 'api_key_file' else '4MiB'}",
    }.items():
        written = text.replace("FILE", str(tmp_path / file)).replace("GOOD", str(tmp_path / "good"))
        (problem,) = problems(written)
        assert f": expected {expected} ({why}" in problem, file
        assert str(tmp_path) not in problem or option == "ca_file"


def test_a_file_that_became_a_pipe_keeps_no_worker_either(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("h")
    issued.private_key_pem.write_to_path(tmp_path / "key")
    for file in ("cert", "ca"):
        issued.cert_chain_pems[0].write_to_path(tmp_path / file)
    cert, key, ca = (str(tmp_path / file) for file in ("cert", "key", "ca"))
    contexts = [
        config.TLS(cert_file=cert, key_file=key).context,
        config.UpstreamTLS(cert_file=cert, key_file=key, ca_file=ca).context,
    ]
    for context in contexts:
        assert context()
    for file in ("key", "cert", "ca"):
        (tmp_path / file).unlink()
        os.mkfifo(tmp_path / file)
        for context in contexts[file == "ca" :]:
            with pytest.raises(OSError, match="not a regular file"):
                context()


def test_keys_are_read_through_links_as_they_are_mounted(tmp_path: Path) -> None:
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "key").write_text("sk-x\n")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "key").symlink_to("..data/key")
    loaded = config.parse(upstream(f"api_key_file: {tmp_path / 'key'}"), "f", {})
    assert loaded.upstreams[0].key == Secret("sk-x")


@pytest.mark.parametrize("content", ["", "\n", "two\nlines", "é", "a b"])
def test_a_key_file_has_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(content)
    assert problems(upstream(f"api_key_file: {tmp_path / 'key'}")) == [
        "f:4:5: upstreams[0].api_key_file: expected a file with an API key: one line of visible ASCII characters"
    ]


def test_a_file_without_certificates_is_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("no certificate")
    (problem,) = problems(upstream(f"tls: {{ca_file: {tmp_path / 'ca'}}}"))
    assert problem.startswith(f"f:4:11: upstreams[0].tls.ca_file: {CA_FILE} (no certificate is in it)")


def test_a_configuration_may_come_out_of_a_pipe() -> None:
    ours, theirs = os.pipe()
    # More than a pipe holds, so that it is read while it is written.
    text = f"# {'x' * 200_000}\n{VALID}"
    with ThreadPoolExecutor(1) as pool:
        try:
            loading = pool.submit(config.load, f"/dev/fd/{ours}", {})
            with open(theirs, "w") as file:
                file.write(text)
            assert replace(loading.result(), places=()) == replace(config.parse(VALID, "f", {}), places=())
        finally:
            os.close(ours)


def test_it_may_have_been_written_before_it_is_read() -> None:
    ours, theirs = os.pipe()
    os.write(theirs, VALID.encode())
    os.close(theirs)
    try:
        assert config.load(f"/dev/fd/{ours}") == config.parse(VALID, "f")
    finally:
        os.close(ours)


def test_it_may_be_written_later(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(config.load, tmp_path / "pipe", {})
        # This waits for a reader.
        (tmp_path / "pipe").write_text(VALID)
        assert loading.result() == config.parse(VALID, "f", {})


@pytest.mark.parametrize("begun", [None, b"", VALID.encode()])
def test_a_pipe_that_nobody_writes_into_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bytes | None
) -> None:
    monkeypatch.setattr(files, "_PIPE_TIMEOUT", 0.1)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    # Both ends at once, so that nobody waits for the other.
    writer = None if begun is None else os.open(path, os.O_RDWR)
    try:
        if writer is not None and begun:
            os.write(writer, begun)
        with pytest.raises(ConfigError) as caught:
            config.load(path)
    finally:
        if writer is not None:
            os.close(writer)
    assert caught.value.problems == (f"{path}: cannot be read: nothing came out of it for 0.1 seconds",)


def test_a_configuration_has_an_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: larger than 4MiB"):
        config.load("/dev/zero")
    with pytest.raises(ConfigError, match=f"{tmp_path}: cannot be read: Is a directory"):
        config.load(tmp_path)
    with pytest.raises(ConfigError, match=r"expected options with values, .*, got nothing"):
        config.load("/dev/null")
