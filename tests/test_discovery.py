"""Addresses of names: each keeps its place, and a place is about one address at a time."""

from __future__ import annotations

import signal
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sseproxy.ledger.endpoints import (
    MAX_ADDRESSES,
    Addresses,
    Standing,
    address_counts,
    address_key,
    labels,
    of_host,
)
from sseproxy.ledger.table import Ledger
from sseproxy.process.discovery import Places, look_up
from sseproxy.signals import FOR_SUPERVISOR

ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


@given(
    rounds=st.lists(
        st.tuples(st.lists(st.integers(1, 200), max_size=90), st.sets(st.integers(0, MAX_ADDRESSES - 1))), max_size=8
    )
)
def test_an_address_keeps_its_place_and_a_busy_place_its_address(rounds: list[tuple[list[int], set[int]]]) -> None:
    places = Places({})
    last: dict[int, IPv4Address | IPv6Address] = {}
    for found, busy in rounds:
        before = dict(places.taken)
        addresses = [ip_address(number) for number in found]
        without = places.replace(addresses, busy.__contains__)
        taken = places.taken
        assert set(taken.values()) <= set(addresses)
        assert len(set(taken.values())) == len(taken) <= MAX_ADDRESSES
        assert len(set(addresses)) == len(taken) + without
        for place, address in before.items():
            assert taken.get(place) == address or address not in addresses
        for place in busy & taken.keys():
            assert last.get(place) == taken[place]
        if without:
            assert len(taken.keys() | busy) == MAX_ADDRESSES
        last |= taken


def test_a_place_that_was_just_left_is_used_last() -> None:
    places = Places({})
    places.replace([ip_address("10.0.0.1")], lambda place: False)
    places.replace([ip_address("10.0.0.2")], lambda place: False)
    assert places.taken == {1: ip_address("10.0.0.2")}
    # One that comes back has the place that it had.
    places.replace([ip_address("10.0.0.3"), ip_address("10.0.0.1")], lambda place: False)
    assert places.taken == {0: ip_address("10.0.0.1"), 2: ip_address("10.0.0.3")}


def test_places_that_are_known_from_before_stay() -> None:
    places = Places({7: ip_address("10.0.0.1")})
    places.replace([ip_address("10.0.0.2"), ip_address("10.0.0.1")], lambda place: False)
    assert places.taken == {7: ip_address("10.0.0.1"), 0: ip_address("10.0.0.2")}


@given(found=st.dictionaries(st.integers(0, MAX_ADDRESSES - 1), ADDRESSES.filter(int), max_size=20))
def test_addresses_are_read_as_they_were_written(found: dict[int, IPv4Address | IPv6Address]) -> None:
    ledger = Ledger(rows=2)
    try:
        row = ledger.own(ledger.columns(address_counts("up h:80"), ()))
        addresses = Addresses(row, "up h:80")
        assert addresses.version == 0
        addresses.replace(found, 5)
        expected = {
            place: address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
            for place, address in found.items()
        }
        assert addresses.read() == expected
        assert addresses.version == 5
    finally:
        ledger.close()


def test_another_host_has_other_places() -> None:
    ledger = Ledger(rows=2)
    try:
        one, other = of_host("up", "http://a:80/v1"), of_host("up", "http://b/v1")
        names = [*address_counts(one), *address_counts(other)]
        assert len(set(names)) == len(names)
        row = ledger.own(ledger.columns(names, ()))
        Standing(row, one, address_key(0)).eject(1, None)
        assert not Standing(row, other, address_key(0)).is_out
    finally:
        ledger.close()


def test_what_the_supervisor_tells_of_other_names_is_withdrawn() -> None:
    ledger = Ledger(rows=2)
    try:
        one, other = address_counts("up a:80"), address_counts("up b:80")
        row = ledger.own(ledger.columns([*one, *other], ()))
        Standing(row, "up a:80", address_key(0)).eject(1, None)
        Standing(row, "up b:80", address_key(0)).eject(2, None)
        Addresses(row, "up a:80").replace({0: ip_address("10.0.0.1")}, 3)
        ledger.withdraw(other)
        assert not Standing(row, "up a:80", address_key(0)).is_out
        assert Addresses(row, "up a:80").read() == {}
        assert Standing(row, "up b:80", address_key(0)).is_out
        # Its columns are free now.
        ledger.columns(other, ())
        assert ledger.names == set(other)
    finally:
        ledger.close()


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        (["http://a/v1"], ["a:80"]),
        (["https://a/v1", "http://b:8000/v1"], ["a:443", "b:8000"]),
        (["http://[::1]:8000/v1"], ["[::1]:8000"]),
        (["http://a/v1", "http://a/v2", "http://b/v1"], ["a:80/v1", "a:80/v2", "b:80"]),
        (["http://a/v1", "http://a/v1"], ["a:80/v1", "a:80/v1#2"]),
    ],
)
def test_endpoints_are_called_by_host_and_port(urls: list[str], expected: list[str]) -> None:
    assert labels(urls) == expected


async def test_a_name_is_looked_up_as_the_system_does() -> None:
    assert ip_address("127.0.0.1") in await look_up("localhost", 80)
    with pytest.raises(OSError, match=r"."):
        await look_up("nowhere.invalid", 80)
    with pytest.raises(UnicodeError):
        await look_up("a" * 64 + ".test", 80)


async def test_the_thread_of_a_look_up_leaves_signals_to_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked: list[set[signal.Signals | int]] = []

    def getaddrinfo(*_: object, **__: object) -> list[object]:
        blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return []

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    assert await look_up("localhost", 80) == []
    assert blocked[0] >= set(FOR_SUPERVISOR)
