"""N frozen causal language models that behave as one: the Hugging Face model of the ensemble."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from .execution import SCHEDULES, CoupledPass, inputs
from .execution.span import Reader
from .generation import CoupledGeneration
from .mixing import OutputMixer
from .topology import ANCHOR, Edge, Topology

_KEYS = itertools.count()


@dataclass
class CoupledOutput(CausalLMOutputWithPast):
    """A causal LM's output, and with `output_steered=True` every model's own logits under coupling.

    Attributes:
        steered_logits: name -> (B, T_i, V_i).
        steered_input_ids: name -> (B, T_i), the tokens those logits follow, in the model's own vocabulary.
        steered_attention_mask: name -> (B, T_i), 1 for real tokens; rows of a model with its own tokenizer are
            padded on the right.
    """

    steered_logits: dict[str, Tensor] | None = None
    steered_input_ids: dict[str, Tensor] | None = None
    steered_attention_mask: dict[str, Tensor] | None = None


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
            raise ConfigError(
                "an ensemble is built with rc_agents.couple(...) or from_pretrained(...), not from a config"
            )
        super().__init__(config)
        self.members = dict(members)
        self._handles: dict[str, list[Any]] = {}
        self.key = next(_KEYS)
        for name, member in self.members.items():
            setattr(self, f"lm_{name}", member.model)
            self._tap(name)
        self.bridges = nn.ModuleDict()
        self.routers = nn.ModuleList()
        self.mixer = OutputMixer(config.mix, self.names)
        for edge in self.edges:
            self._build_bridges(edge)
        if config.bridge_config.kind == "moe":
            self._build_routers()
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
        self._handles[name] = backbone.tap(self.models[name], layers, self.key)

    @contextmanager
    def untapped(self, name: str) -> Iterator[None]:
        """Takes the taps off one model inside a `with` block."""
        for handle in self._handles.pop(name):
            handle.remove()
        try:
            yield
        finally:
            self._tap(name)

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

    def _build_routers(self) -> None:
        """Makes a router a site, each on the device of the anchor's block."""
        blocks = backbone.find_blocks(self.models[ANCHOR])
        for row in self.sites:
            router = Router(self.names, self.config.hidden_size)
            self.routers.append(router.to(placement.execution_device(blocks[row[0] - 1])))

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
        raise InputError(
            "the bases are frozen: the ensemble's embeddings cannot be replaced or resized"
        )

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
        print(
            f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
        )

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
        presence: Tensor | None = None,
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
            edge_strength, presence: the same as tensors, (B, E) in the order of `edges` and (B, N) in that of `names`,
                as `generate` passes them on.

        Raises:
            InputError: inputs that cannot work; ModelRunError: a model or a bridge failed.
        """
        ids = inputs.check_ids(input_ids, inputs_embeds, self.config.vocab_size)
        inputs.check_known(kwargs, inspect.signature(self.forward).parameters)
        choice = selection.Choice(self.edges, self.names, edge_strength, presence)
        if specialists is not None or strength is not None:
            choice = selection.choose(self.edges, self.names, ids.shape[0], specialists, strength)
        if use_cache is None:
            use_cache = past_key_values is not None
        asked = {
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        step = CoupledPass(
            self,
            ids,
            attention_mask,
            position_ids,
            self._memory(past_key_values, use_cache),
            use_cache,
            choice,
            logits_to_keep,
            output_steered,
            {key: value for key, value in asked.items() if value is not None},
        )
        outputs = step.run(SCHEDULES[self.config.schedule])
        return self._output(step, outputs, labels, kwargs)

    def _memory(self, cache: Cache | None, use_cache: bool) -> CoupledCache:
        if not use_cache:
            return CoupledCache({})
        configs = {name: model.config for name, model in self.models.items()}
        return CoupledCache.wrap(cache, configs, growing=self.config.span_names)

    def _output(
        self,
        step: CoupledPass,
        outputs: dict[str, Any],
        labels: Tensor | None,
        kwargs: dict[str, Any],
    ) -> CoupledOutput:
        anchor = outputs[ANCHOR]
        logits = anchor.logits
        if self.mixer.kind != "anchor":
            mixed = {name: outputs[name].logits for name in step.mixed}
            logits = self.mixer(mixed, step.choice.present())
        loss = None
        if labels is not None:
            count = kwargs.get("num_items_in_batch")
            extra = {} if count is None else {"num_items_in_batch": count}
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **extra
            )
        steered = steered_ids = steered_mask = None
        if step.output_steered:
            steered, steered_ids, steered_mask = step.steered(outputs)
        return CoupledOutput(
            loss=loss,
            logits=logits,
            past_key_values=step.memory if step.use_cache else None,
            hidden_states=anchor.get("hidden_states"),
            attentions=anchor.get("attentions"),
            steered_logits=steered,
            steered_input_ids=steered_ids,
            steered_attention_mask=steered_mask,
        )

    def anchor_bytes(self) -> TokenBytes:
        """Returns what the anchor's tokens spell, made once."""
        made = self.__dict__.setdefault("_tables", {})
        if ANCHOR not in made:
            made[ANCHOR] = TokenBytes(self.tokenizer, ANCHOR)
        return made[ANCHOR]

    def reader(self, name: str) -> Reader:
        """Returns how a model with its own tokenizer reads along, made once."""
        made = self.__dict__.setdefault("_tables", {})
        if name not in made:
            made[name] = Reader.of(name, self.models[name], self.tokenizers[name])
        return made[name]

    def decode_steered(self, output: CoupledOutput) -> dict[str, list[str]]:
        """Returns each model's greedy next token behind every row, as text of its own vocabulary.

        Empty where a model with its own tokenizer had no new token in that row.
        """
        if output.steered_logits is None or output.steered_attention_mask is None:
            raise InputError(
                "the output has no steered logits; call the model with output_steered=True"
            )
        texts = {}
        for name, logits in output.steered_logits.items():
            if self.tokenizers[name] is None:
                raise InputError(f"model {name!r} has no tokenizer to decode with")
            real = output.steered_attention_mask[name].to(logits.device)  # (B, T)
            last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).amax(1) - 1
            found = logits[torch.arange(len(last)), last.clamp(min=0)].argmax(-1)
            chosen = self.tokenizers[name].batch_decode(found[:, None])
            texts[name] = [text if at >= 0 else "" for text, at in zip(chosen, last, strict=True)]
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
        membership.add(
            self, name, reference, bridges, edges, alignment, tokenizer, device_map, dtype
        )

    def remove_specialist(self, name: str) -> None:
        """Removes a frozen model with its bridges; in reverse order of addition this restores the earlier state."""
        membership.remove(self, name)

    def base_fingerprint(self, name: str | None = None) -> Any:
        """Returns the hash of a base's weights as they are in memory, or of every model's by name."""
        if name is not None:
            return backbone.weights_hash(
                self.models[
                    selection.check_names([name], self.names)[0] if name != ANCHOR else name
                ]
            )
        return {each: backbone.weights_hash(model) for each, model in self.models.items()}

    def save_pretrained(
        self, save_directory: str | Path, *, include_bases: bool = False, **kwargs: Any
    ) -> None:
        """Saves bridges, config, generation config, the anchor's tokenizer and a model card; no base weights.

        Args:
            save_directory: folder; a kill at any moment leaves the old or the new checkpoint whole.
            include_bases: also save the base models, as live models without a path need.
        """
        checkpoint.save_checkpoint(self, save_directory, include_bases=include_bases, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads what `save_pretrained` writes to the Hugging Face hub.

        Args:
            repo_id: owner/name; made where it is not there.
            include_bases, private, token, revision, commit_message, create_pr: see `checkpoint.push`.
        """
        return checkpoint.push(self, repo_id, **kwargs)

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
            raise ConfigError(
                f"tokenizers names an unknown model {key!r}; known: {', '.join(names)}"
            )
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
