"""Who may ask: API keys, and the names under which an endpoint on the loopback interface is asked."""

import hashlib
import hmac
import ipaddress
from collections.abc import Collection, Sequence

from starlette.types import Scope

from serve.errors import ApiError

OPEN_TO_ALL = {"/", "/healthz", "/openapi.json", "/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"}
"""Paths that need no key: pages that ask for one with what they load, and the question whether anyone is there."""


class Keys:
    """The API keys of an endpoint; none if everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, scope: Scope) -> str:
        """Check the key of a request.

        Returns:
            The name of the key's space of memories, which tells nothing of the key; "" if it needs no key.

        Raises:
            ApiError: 401 if it has none of these keys and needs one.
        """
        if not self._digests or scope["path"] in OPEN_TO_ALL:
            return ""
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        # Every key is compared, and in constant time: how long it takes tells nothing of any of them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401, "this endpoint needs an API key: send 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        return _space(digest)

    def spaces(self) -> list[str]:
        """Return the names of the spaces of all keys; that of everybody if there are none."""
        return [_space(digest) for digest in self._digests] or [""]


def _space(digest: bytes) -> str:
    return hashlib.sha256(b"space" + digest).hexdigest()[:16]


class Hosts:
    """The names that requests may give in ``Host``.

    A web page of somebody else can give its own name an address of the loopback interface, and its scripts then reach
    the endpoint as if it were theirs (DNS rebinding). What gives them away is that name.

    Args:
        host: the address that the endpoint listens on; other machines know one that is no loopback address by names
            that are not known here, so any is accepted then.
        more: further names that are accepted, such as that of a proxy on this machine.
    """

    def __init__(self, host: str, more: Collection[str] = ()) -> None:
        self._any = not _is_loopback(host)
        self._names = {host.lower(), "localhost", *(name.lower() for name in more)}

    def check(self, scope: Scope) -> None:
        """Check the ``Host`` of a request.

        Raises:
            ApiError: 403 if it is of another site.
        """
        given = dict(scope["headers"]).get(b"host")
        if self._any or given is None:
            return
        name = _without_port(given.decode("latin-1").lower())
        if name not in self._names and not _is_loopback(name):
            sentence = (
                f"'{name[:100]}' is no name of this endpoint: ask it by its address, or start it with --allow-host"
            )
            raise ApiError(403, sentence, code="host_not_allowed")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and ":" in host else host


def _is_loopback(host: str) -> bool:
    if host.rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
