"""Lays the tokens of models with different tokenizers side by side for one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..alignment import Row, SpanText, TokenBytes, read_index
from ..alignment.streams import stable_limits
from ..alignment.tokens import readable
from ..backbone import accepted_arguments
from ..cache import CoupledCache
from ..topology import ANCHOR, Edge
from .exchange import as_index


@dataclass
class Step:
    """What one model with its own tokenizer runs in this pass."""

    input_ids: Tensor  # (B, S)
    position_ids: Tensor  # (B, S)
    attention_mask: Tensor  # (B, slots)


@dataclass
class SpanPlan:
    """A pass's inputs for the models with their own tokenizers, and who reads which slot.

    Args:
        steps: name -> its new tokens; a model without new tokens is left out.
        reads: edge -> (B, T_target) slots of the source.
        fresh: models whose cache is emptied first, because it cannot be cut to the text.
    """

    steps: dict[str, Step] = field(default_factory=dict)
    reads: dict[Edge, Tensor] = field(default_factory=dict)


def takes_holes(model: PreTrainedModel) -> bool:
    """Whether a model can skip cache columns row by row: full attention only, positions passed in from outside."""
    config = model.config.get_text_config(decoder=True)
    if "position_ids" not in accepted_arguments(model) or getattr(config, "alibi", False):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def plan(
    memory: CoupledCache,
    models: Mapping[str, PreTrainedModel],
    tokens: Mapping[str, TokenBytes],
    edges: Sequence[Edge],
    input_ids: Tensor,
    attention_mask: Tensor,
) -> SpanPlan:
    """Re-tokenizes the text for every model in `tokens` but the anchor, and aligns all of them by bytes.

    Args:
        memory: running tokenizations, caches and state histories; changed in place.
        models: the models with their own tokenizer, by name.
        tokens: bytes of each model's tokens, the anchor's included.
        edges: the edges that are on and need aligning.
        input_ids: the anchor's whole sequence so far, (B, P + T).
        attention_mask: 1 for its real tokens, (B, P + T).
    """
    num_new = input_ids.shape[1] - memory.length
    anchor = _anchor_rows(tokens[ANCHOR], input_ids, attention_mask)
    data = [b"".join(tokens[ANCHOR].of(row.ids)) for row in anchor]
    texts = [readable(part) for part in data]
    result, new_from = SpanPlan(), {}
    for name, model in models.items():
        step, new_from[name] = _advance(memory, name, model, tokens[name], texts)
        if step is not None:
            result.steps[name] = step
    rows = {name: memory.texts[name].rows for name in models} | {ANCHOR: anchor}
    first = input_ids.shape[1] - num_new
    for edge in edges:
        index = []
        for b in range(len(texts)):
            target, source = rows[edge.target][b], rows[edge.source][b]
            if edge.target == ANCHOR:
                new = [k for k, slot in enumerate(target.slots) if slot >= first]
            else:
                new = list(range(new_from[edge.target][b], len(target.ids)))
            ends = [target.ends[k] for k in new]
            limits = stable_limits(data[b], ends, tokens[edge.source])
            slots = read_index(ends, source, limits)
            index.append(_spread(slots, [target.slots[k] - first for k in new], num_new) if edge.target == ANCHOR else slots)
        result.reads[edge] = as_index(index)
    return result


def _anchor_rows(tokens: TokenBytes, input_ids: Tensor, attention_mask: Tensor) -> list[Row]:
    rows = []
    for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        slots = [k for k, real in enumerate(mask) if real]
        kept = [ids[k] for k in slots]
        rows.append(Row(kept, tokens.ends(kept), slots))
    return rows


def _spread(slots: list[int], columns: list[int], width: int) -> list[int]:
    """Puts what the real tokens read at their columns; padding reads nothing."""
    row = [-1] * width
    for column, slot in zip(columns, slots, strict=True):
        row[column] = slot
    return row


def _advance(
    memory: CoupledCache, name: str, model: PreTrainedModel, tokens: TokenBytes, texts: list[str]
) -> tuple[Step | None, list[int]]:
    """Brings one model's tokenization up to the text, and its cache back to the part that still holds."""
    text = memory.texts.setdefault(name, SpanText(tokens))
    kept = text.follow(texts)
    live = text.live_slots()
    cache = memory.caches.get(name)
    ragged = len(texts) > 1 and not takes_holes(model)
    if live < text.num_slots or (ragged and text.num_slots):
        if ragged or (cache is not None and not _cut(cache, text.num_slots - live)):
            kept = [0] * len(texts)
            live = 0
            for row in text.rows:
                row.slots = []
            if cache is not None:
                cache.reset()
        memory.drop_slots(name, live)
        text.num_slots = live
    return _new_tokens(text, kept), kept


def _cut(cache: DynamicCache, count: int) -> bool:
    """Takes the last `count` columns off a cache; False where it cannot."""
    recurrent = any(getattr(layer, "is_recurrent_states_initialized", None) for layer in cache.layers)
    if recurrent and not cache.is_croppable:
        return False
    cache.crop(-count)
    return True


def _new_tokens(text: SpanText, kept: list[int]) -> Step | None:
    new = [row.ids[keep:] for row, keep in zip(text.rows, kept, strict=True)]
    width = max(len(ids) for ids in new)
    if width == 0:
        return None
    positions = []
    for row, keep, ids in zip(text.rows, kept, new, strict=True):
        row.slots = row.slots[:keep] + list(range(text.num_slots, text.num_slots + len(ids)))
        positions.append([*range(keep, keep + len(ids)), *([0] * (width - len(ids)))])
    text.num_slots += width
    mask = torch.zeros(len(new), text.num_slots, dtype=torch.long)
    for b, row in enumerate(text.rows):
        mask[b, row.slots] = 1
    padded = [ids + [0] * (width - len(ids)) for ids in new]
    return Step(torch.tensor(padded), torch.tensor(positions), mask)
