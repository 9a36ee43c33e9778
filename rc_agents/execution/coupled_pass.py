"""One coupled pass: which models run, on what inputs, and what they exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backbone, context, placement, selection, sources
from ..cache import CoupledCache
from ..topology import ANCHOR, Edge
from . import inputs
from .exchange import EXCHANGE, Exchange, RoutedExchange, keep
from .protocol import NO_LOGITS, Call, Meet, Schedule, Stream, fail
from .span import SpanPlan, plan
from .texts import Chats

if TYPE_CHECKING:
    from ..modeling import CoupledForCausalLM


@dataclass
class CoupledPass:
    """The steps of one forward of an ensemble, the same under every schedule.

    Args:
        ensemble: whose forward it is.
        input_ids: the anchor's new tokens, (B, T).
        attention_mask: (B, P + T) with P tokens in the memory, or None.
        position_ids: (B, T), or None.
        memory: the ensemble's cache; an empty one where `use_cache` is off.
        use_cache: whether the models read and fill their caches.
        choice: which specialists speak in which row, and how loudly.
        logits_to_keep: the last so many positions' logits; 0 for all.
        output_steered: whether every model's own logits are wanted.
        asked: more outputs wanted of the anchor, by name of the argument.
        chats: how models with their own chat templates read the rows' conversations, (B,), or None.
        shown: what each encoder is shown, by name.
    """

    ensemble: CoupledForCausalLM
    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    memory: CoupledCache
    use_cache: bool
    choice: selection.Choice
    logits_to_keep: int | Tensor = 0
    output_steered: bool = False
    asked: Mapping[str, Any] = field(default_factory=dict)
    chats: Chats | None = None
    shown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.past = self.memory.length if self.use_cache else 0
        inputs.check_rows(self.memory.ids, self.input_ids)
        self.mask = inputs.check_mask(self.attention_mask, self.input_ids, self.past)
        self.position_ids = inputs.check_positions(self.position_ids, self.input_ids)
        if self.position_ids is None:
            self.position_ids = inputs.positions(self.mask, self.input_ids, self.past)
        self.chats = inputs.check_chats(self.chats, len(self.input_ids))
        rows = len(self.input_ids)
        self.unseen = sources.checked(self.ensemble, self.shown, self.memory.encoded, rows)
        self.spans = self._lay_spans()

    def run(self, schedule: Schedule) -> dict[str, Any]:
        """Runs the models; returns what each one's forward returned, by name."""
        self.memory.busy = self.use_cache and bool(self.spans.picks)  # its texts have moved on
        self._check_context()
        self._catch_up()
        self._encode()
        streams = [
            self._stream(name, self._arguments(name, self.input_ids, self.mask, self.position_ids))
            for name in self.running
            if name not in self.idle
        ]
        self.memory.busy = self.use_cache
        token = backbone.OWNER.set(self.ensemble.key)
        try:
            outputs = schedule(streams, len(self.ensemble.sites), self.exchange())
        finally:
            backbone.OWNER.reset(token)
        self.memory.busy = False
        if self.use_cache:
            self.memory.remember(self.input_ids)
            for name in self.running:
                if name not in self.ensemble.config.span_names:
                    self.memory.seen[name] = self.past + self.input_ids.shape[1]
        return outputs

    # Who takes part.

    @cached_property
    def cut(self) -> frozenset[str]:
        """The models that `disabled` has cut out here, and those that are lost."""
        return selection.cut_names(self.ensemble) | self.memory.lost.keys()

    @cached_property
    def edges(self) -> list[Edge]:
        """The edges that some row uses."""
        return [
            edge
            for edge in self.ensemble.edges
            if not self.cut.intersection(edge)
            and self.choice.uses(edge)
            and edge.source not in self.blind
        ]

    @cached_property
    def blind(self) -> set[str]:
        """The encoders that nobody has shown anything."""
        return {*self.ensemble.config.encoder_names} - {*self.unseen, *self.memory.encoded}

    @cached_property
    def running(self) -> list[str]:
        """The models that run side by side: those that read the text and whose states can reach an output."""
        names = list(self.ensemble.readers)
        if self.output_steered:
            return [name for name in names if name not in self.memory.lost]
        if self.ensemble.mixer.kind != "anchor" or len(self.ensemble.routers):
            return self.mixed
        needed = {ANCHOR}
        while more := {edge.source for edge in self.edges if edge.target in needed} - needed:
            needed |= more
        return [name for name in names if name in needed]

    @cached_property
    def mixed(self) -> list[str]:
        """The models whose states or logits are mixed in some row."""
        return [
            name
            for name in self.ensemble.names
            if name not in self.cut and self.choice.takes_part(name)
        ]

    @cached_property
    def idle(self) -> list[str]:
        """The models with their own tokenizer for which the new text holds no new token."""
        spans = self.ensemble.config.span_names
        return [name for name in self.running if name in spans and name not in self.spans.steps]

    # On what inputs.

    def _lay_spans(self) -> SpanPlan:
        """Tokenizes the text anew for the models that have their own tokenizer."""
        names = [name for name in self.running if name in self.ensemble.config.span_names]
        if not names:
            return SpanPlan()
        seen = self.memory.ids
        whole = self.input_ids if seen is None else torch.cat([seen, self.input_ids], dim=1)
        mask = torch.ones_like(whole) if self.mask is None else self.mask
        readers = {name: self.ensemble.reader(name) for name in names}
        anchor = self.ensemble.anchor_bytes()
        alone = self.output_steered or self.ensemble.mixer.kind != "anchor"
        present = None if alone or len(self.ensemble.routers) else self.choice.present()
        return plan(self.memory, readers, anchor, whole.cpu(), mask.cpu(), self.chats, present)

    def _check_context(self) -> None:
        """Refuses a text that is longer than one of the models was made for, in its own tokens."""
        for name in self.running:
            if name in self.idle:
                continue
            places = self.position_ids
            if name in self.spans.steps:
                places = self.spans.steps[name].position_ids
            rows, columns = self.input_ids.shape
            last = [columns - 1] * rows if places is None else places.amax(1).tolist()
            config = self.ensemble.models[name].config
            own = name in self.ensemble.config.span_names
            counts = [place + 1 for place in last]
            context.check_fits(self.ensemble, name, config, counts, own_tokens=own)

    def _catch_up(self) -> None:
        """Shows a model that was left out of earlier steps the tokens it missed, uncoupled."""
        if self.memory.ids is None:
            return
        for name in self.running:
            start = self.memory.seen[name]
            if name in self.ensemble.config.span_names or start == self.past:
                continue
            missed = self.memory.ids[:, start:]
            mask = None if self.mask is None else self.mask[:, : self.past]
            places = inputs.positions(mask, missed, start)
            self.memory.busy = True
            stream = self._stream(name, self._arguments(name, missed, mask, places))
            try:
                if self.ensemble.members[name].remote:
                    assert self.ensemble.elsewhere is not None
                    assert stream.call is not None
                    self.ensemble.elsewhere.catch_up(name, start, stream.call)
                else:
                    stream.run()
            except Exception as error:
                fail(name, error)
            self.memory.seen[name] = self.past

    def _encode(self) -> None:
        """Runs the encoders that are heard and have not seen yet what they are shown."""
        heard = {edge.source for edge in self.edges}
        for name in [name for name in self.unseen if name in heard]:
            self.memory.busy = self.use_cache
            try:
                found = sources.encode(self.ensemble, name, self.unseen[name], len(self.input_ids))
            except Exception as error:
                fail(name, error)
            self.memory.encoded[name] = found

    def _arguments(
        self, name: str, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None
    ) -> dict[str, Any]:
        """Returns what one model's forward is called with, on its own device."""
        model = self.ensemble.models[name]
        if name in self.spans.steps:
            step = self.spans.steps[name]
            input_ids, position_ids = step.input_ids, step.position_ids
            mask = step.attention_mask  # type: ignore[assignment]
        elif (self.ensemble.config.alignment or {}).get(name) == "clamp":
            last = model.config.get_text_config(decoder=True).vocab_size - 1
            input_ids = input_ids.clamp(max=last)
        tensors: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if "position_ids" in backbone.accepted_arguments(model):
            tensors["position_ids"] = position_ids
        device = placement.input_device(model)
        arguments: dict[str, Any] = {
            key: tensor.to(device) if isinstance(tensor, Tensor) else tensor
            for key, tensor in tensors.items()
            if tensor is not None
        }
        arguments["use_cache"] = self.use_cache and self.spans.goes_on(name)
        if arguments["use_cache"]:
            arguments[backbone.cache_argument(model)] = self.memory.caches[name]
        if name == ANCHOR:
            arguments |= self.asked
        return arguments

    def _stream(self, name: str, arguments: dict[str, Any]) -> Stream:
        model = self.ensemble.models[name]
        needed = name == ANCHOR or self.output_steered or self.ensemble.mixer.kind != "anchor"
        keep_last: Any = self.logits_to_keep if needed else NO_LOGITS
        if needed and name in self.spans.steps:
            keep_last = 0  # its positions are not the anchor's
        call = Call(arguments, keep_last)
        return Stream(name, lambda: call.of(model), call)

    # What comes out.

    def steered(self, outputs: dict[str, Any]) -> tuple[dict[str, Tensor], ...]:
        """Returns every model's own logits, the tokens they follow and which of those are real, by name.

        A model with its own tokenizer gives all of the pass's tokens, whatever `logits_to_keep` says, and none where
        the new text holds no new token of its own.
        """
        logits, ids, real = {}, {}, {}
        for name in self.idle:
            ids[name] = real[name] = self.input_ids[:, :0]
            vocabulary = self.ensemble.models[name].config.get_text_config(decoder=True).vocab_size
            logits[name] = outputs[ANCHOR].logits.new_zeros(len(self.input_ids), 0, vocabulary)
        last = self.logits_to_keep
        kept = slice(-last, None) if isinstance(last, int) else last
        for name, output in outputs.items():
            if name in self.spans.steps:
                step = self.spans.steps[name]
                width = step.real.shape[1]
                logits[name], ids[name] = output.logits[:, :width], step.input_ids[:, :width]
                real[name] = step.real
            else:
                mask = None if self.mask is None else self.mask[:, self.past :]
                logits[name], ids[name] = output.logits, self.input_ids[:, kept]
                real[name] = (torch.ones_like(self.input_ids) if mask is None else mask)[:, kept]
        return logits, ids, real

    # What they exchange.

    def exchange(self, into: str | None = None) -> Meet:
        """Returns what the models exchange; with `into`, by the edges into that model alone."""
        if len(self.ensemble.routers):
            return RoutedExchange(self.ensemble.routers, self.mixed, self.choice.present())
        if not self.edges and EXCHANGE.get() is Exchange:  # and nobody records either
            return keep
        edges = [edge for edge in self.edges if into in (None, edge.target)]
        return EXCHANGE.get()(
            edges, self.ensemble.bridge, self.strengths(edges), self.spans, self.memory
        )

    def strengths(self, edges: Sequence[Edge]) -> dict[Edge, Tensor]:
        """Returns the factor of each edge in every row, (B,); those at full strength are left out."""
        factors = {edge: self.choice.factor(edge) for edge in edges}
        return {edge: factor for edge, factor in factors.items() if factor is not None}
