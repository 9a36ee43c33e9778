"""Ensembles of tiny models with different tokenizers, and texts that are hard to align."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import rc_agents
from rc_agents import CoupledForCausalLM, CoupledOutput
from tests.ensembles import NAMES, wake
from tests.tiny import tiny
from tests.tiny_tokenizers import PAD, tiny_tokenizer

PIECES = [
    "the people", " of the town", "don't", "  ", "\n\n", "\n    ", "\n        ", "\t", "return", "self.",
    "(x, y)", ": ", "def ", "</s>", "<|im_start|>", "<s>", "12", "3.14", "1234567", "—", "“quoted”", "école",
    "你好，世界", "🙂", "👩‍👩‍👧", "שלום", " עולם", "مرحبا", "e\u0301", "\u00a0", "\u200b", "\r\n", "▁", "?", "'",
]  # fmt: skip
"""What tokenizers treat in their own ways; joined at random."""

TEXTS = st.lists(
    st.sampled_from(PIECES) | st.text("aehinorst .,;'\n", max_size=6) | st.text(max_size=3),
    max_size=8,
).map(lambda parts: "".join(parts).encode("utf-8", "replace").decode())

PROSE = "The people of the town said that the water was higher, and they couldn't remember: why?"
CODE = (
    "def add(left: int, right: int) -> int:\n    return left + right\n\n"
    "class Reader:\n    def read(self):\n        pass\n"
)
OTHER = "naïve 🙂 שלום עולם 你好，世界 3.14159 e\u0301"

Part = tuple[str, str]
"""A tiny model's architecture and its tokenizer's kind."""


def span_ensemble(*parts: Part, seed: int = 0, **settings: Any) -> CoupledForCausalLM:
    """Couples tiny models, each with its own tokenizer; the anchor comes first. Bridges speak; float64."""
    names = ("anchor", *NAMES)[: len(parts)]
    tokenizers = {name: tiny_tokenizer(kind) for name, (_, kind) in zip(names, parts, strict=True)}
    models = {
        name: tiny(arch, vocab_size=len(tokenizers[name]), seed=number).double()
        for number, (name, (arch, _)) in enumerate(zip(names, parts, strict=True))
    }
    model = rc_agents.couple(
        models.pop("anchor"), models, tokenizers=tokenizers, **{"sites": 2, **settings}
    )
    model.bridges.double()
    wake(model, seed)
    return model


def ids_of(model: CoupledForCausalLM, text: str) -> Tensor:
    """The anchor's tokens of a text, (1, T)."""
    return torch.tensor([model.tokenizer(text)["input_ids"]], dtype=torch.long)


def batch_of(model: CoupledForCausalLM, *texts: str, side: str = "left") -> tuple[Tensor, Tensor]:
    """The anchor's tokens of several texts, padded: (input_ids, attention_mask)."""
    rows = [model.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    ids = [
        [PAD] * len(gap) + row if side == "left" else row + [PAD] * len(gap)
        for row, gap in zip(rows, gaps, strict=True)
    ]
    ones = [[1] * len(row) for row in rows]
    mask = [gap + one if side == "left" else one + gap for gap, one in zip(gaps, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def in_steps(
    model: CoupledForCausalLM, ids: Tensor, cuts: list[int], **settings: Any
) -> CoupledOutput:
    """Feeds a sequence in several passes over one cache; returns the last output with all logits in it."""
    logits, cache = [], None
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        if end > start:
            output = model(ids[:, start:end], past_key_values=cache, use_cache=True, **settings)
            cache = output.past_key_values
            logits.append(output.logits)
    output.logits = torch.cat(logits, dim=1)
    return output


def close(one: Tensor, other: Tensor) -> None:
    """Fails unless two results agree but for rounding (some layers of some models work in float32)."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
