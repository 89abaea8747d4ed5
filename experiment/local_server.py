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
    """Return the names that a server answers to: those of this machine, as most reverse proxies call it, and `names`;
    None: any, without `names` if other machines can reach the `address` to listen on. Raises UserError for a name with
    more than the name."""
    for name in names or ():
        if name.count(":") == 1 or not {",", "/", "["}.isdisjoint(name):
            raise UserError(
                f"--allowed_hosts: expected one name without port, such as models.example.org, not '{name}'"
            )
    if not names and not ip_address(address).is_loopback:
        return None
    return LOCAL_HOSTS | {address, *(name.lower() for name in names or ())}


def host_name(host: str) -> str:
    """Return a `Host` without its port, an IPv6 address without its brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
