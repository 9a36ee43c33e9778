"""Who speaks, and how loudly: per call, per row, inside a block."""

import threading

import numpy as np
import pytest
import torch

import rc_agents
from rc_agents import BridgeConfig
from tests.ensembles import GREEDY, ensemble, frozen_logits, padded, prompts, wake
from tests.tiny import tiny

pytestmark = pytest.mark.tiny

TRIPLE = ("llama", "gemma3_text", "gpt2")
CHOICES = [
    ([["medical"], ["law"], [], None], None),
    (None, [0.0, 0.5, 1.0, 2.0]),
    ([["law"], None, ["medical", "law"], []], [1.0, {"law": 0.3}, {"medical": 2}, 1]),
    (["medical"], [{"medical": 0.5}, 1.0, 0.0, 3]),
]
each_choice = pytest.mark.parametrize(("specialists", "strength"), CHOICES)


def _of_row(row, specialists, strength):
    per_row = specialists is not None and not isinstance(specialists[0], str)
    return {
        "specialists": specialists[row] if per_row else specialists,
        "strength": strength[row] if strength is not None else None,
    }


@each_choice
@pytest.mark.parametrize("topology", ["unilateral", "multi_bilateral"])
def test_each_row_is_its_single_call(specialists, strength, topology):
    model, (ids, mask) = ensemble(*TRIPLE, topology=topology), padded((8, 5, 8, 6), "left")
    together = model(ids, attention_mask=mask, specialists=specialists, strength=strength).logits
    for row in range(4):
        alone = ids[row : row + 1, mask[row].bool()]
        logits = model(alone, **_of_row(row, specialists, strength)).logits
        torch.testing.assert_close(together[row, mask[row].bool()], logits[0], rtol=1e-4, atol=1e-4)


@each_choice
def test_each_generated_row_is_its_single_call(specialists, strength):
    model, (ids, mask) = ensemble(*TRIPLE), padded((8, 5, 8, 6), "left")
    settings = {**GREEDY, "max_new_tokens": 5}
    choice = {"specialists": specialists, "strength": strength}
    together = model.generate(ids, attention_mask=mask, **choice, **settings)[:, 8:]
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **choice, **settings)
    assert torch.equal(uncached[:, 8:], together)
    for row in range(4):
        alone = ids[row : row + 1, mask[row].bool()]
        new = model.generate(alone, **_of_row(row, specialists, strength), **settings)
        assert torch.equal(new[0, alone.shape[1] :], together[row])


@pytest.mark.parametrize("mix", ["average", "learned"])
def test_a_row_mixes_the_logits_of_its_own_specialists(mix):
    model, ids = ensemble(*TRIPLE, mix=mix), prompts(4)
    chosen = [["medical"], ["law"], [], None]
    together = model(ids, specialists=chosen).logits
    for row in range(4):
        logits = model(ids[row : row + 1], specialists=chosen[row]).logits
        torch.testing.assert_close(together[row], logits[0], rtol=1e-4, atol=1e-4)
    frozen = frozen_logits(tiny("llama"), ids[2:3])
    torch.testing.assert_close(together[2], frozen[0], rtol=1e-4, atol=1e-4)
    with model.disabled("law"):
        cut = model(ids[:1]).logits
    torch.testing.assert_close(together[0], cut[0], rtol=1e-4, atol=1e-4)


def test_a_row_routes_the_states_of_its_own_specialists():
    members = [tiny(arch, width=32, seed=seed) for seed, arch in enumerate(TRIPLE)]
    model = rc_agents.couple(
        members[0],
        {"medical": members[1], "law": members[2]},
        bridge=BridgeConfig(kind="moe"),
        alignment="shared",
        sites=2,
    )
    wake(model)
    ids, chosen = prompts(4), [["medical"], ["law"], [], None]
    together = model(ids, specialists=chosen).logits
    for row in range(4):
        logits = model(ids[row : row + 1], specialists=chosen[row]).logits
        torch.testing.assert_close(together[row], logits[0], rtol=1e-4, atol=1e-4)
    frozen = frozen_logits(tiny("llama", width=32), ids[2:3])
    torch.testing.assert_close(together[2], frozen[0], rtol=1e-4, atol=1e-4)


def test_no_specialist_and_no_strength_are_the_frozen_anchor():
    model, ids = ensemble(*TRIPLE), prompts()
    frozen = frozen_logits(tiny("llama"), ids)
    assert torch.equal(model(ids, specialists=[]).logits, frozen)
    assert torch.equal(model(ids, strength=0).logits, frozen)
    assert torch.equal(model(ids, strength=1.0).logits, model(ids).logits)
    expected = tiny("llama").generate(ids, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(ids, specialists=[], max_new_tokens=4, **GREEDY), expected)


def test_choosing_is_cutting_the_others():
    model, ids = ensemble(*TRIPLE), prompts()
    with model.disabled("law"):
        expected = model(ids).logits
    assert torch.equal(model(ids, specialists=["medical"]).logits, expected)
    assert torch.equal(model(ids, specialists=["anchor", "medical"]).logits, expected)
    assert not torch.equal(model(ids, specialists=["law"]).logits, expected)


def test_strength_scales_the_update_of_one_source():
    model, ids = ensemble("llama", "gpt2", topology="unilateral", sites=1), prompts()
    bridge = model.bridge(("medical", "anchor"), 0)
    half = model(ids, strength={"medical": 0.5}).logits
    with torch.no_grad():
        bridge.map.weight.mul_(0.5)
    torch.testing.assert_close(model(ids).logits, half)


def test_beams_and_copies_keep_their_rows_choice():
    model, ids = ensemble(*TRIPLE), prompts(2)
    settings = {**GREEDY, "max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    chosen = [["medical"], ["law"]]
    together = model.generate(ids, specialists=chosen, **settings)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], specialists=chosen[row], **settings)
        assert torch.equal(alone, together[2 * row : 2 * row + 2])


def test_assisted_generation_keeps_the_choice():
    model, ids = ensemble(*TRIPLE), prompts(1, 9)
    settings = {**GREEDY, "max_new_tokens": 8, "specialists": ["law"], "strength": 0.7}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **settings), expected)
    for helper in (tiny("llama", seed=4), ensemble("llama", "qwen2", seed=1)):
        assert torch.equal(model.generate(ids, assistant_model=helper, **settings), expected)


def test_blocks_nest_and_end():
    model, ids = ensemble(*TRIPLE), prompts()
    plain, frozen = model(ids).logits, frozen_logits(tiny("llama"), ids)
    with model.disabled("law"):
        outer = model(ids).logits
        with model.disabled("medical"):
            assert torch.equal(model(ids).logits, frozen)
        assert torch.equal(model(ids).logits, outer)
        with pytest.raises(RuntimeError, match="inside"), model.disabled():
            raise RuntimeError("inside")
        assert torch.equal(model(ids).logits, outer)
    assert torch.equal(model(ids).logits, plain)


def test_a_block_holds_in_its_own_thread_alone():
    model, other, ids = ensemble(*TRIPLE), ensemble(*TRIPLE), prompts()
    plain, heard = model(ids).logits, {}

    def elsewhere():
        heard["thread"] = model(ids).logits

    with model.disabled():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert torch.equal(other(ids).logits, plain)
    assert torch.equal(heard["thread"], plain)


@pytest.mark.parametrize("schedule", ["lockstep", "threads"])
def test_a_block_holds_under_both_schedules(schedule):
    model, ids = ensemble(*TRIPLE, schedule=schedule), prompts()
    with model.disabled("medical", "law"):
        assert torch.equal(model(ids).logits, frozen_logits(tiny("llama"), ids))


def test_a_row_does_not_hear_a_specialist_that_breaks_in_another():
    model, ids = ensemble("llama", "gpt2", topology="unilateral"), prompts(2)
    expected = model(ids[1:], specialists=[]).logits

    def overflow(_, args, output):
        output = output.clone()
        output[1] = torch.inf
        return output

    hook = model.models["medical"].transformer.h[0].mlp.register_forward_hook(overflow)
    found = model(ids, specialists=[["medical"], []]).logits
    hook.remove()
    assert torch.allclose(found[1:], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("specialists", "strength"), [([], None), ([["medical"], []], None), (None, [0.2, 2.0])]
)
def test_guidance_hears_whom_the_call_chose(specialists, strength):
    model, ids = ensemble("llama", "gpt2"), prompts(2)
    settings = {
        **GREEDY,
        "max_new_tokens": 3,
        "guidance_scale": 3.0,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    negative = prompts(2, 4, seed=5)
    together = model.generate(
        ids, specialists=specialists, strength=strength, negative_prompt_ids=negative, **settings
    )
    for row in range(2):
        chosen = specialists
        if chosen and isinstance(chosen[0], list):
            chosen = chosen[row]
        alone = model.generate(
            ids[row : row + 1],
            specialists=chosen,
            strength=None if strength is None else strength[row],
            negative_prompt_ids=negative[row : row + 1],
            **settings,
        )
        for one, other in zip(together.scores, alone.scores, strict=True):
            assert torch.allclose(one[row], other[0], atol=1e-4)
    if specialists == []:
        with model.disabled():
            frozen = model.generate(ids, negative_prompt_ids=negative, **settings)
        assert torch.allclose(together.scores[0], frozen.scores[0], atol=1e-5)


@pytest.mark.parametrize("factor", [torch.tensor(0.5), np.float32(0.5)])
def test_a_strength_may_be_a_number_of_torch_or_numpy(factor):
    model, ids = ensemble("llama", "gpt2"), prompts(2)
    assert torch.equal(model(ids, strength=factor).logits, model(ids, strength=0.5).logits)
