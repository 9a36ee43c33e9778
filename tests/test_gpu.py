"""What needs GPUs, and the parts of it that can be checked without one."""

import argparse

import pytest
import torch
from rc_agents.benchmarks import gpu
from rc_agents.benchmarks.gpu import kernels, main, overlap, union

import rc_agents
from tests.ensembles import GREEDY, ensemble, prompts, wake
from tests.tiny import saved
from tests.tiny_tokenizers import tiny_tokenizer

COUNT = torch.cuda.device_count()
one_gpu = pytest.mark.skipif(COUNT < 1, reason="needs a GPU, and none is here")
two_gpus = pytest.mark.skipif(COUNT < 2, reason=f"needs two GPUs, and {COUNT} are here")
ARCHS = {"anchor": "llama", "medical": "gpt2", "law": "qwen2"}


def test_time_in_which_two_devices_compute_is_counted_once():
    assert union([(5, 7), (0, 2), (1, 3)]) == [(0, 3), (5, 7)]
    assert overlap([[(0, 4)], [(4, 8)]]) == 0
    assert overlap([[(0, 4)], [(2, 6)]]) == pytest.approx(2 / 6)
    assert overlap([[(0, 2), (1, 4)], [(0, 4)], [(0, 4)]]) == 1
    assert overlap([]) == 0


@pytest.mark.skipif(COUNT > 0, reason="says what happens without a GPU")
def test_the_benchmark_says_that_no_gpu_is_here(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "error: no GPU is here; bench-gpu needs one, and two to show overlap\n"
    )


def _couple(folder, **settings):
    paths = {name: saved(folder, arch, "prose") for name, arch in ARCHS.items()}
    same = dict.fromkeys(paths, tiny_tokenizer("prose"))
    model = rc_agents.couple(
        paths.pop("anchor"), paths, **{"sites": 2, "tokenizers": same, **settings}
    )
    wake(model)
    return model


@pytest.mark.gpu
@one_gpu
@pytest.mark.parametrize("schedule", ["lockstep", "threads"])
def test_a_gpu_gives_the_processors_numbers(tmp_path, schedule):
    ids, here = prompts(), _couple(tmp_path)
    there = _couple(tmp_path, device_map=0, schedule=schedule)
    out = there(ids.to(there.device)).logits
    assert out.device == torch.device("cuda", 0)
    torch.testing.assert_close(out.cpu(), here(ids).logits, rtol=1e-3, atol=1e-4)
    new = there.generate(ids.to(there.device), max_new_tokens=4, **GREEDY)
    assert torch.equal(new.cpu(), here.generate(ids, max_new_tokens=4, **GREEDY))


@pytest.mark.gpu
@one_gpu
def test_a_model_beside_the_gpu_is_heard(tmp_path):
    ids, here = prompts(), _couple(tmp_path)
    there = _couple(tmp_path, device_map={"anchor": 0, "medical": "cpu", "law": 0})
    out = there(ids.to(there.device)).logits
    torch.testing.assert_close(out.cpu(), here(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@one_gpu
def test_offloaded_layers_are_carried_to_the_gpu(tmp_path):
    ids, here = prompts(), _couple(tmp_path)
    there = _couple(tmp_path, device_map="auto", max_memory={0: "900kB", "cpu": "4GB"})
    assert any(one.is_meta for one in there.parameters())
    out = there(ids.to(there.device)).logits
    torch.testing.assert_close(out.cpu(), here(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("schedule", ["lockstep", "threads"])
def test_two_gpus_give_the_processors_numbers_and_gradients(tmp_path, schedule):
    ids, here = prompts(), _couple(tmp_path)
    there = _couple(tmp_path, device_map={"anchor": 0, "medical": 1, "law": 1}, schedule=schedule)
    for model in (here, there):
        model(ids.to(model.device), labels=ids.to(model.device)).loss.backward()
    for (name, one), (_, other) in zip(
        here.trainable_parameters(), there.trainable_parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad.cpu(), rtol=1e-3, atol=1e-4, msg=name)
    for _ in range(50):  # a copy that did not wait would give other numbers some time
        out = there(ids.to(there.device)).logits
        torch.testing.assert_close(out.cpu(), here(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@two_gpus
def test_two_gpus_compute_at_the_same_time():
    model = ensemble("llama", "llama", width=1024, schedule="threads")
    for name, index in (("anchor", 0), ("medical", 1)):
        model.models[name].to(f"cuda:{index}")
    for edge in model.edges:
        for site in range(len(model.sites)):
            model.bridge(edge, site).to(model.models[edge.target].device)
    ids = prompts(64, 200).to("cuda:0")
    with torch.inference_mode():
        model(ids)
        spans = kernels(lambda: model(ids))
    assert set(spans) == {0, 1}
    assert overlap(list(spans.values())) > 0.3


def test_the_benchmark_runs_on_whatever_is_here(tmp_path, monkeypatch):
    path = saved(tmp_path, "llama", "prose")
    monkeypatch.setattr(gpu, "kernels", lambda call: call() and {0: [(0, 4)], 1: [(2, 6)]})
    form = {"models": 2, "schedule": "threads", "dtype": "float32"}
    arguments = argparse.Namespace(model=str(path), tokens=8, repeats=1, seed=0, **form)
    found = gpu.measure(arguments)
    assert found["parity"] < 1e-3
    assert found["overlap"] == pytest.approx(2 / 6)
    assert all(set(one) == {"coupled", "slowest", "ratio"} for one in found["ratio"].values())
    assert set(found["ratio"]) == {"pass", "step"}
