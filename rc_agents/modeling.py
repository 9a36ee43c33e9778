"""N frozen causal language models that behave as one: the Hugging Face model of the ensemble."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import backbone, checkpoint, membership, placement, selection
from .alignment import TokenBytes
from .assembly import Loader, Member, Reference, describe, member_names
from .bridges import Bridge, Router
from .cache import CoupledCache
from .config import BridgeConfig, CouplingConfig
from .errors import ConfigError, InputError
from .execution import SCHEDULES, Stream
from .execution.exchange import Exchange, RoutedExchange, keep
from .execution.span import SpanPlan, plan
from .generation import CoupledGeneration
from .mixing import OutputMixer
from .topology import ANCHOR, Edge, Topology


@dataclass
class CoupledOutput(CausalLMOutputWithPast):
    """A causal LM's output, and with `output_steered=True` every model's own logits under coupling.

    Attributes:
        steered_logits: name -> (B, T_i, V_i).
        steered_input_ids: name -> (B, T_i), the tokens those logits follow, in the model's own vocabulary.
    """

    steered_logits: dict[str, Tensor] | None = None
    steered_input_ids: dict[str, Tensor] | None = None


class CoupledForCausalLM(CoupledGeneration, PreTrainedModel, GenerationMixin):
    """Frozen models that exchange gated linear updates of their residual streams in one forward pass.

    Build it with `rc_agents.couple` or `from_pretrained`. From outside it is the anchor: its tokens go in, its
    vocabulary comes out.

    Args:
        config: the ensemble.
        members: the loaded models in the order of `config.names`.

    Source: Residual Coupling (Ekin, 2026), equations in `rc_agents.bridges`.
    """

    config: CouplingConfig
    config_class = CouplingConfig
    base_model_prefix = "rc"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = False

    def __init__(self, config: CouplingConfig, members: Mapping[str, Member] | None = None) -> None:
        if members is None:
            raise ConfigError("an ensemble is built with rc_agents.couple(...) or from_pretrained(...), not from a config")
        super().__init__(config)
        self.members = dict(members)
        self._handles: dict[str, list[Any]] = {}
        for name, member in self.members.items():
            setattr(self, f"lm_{name}", member.model)
            self._tap(name)
        self.bridges = nn.ModuleDict()
        self.routers = nn.ModuleList()
        self.mixer = OutputMixer(config.mix, self.names)
        for edge in self.edges:
            self._build_bridges(edge)
        if config.bridge_config.kind == "moe":
            self.routers.extend(Router(self.names, config.hidden_size) for _ in self.sites)
        self.generation_config = copy.deepcopy(self.models[ANCHOR].generation_config)
        self.name_or_path = ""
        self.eval()

    # The ensemble's parts.

    @property
    def names(self) -> list[str]:
        """The models, "anchor" first, then the specialists in order of addition."""
        return list(self.members)

    @property
    def specialists(self) -> list[str]:
        """The specialists' names in order of addition."""
        return self.names[1:]

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The frozen models by name."""
        return {name: member.model for name, member in self.members.items()}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """Each model's tokenizer by name, None where it has none."""
        return {name: member.tokenizer for name, member in self.members.items()}

    @property
    def tokenizer(self) -> Any:
        """The anchor's tokenizer."""
        return self.members[ANCHOR].tokenizer

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The directed edges between the models."""
        return self.config.edges if self.config.bridge_config.kind != "moe" else ()

    @property
    def sites(self) -> list[list[int]]:
        """For each site the 1-based block of every model, in the order of `names`."""
        return self.config.site_layers or []

    def bridge(self, edge: Edge | tuple[str, str], site: int) -> Bridge:
        """Returns the bridge on an edge at a site (0-based index into `sites`)."""
        return self.bridges[Edge(*edge).key][site]  # type: ignore[index]

    def _tap(self, name: str) -> None:
        column = self.names.index(name)
        layers = {row[column]: site for site, row in enumerate(self.sites)}
        self._handles[name] = backbone.tap(self.models[name], layers)

    def _build_bridges(self, edge: Edge) -> None:
        """Makes one edge's bridges, each on the device of its target's block."""
        if self.config.bridge_config.kind == "moe":
            return
        source, target = self.models[edge.source], self.models[edge.target]
        blocks, column = backbone.find_blocks(target), self.names.index(edge.target)
        widths = backbone.stream_width(source), backbone.stream_width(target)
        made = [Bridge(self.config.bridge_config, *widths) for _ in self.sites]
        for bridge, row in zip(made, self.sites, strict=True):
            bridge.to(placement.execution_device(blocks[row[column] - 1]))
        self.bridges[edge.key] = nn.ModuleList(made)

    def _init_weights(self, module: nn.Module) -> None:
        """Keeps every weight: the bases are loaded and the bridges made."""

    def get_input_embeddings(self) -> nn.Module:
        """The anchor's."""
        return self.models[ANCHOR].get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The anchor's."""
        return self.models[ANCHOR].get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: base weights never change."""
        raise InputError("the bases are frozen: the ensemble's embeddings cannot be replaced or resized")

    @property
    def device(self) -> torch.device:
        """Where the anchor's tokens go."""
        return placement.input_device(self.models[ANCHOR])

    @property
    def dtype(self) -> torch.dtype:
        """The anchor's."""
        return self.models[ANCHOR].dtype

    def train(self, mode: bool = True) -> CoupledForCausalLM:
        """Sets the bridges' mode; the frozen models stay in eval."""
        super().train(mode)
        for model in self.models.values():
            model.eval()
        return self

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the bridges', routers' and mixer's parameters by name."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not name.startswith("lm_"):
                yield name, parameter

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters train, and their share of all."""
        trained = sum(parameter.numel() for _, parameter in self.trainable_parameters())
        total = sum(parameter.numel() for parameter in self.parameters())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    # Choosing who speaks.

    def disabled(self, *names: str) -> AbstractContextManager[None]:
        """Cuts the named specialists' edges in and out inside a `with` block; without names, all of them.

        Holds in the current thread and context only.
        """
        chosen = selection.check_names(list(names), self.names) if names else self.specialists
        return selection.cut(self, chosen)

    # The pass.

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_steered: bool = False,
        specialists: Any = None,
        strength: Any = None,
        edge_strength: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CoupledOutput:
        """Runs all models side by side and returns the mixer's output.

        Args:
            input_ids: the anchor's tokens, (B, T).
            attention_mask: 1 for real tokens, (B, P + T) with P tokens in the cache; 2-D only.
            position_ids: (B, T); from the mask where left out.
            past_key_values: what an earlier call of this ensemble returned, or an empty cache.
            inputs_embeds: refused, as every model embeds the text itself.
            labels: (B, T), shifted inside; -100 is not scored.
            logits_to_keep: the last so many positions' logits; 0 for all.
            output_steered: also return every model's own logits under coupling.
            specialists: names that take part, or one list of names a row; None for all.
            strength: factor on every bridge's update: a number, a dict by specialist, or one a row.
            edge_strength: the same as a tensor, (B, E) in the order of `edges`.

        Raises:
            InputError: inputs that cannot work; ModelRunError: a model or a bridge failed.
        """
        ids = self._check_inputs(input_ids, attention_mask, inputs_embeds, kwargs)
        if edge_strength is None:
            edge_strength = selection.edge_strengths(self.edges, self.names, ids.shape[0], specialists, strength)
        if use_cache is None:
            use_cache = past_key_values is not None
        memory = self._memory(past_key_values, use_cache)
        length = memory.length if use_cache else 0
        mask = self._check_mask(attention_mask, ids, length)
        if position_ids is None and mask is not None and attention_mask is not None:
            position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        active, factors = self._active_edges(edge_strength)
        running = self._running(active, output_steered)
        spans = self._plan(memory, active, running, ids, mask)
        self._check_context(length + ids.shape[1], spans)
        self._catch_up(memory, running, mask, use_cache)
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        streams = []
        for name in running:
            if name in self._span_names and name not in spans.steps:
                continue
            arguments = self._arguments(name, ids, mask, position_ids, spans, memory if use_cache else None)
            if name == ANCHOR:
                arguments |= {key: value for key, value in asked.items() if value is not None}
            wanted = logits_to_keep if name == ANCHOR or self._needs_logits(output_steered) else 1
            streams.append(self._stream(name, arguments, wanted))
        meet = self._exchange(active, factors, spans, memory)
        outputs = SCHEDULES[self.config.schedule](streams, len(self.sites), meet)
        if use_cache:
            memory.remember(ids)
            for name in (n for n in running if n not in self._span_names):
                memory.seen[name] = length + ids.shape[1]
        return self._collect(outputs, labels, memory if use_cache else None, output_steered, ids, spans, kwargs)

    # Steps of the pass.

    def _check_inputs(self, input_ids: Any, mask: Any, embeds: Any, kwargs: dict[str, Any]) -> Tensor:
        if embeds is not None:
            raise InputError("inputs_embeds is refused: every model embeds the text itself; pass input_ids")
        if not isinstance(input_ids, Tensor):
            raise InputError(f"input_ids is a tensor of shape (batch, tokens), got {type(input_ids).__name__}")
        if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise InputError(
                f"input_ids is an integer tensor of shape (batch, tokens), got {input_ids.dtype} of shape "
                f"{tuple(input_ids.shape)}"
            )
        if input_ids.shape[1] == 0 or input_ids.shape[0] == 0:
            raise InputError(f"input_ids is empty, shape {tuple(input_ids.shape)}; pass at least one token")
        size = self.config.vocab_size
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= size:
            raise InputError(f"input_ids holds {low if low < 0 else high}, outside the anchor's vocabulary 0..{size - 1}")
        unknown = set(kwargs) - {"num_items_in_batch", "cache_position", "is_first_iteration", "next_sequence_length"}
        if unknown:
            raise InputError(f"forward got unknown arguments: {', '.join(sorted(unknown))}")
        return input_ids

    def _check_mask(self, mask: Any, ids: Tensor, length: int) -> Tensor | None:
        if mask is None:
            return torch.ones(ids.shape[0], length + ids.shape[1], dtype=torch.long) if self._span_names else None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise InputError("attention_mask is a 2-D tensor of ones and zeros, one column a token")
        if tuple(mask.shape) == (ids.shape[0], ids.shape[1]) and length:
            raise InputError(
                f"attention_mask covers {mask.shape[1]} tokens, but {length} lie in the cache; "
                f"pass a mask of {length + ids.shape[1]} columns"
            )
        if tuple(mask.shape) != (ids.shape[0], length + ids.shape[1]):
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}, expected {(ids.shape[0], length + ids.shape[1])}"
            )
        return mask

    def _check_context(self, length: int, spans: SpanPlan) -> None:
        """Refuses a text that is longer than one of the models was made for, in that model's own tokens."""
        for name, model in self.models.items():
            limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            count = int(spans.steps[name].position_ids.max()) + 1 if name in spans.steps else length
            if name in self._span_names and name not in spans.steps:
                continue
            if isinstance(limit, int) and limit > 0 and count > limit:
                raise InputError(f"the text has {count} tokens for model {name!r}, which takes at most {limit}")

    @property
    def _span_names(self) -> list[str]:
        return [name for name, how in (self.config.alignment or {}).items() if how == "span"]

    def _memory(self, cache: Cache | None, use_cache: bool) -> CoupledCache:
        if not use_cache:
            return CoupledCache({})
        configs = {name: model.config for name, model in self.models.items()}
        return CoupledCache.wrap(cache, configs, growing=self._span_names)

    def _active_edges(self, edge_strength: Tensor | None) -> tuple[list[Edge], dict[Edge, Tensor]]:
        """Returns the edges that some row uses, and the factors of those that are not one everywhere."""
        off = selection.cut_names(self)
        active = [edge for edge in self.edges if not off.intersection(edge)]
        if edge_strength is None:
            return active, {}
        columns = {edge: edge_strength[:, self.edges.index(edge)] for edge in active}
        active = [edge for edge in active if bool(columns[edge].any())]
        return active, {edge: columns[edge] for edge in active if bool((columns[edge] != 1).any())}

    def _needs_logits(self, output_steered: bool) -> bool:
        return output_steered or self.mixer.kind != "anchor"

    def _running(self, active: Sequence[Edge], output_steered: bool) -> list[str]:
        """Returns the models that run: those whose states can reach an output."""
        off = selection.cut_names(self)
        present = [name for name in self.names if name not in off]
        if self._needs_logits(output_steered) or len(self.routers):
            return self.names if output_steered else present
        needed = {ANCHOR}
        while more := {edge.source for edge in active if edge.target in needed} - needed:
            needed |= more
        return [name for name in self.names if name in needed]

    def _token_bytes(self) -> dict[str, TokenBytes]:
        """Returns the byte tables of the anchor's and every span model's tokenizer, made once."""
        tables: dict[str, TokenBytes] = self.__dict__.setdefault("_tables", {})
        for name in (ANCHOR, *self._span_names):
            if name not in tables:
                tables[name] = TokenBytes(self.tokenizers[name], name)
        return tables

    def _plan(
        self, memory: CoupledCache, active: Sequence[Edge], running: Sequence[str], ids: Tensor, mask: Tensor | None
    ) -> SpanPlan:
        names = [name for name in running if name in self._span_names]
        if not names:
            return SpanPlan()
        assert mask is not None
        whole = ids if memory.ids is None else torch.cat([memory.ids, ids], dim=1)
        edges = [edge for edge in active if any(end in names for end in edge)]
        return plan(memory, {n: self.models[n] for n in names}, self._token_bytes(), edges, whole.cpu(), mask.cpu())

    def _catch_up(self, memory: CoupledCache, running: Sequence[str], mask: Tensor | None, use_cache: bool) -> None:
        """Shows a model that was cut out of earlier steps the tokens it missed, uncoupled as they were."""
        if not use_cache or memory.ids is None:
            return
        for name in running:
            start = memory.seen[name]
            if name in self._span_names or start == memory.length:
                continue
            missed = memory.ids[:, start : memory.length]
            part = None if mask is None else mask[:, : memory.length]
            position_ids = None if part is None else (part.long().cumsum(-1) - 1).clamp(min=0)[:, start:]
            arguments = self._arguments(name, missed, part, position_ids, SpanPlan(), memory)
            self._stream(name, arguments, 1).run()
            memory.seen[name] = memory.length

    def _arguments(
        self,
        name: str,
        ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        spans: SpanPlan,
        memory: CoupledCache | None,
    ) -> dict[str, Any]:
        """Returns what one model's forward is called with, on its own device."""
        model = self.models[name]
        if name in spans.steps:
            step = spans.steps[name]
            ids, mask, position_ids = step.input_ids, step.attention_mask, step.position_ids
        elif (self.config.alignment or {}).get(name) == "clamp":
            ids = ids.clamp(max=model.config.get_text_config(decoder=True).vocab_size - 1)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": memory is not None}
        if position_ids is not None and "position_ids" in backbone.accepted_arguments(model):
            arguments["position_ids"] = position_ids
        if memory is not None:
            arguments[backbone.cache_argument(model)] = memory.caches[name]
        device = placement.input_device(model)
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}

    def _stream(self, name: str, arguments: dict[str, Any], logits_to_keep: int | Tensor) -> Stream:
        model = self.models[name]
        trims = "logits_to_keep" in backbone.accepted_arguments(model)
        extra = {"logits_to_keep": logits_to_keep} if trims else {}

        def run() -> Any:
            output = model(**arguments, **extra, return_dict=True)
            if not trims and isinstance(logits_to_keep, int) and logits_to_keep:
                output.logits = output.logits[:, -logits_to_keep:]
            return output

        return Stream(name, run)

    def _exchange(
        self, active: Sequence[Edge], factors: dict[Edge, Tensor], spans: SpanPlan, memory: CoupledCache
    ) -> Any:
        if len(self.routers):
            off = selection.cut_names(self)
            return RoutedExchange(lambda site: self.routers[site], [n for n in self.names if n not in off])
        if not active:
            return keep
        return Exchange(active, self.bridge, factors, spans.reads, memory)

    def _collect(
        self,
        outputs: dict[str, Any],
        labels: Tensor | None,
        memory: CoupledCache | None,
        output_steered: bool,
        ids: Tensor,
        spans: SpanPlan,
        kwargs: dict[str, Any],
    ) -> CoupledOutput:
        anchor = outputs[ANCHOR]
        off = selection.cut_names(self)
        mixed = {name: outputs[name].logits for name in self.names if name in outputs and name not in off}
        logits = anchor.logits if self.mixer.kind == "anchor" else self.mixer(mixed)
        loss = None
        if labels is not None:
            extra = {key: kwargs[key] for key in ("num_items_in_batch",) if kwargs.get(key) is not None}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **extra)
        steered = steered_ids = None
        if output_steered:
            steered = {name: output.logits for name, output in outputs.items()}
            steered_ids = {name: spans.steps[name].input_ids if name in spans.steps else ids for name in outputs}
        return CoupledOutput(
            loss=loss,
            logits=logits,
            past_key_values=memory,
            hidden_states=anchor.get("hidden_states"),
            attentions=anchor.get("attentions"),
            steered_logits=steered,
            steered_input_ids=steered_ids,
        )

    def decode_steered(self, output: CoupledOutput) -> dict[str, list[str]]:
        """Returns each model's greedy next token behind every row, as text of its own vocabulary."""
        if output.steered_logits is None:
            raise InputError("the output has no steered logits; call the model with output_steered=True")
        texts = {}
        for name, logits in output.steered_logits.items():
            if self.tokenizers[name] is None:
                raise InputError(f"model {name!r} has no tokenizer to decode with")
            texts[name] = self.tokenizers[name].batch_decode(logits[:, -1:].argmax(-1))
        return texts

    # Members come and go; checkpoints. The work is done in `membership` and `checkpoint`.

    def add_specialist(
        self,
        name: str,
        reference: Reference,
        bridges: str | Path | None = None,
        *,
        edges: Any = None,
        alignment: str = "auto",
        tokenizer: Any = None,
        device_map: Any = None,
        dtype: Any = None,
    ) -> None:
        """Adds a frozen model; existing bridges keep every bit, the new ones start as the config says.

        Args:
            name: the specialist's name.
            reference: id, path, `package:NAME`, `ModelRef` or a loaded model.
            bridges: a saved ensemble that holds trained bridges for this name.
            edges: its edges, for a custom topology; a preset topology knows them.
            alignment: as in `rc_agents.couple`.
            tokenizer: for a loaded model without one of its own.
            device_map, dtype: for this model.
        """
        membership.add(self, name, reference, bridges, edges, alignment, tokenizer, device_map, dtype)

    def remove_specialist(self, name: str) -> None:
        """Removes a frozen model with its bridges; in reverse order of addition this restores the earlier state."""
        membership.remove(self, name)

    def base_fingerprint(self, name: str | None = None) -> Any:
        """Returns the hash of a base's weights as they are in memory, or of every model's by name."""
        if name is not None:
            return backbone.weights_hash(self.models[selection.check_names([name], self.names)[0] if name != ANCHOR else name])
        return {each: backbone.weights_hash(model) for each, model in self.models.items()}

    def save_pretrained(self, save_directory: str | Path, *, include_bases: bool = False, **kwargs: Any) -> None:
        """Saves bridges, config, generation config, the anchor's tokenizer and a model card; no base weights.

        Args:
            save_directory: folder; a kill at any moment leaves the old or the new checkpoint whole.
            include_bases: also save the base models, as live models without a path need.
        """
        checkpoint.save_checkpoint(self, save_directory, include_bases=include_bases, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> CoupledForCausalLM:
        """Loads a saved ensemble: its bases from where they lie, its bridges from `path` (folder or hub id).

        Args:
            device_map, dtype, schedule, revision, trust_remote_code: as in `rc_agents.couple`.
            bases: name -> other place of a base, for example after it was moved; its fingerprint must fit.

        Raises:
            CheckpointError: missing, truncated or foreign files, another base; nothing is half-loaded.
        """
        return checkpoint.load(cls, path, *args, **kwargs)


def couple(
    anchor: Reference,
    specialists: Mapping[str, Reference] | None = None,
    *,
    topology: str | Topology | Sequence[Sequence[str]] = "multi_bilateral",
    bridge: BridgeConfig | dict[str, Any] | str | None = None,
    sites: int | Sequence[int] = 5,
    alignment: str = "auto",
    mix: str = "anchor",
    device_map: Any = None,
    dtype: Any = None,
    schedule: str = "lockstep",
    tokenizers: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> CoupledForCausalLM:
    """Couples frozen models into one.

    Args:
        anchor: the generalist, whose tokens go in and come out: hub id, path, `package:NAME`, `ModelRef` or a loaded
            model.
        specialists: name -> model, in order of addition; None or empty for the anchor alone.
        topology: "unilateral", "star_bilateral", "multi_bilateral", or a `Topology` of edges.
        bridge: the form of the bridges, a `BridgeConfig`.
        sites: how many meeting points, the last block included, or the anchor's 1-based blocks.
        alignment: how tokens meet: "auto" (shared for equal tokenizers, else span), "shared", "span", or "clamp" (the
            published form, for comparison).
        mix: "anchor", "average", "learned" or "sigmoid".
        device_map: None, one value for all, or a dict by model name of whatever Hugging Face accepts.
        dtype: one for all, or a dict by model name; None keeps what is stored.
        schedule: "lockstep" (one thread) or "threads" (one a model).
        tokenizers: for models that were passed in loaded, by name.
        trust_remote_code: lets Hugging Face run code that comes with a model; off unless asked for.

    Returns:
        The ensemble, in eval mode, every base frozen.

    Raises:
        ConfigError, ModelError, TokenError, PackageError: one line that says what to do.
    """
    names = member_names(specialists)
    for key in tokenizers or {}:
        if key not in names:
            raise ConfigError(f"tokenizers names an unknown model {key!r}; known: {', '.join(names)}")
    loader = Loader(names, device_map, dtype, tokenizers or {}, trust_remote_code)
    for name, reference in {ANCHOR: anchor, **(specialists or {})}.items():
        loader.add(name, reference)
    config = describe(
        loader.members,
        topology=topology,
        bridge=bridge,
        sites=sites,
        alignment=alignment,
        mix=mix,
        schedule=schedule,
    )
    return CoupledForCausalLM(config, loader.members)


AutoModelForCausalLM.register(CouplingConfig, CoupledForCausalLM)
