"""What we use of transformers that is private is listed in one place, and is still there."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel

import rc_agents
from rc_agents.generation import _PRIVATE
from tests.ensembles import GREEDY, prompts
from tests.tiny import tiny

pytestmark = pytest.mark.tiny

SOURCE = Path(rc_agents.__file__).parent


def _objects():
    """One of each kind of object of transformers whose private parts we could reach for."""
    model, cache = tiny("llama"), DynamicCache()
    model.generate(prompts(), past_key_values=cache, max_new_tokens=1, **GREEDY)
    return {
        "GenerationMixin": model,
        "PreTrainedModel": model,
        "PreTrainedConfig": model.config,
        "Cache": cache,
        "GenerationConfig": GenerationConfig(),
    }


@pytest.mark.parametrize("name", _PRIVATE)
def test_what_we_lean_on_is_there(name):
    owner, attribute = name.split(".")
    expected = _PRIVATE[name]
    if expected is None:
        assert hasattr(_objects()[owner], attribute)
    else:
        method = getattr(getattr(transformers, owner), attribute)
        assert tuple(inspect.signature(method).parameters) == expected


def _private(name):
    return name.startswith("_") and not name.startswith("__")


def _reached_for(tree):
    """Private names that a module takes from objects, sets on them, or defines in its classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
            if isinstance(node.args[1], ast.Constant) and _private(str(node.args[1].value)):
                yield node.args[1].value
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and _private(part.name):
                    yield part.name
                for target in getattr(part, "targets", []):
                    if _private(getattr(target, "id", "")):
                        yield target.id


def test_the_list_is_complete():
    theirs = {name for one in _objects().values() for name in dir(one)} - set(dir(nn.Module()))
    theirs |= {name for one in (PreTrainedModel, GenerationMixin, Cache) for name in dir(one)}
    theirs -= set(dir(nn.Module))
    used = {
        name
        for file in SOURCE.rglob("*.py")
        for name in _reached_for(ast.parse(file.read_text(encoding="utf-8")))
    }
    listed = {name.split(".")[1] for name in _PRIVATE}
    assert used & theirs == listed


def test_the_sampler_we_replace_draws_what_is_left():
    """`generate` still samples from the processed scores, so that one finite score decides."""
    model, ids = tiny("llama"), prompts(1)

    class Only(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([5]), 0.0)

    settings = {**GREEDY, "do_sample": True, "max_new_tokens": 3}
    out = model.generate(ids, logits_processor=[Only()], **settings)
    assert out[0, -3:].tolist() == [5, 5, 5]
