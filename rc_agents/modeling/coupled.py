"""The Hugging Face model of an ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, GenerationMixin

from .. import backbone, checkpoint, membership, selection
from .. import sources as _sources
from .. import sparse as sparing
from ..alignment import Chat, TokenBytes
from ..assembly import Reference
from ..cache import CoupledCache
from ..config import CouplingConfig
from ..errors import ConfigError, InputError
from ..execution import CoupledPass, inputs, run_sparse, schedule_called
from ..execution.span import Reader
from ..execution.watch import may_sleep
from ..generation import CoupledGeneration
from ..topology import ANCHOR
from . import chats as _chats
from .output import CoupledOutput
from .parts import EnsembleParts


class CoupledForCausalLM(CoupledGeneration, EnsembleParts, GenerationMixin):
    """Frozen models that exchange gated linear updates of their residual streams in one forward pass.

    Build it with `rc_agents.couple` or `from_pretrained`. From outside it is the anchor: its tokens go in, its
    vocabulary comes out.

    Args:
        config: the ensemble.
        members: the loaded models in the order of `config.names`.
        elsewhere: where the remote ones among them run, see `rc_agents.nodes`.

    Source: Residual Coupling (Ekin, 2026), equations in `rc_agents.bridges`.
    """

    # Choosing who speaks.

    def disabled(self, *names: str) -> AbstractContextManager[None]:
        """Cuts the named specialists' edges in and out inside a `with` block; without names, all of them.

        Holds in the current thread and context only.
        """
        chosen = selection.check_names(list(names), self.names) if names else self.specialists
        return selection.cut(self, chosen)

    def sparse(
        self, settings: sparing.Sparse | None = None
    ) -> AbstractContextManager[sparing.Spared]:
        """Lets specialists sleep inside a `with` block while tokens are decoded to which they add nothing.

        A specialist that sleeps does not run; when it is woken it first reads what it has missed. Prompts, and all
        passes without a cache, are run as ever. Holds in the current thread and context only.

        Args:
            settings: when they sleep and are woken; `Sparse()` where left out.

        Returns:
            The block's context; it yields counts of what was spared.

        Raises:
            ConfigError: an ensemble in which no specialist can sleep; the message says why.
        """
        if self.remote_names:
            raise ConfigError("specialists sleep in one process; load this ensemble without nodes")
        if self.mixer.kind != "anchor" or len(self.routers):
            raise ConfigError(
                "every model's output is needed at every token where they are mixed; sparse needs mix='anchor' and "
                "bridges"
            )
        if not may_sleep(self):
            raise ConfigError(
                "no specialist can sleep: each has its own tokenizer, or meets one that has; use shared tokens"
            )
        return sparing.sparing(self, settings or sparing.Sparse())

    # The pass.

    def chat_inputs(self, messages: Sequence[Any], **template: Any) -> dict[str, Any]:
        """Renders a conversation by each model's template: `model.generate(**model.chat_inputs(messages))`.

        Args:
            messages: dicts with a `role` and a `content`, both strings; or a list of such conversations, one a row.
            template: more variables for the templates.

        Returns:
            input_ids and attention_mask, (B, T), left-padded, up to where the assistant's turn begins, and chats where
            models read them by templates of their own.

        Raises:
            InputError: malformed messages, or an anchor without a chat template or whose template refuses them.
        """
        return _chats.inputs_of(self, messages, template)

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
        chats: Sequence[Chat | None] | None = None,
        sources: Mapping[str, Any] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CoupledOutput | tuple[Any, ...]:
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
            chats: how models with their own chat templates read the rows, as `chat_inputs` returns it.
            sources: what encoders are shown, such as {"eye": {"pixel_values": ...}}, or for an encoder a list with the
                inputs of each row, None for a row without any. Where one encoder alone takes it, its main input may
                come by its own name: `pixel_values=`. With `past_key_values` it may be left out once it was seen.

        Raises:
            InputError: inputs that cannot work; ModelRunError: a model or a bridge failed.
        """
        ids = inputs.check_ids(input_ids, inputs_embeds, self.config.vocab_size)
        shown = _sources.named(self, sources, kwargs)
        inputs.check_known(kwargs, self.forward)
        inputs.check_labels(labels, ids, logits_to_keep, self.config.vocab_size)
        choice = selection.Choice(self.edges, self.names, edge_strength, presence)
        if specialists is not None or strength is not None:
            choice = selection.choose(self.edges, self.names, ids.shape[0], specialists, strength)
        elif edge_strength is None and presence is None:
            choice = selection.of_call(self, ids.shape[0]) or choice
        if use_cache is None:
            use_cache = past_key_values is not None
        asked = {
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        memory = self._memory(past_key_values, use_cache)

        def make(choice: selection.Choice = choice) -> CoupledPass:
            return CoupledPass(
                self,
                ids,
                attention_mask,
                position_ids,
                memory,
                use_cache,
                choice,
                logits_to_keep,
                output_steered,
                {key: value for key, value in asked.items() if value is not None},
                chats,
                shown,
            )

        if self.elsewhere is not None:
            step, outputs = self.elsewhere.run(make, memory)
        elif (sparse := sparing.current(self)) is not None:
            run = schedule_called(self.config.schedule)
            step, outputs = run_sparse(make, choice, memory, run, *sparse)
        else:
            step = make()
            outputs = step.run(schedule_called(self.config.schedule))
        output = self._output(step, outputs, labels, kwargs)
        return output if return_dict is not False else output.to_tuple()

    def _memory(self, cache: Cache | None, use_cache: bool) -> CoupledCache:
        if not use_cache:
            return CoupledCache({})
        configs = {name: model.config for name, model in self.readers.items()}
        return CoupledCache.wrap(
            cache, configs, growing=self.config.span_names, remote=self.remote_names
        )

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
            lost=dict(step.memory.lost) or None,
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
            tree = None
            if self.members[name].remote:
                assert self.elsewhere is not None
                tree = self.elsewhere.takes_branches(name)
            made[name] = Reader.of(name, self.models[name], self.tokenizers[name], tree)
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
            if not logits.shape[1]:
                texts[name] = [""] * len(logits)
                continue
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
        addition = membership.Addition(
            name=name,
            reference=reference,
            bridges=bridges,
            edges=edges,
            alignment=alignment,
            tokenizer=tokenizer,
            device_map=device_map,
            dtype=dtype,
        )
        membership.add(self, addition)

    def remove_specialist(self, name: str) -> None:
        """Removes a frozen model with its bridges; in reverse order of addition this restores the earlier state."""
        membership.remove(self, name)

    def base_fingerprint(self, name: str | None = None) -> Any:
        """Returns the hash of a base's weights as they are in memory, or of every model's by name.

        Models of other processes are left out; asked for by name they raise `InputError`.
        """
        if name is None:
            here = {each: one for each, one in self.models.items() if not self.members[each].remote}
            return {each: backbone.weights_hash(model) for each, model in here.items()}
        if name != ANCHOR:
            selection.check_names([name], self.names)
        if self.members[name].remote:
            raise InputError(f"the weights of {name!r} are in another process; ask there")
        return backbone.weights_hash(self.models[name])

    def save_pretrained(
        self, save_directory: str | Path, *, include_bases: bool = False, **kwargs: Any
    ) -> None:
        """Saves bridges, config, generation config, the models' tokenizers and a model card; no base weights.

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
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> CoupledForCausalLM:
        """Loads a saved ensemble: its bases from where they lie, its bridges from the checkpoint.

        Args:
            pretrained_model_name_or_path: the checkpoint, a folder, a hub id or `package:NAME`.
            device_map, dtype, schedule, revision, trust_remote_code: as in `rc_agents.couple`.
            tokenizers: name -> tokenizer in place of the checkpoint's.
            bases: name -> other place of a base, for example after it was moved; its fingerprint must fit.
            check_fingerprints: False takes bases that are not those of the checkpoint.

        Raises:
            CheckpointError: missing, truncated or foreign files, another base; nothing is half-loaded.
        """
        return checkpoint.load(cls, pretrained_model_name_or_path, **kwargs)


AutoModelForCausalLM.register(CouplingConfig, CoupledForCausalLM)
