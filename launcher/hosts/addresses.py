"""The address by which this host reaches another one, and the interface that it uses.

Imports the standard library only and runs on any Python 3: preflight sends the source of this file to hosts.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from contextlib import suppress
from pathlib import Path

_SIOCGIFADDR = 0x8915  # see netdevice(7)
_IF_INET6 = Path("/proc/net/if_inet6")


def route_to(name: str) -> tuple[str, str]:
    """(the address of a host, the own address of packets to it). An IPv4 address unless there is no way to it.

    Raises OSError if the name has no address, or there is no way to any.
    """
    failure = OSError(f"no address of {name}")
    found = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
    for family, kind, protocol, _, address in sorted(found, key=lambda info: info[0] != socket.AF_INET):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                return str(address[0]), str(probe.getsockname()[0])
        except OSError as error:
            failure = error
    raise failure


def interface_of(address: str) -> str | None:
    """The interface with this IPv4 or IPv6 address, None if unknown."""
    return _interface_of_ipv6(address) if ":" in address else _interface_of_ipv4(address)


def _interface_of_ipv4(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _interface_of_ipv6(address: str) -> str | None:
    own = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    with suppress(OSError):
        for line in _IF_INET6.read_text().splitlines():
            digits, _, _, _, _, name = line.split()
            if digits == own:
                return name
    return None
