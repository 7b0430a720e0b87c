"""TLS session tickets (RFC 8446 section 2.2): a handshake with one needs no certificate and no signature.

They are kept in memory only, on both ends. None is for early data: what a client says first is a secret that must not
be sent where it could be replayed (RFC 8446 section 8).
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, Final

__all__ = ["Tickets"]

LIMIT: Final = 4096
"tickets, of about a kilobyte each; without its ticket a client shakes hands as if it were the first time"


class Tickets:
    """The tickets that were used last: a server's by what a client shows of them, a client's by whom they are for."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, key: Hashable, ticket: Any) -> None:
        """Keep a ticket, the only one for its key."""
        self._kept[key] = replace(ticket, max_early_data_size=None)
        self._kept.move_to_end(key)
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def issued(self, ticket: Any) -> None:
        """A server has given a ticket away."""
        self.keep(ticket.ticket, ticket)

    def find(self, key: Hashable) -> Any:
        """The ticket for the key, or None."""
        ticket = self._kept.get(key)
        if ticket is not None:
            self._kept.move_to_end(key)
        return ticket

    def clear(self) -> None:
        """Forget them: who was trusted when they were made need not be any more."""
        self._kept.clear()
