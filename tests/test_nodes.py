"""Models in processes of their own give what one process gives: the common tests, run once more over links."""

import contextlib
import copy
import gc
import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from rc_agents.adapters.langchain import ChatCoupled
from rc_agents.adapters.server import create_app
from transformers import AutoModelForCausalLM

import rc_agents
from rc_agents import BridgeConfig, ModelRef, Topology
from rc_agents.nodes import NodeSettings, connect
from rc_agents.service import GenerationParams, GenerationService
from rc_agents.training.bridges import train
from rc_agents.training.config import TrainConfig
from tests import test_common_suite as common
from tests import test_generation as generation
from tests import test_selection as selection
from tests import test_span as span
from tests.connected import connected, linked, served
from tests.ensembles import GREEDY, ensemble, padded, prompts, talking, wake
from tests.spans import PROSE, batch_of, span_ensemble
from tests.tiny import saved
from tests.tiny_tokenizers import PROSE as TINY_PROSE

pytestmark = pytest.mark.tiny

MODULES = (common, generation, selection, span)
SHARED = [("llama", "gemma3_text"), ("qwen2", "mixtral", "opt"), ("bamba", "bloom")]
SPANS = [
    span.PAIRS[5],
    span.TRIPLES[0],
    *(pytest.param(parts, marks=pytest.mark.slow) for parts in (span.PAIRS[0], span.TRIPLES[2])),
]
BORROWED: list[tuple[Any, dict[str, Any]]] = [
    *(
        (common.test_a_row_is_the_same_alone_in_a_batch_and_with_a_cache, {"archs": a})
        for a in SHARED
    ),
    *((common.test_beam_search_is_the_same_with_and_without_a_cache, {"archs": a}) for a in SHARED),
    *((common.test_a_static_cache_changes_nothing, {"archs": a}) for a in SHARED[:2]),
    *((common.test_assisted_generation_changes_nothing, {"archs": a}) for a in SHARED[:1]),
    (common.test_one_to_five_models_couple, {"count": 4}),
    (generation.test_a_seed_makes_samples_repeat, {}),
    (generation.test_every_row_samples_from_its_own_seed, {}),
    (generation.test_an_empty_cache_of_transformers_may_be_passed, {}),
    (generation.test_a_prompt_may_be_read_in_chunks, {}),
    (generation.test_a_logits_processor_is_heard, {}),
    (generation.test_guidance_without_a_second_prompt_runs, {}),
    (generation.test_a_static_cache_holds_padded_rows, {}),
    (generation.test_max_time_and_eos_end_generation, {}),
    (generation.test_attentions_are_the_anchors, {}),
    (generation.test_the_output_may_be_a_tuple, {}),
    (generation.test_positions_may_be_passed, {}),
    (selection.test_choosing_is_cutting_the_others, {}),
    (selection.test_beams_and_copies_keep_their_rows_choice, {}),
    (selection.test_assisted_generation_keeps_the_choice, {}),
    (selection.test_blocks_nest_and_end, {}),
    (span.test_a_static_cache_gives_the_greedy_answer, {}),
    (span.test_a_specialist_left_out_of_one_pass_reads_on_in_the_next, {}),
    (span.test_specialists_and_strength_hold_row_by_row, {}),
    (span.test_half_a_character_waits, {}),
]


def _named(case: tuple[Any, dict[str, Any]]) -> str:
    test, arguments = case
    shown = "-".join("+".join(v) if isinstance(v, tuple) else str(v) for v in arguments.values())
    return "-".join(filter(None, [test.__name__.removeprefix("test_"), shown]))


@pytest.fixture
def across(monkeypatch):
    """Puts every specialist of the ensembles that tests make behind a link."""
    with contextlib.ExitStack() as stack:

        def over_links(make):
            def made(*args, **settings):
                return stack.enter_context(connected(make(*args, **settings), trains=True))

            return made

        for module in MODULES:
            for name, make in (("ensemble", ensemble), ("span_ensemble", span_ensemble)):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, over_links(make))
        yield


@pytest.mark.parametrize("case", BORROWED, ids=_named)
def test_the_common_suite(case, across):
    test, arguments = case
    unfilled = set(inspect.signature(test).parameters) - set(arguments)
    assert not unfilled, f"{test.__name__} wants {unfilled}"
    test(**arguments)


# Equal to one process, number for number.

CHAIN = Topology([("law", "medical"), ("medical", "anchor")])
FORMS = [
    {},
    {"topology": "unilateral"},
    {"topology": "star_bilateral", "mix": "average"},
    {"topology": CHAIN},
    {"bridge": BridgeConfig(gate="token"), "mix": "learned"},
    {"bridge": BridgeConfig(kind="low_rank", rank=3), "topology": "star_bilateral"},
    {"bridge": BridgeConfig(update="blend", start="default")},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_logits_loss_and_gradients_are_those_of_one_process(form):
    one = ensemble("llama", "gemma3_text", "gpt2", **form)
    (ids, mask), labels = padded((7, 4), "left"), prompts()
    with connected(one, trains=True) as model:
        for _ in range(2):  # and once more, with what was added up
            outs = [
                each(ids, attention_mask=mask, labels=labels, output_steered=True)
                for each in (one, model)
            ]
            for name in one.names:
                assert torch.equal(outs[0].steered_logits[name], outs[1].steered_logits[name])
            assert torch.equal(outs[0].logits, outs[1].logits)
            assert torch.equal(outs[0].loss, outs[1].loss)
            for out in outs:
                out.loss.backward()
        grads = [
            {name: value.grad for name, value in each.trainable_parameters()}
            for each in (one, model)
        ]
        assert grads[0].keys() == grads[1].keys()
        heard = 0
        for name, grad in grads[0].items():
            other = grads[1][name]
            if grad is None:
                assert other is None or not other.any()
                continue
            heard += bool(grad.any())
            torch.testing.assert_close(other, grad, rtol=1e-5, atol=1e-8)
        assert heard


def test_steps_of_an_optimizer_train_bridges_of_every_process():
    one, (ids, mask) = ensemble("llama", "gpt2", "qwen2"), padded((7, 4), "left")
    with connected(one, trains=True) as model:
        losses = []
        for each in (one, model):
            optimizer = torch.optim.SGD([value for _, value in each.trainable_parameters()], lr=0.5)
            history = []
            for _ in range(4):
                optimizer.zero_grad()
                loss = each(ids, attention_mask=mask, labels=ids).loss
                loss.backward()
                optimizer.step()
                history.append(loss.item())
            losses.append(history)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert losses[0][-1] < losses[0][0]
        trained = dict(one.trainable_parameters())
        for name, value in model.trainable_parameters():
            torch.testing.assert_close(value, trained[name], rtol=1e-4, atol=1e-5)
        # What was trained is what the other processes run, and what is saved.
        assert torch.equal(model(ids).logits, model(ids, use_cache=True).logits)


def test_trained_bridges_are_saved_from_the_anchors_process(tmp_path):
    one, ids = ensemble("llama", "gpt2"), prompts()
    with connected(one, trains=True) as model:
        wake(model, seed=5)
        wake(one, seed=5)
        assert torch.equal(model(ids).logits, one(ids).logits)  # the other process runs them, too
        model.save_pretrained(tmp_path / "trained")
        bases = {name: f"{model.name_or_path}/{ref['base']}" for name, ref in _bases(model).items()}
        saved = rc_agents.CoupledForCausalLM.from_pretrained(tmp_path / "trained", bases=bases)
        assert torch.equal(saved(ids).logits, one(ids).logits)


def _bases(model):
    config = json.loads((Path(model.name_or_path) / "config.json").read_text())
    return config["models"]


def test_what_needs_the_other_processes_weights_is_refused(tmp_path):
    one = ensemble("llama", "gpt2")
    with connected(one) as model:
        with pytest.raises(rc_agents.RCError, match="connect with trains=True"):
            model.save_pretrained(tmp_path)
        with pytest.raises(rc_agents.RCError, match="in another process; ask there"):
            model.base_fingerprint("medical")
        assert model.base_fingerprint() == {"anchor": one.base_fingerprint("anchor")}
        with pytest.raises(rc_agents.RCError, match="stay as they are"):
            model.add_specialist("law", one.models["medical"], alignment="shared")
        with pytest.raises(rc_agents.RCError, match="stay as they are"):
            model.remove_specialist("medical")
        with torch.no_grad():
            cache = model(prompts(), use_cache=True).past_key_values
        with pytest.raises(rc_agents.RCError, match="cannot be copied"):
            copy.deepcopy(cache)


def test_a_cache_that_is_gone_is_freed_in_the_other_process():
    one, ids = ensemble("llama", "gpt2"), prompts()
    with linked(one) as (model, nodes):
        for _ in range(5):
            model.generate(ids, max_new_tokens=2, **GREEDY)
        gc.collect()
        out = model(ids, use_cache=True)
        assert len(nodes["medical"].memories) == 1
        assert out.past_key_values.caches["medical"].id in nodes["medical"].memories


def test_calls_from_four_threads_take_turns():
    one = ensemble("llama", "gpt2")
    texts = [prompts(1, 6 + n, seed=n) for n in range(4)]
    settings = {**GREEDY, "max_new_tokens": 5}
    expected = [one.generate(ids, **settings) for ids in texts]
    with connected(one) as model, ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            found = list(pool.map(lambda ids: model.generate(ids, **settings), texts))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_service_and_its_adapters_run_on_top():
    one = talking("medical")
    params = GenerationParams(max_new_tokens=6, temperature=0)
    expected = GenerationService(one).generate("the people", params).text
    with connected(one) as model:
        service = GenerationService(model)
        assert service.generate("the people", params).text == expected
        with service.stream("the people", params) as pieces:
            assert "".join(pieces) == expected
        chat = ChatCoupled(model=model, max_tokens=6, temperature=0)
        assert (
            chat.invoke("the people").content
            == ChatCoupled(model=one, max_tokens=6, temperature=0).invoke("the people").content
        )


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_states_may_cross_in_fewer_bits(wire):
    one, ids = ensemble("llama", "gpt2", topology="star_bilateral"), prompts(4, 24)
    exact = one(ids).logits
    with connected(one, NodeSettings(deadline=20.0, wire=wire)) as model:
        near = model(ids).logits
        channel = model.elsewhere.channels["medical"]
        few = channel.sent + channel.received
    with connected(one) as model:
        assert torch.equal(model(ids).logits, exact)
        channel = model.elsewhere.channels["medical"]
        many = channel.sent + channel.received
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0.05, atol=0.05)
    assert few < {"bfloat16": 0.7, "int8": 0.5}[wire] * many


def test_only_what_an_edge_needs_crosses():
    one, ids = ensemble("llama", "gpt2", topology="unilateral"), prompts(2, 20)
    with connected(one) as model:
        model(ids)
        channel = model.elsewhere.channels["medical"]
        before = channel.sent, channel.received
        model(ids)
        sent, received = channel.sent - before[0], channel.received - before[1]
    states = len(one.sites) * ids.numel() * one.models["medical"].config.hidden_size * 4
    assert states <= received < states + 512
    assert sent < ids.numel() * 8 * 2 + 1024


def test_a_specialist_is_not_told_of_those_that_it_shares_no_edge_with():
    told, ids = {}, prompts(1, 8)
    for archs in (("llama", "gpt2"), ("llama", "gpt2", "qwen2", "mixtral")):
        one = ensemble(*archs, topology="star_bilateral")
        with connected(one) as model:
            model(ids)
            channel = model.elsewhere.channels["medical"]
            before = channel.sent
            assert torch.equal(model(ids).logits, one(ids).logits)
            told[len(archs)] = channel.sent - before
    assert told[2] == told[4]


def test_a_bridge_that_reads_a_prediction_asks_the_sources_process():
    form = {("medical", "anchor"): BridgeConfig(gate="token", reads="prediction", start="identity")}
    one = ensemble("llama", "llama", edge_bridges=form, topology="star_bilateral")
    ids = prompts()
    with connected(one) as model, torch.no_grad():
        assert torch.equal(model(ids).logits, one(ids).logits)
        expected = one.generate(ids, max_new_tokens=4, **GREEDY)
        assert torch.equal(model.generate(ids, max_new_tokens=4, **GREEDY), expected)


def test_a_specialist_may_be_an_adapter_over_the_anchors_base(tmp_path):
    peft = pytest.importorskip("peft")
    base = saved(tmp_path, "llama", "prose", width=32, layers=4)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    ref = ModelRef(base=str(base), adapter=str(tmp_path / "adapter"))
    one, ids = rc_agents.couple(base, {"medical": ref}, sites=2), prompts()
    wake(one)
    one.save_pretrained(tmp_path / "saved")
    with served(str(tmp_path / "saved"), one.specialists) as (model, _), torch.no_grad():
        assert torch.equal(model(ids).logits, one(ids).logits)
        assert model.elsewhere.connected == ["medical"]


def test_an_ensemble_of_routers_runs_in_one_process(tmp_path):
    one = ensemble("llama", "gpt2", bridge=BridgeConfig(kind="moe"), width=32)
    with pytest.raises(rc_agents.RCError, match="run this ensemble in one process"), connected(one):
        pass


@pytest.mark.parametrize("parts", SPANS, ids=span.names_of)
def test_models_with_tokens_of_their_own(parts):
    texts = (span.TEXT, PROSE)
    with connected(span_ensemble(*parts)) as model, torch.no_grad():
        one = rc_agents.CoupledForCausalLM.from_pretrained(model.name_or_path)
        for side in ("left", "right"):
            ids, mask = batch_of(one, *texts, side=side)
            assert torch.equal(
                model(ids, attention_mask=mask).logits, one(ids, attention_mask=mask).logits
            )
        ids, mask = batch_of(one, *texts)
        for settings in (
            {},
            {"num_beams": 2},
            {"use_cache": False},
            {"prompt_lookup_num_tokens": 2},
        ):
            rows = slice(0, 1 if "prompt_lookup_num_tokens" in settings else None)
            arguments = {**GREEDY, **settings, "attention_mask": mask[rows], "max_new_tokens": 6}
            if parts[1][0] == "mamba2" and "prompt_lookup_num_tokens" in settings:
                continue
            expected = one.generate(ids[rows], **arguments)
            assert torch.equal(model.generate(ids[rows], **arguments), expected)


def test_an_answer_says_who_took_no_part(tmp_path):
    one = talking("medical")
    one.save_pretrained(tmp_path, include_bases=True)
    params = GenerationParams(max_new_tokens=4, temperature=0)
    model = connect(tmp_path, wait=None)
    try:
        result = GenerationService(model).generate("the people", params)
        assert result.lost == {"medical": "its process is not there"}
        with one.disabled():
            assert result.text == GenerationService(one).generate("the people", params).text
        app = create_app(model)
        body = {"model": "rc", "prompt": "the people", "max_tokens": 4, "temperature": 0}
        with TestClient(app) as client:
            choice = client.post("/v1/completions", json=body).json()["choices"][0]
        assert choice["lost_specialists"] == result.lost
    finally:
        model.elsewhere.close()
    assert GenerationService(one).generate("the people", params).lost == {}


def test_the_trainer_runs_on_top(tmp_path):
    one = talking("medical")
    one.save_pretrained(tmp_path / "start", include_bases=True)
    one = rc_agents.CoupledForCausalLM.from_pretrained(tmp_path / "start")
    texts = [line for line in TINY_PROSE.splitlines() if line] * 3
    config = TrainConfig(steps=3, learning_rate=1e-2)
    expected = [row["loss"] for row in train(one, texts, config=config, progress=False).history]
    with connected(one.__class__.from_pretrained(tmp_path / "start"), trains=True) as model:
        result = train(model, texts, tmp_path / "trained", config, progress=False)
        assert [row["loss"] for row in result.history] == pytest.approx(expected, rel=1e-5)
        own = dict(one.trainable_parameters())
        for name, value in model.trainable_parameters():
            torch.testing.assert_close(value, own[name], rtol=1e-3, atol=1e-4)
    assert expected[-1] < expected[0]
    assert (tmp_path / "trained" / "config.json").is_file()
