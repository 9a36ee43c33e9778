"""What the anchor's process tells another of a pass: the model's inputs, who else runs, which edges are on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cache import RemoteCache
from ..execution.protocol import NO_LOGITS, Call
from ..execution.span import SpanPlan
from ..execution.wire import Frame
from ..topology import Edge

INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass
class Order:
    """One model's part of a pass.

    Args:
        number: of the pass, rising.
        call: what the model's forward is called with.
        cache: what stands for its memory of the text; None where nothing is remembered.
        after: the last pass that this memory holds.
        past: the anchor's columns before this pass.
        num_sites: how often the models meet; 0 where the model runs uncoupled.
        present: the models that run.
        epochs: the connection of each of them that is not the anchor.
        edges: the edges that are on.
        strength: factor of an edge into this model in every row, (B,).
        spans: how tokens lie beside each other, as far as this model needs it.
        output: whether the anchor waits for the logits.
        answers: whether the anchor waits until the model is done.
        limit: seconds that each wait may take.
        wire: how states cross.
        deaf: the models that need not hear anybody at the last site.
        since: the first pass that may still be undone together with this one.
    """

    number: int
    call: Call
    cache: RemoteCache | None
    past: int
    num_sites: int
    present: Sequence[str]
    epochs: dict[str, int]
    edges: Sequence[Edge]
    strength: dict[Edge, Tensor] = field(default_factory=dict)
    spans: SpanPlan = field(default_factory=SpanPlan)
    output: bool = False
    answers: bool = False
    after: int | None = None
    limit: float = 60.0
    wire: str = "exact"
    deaf: Sequence[str] = ()
    since: int = 0

    def frame(self, me: str) -> Frame:
        """Returns the frame that tells the model `me` of it; takes along what is pending for its cache."""
        arguments, cache = self.call.arguments, self.cache
        tensors: dict[str, Tensor] = {}
        for key in INPUTS:
            value = arguments.get(key)
            if isinstance(value, dict):
                tensors |= {f"{key}.{kind}": one for kind, one in value.items()}
            elif isinstance(value, Tensor):
                tensors[key] = value
        if isinstance(self.call.keep, Tensor):
            tensors["keep"] = self.call.keep
        if me in self.spans.reads:
            tensors["reads"] = self.spans.reads[me]
        tensors |= {f"picks.{name}": one for name, one in self.spans.picks.items()}
        edges = [edge for edge in self.edges if me in edge]
        near = {me, *(name for edge in edges for name in edge)}  # all that it deals with
        for place, edge in enumerate(edges):
            if edge in self.strength and edge.target == me:
                tensors[f"strength.{place}"] = self.strength[edge]
        fields = {
            "pass": self.number,
            "past": self.past,
            "num_sites": self.num_sites,
            "present": [name for name in self.present if name in near],
            "epochs": {name: one for name, one in self.epochs.items() if name in near},
            "edges": [list(edge) for edge in edges],
            "cache": None if cache is None else cache.id,
            "capacity": None if cache is None else cache.capacity,
            "plain": cache is not None and cache.plain,
            "operations": [] if cache is None else cache.taken(),
            "use_cache": bool(arguments.get("use_cache")),
            "keep": "none" if self.call.keep is NO_LOGITS else _number(self.call.keep),
            "output": self.output,
            "answers": self.answers,
            "limit": self.limit,
            "wire": self.wire,
            "deaf": [name for name in self.deaf if name in near],
            "since": self.since,
            "after": None if cache is None else cache.after,
            "mode": mode(),
        }
        return Frame("pass", fields, tensors)

    @classmethod
    def read(cls, frame: Frame, me: str) -> Order:
        """Makes the order out of its frame; the tensors are still on the CPU, the cache is not in it."""
        fields, tensors = frame.fields, frame.tensors
        arguments: dict[str, Any] = {"use_cache": fields["use_cache"]}
        for name, tensor in tensors.items():
            key, _, kind = name.partition(".")
            if key in INPUTS and kind:
                arguments.setdefault(key, {})[kind] = tensor
            elif key in INPUTS:
                arguments[key] = tensor
        edges = [Edge(*edge) for edge in fields["edges"]]
        spans = SpanPlan(picks=_under("picks", tensors))
        if "reads" in tensors:
            spans.reads[me] = tensors["reads"]
        return cls(
            number=fields["pass"],
            call=Call(arguments, _keep(fields["keep"], tensors)),
            cache=None,
            past=fields["past"],
            num_sites=fields["num_sites"],
            present=fields["present"],
            epochs=fields["epochs"],
            edges=edges,
            strength={edges[int(at)]: one for at, one in _under("strength", tensors).items()},
            spans=spans,
            output=fields["output"],
            answers=fields["answers"],
            limit=fields["limit"],
            wire=fields["wire"],
            deaf=fields["deaf"],
            since=fields["since"],
            after=fields["after"],
        )


def _number(keep: Any) -> int | None:
    return keep if isinstance(keep, int) else None


def _keep(told: Any, tensors: dict[str, Tensor]) -> int | slice | Tensor:
    if told == "none":
        return NO_LOGITS
    return tensors["keep"] if told is None else int(told)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {
        name.removeprefix(start): one for name, one in tensors.items() if name.startswith(start)
    }


def mode() -> dict[str, Any]:
    """Returns the grad, inference and autocast modes of this thread."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": next(
            (
                str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
                for kind in ("cpu", "cuda")
                if torch.is_autocast_enabled(kind)
            ),
            None,
        ),
    }


def entered(told: dict[str, Any], device: torch.device) -> ExitStack:
    """Returns a context with the modes that `mode` gave in another process."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(told["inference"]))
    stack.enter_context(torch.set_grad_enabled(told["grad"]))
    if told["autocast"] is not None:
        stack.enter_context(torch.autocast(device.type, dtype=getattr(torch, told["autocast"])))
    return stack
