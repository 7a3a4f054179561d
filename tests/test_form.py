"""The model in a form, found in parts of any size."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO

import pytest
from aiohttp import FormData
from hypothesis import given, settings
from hypothesis import strategies as st

from sseproxy.wire.form import FormReader, boundary_of

from .splits import splits, steps
from .test_extract import READ, calls, held

BOUNDARY = b"x-y"
END = b"\r\n--x-y--\r\n"
FILE = 2 << 20
# Bytes: what is kept of a read, and the read.
MOST = 200_000


def field(name: bytes, value: bytes, more: bytes = b"") -> bytes:
    return b'\r\n--x-y\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b' % (name, more, value)


def upload(name: bytes, value: bytes) -> bytes:
    return field(name, value, b'; filename="a;b=\\"c.wav"\r\nContent-Type: audio/wav')


def form(*parts: bytes) -> bytes:
    return (b"".join(parts) + END)[2:]


def model_of(*parts: bytes, boundary: bytes = BOUNDARY) -> str | None:
    reader = FormReader(boundary)
    for part in parts:
        reader.feed(part)
    assert reader.model == reader.model_so_far
    return reader.model


def slowly(body: bytes) -> str | None:
    """The model, by a reader that has all of the body before it."""
    model: str | None = None
    *parts, rest = re.split(rb"\r\n--x-y(?=--|[ \t]{0,256}\r\n)", b"\r\n" + body)
    for part in parts[1:]:
        if part.startswith(b"--"):
            return model
        # A part without content shares its line end with the delimiter behind it.
        head, blank, value = (part + b"\r\n").partition(b"\r\n\r\n")
        if not blank or b"\r\n--x-y" in head:
            return None
        named = re.search(rb'(?i)\r\ncontent-disposition: form-data; name="model"(.*)', head)
        if named and b"filename" not in named[1]:
            try:
                model = value.removesuffix(b"\r\n").decode()
            except UnicodeDecodeError:
                model = None
    head = rest.partition(b"\r\n\r\n")[0]
    return None if parts and not rest.startswith(b"--") and b"\r\n--x-y" in head else model


CONTENTS = st.lists(
    st.sampled_from(
        [b"a", b"\r\n", b"--", b"x-y", b"\r\n--x-", b"\r\n--x-y", b"\r\n--x-yz", b"\r", b"\n", b" ", b"\xff"]
    ),
    max_size=6,
).map(b"".join)
PARTS = st.builds(field, st.sampled_from([b"model", b"model", b"file", b"models"]), CONTENTS) | st.builds(
    upload, st.sampled_from([b"model", b"file"]), CONTENTS
)


@settings(max_examples=500, deadline=None)
@given(st.data(), st.lists(PARTS, max_size=4), st.booleans())
def test_a_form_is_read_the_same_in_any_split(data: st.DataObject, parts: list[bytes], whole: bool) -> None:
    body = form(*parts)
    if not whole:
        body = body[: data.draw(st.integers(0, len(body)))]
    expected = slowly(body)
    for pieces in ([body], steps(body), data.draw(splits(body))):
        assert model_of(*pieces) == expected


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (form(field(b"model", b"whisper-1")), "whisper-1"),
        (form(upload(b"file", b"\0" * FILE), field(b"model", b"whisper-1")), "whisper-1"),
        (form(field(b"model", b"a"), upload(b"file", b"x"), field(b"model", b"b")), "b"),
        (form(field(b"model", b"a"), upload(b"model", b"b")), "a"),
        (form(field(b"model", b"a"), field(b"model", b"b", b"; filename*=UTF-8''c")), "a"),
        (form(field(b"model", "é😀".encode())), "é😀"),
        (form(field(b"model", b"a\r\nb")), "a\r\nb"),
        (form(field(b"model", b"")), ""),
        (form(field(b"model", b"x" * 128)), "x" * 128),
        (form(field(b"model", b"a"), field(b"model", b"x" * 129)), None),
        (form(field(b"model", b"x" * FILE)), None),
        (form(field(b"model", b"\xff")), None),
        (form(field(b"file", b"\r\n--x-yz\r\nContent-Disposition: form-data; name=model\r\n\r\nm")), None),
        (b"a preamble" + b"\r\n" + form(field(b"model", b"a")), "a"),
        (form(field(b"model", b"a")).replace(b"--x-y\r\n", b"--x-y \t \r\n"), "a"),
        (form(field(b"model", b"a")).replace(b'"model"', b"model"), "a"),
        (form(field(b"model", b"a")).replace(b'"model"', b'"mod\\el"'), "a"),
        (form(field(b"model", b"a")).replace(b"Content-Disposition", b"content-disposition"), "a"),
        (form(field(b"model", b"a")).replace(b"Content-Disposition", b"X: y\r\nContent-Disposition"), "a"),
        (form(field(b"model", b"a")).replace(b"form-data", b"attachment"), None),
        (form(field(b"model", b"a"), field(b"y" * 5000, b"b")), None),
        (form(field(b"model", b"a"), *[field(b"y", b"b")] * 998), "a"),
        (form(field(b"model", b"a"), *[field(b"y", b"b")] * 1000), None),
        (form(field(b"model", b"a")).replace(b"\r\n", b"\n"), None),
        (form() + form(field(b"model", b"a")), None),
        (b"", None),
        (b'{"model":"a"}', None),
    ],
)
def test_the_last_field_that_is_no_file_is_the_model(body: bytes, model: str | None) -> None:
    for pieces in ([body], steps(body, 1 if len(body) < 10_000 else 1000)):
        assert model_of(*pieces) == model


async def test_what_aiohttp_writes_is_read() -> None:
    data = FormData()
    data.add_field("file", BytesIO(b"RIFF"), filename="a.wav")
    data.add_field("model", "whisper-1")
    payload = data()
    boundary = boundary_of(payload.content_type.encode())
    assert boundary is not None

    class Written(bytearray):
        async def write(self, part: bytes) -> None:
            self += part

    written = Written()
    await payload.write(written)  # type: ignore[arg-type]
    assert model_of(bytes(written), boundary=boundary) == "whisper-1"


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b'Multipart/Form-Data ;charset=utf-8; BOUNDARY="a b"', b"a b"),
        (
            b"multipart/form-data;boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW",
            b"----WebKitFormBoundary7MA4YWxkTrZu0gW",
        ),
        (b'multipart/form-data; a="; boundary=no"; boundary=yes', b"yes"),
        (b"multipart/form-data; boundary=" + b"a" * 70, b"a" * 70),
        (b"multipart/form-data; boundary=" + b"a" * 71, None),
        (b'multipart/form-data; boundary="a "', None),
        (b'multipart/form-data; boundary="a\r\nb"', None),
        (b'multipart/form-data; boundary="abc', None),
        (b"multipart/form-data; boundary=", None),
        (b"multipart/form-data", None),
        (b"multipart/mixed; boundary=abc", None),
        (b"application/json", None),
    ],
)
def test_a_form_has_a_boundary(content_type: bytes, boundary: bytes | None) -> None:
    assert boundary_of(content_type) == boundary


WORST: dict[str, tuple[bytes, bytes]] = {
    "small parts": (b"b", b"\r\n--b\r\n\r\n\r\n" * (FILE // 12)),
    "no delimiters": (b"b", b"\r\n--bx" * (FILE // 6)),
    "nearly delimiters": (b"-" * 70, b"\r\n" + b"-" * FILE),
    "many beginnings": (b"a" * 70, b"\r\n--" * (FILE // 4)),
    "padding": (b"b", b"\r\n--b" + b" " * FILE),
    "a head": (b"b", b"--b\r\n" + b"x" * FILE),
    "heads": (
        b"b",
        (b"--b\r\n" + b"Content-Disposition: form-data" + b";a=" * 1000 + b"\r\n\r\n\r\n") * (FILE // 3000),
    ),
    "open quotes": (
        b"b",
        b"\r\n".join([b"--b", b"Content-Disposition: form-data" + b';a="' * 900, b"", b"\r\n"]) * (FILE // 3600),
    ),
    "a value": (b"b", b"--b\r\nContent-Disposition: form-data; name=model\r\n\r\n" + b"x" * FILE),
    "a file": (b"b", b"--b\r\n\r\n" + b"\r" * FILE),
}


@pytest.mark.parametrize("kind", WORST)
def test_whatever_it_holds_the_work_for_a_part_and_memory_are_bounded(kind: str) -> None:
    boundary, body = WORST[kind]

    def reading() -> Callable[[bytes], object]:
        return FormReader(boundary).feed

    assert calls(reading(), body) < 2 * READ
    assert held(reading(), body) < MOST


@given(
    st.data(),
    st.lists(st.sampled_from([b"--b", b"\r\n", b":", b";", b'"', b"name=model", b"\\", b"\xff"]), max_size=30),
)
def test_no_bytes_make_it_raise(data: st.DataObject, words: list[bytes]) -> None:
    body = b"--b\r\nContent-Disposition: form-data" + b"".join(words)
    for pieces in ([body], data.draw(splits(body))):
        model_of(*pieces, boundary=b"b")
        boundary_of(body)
        boundary_of(b"multipart/form-data;" + body)
