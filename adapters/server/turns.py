"""Whose row is next: those who ask take turns."""

from __future__ import annotations


class Turns:
    """Start-time fair queuing (Goyal, Vin and Cheng, 1996) with every row as long as any other.

    A row's turn is the one behind its asker's last row, and no earlier than the row that was begun last. So whoever
    asks for many rows waits behind each newcomer's first, nobody waits for ever, and one asker's rows keep their order.
    """

    def __init__(self) -> None:
        self._now = 0
        self._next: dict[str, int] = {}

    def __len__(self) -> int:
        """How many askers are remembered."""
        return len(self._next)

    def give(self, asker: str) -> int:
        """Returns the turn of an asker's next row; lower ones come first."""
        turn = max(self._now, self._next.get(asker, 0))
        self._next[asker] = turn + 1
        return turn

    def begin(self, turn: int) -> None:
        """Takes note that a row was begun; whoever has no turn behind it is forgotten."""
        self._now = max(self._now, turn)
        self._next = {asker: after for asker, after in self._next.items() if after > self._now}
