import socket

import pytest

from launcher.hosts.addresses import interface_of, route_to

IPV4, IPV6 = ("127.0.0.1", 9), ("::1", 9, 0, 0)
BROADCAST = ("255.255.255.255", 9)  # to which an ordinary socket cannot connect

needs_ipv6 = pytest.mark.skipif(interface_of("::1") is None, reason="needs IPv6")


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[object, ...]) -> None:
    found = [
        (socket.AF_INET6 if len(address) == 4 else socket.AF_INET, socket.SOCK_DGRAM, 0, "", address)
        for address in addresses
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


@needs_ipv6
def test_ipv4_is_preferred_if_there_is_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a guard that takes another address than preflight has checked, and a name with an old IPv4 address."""
    resolve_to(monkeypatch, IPV6, IPV4)
    assert route_to("node-1") == ("127.0.0.1", "127.0.0.1")
    resolve_to(monkeypatch, BROADCAST, IPV6)
    assert route_to("node-1") == ("::1", "::1")


def test_a_host_without_a_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="Name or service not known"):
        route_to("no-such-host.invalid")
    resolve_to(monkeypatch, BROADCAST)
    with pytest.raises(OSError, match="Permission denied"):
        route_to("node-1")


def test_interfaces_are_found_by_ipv4_addresses() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


@needs_ipv6
def test_interfaces_are_found_by_ipv6_addresses() -> None:
    """Catches '?' in the table of preflight, and NCCL on a wrong network."""
    assert interface_of("0:0::1") == "lo"
    assert interface_of("2001:db8::1") is None
