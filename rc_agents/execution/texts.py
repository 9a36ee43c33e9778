"""The running text of each model with its own tokenizer, by the anchor's columns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..alignment import Chat, Clock, Row, Script, Segments, SpanText, TokenBytes
from ..cache import CoupledCache
from ..errors import InputError

Chats = Sequence[Chat | None]
"""How the models with their own templates read each row's conversation; None for a row that is plain text."""


def wind(
    memory: CoupledCache,
    name: str,
    segments: Segments,
    tree: bool,
    anchor: TokenBytes,
    input_ids: Tensor,
    attention_mask: Tensor,
    chats: Chats | None = None,
) -> SpanText:
    """Brings what a model reads up to the anchor's last column; returns it.

    Args:
        memory: holds it between passes; changed in place.
        name: the model's.
        segments: its tokenizer.
        tree: whether it can branch.
        anchor: bytes of the anchor's tokens.
        input_ids: the anchor's whole sequence so far, (B, P + T).
        attention_mask: 1 for its real tokens, (B, P + T).
        chats: one a row, (B,).

    Raises:
        InputError: a chat that was made for other tokens, or a cache that holds another reading of its conversation.
    """
    each_chat = chats or [None] * len(input_ids)
    scripts = [None if chat is None else chat.script(name) for chat in each_chat]
    text = memory.texts.get(name)
    if text is None:
        rows = [Row(segments, leads=script is None) for script in scripts]
        text = SpanText(tree, rows, [Clock(script) for script in scripts])
    else:
        for b, script in enumerate(scripts):
            if not text.clocks[b].num_columns and script is not None:
                text.begin(b, script)
        each = zip(text.clocks, scripts, input_ids, attention_mask, strict=True)
        text.clocks = [_going_on(name, anchor, *row) for row in each]
    memory.busy = True  # and it stays so, and refused, where one row fails
    memory.texts[name] = text
    for clock, ids, mask in zip(text.clocks, input_ids, attention_mask, strict=True):
        since = clock.num_columns
        clock.extend(anchor, ids[since:].tolist(), mask[since:].tolist())
    return text


def _going_on(
    name: str, anchor: TokenBytes, clock: Clock, script: Script | None, ids: Tensor, mask: Tensor
) -> Clock:
    """Returns the clock of a conversation that may have a turn more than when its columns were read."""
    if script is None or script is clock.script or script == clock.script:
        return clock
    longer, columns = Clock(script), clock.num_columns
    longer.extend(anchor, ids[:columns].tolist(), mask[:columns].tolist())
    if clock.script is None or not longer.goes_on(clock):
        raise InputError(
            f"past_key_values holds another reading of this conversation by model {name!r}; start from an empty cache"
        )
    return longer
