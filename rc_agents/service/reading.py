"""From one row's tokens to its text, as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class RowReader:
    """Reads one row, token by token.

    Args:
        tokenizer: the anchor's.
        limit: tokens after which the row ends with "length".
        eos: ids that end the row with "stop".
        stop: strings that end the row with "stop"; the text ends before them.
        context: the prompt's last tokens where the text goes on from the prompt, so that a first space is kept.

    Attributes:
        text: all text so far that is settled.
        count: tokens so far, an end-of-text token included.
        finish_reason: None while the row runs.
    """

    def __init__(
        self,
        tokenizer: Any,
        limit: int,
        eos: Collection[int],
        stop: Sequence[str] = (),
        context: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._limit, self._eos, self._stop = tokenizer, limit, eos, stop
        self._ids = list(context)
        # The window that is decoded, where the following one starts, and what was read of it.
        self._start, self._next = 0, len(self._ids)
        self._read = len(self._decode())
        self._held = ""  # may turn out to be the start of a stop string
        self.text = ""
        self.count = 0
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """Takes the row's next token; returns the text that it settles."""
        self.count += 1
        if token in self._eos:
            return self.finish("stop")
        self._ids.append(token)
        settled = self._settle(self._new_characters())
        if self.finish_reason is None and self.count >= self._limit:
            settled += self.finish("length")
        return settled

    def finish(self, reason: str) -> str:
        """Ends the row, unless it has ended; returns the text that was held back."""
        if self.finish_reason is not None:
            return ""
        settled = self._settle(self._decode()[self._read :])
        if self.finish_reason is None:
            self.finish_reason = reason
            self.text += self._held
            settled, self._held = settled + self._held, ""
        return settled

    def _decode(self) -> str:
        window = self._ids[self._start :]
        return self._tokenizer.decode(window, skip_special_tokens=True) if window else ""

    def _new_characters(self) -> str:
        """What the window shows that was not read yet, without the bytes of an unfinished character.

        They show as replacement characters, and in some tokenizers so do all bytes right before them.
        """
        window = self._decode()
        whole = len(window.rstrip(REPLACEMENT))
        new, self._read = window[self._read : whole], max(self._read, whole)
        if new and whole == len(window):
            self._start, self._next = self._next, len(self._ids)
            self._read = len(self._decode())
        return new

    def _settle(self, new: str) -> str:
        """Adds text, up to a stop string or to what may be the start of one."""
        text = self._held + new
        found = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text
        ]
        if found:
            self.finish_reason, settled, self._held = "stop", text[: min(found)[1]], ""
        else:
            keep = max((_overlap(text, stop) for stop in self._stop), default=0)
            settled, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += settled
        return settled


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next(
        (
            size
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
