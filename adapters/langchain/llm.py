"""The text model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM, LanguageModelInput
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables.config import RunnableConfig, get_config_list, run_in_executor
from pydantic import ConfigDict

from rc_agents.service import CHOICES, LIMITS, GenerationResult

from .fields import CoupledFields, in_thread


class CoupledLLM(CoupledFields, BaseLLM):
    """A LangChain text model over an ensemble: it goes on from the prompt; fields as in `CoupledFields`.

    All prompts of a batch are one `generate` call; with `return_exceptions` those that cannot be answered fail alone.
    `langchain_core.load.load` reads back what `dumpd` writes, with `allowed_objects=[CoupledLLM]` and
    `valid_namespaces=["rc_agents"]`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @property
    def _llm_type(self) -> str:
        return "rc-agents"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Whether LangChain may write it out: by its fields, of which a live ensemble is only a name."""
        return True

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answers prompts, as upstream; a cache goes by the call's own choices too."""
        model, more = self._chosen(kwargs)
        return super(CoupledLLM, model).generate(prompts, stop, callbacks, **more)

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> LLMResult:
        """The same, without holding up the event loop; ends within one token where it is cancelled."""
        model, more = self._chosen(kwargs)
        return await super(CoupledLLM, model).agenerate(prompts, stop, callbacks, **more)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Answers the inputs in one generation, or in several of `max_concurrency` inputs each."""
        if not return_exceptions or not inputs:
            return super().batch(inputs, config, **kwargs)
        outputs: dict[int, str] = {}
        configs = get_config_list(config, len(inputs))
        for rows in self._apart(inputs, kwargs):
            part = [inputs[n] for n in rows], [configs[n] for n in rows]
            answers = super().batch(*part, return_exceptions=True, **kwargs)
            outputs |= zip(rows, answers, strict=True)
        return [outputs[n] for n in range(len(inputs))]

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """The same, without holding up the event loop."""
        if not return_exceptions or not inputs:
            return await super().abatch(inputs, config, **kwargs)
        outputs: dict[int, str] = {}
        configs = get_config_list(config, len(inputs))
        for rows in await run_in_executor(None, self._apart, inputs, kwargs):
            part = [inputs[n] for n in rows], [configs[n] for n in rows]
            answers = await super().abatch(*part, return_exceptions=True, **kwargs)
            outputs |= zip(rows, answers, strict=True)
        return [outputs[n] for n in range(len(inputs))]

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._answer(prompts, stop, kwargs)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return await in_thread(partial(self._answer, prompts, stop, kwargs))

    def _answer(
        self,
        prompts: list[str],
        stop: list[str] | None,
        kwargs: dict[str, Any],
        left: threading.Event | None = None,
    ) -> LLMResult:
        params = self._params(stop, kwargs)
        results = self.source.get().batch(prompts, [params] * len(prompts), cancel=left)
        generations = [
            [Generation(text=one.text, generation_info=self._info(one))] for one in results
        ]
        inputs, outputs = (sum(getattr(one, name) for one in results) for name in _COUNTS)
        usage = {
            "prompt_tokens": inputs,
            "completion_tokens": outputs,
            "total_tokens": inputs + outputs,
        }
        return LLMResult(
            generations=generations, llm_output={"model_name": self.model, "token_usage": usage}
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with self.source.get().stream(prompt, self._params(stop, kwargs)) as stream:
            for text in stream:
                chunk = GenerationChunk(text=text)
                if run_manager:
                    run_manager.on_llm_new_token(text, chunk=chunk)
                yield chunk
            yield GenerationChunk(text="", generation_info=self._info(stream.result))

    def _chosen(self, kwargs: Mapping[str, Any]) -> tuple[CoupledLLM, dict[str, Any]]:
        """A copy with a call's choices as fields, which a cache goes by, and the arguments that are left."""
        fields = {name: kwargs[name] for name in CHOICES if name in kwargs}
        if limits := [kwargs[name] for name in LIMITS if name in kwargs]:
            fields["max_tokens"] = limits[0]
        rest = {name: one for name, one in kwargs.items() if name not in {*CHOICES, *LIMITS}}
        return self.model_copy(update=fields) if fields else self, rest

    def _apart(self, inputs: list[LanguageModelInput], kwargs: dict[str, Any]) -> list[list[int]]:
        """Numbers of the inputs that can be answered together, and each other one's alone."""
        refused = [n for n, one in enumerate(inputs) if self._refuses(one, kwargs)]
        fine = [n for n in range(len(inputs)) if n not in refused]
        return [part for part in (fine, *([n] for n in refused)) if part]

    def _refuses(self, one: LanguageModelInput, kwargs: dict[str, Any]) -> bool:
        service, asked = self.source.get(), dict(kwargs)
        try:
            params = self._params(asked.pop("stop", None), asked)
            service.fits_beside([], (service.encode(self._convert_input(one).to_string()), params))
        except ValueError:
            return True
        return False

    def _info(self, result: GenerationResult) -> dict[str, Any]:
        return self._metadata(result) | {name: getattr(result, name) for name in _COUNTS}


_COUNTS = ("prompt_tokens", "completion_tokens")
