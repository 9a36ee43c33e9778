"""Whose row is next: those who ask take turns."""

from __future__ import annotations

from collections.abc import Iterable


class Turns:
    """Start-time fair queuing (Goyal, Vin and Cheng, 1996) with every row as long as any other.

    A row's turn is behind that of its asker's last row which waits, and behind all that were begun. So whoever asks for
    many rows has one begun for each of a newcomer's; a row that waits goes before all that come once its turn has
    passed, so nobody waits for ever; and what was never begun costs its asker nothing.
    """

    def __init__(self) -> None:
        self._now = 0

    def give(self, asker: str, waiting: Iterable[tuple[str, int]]) -> int:
        """Returns the turn of an asker's next row; lower ones come first, and of equal ones whichever came first.

        Args:
            asker: whose row it is.
            waiting: asker and turn of the rows that wait.
        """
        own = (turn + 1 for who, turn in waiting if who == asker)
        return max(self._now, *own, 0)

    def begin(self, turn: int) -> None:
        """Takes note that a row was begun."""
        self._now = max(self._now, turn + 1)
