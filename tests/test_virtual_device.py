"""The virtual devices behave as devices do."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import saved, tiny
from tests.virtual_device import Transfer, virtual_devices


def test_a_tensor_reports_its_device_and_keeps_its_numbers():
    with virtual_devices(2) as devices:
        x = torch.arange(6.0).reshape(2, 3).to(devices[1])
        y = (x @ x.T).softmax(-1)
        assert y.device == devices[1]
        assert torch.equal(y.cpu(), (x.cpu() @ x.cpu().T).softmax(-1))
        assert x.sum().item() == 15
        assert torch.tensor([1, 2], device=devices[0]).tolist() == [1, 2]


@pytest.mark.parametrize("other", ["cpu", "vgpu:0"])
def test_mixing_devices_raises(other):
    with virtual_devices(2) as devices:
        x = torch.ones(3, device=devices[1])
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3, device=other)
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.functional.embedding(torch.tensor([0], device=other), x[:, None])


def test_cpu_scalars_and_cpu_indices_may_differ_as_on_cuda():
    with virtual_devices(2) as devices:
        x = torch.arange(3.0, device=devices[1])
        assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3]
        assert x[torch.tensor([2, 0])].tolist() == [2, 0]
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.tensor(1.0, device=devices[0])


def test_a_device_that_is_not_there_raises():
    with virtual_devices(2), pytest.raises(RuntimeError, match="invalid device ordinal: vgpu:2"):
        torch.ones(3, device="vgpu:2")
    with pytest.raises(RuntimeError, match="only inside"):
        torch.ones(3, device="vgpu:0")


def test_every_copy_between_devices_is_logged_once():
    with virtual_devices(2) as devices:
        first, second = devices
        x = torch.ones(2, 3, dtype=torch.bfloat16).to(first)
        x.to(first)
        x.to(second)
        torch.empty(2, 3, device=second).copy_(x)
        x.cpu()
        bf16 = {"shape": (2, 3), "dtype": torch.bfloat16}
        cpu = torch.device("cpu")
        assert devices.transfers == [
            Transfer(cpu, first, **bf16),
            Transfer(first, second, **bf16),
            Transfer(first, second, **bf16),
            Transfer(first, cpu, **bf16),
        ]
        assert [one.num_bytes for one in devices.between()] == [12, 12]
        assert devices.between(first, "cpu") == [devices.transfers[0], devices.transfers[3]]


def test_the_log_sees_other_threads_and_inference_mode():
    with virtual_devices(2) as devices:

        def work() -> None:
            with torch.inference_mode():
                x = torch.ones(4, device=devices[0])
                (x[None].float() * x.to(device=devices[0], dtype=torch.float)).to(devices[1])

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert devices.transfers == [Transfer(*devices, (1, 4), torch.float32)]


def test_views_and_in_place_operations_share_the_tensor():
    with virtual_devices(1) as devices:
        x = torch.zeros(2, 2, device=devices[0])
        row = x[0]
        assert row.add_(1) is row
        torch.add(x, 1, out=x)
        assert x.tolist() == [[2, 2], [1, 1]]


def test_gradients_cross_devices():
    with virtual_devices(2) as devices:
        layer = torch.nn.Linear(3, 2).to(devices[0])
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        before = layer.bias.tolist()
        layer(torch.ones(1, 3, device=devices[0])).to(devices[1]).sum().backward()
        optimizer.step()
        assert layer.weight.grad.device == devices[0]
        assert layer.bias.tolist() == pytest.approx([one - 1 for one in before])


@pytest.mark.tiny
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "lfm2", "mamba2", "mixtral"])
def test_a_moved_model_gives_the_same_numbers(arch):
    input_ids = torch.randint(3, 96, (2, 7))
    expected = tiny(arch)(input_ids).logits
    with virtual_devices(2) as devices:
        model = tiny(arch).to(devices[1])
        logits = model(input_ids.to(devices[1])).logits
        assert logits.device == devices[1]
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.tiny
def test_hugging_face_spreads_a_model_over_them(tmp_path):
    path = saved(tmp_path, "llama", "prose", layers=2)
    ends = {
        "model.embed_tokens": "vgpu:0",
        "model.layers.0": "vgpu:0",
        "model.rotary_emb": "vgpu:0",
    }
    last = {"model.layers.1": "vgpu:1", "model.norm": "vgpu:1", "lm_head": "vgpu:1"}
    input_ids = torch.randint(3, 96, (1, 5))
    expected = AutoModelForCausalLM.from_pretrained(path)(input_ids).logits
    with virtual_devices(2) as devices:
        model = AutoModelForCausalLM.from_pretrained(path, device_map=ends | last)
        assert {one.device for one in model.parameters()} == set(devices)
        devices.transfers.clear()
        logits = model(input_ids.to(devices[0])).logits
        assert (1, 5, 32) in [one.shape for one in devices.between()]
        torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-5)
