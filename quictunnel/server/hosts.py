"""Custom hosts: which tunnel a host leads to that is not the server's own NAME.DOMAIN.

A tunnel's hosts are what its live sessions say they are. Those that none of them says any more are in the book still,
and so are those of clients that have not come back since a restart, or have come to another of the server's processes
only. Where the book names a tunnel that has no session here, visitors hear of a tunnel without a client and not of
nothing, until a session of it registers without the host, or another tunnel of the same token with it.
"""

from collections.abc import Callable, Sequence
from typing import Final

from quictunnel.server.registry import Session, Tunnel
from quictunnel.trust.owners import Held
from quictunnel.trust.tokens import Grant
from quictunnel.wire.names import normalise_host_pattern

__all__ = ["HOSTS_LIMIT", "HostRefused", "Hosts", "custom_hosts"]

HOSTS_LIMIT: Final = 16
"custom hosts of one session"


class HostRefused(Exception):
    """A client may not have a host: ``code`` is the refusal's, the text says why."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(text)


def custom_hosts(asked: Sequence[str], grant: Grant, domain: str) -> tuple[str, ...]:
    """The hosts of a hello in their one form, each once. Raises HostRefused for one that its token is not for."""
    if len(asked) > HOSTS_LIMIT:
        raise HostRefused("protocol", f"a session has at most {HOSTS_LIMIT} custom hosts, and asks for {len(asked)}")
    hosts = []
    for each in asked:
        try:
            host = normalise_host_pattern(each)
        except ValueError as error:
            raise HostRefused("token_scope", str(error)) from None
        if f".{host}".endswith(f".{domain}"):
            raise HostRefused("token_scope", f"the host {host} is the server's own: a tunnel there is NAME.{domain}")
        if not grant.allows_host(host):
            allowed = ", ".join(grant.hosts[:5]) + (", ..." if len(grant.hosts) > 5 else "")
            what = f"it is for {allowed}" if allowed else "it was made without --host"
            raise HostRefused("token_scope", f"token {grant.token_id} is not for the host {host}; {what}")
        hosts.append(host)
    return tuple(dict.fromkeys(hosts))


class Hosts:
    """The custom hosts of a server."""

    def __init__(self, tunnel_of: Callable[[str], Tunnel | None], known: Callable[[str], Held | None]) -> None:
        """``tunnel_of`` gives the tunnel of a name, ``known`` what the book says of a host or a wildcard."""
        self._tunnel_of = tunnel_of
        self._known = known
        self._exact: dict[str, Tunnel] = {}
        self._below: dict[str, Tunnel] = {}  # by what stands behind ``*.``
        self._of: dict[Tunnel, set[str]] = {}

    def __repr__(self) -> str:
        return f"<Hosts {len(self._exact)} exact, {len(self._below)} wildcards>"

    # Requests

    def tunnel(self, host: str) -> Tunnel | None:
        """Where a host leads, by its own name or else by the wildcard above it. Raises TunnelError."""
        return self._exact.get(host) or self._beyond(host)[1]

    def pattern(self, host: str) -> str:
        """The host, or the wildcard above it, that leads somewhere; empty if neither does. Raises TunnelError."""
        return host if host in self._exact else self._beyond(host)[0]

    def _beyond(self, host: str) -> tuple[str, Tunnel | None]:
        if host.endswith("]") or host.rpartition(".")[2].isdigit():
            return "", None  # an address
        parent = host.partition(".")[2]
        below = self._below.get(parent) if parent else None
        held = self._known(host)
        if held is not None:
            tunnel = self._unserved(held)
            if tunnel is not None:
                return host, tunnel
            if below is None or not _is_owned_by(below, held.token):
                # Somebody's by name: then it is nobody else's by a wildcard, whether it is served or not.
                return "", None
        if below is not None:
            return f"*.{parent}", below
        held = self._known(f"*.{parent}") if parent else None
        tunnel = None if held is None else self._unserved(held)
        return ("", None) if tunnel is None else (f"*.{parent}", tunnel)

    def _unserved(self, held: Held) -> Tunnel | None:
        """The tunnel that a line of the book names, if no client of it is here that could say otherwise."""
        tunnel = self._tunnel_of(held.tunnel) if held.tunnel else None
        return None if tunnel is None or tunnel.sessions else tunnel

    # Sessions

    def holder(self, host: str) -> Tunnel | None:
        """The tunnel whose sessions say exactly that host, or exactly that wildcard."""
        return self._below.get(host[2:]) if host.startswith("*.") else self._exact.get(host)

    def has_any(self, tunnel: Tunnel) -> bool:
        """Whether any of the tunnel's sessions has custom hosts."""
        return tunnel in self._of

    def register(self, session: Session, hosts: Sequence[str]) -> None:
        """A session says what its hosts are."""
        tunnel = session.tunnel
        session.hosts = tuple(hosts)
        for host in hosts:
            before = self.holder(host)
            if before is not tunnel:
                if before is not None:
                    self._of[before].discard(host)
                where, key = self._place(host)
                where[key] = tunnel
                self._of.setdefault(tunnel, set()).add(host)
        self._settle(tunnel)

    def ended(self, session: Session) -> None:
        """A session is over."""
        if session.hosts:
            self._settle(session.tunnel)

    def _settle(self, tunnel: Tunnel) -> None:
        """Forget hosts that none of the tunnel's sessions says."""
        hosts = self._of.get(tunnel)
        if hosts is None:
            return
        for host in hosts.difference(*(session.hosts for session in tunnel.sessions.values())):
            where, key = self._place(host)
            del where[key]
            hosts.discard(host)
        if not hosts:
            del self._of[tunnel]

    def _place(self, host: str) -> tuple[dict[str, Tunnel], str]:
        return (self._below, host[2:]) if host.startswith("*.") else (self._exact, host)


def _is_owned_by(tunnel: Tunnel, token: str) -> bool:
    return tunnel.owner is not None and tunnel.owner.token_id == token
