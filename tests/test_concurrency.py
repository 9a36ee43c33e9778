"""Several calls at once on one model, and what happens when a model or a bridge fails."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from rc_agents.errors import InputError, ModelRunError
from tests.ensembles import GREEDY, ensemble, prompts

pytestmark = [pytest.mark.tiny, pytest.mark.timeout(60)]

ARCHS = ("llama", "gemma3_text", "gpt2")
each_schedule = pytest.mark.parametrize("schedule", ["lockstep", "threads"])


def _together(calls):
    """Runs every call in a thread of its own, all started at once."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


@each_schedule
def test_four_calls_at_once_are_four_single_calls(schedule):
    model = ensemble(*ARCHS, schedule=schedule)
    many = [prompts(rows, 5 + rows, seed=rows) for rows in (1, 2, 1, 3)]
    settings = {**GREEDY, "max_new_tokens": 5}
    expected = [model.generate(ids, **settings) for ids in many]
    found = _together([lambda ids=ids: model.generate(ids, **settings) for ids in many])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@each_schedule
def test_seeded_samples_are_their_own_beside_other_calls(schedule):
    model, ids = ensemble(*ARCHS, schedule=schedule), prompts(2)
    settings = {**GREEDY, "do_sample": True, "max_new_tokens": 5}
    expected = [model.generate(ids, seed=seed, **settings) for seed in range(4)]
    found = _together([lambda s=s: model.generate(ids, seed=s, **settings) for s in range(4)])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(expected[0], expected[1])


def test_calls_at_once_keep_their_own_choice():
    model, ids = ensemble(*ARCHS), prompts(1)
    choices = [[], ["medical"], ["law"], None]
    settings = {**GREEDY, "max_new_tokens": 6}
    expected = [model.generate(ids, specialists=one, **settings) for one in choices]

    def cut():
        with model.disabled():
            return model.generate(ids, **settings)

    calls = [lambda c=c: model.generate(ids, specialists=c, **settings) for c in choices]
    found = _together([*calls, cut])
    for one, other in zip(found, [*expected, expected[0]], strict=True):
        assert torch.equal(one, other)


def test_threads_give_the_gradients_of_lockstep():
    gradients = []
    for schedule in ("lockstep", "threads"):
        model, ids = ensemble(*ARCHS, schedule=schedule), prompts()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for _, p in model.trainable_parameters()])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


class Boom(nn.Module):
    """Fails for batches of three rows, and only then."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args, **kwargs):
        if x.shape[0] == 3:
            raise ValueError("boom")
        return self.inner(x, *args, **kwargs)


@each_schedule
@pytest.mark.parametrize("name", ["anchor", "medical", "law"])
def test_a_failing_model_is_named_and_the_next_call_works(schedule, name):
    model, ids = ensemble(*ARCHS, schedule=schedule), prompts(2)
    before, threads = model(ids).logits, set(threading.enumerate())
    blocks = model.models[name].base_model
    layers = blocks.h if name == "law" else blocks.layers
    layers[1].mlp = Boom(layers[1].mlp)
    for _ in range(3):
        with pytest.raises(
            ModelRunError, match=f"model '{name}' failed in the coupled pass: ValueError: boom"
        ) as caught:
            model(prompts(3))
        assert isinstance(caught.value.__cause__, ValueError)
        assert torch.equal(model(ids).logits, before)
    with pytest.raises(ModelRunError, match=name):
        model.generate(prompts(3), max_new_tokens=2, **GREEDY)
    assert set(threading.enumerate()) <= threads


@each_schedule
def test_a_failing_bridge_is_named_and_the_next_call_works(schedule):
    model, ids = ensemble(*ARCHS, schedule=schedule), prompts(2)
    before = model(ids).logits
    bridge = model.bridge(("law", "medical"), 1)
    bridge.map = Boom(bridge.map)
    with pytest.raises(
        ModelRunError, match="bridge 'law' -> 'medical' failed at site 1: ValueError: boom"
    ):
        model(prompts(3))
    assert torch.equal(model(ids).logits, before)


@each_schedule
def test_one_failing_call_leaves_the_others_alone(schedule):
    model = ensemble(*ARCHS, schedule=schedule)
    model.lm_medical.model.layers[2].mlp = Boom(model.lm_medical.model.layers[2].mlp)
    many = [prompts(rows, 6, seed=rows) for rows in (1, 2, 4)]
    settings = {**GREEDY, "max_new_tokens": 6}
    expected = [model.generate(ids, **settings) for ids in many]

    def fail():
        with pytest.raises(ModelRunError, match="model 'medical' failed"):
            model.generate(prompts(3), **settings)

    calls = [lambda ids=ids: model.generate(ids, **settings) for ids in many]
    *found, _ = _together([*calls, fail])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@each_schedule
@pytest.mark.parametrize("name", ["anchor", "medical"])
def test_a_model_that_skips_blocks_is_reported(schedule, name, monkeypatch):
    model, ids = ensemble("llama", "qwen2", schedule=schedule), prompts()
    before = model(ids).logits
    monkeypatch.setattr(model.models[name].config, "num_hidden_layers", 3)
    with pytest.raises(ModelRunError, match=f"model '{name}' finished without passing the block"):
        model(ids)
    monkeypatch.undo()
    assert torch.equal(model(ids).logits, before)


class Twice(nn.Module):
    """A block whose model runs it two times over."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **kwargs):
        return self.block(self.block(x, *args, **kwargs), *args, **kwargs)


@each_schedule
@pytest.mark.parametrize("block", [1, 3])
def test_a_model_that_passes_a_block_twice_is_reported(schedule, block):
    model, ids = ensemble("llama", "llama", schedule=schedule), prompts()
    layers = model.lm_medical.model.layers
    layers[block] = Twice(layers[block])  # blocks 2 and 4 are sites
    with pytest.raises(ModelRunError, match=r"model 'medical' passes .* more than once"):
        model(ids)


@each_schedule
def test_an_interrupt_goes_through(schedule):
    model, ids = ensemble("llama", "qwen2", schedule=schedule), prompts()
    before = model(ids).logits

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.lm_anchor.model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids)
    handle.remove()
    assert torch.equal(model(ids).logits, before)


def test_a_cache_of_a_failed_call_is_refused():
    model, ids = ensemble("llama", "qwen2"), prompts(3)
    cache = model(ids, use_cache=True).past_key_values
    mlp = model.lm_medical.model.layers[0].mlp
    model.lm_medical.model.layers[0].mlp = Boom(mlp)
    with pytest.raises(ModelRunError, match="boom"):
        model(ids[:, :1], past_key_values=cache)
    model.lm_medical.model.layers[0].mlp = mlp
    with pytest.raises(InputError, match="left half-written"):
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    torch.testing.assert_close(
        model(ids, past_key_values=cache).logits, model(ids).logits, rtol=1e-4, atol=1e-5
    )


def test_threads_stay_between_passes():
    model, ids = ensemble(*ARCHS, schedule="threads"), prompts(1)
    model(input_ids=ids)
    before = {thread.ident for thread in threading.enumerate()}
    for _ in range(5):
        model(input_ids=ids)
    assert {thread.ident for thread in threading.enumerate()} == before


FORKED = """
import os, torch
torch.set_num_threads(1)
from tests.ensembles import ensemble, prompts
model, ids = ensemble("llama", "gpt2", schedule="threads"), prompts(1)
expected = model(input_ids=ids).logits
child = os.fork()
if not child:
    os._exit(0 if torch.equal(model(input_ids=ids).logits, expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_forked_process_has_threads_of_its_own():
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, timeout=50
    )
    assert found.stdout == "0\n", found.stderr


def test_a_model_that_only_speaks_computes_no_logits():
    model, ids = ensemble(*ARCHS, topology="unilateral"), prompts(2)
    widths = {}

    def note(name):
        return lambda _, args, output: widths.update({name: output.shape[1]})

    hooks = [
        one.get_output_embeddings().register_forward_hook(note(name))
        for name, one in model.models.items()
    ]
    model(input_ids=ids)
    assert widths == {"anchor": ids.shape[1], **dict.fromkeys(model.specialists, 0)}
    model(input_ids=ids, output_steered=True)
    assert set(widths.values()) == {ids.shape[1]}
    for hook in hooks:
        hook.remove()
