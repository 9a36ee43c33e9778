"""The text model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from rc_agents.service import GenerationResult

from .fields import CoupledFields


class CoupledLLM(CoupledFields, BaseLLM):
    """A LangChain text model over an ensemble: it goes on from the prompt; fields as in `CoupledFields`.

    All prompts of a batch are one `generate` call.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @property
    def _llm_type(self) -> str:
        return "rc-agents"

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        params = self._params(stop, kwargs)
        results = self.source.get().batch(prompts, [params] * len(prompts))
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

    def _info(self, result: GenerationResult) -> dict[str, Any]:
        return self._metadata(result) | {name: getattr(result, name) for name in _COUNTS}


_COUNTS = ("prompt_tokens", "completion_tokens")
