"""The pass that the anchor's process runs, and who is to blame where it fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..errors import ModelRunError
from ..execution.wire import Frame
from ..topology import ANCHOR

logger = logging.getLogger(__name__)


class Lost(ModelRunError):
    """A specialist's process is lost in the middle of a pass."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"specialist {name!r} is lost: {reason}")
        self.name, self.reason = name, reason


class Running:
    """The pass at hand: its number, who takes part, and what they report of each other.

    Attributes:
        number: of the pass that runs, -1 for none.
        finished: number of the last one that ended well.
        present: the specialists that take part.
        since: the first pass that a loss undoes, None where nothing is to be undone.
        told: who was told of a pass since then.
        suspects: who was reported lost after its pass had ended, and why.
    """

    def __init__(self) -> None:
        self.number = self.finished = -1
        self.present: Sequence[str] = ()
        self.since: int | None = None
        self.told: set[str] = set()
        self.suspects: dict[str, str] = {}
        self._waits_on: dict[str, str] = {}

    def begin(self, number: int, present: Sequence[str]) -> None:
        """A pass of these models begins."""
        self.number = number
        if self.since is None:
            self.since, self.told = number, set()
        self.present = [name for name in present if name != ANCHOR]
        self._waits_on = {}

    def end(self, number: int) -> None:
        """It has given all that it was run for."""
        self.number, self.finished = -1, number

    def give_up(self) -> tuple[int, int] | None:
        """It is given up; returns its number and the first that goes with it, None where nobody was told."""
        number, since = self.number, self.since
        self.number, self.since = -1, None
        return None if since is None else (max(number, since), since)

    def hear(self, sender: str, frame: Frame) -> None:
        """Hears of trouble; raises `Lost` where the pass that runs cannot go on."""
        number = int(frame.fields.get("pass", -1))
        if frame.kind == "lost" and number == self.finished:  # this process needed it no more
            peer = str(frame.fields["peer"])
            self.suspects[peer] = f"{sender} lost it: {frame.fields['reason']}"
        if number != self.number or number < 0:
            return
        if frame.kind == "waiting":
            self._waits_on[sender] = str(frame.fields["on"])
        elif frame.kind == "failed":
            raise Lost(sender, f"it failed: {frame.fields['reason']}")
        elif frame.kind == "lost":
            peer = self.culprit(str(frame.fields["peer"]))
            if peer not in self.present:
                raise Lost(sender, f"it lost {peer!r}, who takes no part: {frame.fields['reason']}")
            raise Lost(peer, f"{sender} lost it: {frame.fields['reason']}")
        else:
            logger.warning("a frame of unknown kind %r from %s", frame.kind, sender)

    def culprit(self, name: str) -> str:
        """Returns for whom a specialist waits in the end, itself where it waits for nobody."""
        culprit, seen = name, set()
        while culprit in self._waits_on and culprit not in seen:
            seen.add(culprit)
            culprit = self._waits_on[culprit]
        return name if culprit == ANCHOR else culprit
