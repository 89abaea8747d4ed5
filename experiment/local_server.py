"""Listening address and accepted host names of our HTTP servers.

A name of another site may have been pointed at this machine, so that its pages can read our answers (DNS rebinding).
"""

import socket
from collections.abc import Sequence
from ipaddress import ip_address

from experiment.errors import UserError

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, but does not listen yet. Raises UserError for an address that cannot be used."""
    try:
        # AI_PASSIVE: without it, '*' is the loopback address.
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host: cannot listen on '{host}': {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise unusable(host, port, error) from None
    return listener


def unusable(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"--port: cannot listen on {host}:{port}: {error.strerror}; --port 0 chooses a free one")


def allowed_hosts(names: Sequence[str] | None, address: str) -> frozenset[str] | None:
    """Return the names that a server answers to; None: any. names: of an option; without any, the names of this machine
    if only it can reach the `address` to listen on."""
    if names:
        return frozenset(name.lower() for name in names)
    return LOCAL_HOSTS | {address} if ip_address(address).is_loopback else None


def host_name(host: str) -> str:
    """Return a `Host` without its port, an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
