"""Encoders of pictures and sound as sources: their states cross into a language model that reads text alone."""

import json

import pytest
import torch
import transformers
from torch import nn

import rc_agents
from rc_agents import backbone
from rc_agents.errors import ConfigError, InputError, ModelError, TokenError, TrainingError
from rc_agents.training import data
from rc_agents.training.bridges import TrainConfig, train
from rc_agents.training.parameters import groups
from rc_agents.training.warm_start import gather, set_start
from tests.ensembles import GREEDY, frozen_logits, own_state, padded, prompts, unchanged_bases, wake
from tests.eyes import CONFIGS, PICTURES, SIZE, shown, tiny_encoder
from tests.spans import ids_of, span_ensemble
from tests.tiny import saved, tiny
from tests.tiny_tokenizers import tiny_tokenizer
from tests.virtual_device import virtual_devices

pytestmark = pytest.mark.tiny

EVERY = pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ("vit", "llama"),
        ("vit", "gemma3_text"),
        ("clip", "gpt2"),
        ("siglip", "llama"),
        ("wav2vec2", "gpt2"),
    ],
)
ENCODER = pytest.mark.parametrize("kind", CONFIGS)


def seeing(kind="vit", arch="llama", awake=True, **settings):
    """A tiny language model with an encoder beside it."""
    settings = {"topology": "unilateral", "sites": 2, **settings}
    model = rc_agents.couple(tiny(arch), {"eye": tiny_encoder(kind)}, **settings)
    if awake:
        wake(model)
    return model


def sources(kind="vit", rows=2, seed=0):
    return {"eye": shown(kind, rows, seed)}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# Off is exactly off, and on is heard.


@EVERY
def test_new_bridges_leave_the_anchor_every_bit_and_open_ones_carry_the_picture(kind, arch):
    model, ids = seeing(kind, arch, awake=False), prompts()
    alone = frozen_logits(model.models["anchor"], ids)
    assert torch.equal(model(ids, sources=sources(kind)).logits, alone)
    assert torch.equal(model(ids, sources=sources(kind, seed=1)).logits, alone)
    wake(model)
    first, other = (model(ids, sources=sources(kind, seed=seed)).logits for seed in (0, 1))
    assert (first - alone).abs().max() > 1e-2
    assert (first - other).abs().max() > 1e-3
    assert torch.equal(first, model(ids, sources=sources(kind)).logits)


@EVERY
def test_without_a_picture_or_with_the_encoder_disabled_it_is_the_frozen_anchor(kind, arch):
    model, ids = seeing(kind, arch), prompts()
    alone = frozen_logits(model.models["anchor"], ids)
    for nothing in (None, {}, {"eye": None}, {"eye": [None, None]}):
        assert torch.equal(model(ids, sources=nothing).logits, alone)
    with model.disabled("eye"):
        assert torch.equal(model(ids, sources=sources(kind)).logits, alone)
    muted = model(ids, sources=sources(kind), specialists=[])
    assert torch.equal(muted.logits, alone)
    silent = model.generate(ids, max_new_tokens=3, **GREEDY)
    anchor = model.models["anchor"].generate(ids, max_new_tokens=3, **GREEDY)
    assert torch.equal(silent, anchor)


def test_an_encoder_that_nobody_hears_does_not_run(calls):
    model, ids = seeing(), prompts()
    count = calls(model)
    with model.disabled("eye"):
        model(ids, sources=sources())
    model(ids, sources=sources(), strength=0.0)
    assert count() == 0


@pytest.fixture
def calls():
    """Counts how often an ensemble's encoder runs."""
    handles = []

    def watch(model):
        seen = []
        hook = model.models["eye"].register_forward_pre_hook(lambda *args: seen.append(1))
        handles.append(hook)
        return lambda: len(seen)

    yield watch
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("schedule", ["lockstep", "threads"])
def test_beside_models_that_read_the_text(schedule):
    specialists = {"medical": tiny("qwen2", seed=1), "eye": tiny_encoder("vit")}
    edges = [("medical", "anchor"), ("anchor", "medical"), ("eye", "anchor"), ("eye", "medical")]
    model = rc_agents.couple(
        tiny("llama"), specialists, topology=edges, alignment="shared", sites=2, schedule=schedule
    )
    ids = prompts()
    alone = frozen_logits(model.models["anchor"], ids)
    assert torch.equal(model(ids, sources=sources()).logits, alone)
    wake(model)
    blind = model(ids).logits
    with model.disabled("eye"):
        assert torch.equal(model(ids, sources=sources()).logits, blind)
    steered = model(ids, sources=sources(), output_steered=True).steered_logits
    assert steered.keys() == {"anchor", "medical"}
    own = model(ids, output_steered=True).steered_logits
    assert (steered["medical"] - own["medical"]).abs().max() > 1e-3
    with model.disabled("medical"):
        assert not torch.equal(model(ids, sources=sources()).logits, alone)


def test_a_specialist_with_its_own_tokenizer_sees_the_picture_at_its_own_tokens():
    model = span_ensemble(("llama", "prose"), ("gpt2", "code"), topology="unilateral")
    edges = [("eye", "medical")]  # the anchor hears of it through the specialist alone
    model.add_specialist("eye", tiny_encoder("vit").double(), edges=edges)
    model.bridges.double()
    wake(model)
    ids = ids_of(model, "the people of the town")
    given = {"eye": shown("vit", 1)}
    whole = model(ids, sources=given).logits
    assert (whole - model(ids).logits).abs().max() > 1e-3
    begun = model(ids[:, :4], sources=given, use_cache=True)
    step = model(ids[:, 4:], past_key_values=begun.past_key_values)
    close(torch.cat([begun.logits, step.logits], 1), whole)


def test_two_encoders_at_once():
    specialists = {"eye": tiny_encoder("vit"), "ear": tiny_encoder("wav2vec2")}
    model = rc_agents.couple(tiny("llama"), specialists, topology="unilateral", sites=2)
    wake(model)
    ids, heard = prompts(), shown("wav2vec2")
    both = model(ids, sources={"eye": shown("vit"), "ear": heard}).logits
    only = model(ids, sources={"ear": heard}).logits
    with model.disabled("eye"):
        close(model(ids, sources={"eye": shown("vit"), "ear": heard}).logits, only)
    assert (both - only).abs().max() > 1e-3
    plain = {"input_values": heard["input_values"]}
    by_name = model(ids, pixel_values=shown("vit")["pixel_values"], **plain).logits
    assert torch.equal(by_name, model(ids, sources={"eye": shown("vit"), "ear": plain}).logits)


# Decoding.


@EVERY
def test_cached_decoding_is_the_uncached_one_and_the_encoder_runs_once(kind, arch, calls):
    model, ids = seeing(kind, arch), prompts()
    whole = model.generate(ids, sources=sources(kind), max_new_tokens=6, use_cache=False, **GREEDY)
    count = calls(model)
    cached = model.generate(ids, sources=sources(kind), max_new_tokens=6, **GREEDY)
    assert torch.equal(cached, whole)
    assert count() == 1


def test_every_step_reads_the_kept_states():
    model, ids = seeing(), prompts(2, 9)
    whole = model(ids, sources=sources()).logits
    begun = model(ids[:, :6], sources=sources(), use_cache=True)
    step = model(ids[:, 6:8], past_key_values=begun.past_key_values, sources=sources())
    last = model(ids[:, 8:], past_key_values=step.past_key_values)  # it may be left out by now
    close(torch.cat([begun.logits, step.logits, last.logits], 1), whole)


def test_a_cache_that_is_cut_back_keeps_the_picture():
    model, ids = seeing(), prompts(2, 9)
    cache = model(ids, sources=sources(), use_cache=True).past_key_values
    cache.crop(-3)
    again = model(ids[:, 6:], past_key_values=cache).logits
    close(again, model(ids, sources=sources()).logits[:, 6:])


def test_a_text_goes_on_with_what_it_has_seen_and_nothing_else():
    model, ids = seeing(), prompts(2, 9)
    cache = model(ids[:, :6], sources=sources(), use_cache=True).past_key_values
    with pytest.raises(InputError, match=r"holds what 'eye' saw before.*start from an empty cache"):
        model(ids[:, 6:], past_key_values=cache, sources=sources(seed=1))
    cache.reset()
    model(ids[:, :6], past_key_values=cache, sources=sources(seed=1))


@pytest.mark.parametrize("kind", ["vit", "wav2vec2"])
def test_beams_hear_the_picture_of_their_row(kind):
    model, (ids, mask) = seeing(kind), padded((5, 7), "left")
    settings = {**GREEDY, "max_new_tokens": 5, "num_beams": 3}
    together = model.generate(ids, attention_mask=mask, sources=sources(kind), **settings)
    slow = model.generate(
        ids, attention_mask=mask, sources=sources(kind), use_cache=False, **settings
    )
    assert torch.equal(together, slow)
    for row, length in enumerate((5, 7)):
        one = {"eye": {key: value[row : row + 1] for key, value in shown(kind).items()}}
        alone = model.generate(ids[row : row + 1, 7 - length :], sources=one, **settings)
        assert torch.equal(together[row, 7:], alone[0, length:])


def test_several_answers_of_a_row_see_its_picture():
    model, ids = seeing(), prompts(2)
    settings = {**GREEDY, "num_beams": 2, "max_new_tokens": 4}
    found = model.generate(ids, num_return_sequences=2, sources=sources(), **settings)
    assert torch.equal(found[::2], model.generate(ids, sources=sources(), **settings))


# Batches.


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows_one_by_one(kind, arch, side):
    model, (ids, mask) = seeing(kind, arch), padded((4, 7, 6), side)
    given = shown(kind, 3)
    together = model(ids, attention_mask=mask, sources={"eye": given}).logits
    for row in range(3):
        real = mask[row].bool()
        one = {key: value[row : row + 1] for key, value in given.items()}
        if "attention_mask" in one:  # without its padding
            one = {"input_values": one["input_values"][:, : int(one["attention_mask"].sum())]}
        alone = model(ids[row : row + 1, real], sources={"eye": one}).logits
        close(together[row, real], alone[0])


@ENCODER
def test_a_row_without_a_picture_is_the_frozen_anchor(kind):
    model, ids = seeing(kind), prompts(3)
    each = [
        None if row == 1 else {key: value[row : row + 1] for key, value in shown(kind, 3).items()}
        for row in range(3)
    ]
    mixed = model(ids, sources={"eye": each}).logits
    assert torch.equal(mixed[1], frozen_logits(model.models["anchor"], ids)[1])
    close(mixed[[0, 2]], model(ids, sources=sources(kind, 3)).logits[[0, 2]])
    chosen = model(ids, sources=sources(kind, 3), specialists=[["eye"], [], ["eye"]]).logits
    close(chosen, mixed)
    settings = {**GREEDY, "max_new_tokens": 4}
    found = model.generate(ids, sources={"eye": each}, **settings)
    assert torch.equal(found[1], model.models["anchor"].generate(ids, **settings)[1])
    assert torch.equal(
        found[[0, 2]], model.generate(ids, sources=sources(kind, 3), **settings)[[0, 2]]
    )


def test_silence_is_exact_for_a_sound_without_a_real_sample():
    model, ids, given = seeing("wav2vec2"), prompts(), shown("wav2vec2")
    given["attention_mask"][1] = 0
    found = model(ids, sources={"eye": given}).logits
    assert torch.equal(found[1], frozen_logits(model.models["anchor"], ids)[1])


def test_what_lies_in_a_sounds_padding_is_not_heard():
    model, ids, given = seeing("wav2vec2"), prompts(), shown("wav2vec2")
    before = model(ids, sources={"eye": given}).logits
    noisy = given["input_values"] + 5 * (1 - given["attention_mask"])
    close(model(ids, sources={"eye": {**given, "input_values": noisy}}).logits, before)


# What reads the sequence.


def test_pooling_is_a_mean_of_real_states_weighed_for_each_position():
    model, ids = seeing("wav2vec2"), prompts()
    pool = model.bridge(("eye", "anchor"), 0).pool
    states, mask = backbone.encoder_states(model.models["eye"], shown("wav2vec2"), 2)
    target = model.models["anchor"].get_input_embeddings()(ids)
    read = pool(states, mask, target)
    assert read.shape == (2, ids.shape[1], states.shape[-1])
    assert not torch.allclose(read[:, 0], read[:, 1])  # each position asks by itself
    close(pool(states[:, torch.randperm(states.shape[1])] * 0 + 1.5, mask, target), read * 0 + 1.5)
    padding = torch.cat([states, torch.zeros_like(states)], 1)
    close(pool(padding, torch.cat([mask, torch.zeros_like(mask)], 1), target), read)


def test_pooling_starts_as_one_learned_query():
    model = seeing(awake=False)
    pool = model.bridge(("eye", "anchor"), 0).pool
    states, mask = backbone.encoder_states(model.models["eye"], shown("vit"), 1)
    read = pool(states, mask, torch.randn(2, 4, 32))
    assert torch.equal(read[:, :1].expand_as(read), read)


@ENCODER
def test_states_behind_a_layer_are_those_of_the_models_own_output(kind):
    encoder = tiny_encoder(kind)
    states, mask = backbone.encoder_states(encoder, shown(kind), 2)
    assert not any(module._forward_hooks for module in encoder.modules())
    with torch.no_grad():
        own = encoder(**shown(kind), output_hidden_states=True).hidden_states[2]
    close(states, own * mask[..., None])
    assert states.shape[:2] == mask.shape
    assert bool(mask.all()) == (kind in PICTURES)


def test_an_encoder_may_be_read_at_one_block_again_and_again():
    model = seeing(sites=4)  # of an encoder of three blocks
    assert [row[1] for row in model.sites] == [1, 1, 2, 3]
    named = seeing(sites=[{"anchor": 1, "eye": 3}, {"anchor": 4, "eye": 3}])
    assert [row[1] for row in named.sites] == [3, 3]
    assert model(prompts(), sources=sources()).logits.isfinite().all()


@pytest.mark.parametrize(
    "bridge",
    [
        {"gate": "token"},
        {"kind": "low_rank", "rank": 4},
        {"update": "blend", "start": "default"},
        {"normalize_source": False},
    ],
)
def test_other_forms_of_bridges(bridge):
    model, ids = seeing(bridge=bridge), prompts()
    alone = frozen_logits(model.models["anchor"], ids)
    found = model(ids, sources=sources()).logits
    assert (found - alone).abs().max() > 1e-3
    each = {"eye": [None, {key: value[1:] for key, value in shown("vit").items()}]}
    assert torch.equal(model(ids, sources=each).logits[0], alone[0])


# One Hugging Face model.


@ENCODER
def test_saved_equals_loaded(kind, tmp_path):
    model, ids = seeing(kind), prompts()
    expected = model(ids, sources=sources(kind)).logits
    model.save_pretrained(tmp_path / "ensemble", include_bases=True)
    loaded = rc_agents.CoupledForCausalLM.from_pretrained(tmp_path / "ensemble")
    assert torch.equal(loaded(ids, sources=sources(kind)).logits, expected)
    assert loaded.base_fingerprint() == model.base_fingerprint()
    assert loaded.config.encoder_names == ["eye"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ensemble")
    found = again.generate(ids, sources=sources(kind), max_new_tokens=3, **GREEDY)
    assert torch.equal(
        found, model.generate(ids, sources=sources(kind), max_new_tokens=3, **GREEDY)
    )


@pytest.mark.parametrize("kind", PICTURES)
def test_encoders_load_from_a_folder(kind, tmp_path):
    encoder = tiny_encoder(kind)
    encoder.save_pretrained(tmp_path / "eye")
    anchor = saved(tmp_path, "llama", "prose")
    model = rc_agents.couple(str(anchor), {"eye": tmp_path / "eye"}, topology="unilateral", sites=2)
    wake(model)
    assert model.tokenizers["eye"] is None
    model.save_pretrained(tmp_path / "ensemble")
    loaded = rc_agents.CoupledForCausalLM.from_pretrained(tmp_path / "ensemble")
    ids = prompts()
    assert torch.equal(
        loaded(ids, sources=sources(kind)).logits, model(ids, sources=sources(kind)).logits
    )


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_of_a_checkpoint_with_two_towers_the_eye_is_taken(kind, tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 99}
    text |= {"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    eye = tiny_encoder(kind)
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=eye.config.to_dict(), projection_dim=16
    )
    whole = getattr(transformers, f"{name}Model")(config).eval()
    whole.vision_model.load_state_dict(eye.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    model = rc_agents.couple(tiny("llama"), {"eye": tmp_path / "whole"}, topology="unilateral")
    assert model.base_fingerprint("eye") == backbone.weights_hash(eye)
    with pytest.raises(ModelError, match=f"a whole {name}Model; pass the encoder in it"):
        rc_agents.couple(tiny("llama"), {"eye": whole}, topology="unilateral")
    taken = rc_agents.couple(tiny("llama"), {"eye": whole.vision_model}, topology="unilateral")
    assert taken.base_fingerprint("eye") == model.base_fingerprint("eye")


def test_a_classifiers_checkpoint_gives_its_encoder_and_a_cut_one_is_refused(tmp_path):
    config = tiny_encoder("vit").config
    classifier = transformers.ViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "eye")
    model = rc_agents.couple(tiny("llama"), {"eye": tmp_path / "eye"}, topology="unilateral")
    assert model.models["eye"].pooler is None
    assert model.base_fingerprint("eye") == backbone.weights_hash(classifier.vit)
    with pytest.raises(
        ModelError, match=r"'eye' is a ViTForImageClassification; .* its base_model"
    ):
        rc_agents.couple(tiny("llama"), {"eye": classifier}, topology="unilateral")
    config.num_hidden_layers = 4
    config.save_pretrained(tmp_path / "eye")
    with pytest.raises(ModelError, match="lacks weights of its encoder, such as 'layers"):
        rc_agents.couple(tiny("llama"), {"eye": tmp_path / "eye"}, topology="unilateral")


def test_an_encoder_comes_and_goes(tmp_path):
    model, ids = rc_agents.couple(tiny("llama"), topology="unilateral", sites=2), prompts()
    alone = model(ids).logits
    model.add_specialist("eye", tiny_encoder("vit"))
    assert torch.equal(model(ids, sources=sources()).logits, alone)
    wake(model)
    seen = model(ids, sources=sources()).logits
    assert not torch.equal(seen, alone)
    model.save_pretrained(tmp_path / "pack", include_bases=True)
    model.remove_specialist("eye")
    assert torch.equal(model(ids).logits, alone)
    with pytest.raises(InputError, match="names 'eye', which is no encoder; known: none"):
        model(ids, sources=sources())
    model.add_specialist("eye", tiny_encoder("vit"), bridges=tmp_path / "pack")
    assert torch.equal(model(ids, sources=sources()).logits, seen)


def test_half_precision_and_inference_mode():
    encoder, anchor = tiny_encoder("vit").bfloat16(), tiny("llama").bfloat16()
    model = rc_agents.couple(anchor, {"eye": encoder}, topology="unilateral", sites=2)
    wake(model)
    with torch.inference_mode():
        found = model(prompts(), sources=sources()).logits
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["vit", "wav2vec2"])
def test_an_encoder_on_a_device_of_its_own(kind):
    one, ids = seeing(kind), prompts()
    each = {"eye": [None, {key: value[1:] for key, value in shown(kind).items()}]}
    with virtual_devices(2) as devices:
        settings = {"topology": "unilateral", "sites": 2}
        parts = {"eye": tiny_encoder(kind)}
        places = dict(zip(("anchor", "eye"), devices, strict=True))
        model = rc_agents.couple(tiny("llama"), parts, device_map=places, **settings)
        wake(model)
        there = ids.to(devices[0])
        for given in (sources(kind), each):
            close(model(there, sources=given).logits.cpu(), one(ids, sources=given).logits)
        new = model.generate(there, sources=sources(kind), max_new_tokens=3, **GREEDY)
        settings = {**GREEDY, "max_new_tokens": 3}
        assert torch.equal(new.cpu(), one.generate(ids, sources=sources(kind), **settings))


def test_a_plan_counts_the_encoder():
    parts = {"eye": tiny_encoder("vit").config}
    plan = rc_agents.plan(tiny("llama"), parts, machine="1x1GiB", topology="unilateral", sites=2)
    weights = {one.name: sum(one.weights.values()) for one in plan.models}
    assert weights["eye"] == sum(p.numel() for p in tiny_encoder("vit").parameters()) * 4
    bridges = seeing().bridges["eye__anchor"].parameters()
    assert plan.models[0].bridge_bytes == sum(p.numel() for p in bridges) * 4


# Training.


WORDS = (" the", " and")


def lessons(count=8, seed=0):
    """Pictures and the word that each is called by; the text is always the same."""
    found = []
    for number in range(count):
        picture = shown("vit", 1, seed + number)["pixel_values"] * 0.1 + (number % 2) * 2 - 1
        about = {"origin": f"{seed}-{number}", "sources": {"eye": {"pixel_values": picture}}}
        found.append(data.Pair("it is", WORDS[number % 2], ends=False, **about))
    return found


@pytest.fixture
def taught():
    tokenizer = tiny_tokenizer("prose")
    anchor = tiny("llama", vocab_size=len(tokenizer))
    bridge = {"gate_init": 1.0}
    model = rc_agents.couple(
        anchor,
        {"eye": tiny_encoder("vit")},
        topology="unilateral",
        sites=2,
        bridge=bridge,
        tokenizers={"anchor": tokenizer},
    )
    config = TrainConfig(
        steps=40, batch_size=8, learning_rate=1e-2, gate_learning_rate=1e-2, eval_steps=20
    )
    return model, config


def test_training_teaches_what_pictures_show_and_changes_no_base(taught):
    model, config = taught
    before = [p.clone() for _, p in model.trainable_parameters()]
    with unchanged_bases(model):
        result = train(model, lessons(), config=config, validation=lessons(4, 100), progress=False)
    assert result.evaluations[-1]["eval_loss"] < 0.6 * result.history[0]["loss"]
    pairs = zip(before, model.trainable_parameters(), strict=True)
    assert not any(torch.equal(one, now) for one, (_, now) in pairs)  # the pools move too
    ids = model.tokenizer("it is", return_tensors="pt").input_ids
    for number, unseen in enumerate(lessons(6, 200)):
        found = model.generate(ids, sources=unseen.sources, max_new_tokens=1, **GREEDY)
        assert model.tokenizer.decode(found[0, -1:]) == WORDS[number % 2]


@pytest.mark.parametrize("beside", [False, True])
def test_states_kept_on_disk_train_the_same_bridges(taught, tmp_path, beside):
    """The anchor's lower blocks and text specialists are replayed; the encoder runs on what each pair brings."""
    model, _ = taught
    if beside:
        law = tiny("llama", vocab_size=len(model.tokenizer), seed=1)
        model.add_specialist("law", law, tokenizer=model.tokenizer)
    config, start = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2), own_state(model)
    retain = ["it is the garden of the letter and the garden"] * 40
    trained = []
    for states in (None, tmp_path):
        model.load_state_dict(start, strict=False)
        settings = {"config": config, "retain": retain, "progress": False}
        train(model, lessons(), states=states, **settings)
        trained.append(own_state(model))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(start[name], tensor) for name, tensor in trained[0].items())


def test_pools_have_a_rate_of_their_own(taught):
    model, _ = taught
    config = TrainConfig(learning_rate=1e-3, pool_learning_rate=3e-3, weight_decay=0.1)
    found = {one["kind"]: one for one in groups(dict(model.trainable_parameters()), config)}
    assert {kind: one["lr"] for kind, one in found.items()} == {
        "maps": 1e-3,
        "pools": 3e-3,
        "gates": 1e-2,
    }
    assert len(found["pools"]["params"]) == 3 * len(model.sites)
    assert found["pools"]["weight_decay"] == 0.0


def test_a_run_is_told_from_one_with_other_pictures(taught):
    from rc_agents.training.items import read_sets

    model, config = taught
    one, other = (
        read_sets(model.tokenizer, lessons(seed=seed), None, None, config).hashes()
        for seed in (0, 50)
    )
    assert one != other


def test_what_is_learnt_from_text_alone_refuses_encoders(taught):
    model, _ = taught
    with pytest.raises(TrainingError, match="'eye' is an encoder, which reads none: train its"):
        gather(model, ["some text"])
    with pytest.raises(TrainingError, match="'eye' is an encoder"):
        set_start(model, None, edges=[("eye", "anchor")])
    with pytest.raises(TrainingError, match="an encoder predicts no tokens"):
        train(model, lessons(), config=TrainConfig(steps=1, distill_from="eye"), progress=False)


# One clear line for what cannot be.


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            {"topology": "multi_bilateral"},
            ConfigError,
            "goes into an encoder.*topology='unilateral'",
        ),
        ({"topology": [("anchor", "eye")]}, ConfigError, "'anchor' -> 'eye' goes into an encoder"),
        ({"alignment": "shared"}, TokenError, "'eye' is an encoder, which reads none"),
        ({"alignment": "clamp"}, TokenError, "alignment='clamp' says how tokens meet"),
        ({"mix": "average"}, ConfigError, "'eye' is an encoder without any; use mix='anchor'"),
        ({"bridge": {"reads": "prediction", "start": "default"}}, TokenError, "use reads='state'"),
        ({"tokenizers": {"eye": object()}}, ConfigError, "'eye' is an encoder and reads no tokens"),
    ],
)
def test_settings_that_an_encoder_does_not_allow(settings, error, match):
    with pytest.raises(error, match=match):
        seeing(**settings)


def test_routers_and_anchors_are_no_encoders():
    encoder = tiny_encoder("vit", hidden_size=32)
    with pytest.raises(ConfigError, match="kind='moe' mixes states by position, and 'eye'"):
        rc_agents.couple(tiny("llama"), {"eye": encoder}, bridge="moe")
    with pytest.raises(ModelError, match="the anchor is a causal language model, got an encoder"):
        rc_agents.couple(encoder, {"text": tiny("llama")})


def test_adding_an_encoder_to_a_topology_that_would_speak_to_it():
    model = rc_agents.couple(tiny("llama"), sites=2)
    with pytest.raises(ConfigError, match="goes into an encoder"):
        model.add_specialist("eye", tiny_encoder("vit"))
    assert model.names == ["anchor"]
    model.add_specialist("eye", tiny_encoder("vit"), edges=[("eye", "anchor")])
    assert [edge.key for edge in model.edges] == ["eye__anchor"]


PIXELS = torch.zeros(2, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"sources": {"ey": {}}}, "names 'ey', which is no encoder.*did you mean 'eye'"),
        ({"sources": PIXELS}, "sources is a mapping from encoders to their inputs, got Tensor"),
        (
            {"sources": {"eye": PIXELS}},
            r"sources\['eye'\] is a mapping with 'pixel_values', or a list",
        ),
        ({"sources": {"eye": {}}}, "needs 'pixel_values', as its image or feature processor"),
        (
            {"sources": {"eye": {"pixels": PIXELS}}},
            r"needs 'pixel_values'.*got the keys \['pixels'\]",
        ),
        (
            {"sources": {"eye": {"pixel_values": PIXELS, "size": 3}}},
            "'size', which a 'vit' does not",
        ),
        ({"pixel_values": PIXELS[0]}, r"of shape \(rows, 3, 16, 16\), got \(3, 16, 16\)"),
        ({"pixel_values": PIXELS[:, :1]}, r"got \(2, 1, 16, 16\)"),
        ({"pixel_values": PIXELS[..., :8]}, r"got \(2, 3, 16, 8\)"),
        ({"pixel_values": PIXELS.long()}, "is a floating tensor"),
        ({"pixel_values": PIXELS[:1]}, "has 1 rows for a batch of 2; give one a row"),
        (
            {"sources": {"eye": [{"pixel_values": PIXELS}, None]}},
            "entries have one row and one size",
        ),
        ({"sources": {"eye": [None, {}]}}, r"sources\['eye'\]\[1\] needs 'pixel_values'"),
        ({"input_values": PIXELS}, "unknown argument 'input_values'"),
        (
            {"pixel_values": PIXELS, "sources": {"eye": {"pixel_values": PIXELS}}},
            "could be that of",
        ),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_wrong_inputs_are_one_line(given, match, call):
    model = seeing()
    run = model if call == "forward" else model.generate
    unknown = call == "generate" and "input_values" in given  # transformers refuses that by itself
    with pytest.raises(
        ValueError if unknown else InputError, match="input_values" if unknown else match
    ) as caught:
        run(prompts(), **given)
    assert unknown or "\n" not in str(caught.value)


def test_an_input_that_two_encoders_take_needs_a_name():
    pair = {"eye": tiny_encoder("vit"), "other": tiny_encoder("clip")}
    model = rc_agents.couple(tiny("llama"), pair, topology="unilateral", sites=2)
    with pytest.raises(InputError, match="could be that of 'eye' or 'other'; pass sources="):
        model(prompts(), pixel_values=PIXELS)
    wake(model)
    one, other = ({name: {"pixel_values": PIXELS + 1}} for name in pair)
    assert not torch.equal(
        model(prompts(), sources=one).logits, model(prompts(), sources=other).logits
    )


def test_larger_pictures_where_the_encoder_is_told_to_stretch_its_positions():
    model, ids = seeing(), prompts()
    larger = {"pixel_values": torch.randn(2, 3, 32, 32), "interpolate_pos_encoding": True}
    assert model(ids, sources={"eye": larger}).logits.isfinite().all()


def test_processes_refuse_encoders(tmp_path):
    from rc_agents import nodes

    seeing().save_pretrained(tmp_path, include_bases=True)
    with pytest.raises(ConfigError, match="'eye' is an encoder, whose states do not cross"):
        nodes.connect(tmp_path)


def test_a_damaged_encoder_is_named(tmp_path):
    encoder = tiny_encoder("vit")
    nn.init.constant_(next(encoder.parameters()), torch.nan)
    with pytest.raises(ModelError, match="'eye' has NaN or infinite weights"):
        rc_agents.couple(tiny("llama"), {"eye": encoder}, topology="unilateral")
    encoder = tiny_encoder("vit")
    encoder.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "swin"}))
    with pytest.raises(ModelError, match="'eye' cannot be loaded"):
        rc_agents.couple(tiny("llama"), {"eye": tmp_path}, topology="unilateral")
