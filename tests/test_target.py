"""Which targets of requests are paths, and which are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.errors import RequestError
from sseproxy.wire.target import is_for_the_server, split_target, without_host


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", ""),
        ("/v1/chat/completions", "/v1/chat/completions", ""),
        ("/v1/", "/v1/", ""),
        ("/v1?", "/v1", "?"),
        ("/v1?a=b+c&d=%20&e", "/v1", "?a=b+c&d=%20&e"),
        ("/v1?a=../x/..&b=/..//?c", "/v1", "?a=../x/..&b=/..//?c"),
        ("/v1/models/org%2Fname", "/v1/models/org%2Fname", ""),
        ("/v1/models/org%2fname%3Alatest", "/v1/models/org%2fname%3Alatest", ""),
        ("//v1///models//", "//v1///models//", ""),
        ("//elsewhere.example/v1", "//elsewhere.example/v1", ""),
        ("/v1/.../x", "/v1/.../x", ""),
        ("/v1/..x/.y/z../w.", "/v1/..x/.y/z../w.", ""),
        ("/v1/a;b=c/d;", "/v1/a;b=c/d;", ""),
        ("/v1/a\\b", "/v1/a\\b", ""),
        ("/v1/a%20b%23c%3Fd%25", "/v1/a%20b%23c%3Fd%25", ""),
        ("/v1/%E2%9C%93/é", "/v1/%E2%9C%93/é", ""),
        ("/v1/100%/%zz", "/v1/100%/%zz", ""),
        ("/v1/a:b@c", "/v1/a:b@c", ""),
        *((f"/v1/{name}", f"/v1/{name}", "") for name in ("9.41%E2%80%AFAM", "a%C2%A0b", "a%E2%80%8Db", "caf%e9")),
        *(
            (f"/v1/{name}", f"/v1/{name}", "")
            for name in ("%ff", "%E2%80%AE", "%E2%80%A8", "\udcff", "%c0", "%ed%a0%80")
        ),
        ("http://proxy.example/v1/models?a", "/v1/models", "?a"),
        ("HTTPS://user:pw@proxy.example:8443/v1", "/v1", ""),
        ("http://[::1]:80/v1", "/v1", ""),
        ("http://proxy.example", "/", ""),
        ("http://proxy.example/", "/", ""),
        ("http://proxy.example?a=b", "/", "?a=b"),
        ("http://proxy.example?next=/v1/models", "/", "?next=/v1/models"),
        ("http://proxy.example//v1", "//v1", ""),
    ],
)
def test_a_plain_target_is_split_and_kept_byte_for_byte(target: str, path: str, query: str) -> None:
    assert split_target(target) == (path, query)


@pytest.mark.parametrize(
    "target",
    [
        *("/..", "/.", "/v1/..", "/v1/.", "/v1/../x", "/v1/./x", "/../v1", "/v1/../", "//..//v1", "/v1/..?a"),
        *("/v1/%2e%2e/x", "/v1/%2E%2E/x", "/v1/.%2e/x", "/v1/%2e./x", "/v1/%2e/x", "/v1/%2E"),
        *("/v1/..%2fx", "/v1/..%2Fx", "/v1/x%2f..", "/v1/x%2F..%2Fy", "/v1%2f%2e%2e%2fx", "/v1/x%2f.%2fy"),
        *("/v1/..\\x", "/v1\\..\\x", "/v1/..%5cx", "/v1%5C%2e%2e%5Cx", "/v1/x\\..", "/v1/x\\."),
        *("/v1/..;/x", "/v1/..;a=b/x", "/v1/.;/x", "/v1/..%3b/x", "/v1/%2e%2e;/x", "/v1/..;%2fx"),
        *("/v1/\x00", "/v1/%00", "/v1/..%00/x", "/v1/a%0d%0ab", "/v1/\n", "/v1/%7f", "/v1/%1b", "/v1/\t"),
        *("/v1/%c0%ae%c0%ae/x", "/v1/%e0%80%ae/x", "/v1/%F0%80%80%AE/x", "/v1/.%c0%af", "/v1/%C1%9c", "/v1/%C2%85"),
        *("/v1#a", "/#", "/v1?a#b", "http://proxy.example#a", "http://proxy.example/v1#a"),
        *("http://proxy.example/../x", "http://proxy.example/%2e%2e/x", "http:///.."),
        *("", "*", "v1/models", "?a=b", "proxy.example:443", "proxy.example", "http:/v1", "http:v1", "://v1"),
        *("ftp://proxy.example/v1", "file:///v1", "xhttp://proxy.example/v1", "ws://proxy.example/v1", " /v1"),
        *("http//proxy.example/v1", "\\\\proxy.example\\v1"),
    ],
)
def test_anything_else_is_a_bad_target(target: str) -> None:
    with pytest.raises(RequestError) as refused:
        split_target(target)
    assert (refused.value.reason, refused.value.status) == ("bad_target", 400)


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="#"), max_size=40))
def test_whatever_passes_is_byte_for_byte_what_came(rest: str) -> None:
    try:
        path, query = split_target("/" + rest)
    except RequestError:
        return
    assert path + query == "/" + rest
    assert "?" not in path
    assert not {"..", "."} & set(path.split("/"))


@given(st.text("aZ0-_~/", max_size=40), st.text("a./%&=?;\\:@", max_size=40))
def test_a_path_without_dots_passes_with_any_query(path: str, query: str) -> None:
    assert split_target(f"/{path}?{query}") == (f"/{path}", f"?{query}")


@pytest.mark.parametrize(
    ("target", "told", "for_the_server"),
    [
        ("*", "*", True),
        ("http://user:pw@proxy.example/v1?a", "/v1?a", False),
        ("http://proxy.example", "", True),
        ("proxy.example:443", "", False),
    ],
)
def test_what_is_told_of_a_target_has_no_host(target: str, told: str, for_the_server: bool) -> None:
    assert without_host(target) == told
    assert is_for_the_server(target) == for_the_server
