"""Where an endpoint listens: an address of this machine, and never one that others reach without a key by accident."""

import ipaddress
import socket

from hrs.errors import HRSError


def require_address(host: str, port: int, *, keys: bool, allow_anonymous: bool) -> str | None:
    """Check the address that an endpoint is to listen on.

    Args:
        host: a name or an address of this machine, IPv4 or IPv6.
        keys: True if requests must carry an API key.
        allow_anonymous: True if the user wants an endpoint for everybody who reaches it.

    Returns:
        A warning for the user; None if there is nothing to warn of.

    Raises:
        HRSError: if nothing can listen there, or if other machines could use the endpoint without a key.
    """
    if not 1 <= port <= 65535:
        raise HRSError(f"port {port} does not exist: give a --port from 1 to 65535")
    try:
        with bind(host, port) as bound:
            address = str(bound.getsockname()[0])
    except (socket.gaierror, UnicodeError) as error:
        raise HRSError(f"{host!r} is no address of this machine ({error}): give another --host") from error
    except OSError as error:
        what = f"{host_and_port(host, port)} cannot be listened on ({error.strerror})"
        raise HRSError(f"{what}: give another --host or --port") from error
    if keys or ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return None
    if not allow_anonymous:
        raise HRSError(
            f"other machines could use the endpoint on {host} without a key: give --api-key-file, set HRS_API_KEY, or "
            "say --allow-anonymous if everybody who reaches this machine may use the model and its memories"
        )
    return f"everybody who reaches {host_and_port(host, port)} can use the model and read, add and delete its memories"


def host_and_port(host: str, port: int) -> str:
    """Return ``host:port`` as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """Return a TCP socket that is bound to an address and does not listen yet.

    Raises:
        OSError: if it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    *_, where = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
    except OSError:
        bound.close()
        raise
    return bound
