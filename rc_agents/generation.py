"""generate() over the ensemble, and the list of every private part of transformers that rc_agents leans on."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from . import context, selection, sources, sparse
from .cache import CoupledCache
from .errors import InputError
from .sampling import SeededSampling, row_seeds

_SEEDED: ContextVar[Any] = ContextVar("rc_agents_seed", default=None)
_PRIVATE: dict[str, tuple[str, ...] | None] = {
    "GenerationMixin._prepare_cache_for_generation": (
        "self",
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ),
    "GenerationMixin._get_candidate_generator": (
        "self",
        "generation_config",
        "input_ids",
        "inputs_tensor",
        "logits_processor",
        "model_kwargs",
        "assistant_model",
        "target_tokenizer",
        "assistant_tokenizer",
    ),
    "GenerationMixin._get_logits_processor": (
        "self",
        "generation_config",
        "input_ids_seq_length",
        "encoder_input_ids",
        "prefix_allowed_tokens_fn",
        "logits_processor",
        "device",
        "model_kwargs",
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
    ),
    "GenerationMixin._get_stopping_criteria": (
        "self",
        "generation_config",
        "stopping_criteria",
        "tokenizer",
    ),
    "PreTrainedModel._init_weights": ("self", "module"),
    "PreTrainedModel._is_stateful": None,
    "PreTrainedModel._no_split_modules": None,
    "PreTrainedModel._supports_attention_backend": None,
    "PreTrainedModel._supports_flash_attn": None,
    "PreTrainedModel._supports_flex_attn": None,
    "PreTrainedModel._supports_sdpa": None,
    "PreTrainedConfig._attn_implementation": None,
    "PreTrainedConfig._name_or_path": None,
    "Cache._is_user_defined": None,
}
"""What rc_agents uses of transformers that is private: parameters of methods, None for attributes.

tests/test_private_api.py fails when the list is incomplete or transformers changes.
"""


class CoupledGeneration(GenerationMixin):
    """What `generate` needs to know about an ensemble."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        specialists: Any = None,
        strength: Any = None,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates as any Hugging Face model does; see `transformers.GenerationMixin.generate`.

        Where the text outgrows the context of a model that takes part, generation ends with a warning (assisted
        decoding raises there).

        Args:
            inputs: the prompt's tokens, (B, T); also as `input_ids=`.
            specialists: names that take part, or one list of names a row; None for all.
            strength: factor on every bridge's update: a number, a dict by specialist, or one a row.
            seed: makes this call's samples its own, also beside other calls: row r draws from seed + r.
            kwargs: as for any model; `chats` is what `chat_inputs` returned under this name, `sources` (or
                `pixel_values` and the like) what encoders are shown, as for `forward`.

        Raises:
            InputError: an empty prompt, unknown names, or what an ensemble cannot do.
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        self._refuse(ids, kwargs)
        assert isinstance(ids, Tensor)
        shown = sources.named(self, kwargs.pop("sources", None), kwargs)
        if shown:
            sources.checked(self, shown, {}, ids.shape[0])
            kwargs["sources"] = shown
        choice = selection.choose(self.edges, self.names, ids.shape[0], specialists, strength)
        if choice.presence is not None:
            kwargs["edge_strength"], kwargs["presence"] = choice.strength, choice.presence
        if seed is not None:
            row_seeds(seed, ids.shape[0], 1)  # a wrong one is refused even where nothing is drawn
        token = _SEEDED.set(None if seed is None else (seed, ids, []))
        try:
            with selection.during(self, choice), context.watched(self):
                output = super().generate(inputs, *args, **kwargs)
            return _with_scores(output, _SEEDED.get())
        finally:
            _SEEDED.reset(token)

    def _refuse(self, ids: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("inputs_embeds") is not None:
            raise InputError(
                "inputs_embeds is refused: every model embeds the text itself; pass input_ids"
            )
        if not isinstance(ids, Tensor):
            raise InputError(
                f"generate needs input_ids, a tensor of shape (batch, tokens), got {type(ids).__name__}"
            )
        if ids.dim() != 2 or 0 in ids.shape:
            raise InputError(
                f"the prompt is empty or no matrix, shape {tuple(ids.shape)}; pass at least one token a row"
            )
        if kwargs.get("assistant_early_exit"):
            raise InputError(
                "assistant_early_exit is refused: the models meet in blocks that an early exit skips; "
                "pass assistant_model or prompt_lookup_num_tokens"
            )
        if sparse.current(self) is not None:
            self._refuse_sparse(kwargs)
        if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
            self._refuse_assistance()

    def _refuse_sparse(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("use_cache") is False:
            raise InputError(
                "specialists sleep between tokens that a cache keeps; leave out use_cache=False, or model.sparse()"
            )
        if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
            raise InputError(
                "assisted generation checks several tokens at once, and specialists sleep token by token; "
                "leave out the assistant, or model.sparse()"
            )

    def _refuse_assistance(self) -> None:
        for name, model in self.models.items():
            if getattr(model, "_is_stateful", False):
                raise InputError(
                    f"assisted generation rolls caches back, which model {name!r} ({model.config.model_type}) cannot; "
                    "leave out assistant_model and prompt_lookup_num_tokens"
                )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: paged attention would bypass the exchange."""
        raise NotImplementedError(
            "continuous (paged) batching replaces each model's cache and would bypass the exchange; use generate()"
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | None:
        """Keeps the 2-D mask: every model makes its own from it."""
        return attention_mask

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            configs = {name: model.config for name, model in self.readers.items()}
            growing = self.config.span_names
            wrapped = CoupledCache.wrap(
                cache, configs, growing, max_cache_length, self.remote_names
            )
            if getattr(cache, "_is_user_defined", False):
                wrapped._is_user_defined = True
            if getattr(generation_config, "is_assistant", False):
                wrapped.activate_past_recording()
            model_kwargs["past_key_values"] = wrapped

    def _get_logits_processor(
        self, generation_config: Any, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        seeded = _SEEDED.get()
        if seeded is None or not generation_config.do_sample:
            return processors
        if generation_config.num_beams > 1:
            raise InputError(
                "seed cannot make beam sampling its own; use num_beams=1 or do_sample=False"
            )
        seed, ids, made = seeded
        seeds = row_seeds(seed, ids.shape[0], generation_config.num_return_sequences or 1)
        keep = bool(generation_config.output_scores)
        made.append(SeededSampling(seeds, ids.shape[1], keep_scores=keep))
        processors.append(made[-1])
        return processors

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        room = context.current(self)
        return criteria if room is None else StoppingCriteriaList([*criteria, room])

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Keeps from an assistant what is made for this ensemble, or what a single model does not understand."""
        ours = ["chats", "sources"]
        if not isinstance(kwargs.get("assistant_model"), CoupledGeneration):
            ours += ["edge_strength", "presence"]
        given = kwargs.get("model_kwargs") or {}
        kwargs["model_kwargs"] = {k: v for k, v in given.items() if k not in ours}
        return super()._get_candidate_generator(*args, **kwargs)

    @property
    def _is_stateful(self) -> bool:
        """Whether some model's state cannot be rolled back, which assisted decoding needs."""
        return any(getattr(model, "_is_stateful", False) for model in self.models.values())


def _with_scores(output: Any, seeded: Any) -> Any:
    """Puts the scores before the draw back in place of the one-hot ones."""
    if seeded is not None and seeded[2] and getattr(output, "scores", None) is not None:
        before = seeded[2][-1].scores
        output.scores = tuple(before[step] for step in range(len(output.scores)))
    return output
