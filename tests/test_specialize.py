"""Teaching a specialist: data that is read, split and packed right, and an adapter over a frozen base."""

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rc_agents.errors import DataError, ModelError, TrainingError
from rc_agents.training import data
from rc_agents.training.adapter_trainer import can_pack, packed_logits
from rc_agents.training.data import Document, Encoded, Pair
from rc_agents.training.lower_blocks import split_blocks
from rc_agents.training.specialize import SpecializeConfig, specialize
from tests.tiny import saved, tiny
from tests.tiny_tokenizers import tiny_tokenizer

PAIRS = [
    Pair(f"What is {name}?\nAnswer:", f" {answer}", "plain")
    for name, answer in (
        ("one", "river"),
        ("two", "hill"),
        ("three", "water and road"),
        ("four", "fever"),
    )
]
TEXTS = [
    Document(f"The {thing} came down from the hills in spring, and the people saw it. " * 4)
    for thing in "abc"
]
QUICK = SpecializeConfig(
    rank=2,
    alpha=4,
    steps=6,
    learning_rate=5e-3,
    batch_size=4,
    text_batch_size=2,
    block_length=16,
    dtype="float32",
)


# --- reading and splitting ---


def test_reads_every_form_of_record(tmp_path):
    lines = [
        {"text": "a text"},
        {"prompt": "p", "completion": "c"},
        {"question": "q", "answer": "a\u2028b", "group": "g"},
    ]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.py").write_text("x = 1\n")
    (tmp_path / "sub/empty.txt").write_text(" \n")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    expected = [Document("a text"), Pair("p", "c"), Pair("q", "a\u2028b", "g"), Document("x = 1\n")]
    assert data.read(tmp_path) == expected
    assert data.read([*lines, "x = 1\n"]) == expected
    assert data.read(str(tmp_path / "sub/b.py")) == expected[-1:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no training data in"),
        (b"not json\n", "data.jsonl:1 is not JSON"),
        (b'{"text": "fine"}\n{"text": ""}\n', "data.jsonl:2 needs a non-empty text"),
        (b'{"prompt": "p"}\n', r"not keys \['prompt'\]"),
        (b'{"prompt": "p", "completion": 3}\n', "needs a non-empty text"),
        (b"7\n", "not int"),
        (b'{"text": "\xff"}\n', "UTF-8"),
    ],
)
def test_malformed_data_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        data.read(tmp_path / "data.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("place", "message"), [("absent", "does not exist"), (".", "has no .txt")])
def test_missing_data_is_named(tmp_path, place, message):
    with pytest.raises(DataError, match=message):
        data.read(tmp_path / place)


def test_no_records_at_all():
    with pytest.raises(DataError, match="the records given"):
        data.read([])


@given(st.lists(st.text(min_size=1), max_size=20), st.integers(0, 9))
def test_splits_share_no_text_and_do_not_depend_on_the_rest(texts, seed):
    records = [Document(text) for text in texts]
    parts = data.split(records, validation=0.2, test=0.3, seed=seed)
    sides = [
        {" ".join(r.key.split()) for r in part}
        for part in (parts.train, parts.validation, parts.test)
    ]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert len(parts.train) + len(parts.validation) + len(parts.test) == len(texts)
    for record in records:
        alone = data.split([record], validation=0.2, test=0.3, seed=seed)
        assert (record in parts.test) == (alone.test == [record])


def test_split_sizes_follow_the_shares():
    parts = data.split([Document(str(n)) for n in range(2000)], validation=0.1, test=0.2)
    assert len(parts.test) == pytest.approx(400, abs=60)
    assert len(parts.validation) == pytest.approx(200, abs=50)


# --- encoding, planning, packing ---


@pytest.mark.parametrize("kind", ["prose", "code", "metaspace"])
def test_pairs_end_with_eos_and_count_the_completion(kind):
    tokenizer = tiny_tokenizer(kind)
    (example,) = data.encode(tokenizer, [PAIRS[2]], max_length=64, block_length=8)
    assert list(example.ids[: example.answer_start]) == tokenizer(PAIRS[2].prompt).input_ids
    assert example.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.ids[example.answer_start : -1]).strip() == "water and road"


def test_a_completion_that_was_cut_off_has_no_end():
    tokenizer = tiny_tokenizer("prose")
    pair = {"prompt": "p", "completion": " water and road", "ends": False}
    (example,) = data.encode(tokenizer, data.read([pair]), max_length=64, block_length=8)
    with pytest.raises(DataError, match="has ends='no', which is true or false"):
        data.read([pair | {"ends": "no"}])
    assert example.ids[-1] != tokenizer.eos_token_id
    assert tokenizer.decode(example.ids[example.answer_start :]).strip() == "water and road"


def test_a_rendered_prompt_gets_no_second_bos():
    tokenizer = tiny_tokenizer("code")
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    pair = Pair(tokenizer.bos_token + "user: x", "y")
    (example,) = data.encode(tokenizer, [pair], max_length=64, block_length=8)
    assert example.ids.count(tokenizer.bos_token_id) == 1


def test_documents_fill_blocks_joined_by_eos():
    tokenizer = tiny_tokenizer("prose")
    blocks = data.encode(tokenizer, TEXTS, max_length=64, block_length=16)
    joined = [
        token
        for text in TEXTS
        for token in [*tokenizer(text.text).input_ids, tokenizer.eos_token_id]
    ]
    assert [token for block in blocks for token in block.ids] == joined[: len(joined) // 16 * 16]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([PAIRS[0]], "more than max_length=4"),
        ([Document("a")], "lower block_length=64"),
        ([Pair("p", "c", "text")], "belongs to documents"),
    ],
)
def test_what_does_not_fit_is_refused(records, message):
    with pytest.raises(DataError, match=message):
        data.encode(tiny_tokenizer("prose"), records, max_length=4, block_length=64)


def _examples(groups: dict[str, int]) -> list[Encoded]:
    return [Encoded((1, 2, 3), 1, name) for name, count in groups.items() for _ in range(count)]


def test_plan_keeps_groups_apart_and_covers_each_epoch():
    examples = _examples({"a": 8, "b": 4, "text": 6})
    steps = data.plan(examples, batch_size=4, text_batch_size=2, steps=60, seed=1)
    assert all(len({examples[index].group for index in step}) == 1 for step in steps)
    assert {len(step) for step in steps if examples[step[0]].group == "text"} == {2}
    of_a = [step for step in steps if examples[step[0]].group == "a"]
    for first, second in zip(of_a[::2], of_a[1::2], strict=False):
        assert sorted(first + second) == list(range(8))
    assert steps == data.plan(examples, batch_size=4, text_batch_size=2, steps=60, seed=1)


def test_plan_follows_the_mix():
    examples = _examples({"a": 8, "b": 8})
    options = {"batch_size": 4, "text_batch_size": 1, "steps": 1000, "seed": 0}
    steps = data.plan(examples, mix={"a": 3, "b": 1}, **options)
    assert sum(examples[step[0]].group == "a" for step in steps) == pytest.approx(750, abs=60)
    with pytest.raises(
        DataError, match=r"mix names the groups \['c'\], but the data has \['a', 'b'\]"
    ):
        data.plan(examples, mix={"c": 1}, **options)


def test_a_group_smaller_than_a_batch_is_one_batch():
    steps = data.plan(_examples({"a": 3}), batch_size=8, text_batch_size=1, steps=2, seed=0)
    assert [sorted(step) for step in steps] == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.tiny
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "gpt_neox", "opt"])
@pytest.mark.parametrize("count", [1, 4])
def test_packed_pairs_equal_single_ones(arch, count):
    tokenizer = tiny_tokenizer("prose")
    model = tiny(arch, vocab_size=len(tokenizer))
    examples = data.encode(tokenizer, PAIRS[:count], max_length=64, block_length=8)
    batch = data.pack(examples)
    with torch.inference_mode():
        packed_PV = packed_logits(model, batch)
        single_PV = torch.cat(
            [model(torch.tensor([e.ids])).logits[0, e.answer_start - 1 : -1] for e in examples]
        )
    torch.testing.assert_close(packed_PV, single_PV, rtol=1e-4, atol=1e-4)
    assert batch["targets"].tolist() == [
        token for e in examples for token in e.ids[e.answer_start :]
    ]
    if count > 1:
        assert batch["input_ids"].shape[1] < sum(len(e.ids) - 1 for e in examples)


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("arch", "packs"), [("llama", True), ("gemma2", False), ("bloom", False), ("mamba2", False)]
)
def test_models_that_cannot_pack_are_found_out(arch, packs):
    tokenizer = tiny_tokenizer("prose")
    examples = data.encode(tokenizer, PAIRS, max_length=64, block_length=8)
    assert can_pack(tiny(arch, vocab_size=len(tokenizer)), examples) is packs


@pytest.mark.tiny
def test_padded_pairs_have_the_packed_loss():
    tokenizer = tiny_tokenizer("prose")
    model = tiny("llama", vocab_size=len(tokenizer))
    examples = data.encode(tokenizer, PAIRS, max_length=64, block_length=8)
    batch = data.pack(examples)
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(packed_logits(model, batch), batch["targets"])
        found = model(**data.collate(examples, packed=False), use_cache=False).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.tiny
def test_a_model_that_cannot_pack_learns_padded(tmp_path):
    base = saved(tmp_path, "gemma2", "prose")
    config = dataclasses.replace(QUICK, steps=30, learning_rate=1e-2)
    result = specialize(base, PAIRS, tmp_path / "adapter", config, progress=False)
    log = [
        json.loads(line)["loss"]
        for line in (result.path / "training.jsonl").read_text().splitlines()
    ]
    assert log[-1] < log[0]


def test_packing_the_same_prompt_with_two_answers():
    examples = [Encoded((5, 6, 7, 2), 2, ""), Encoded((5, 6, 8, 2), 2, "")]
    batch = data.pack(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2]]
    assert batch["label_positions"].tolist() == [1, 2, 1, 3]
    assert batch["targets"].tolist() == [7, 2, 8, 2]


# --- training ---


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("base"), "llama", "prose")


def _weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.tiny
@pytest.mark.parametrize("frozen_blocks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_teaches_pairs_over_an_untouched_base(base, tmp_path, frozen_blocks):
    before = (base / "model.safetensors").read_bytes()
    config = dataclasses.replace(
        QUICK, steps=150, rank=8, alpha=16, learning_rate=1e-2, frozen_blocks=frozen_blocks
    )
    result = specialize(base, PAIRS, tmp_path / "adapter", config, progress=False)
    assert (base / "model.safetensors").read_bytes() == before
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(plain, result.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for pair in PAIRS:
        inputs = tokenizer(pair.prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[
            0, inputs.input_ids.shape[1] :
        ]
        assert tokenizer.decode(ids, skip_special_tokens=True) == pair.completion


@pytest.mark.tiny
def test_adapter_folder(base, tmp_path):
    records = [*PAIRS, *TEXTS]
    result = specialize(base, records, tmp_path / "adapter", QUICK, progress=False)
    settings = json.loads((result.path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert settings["r"] == 2
    log = [json.loads(line) for line in (result.path / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert "steps | 6" in (result.path / "README.md").read_text()
    assert result.trained_parameters == sum(
        t.numel() for t in peft.load_peft_weights(str(result.path)).values()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    again = specialize(base, records, tmp_path / "again", QUICK, progress=False)
    assert _weights(again.path) == _weights(result.path)


class _Stop(TrainerCallback):
    """Ends a run the hard way after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.tiny
@pytest.mark.parametrize("frozen_blocks", [0, 1])
def test_resumed_equals_uninterrupted(base, tmp_path, frozen_blocks):
    config = dataclasses.replace(QUICK, save_steps=2, frozen_blocks=frozen_blocks)
    records = [*PAIRS, *TEXTS]
    whole = specialize(base, records, tmp_path / "whole", config, progress=False)
    with pytest.raises(KeyboardInterrupt):
        specialize(base, records, tmp_path / "halves", config, callbacks=[_Stop(5)], progress=False)
    assert not (tmp_path / "halves").exists()
    halves = specialize(base, records, tmp_path / "halves", config, resume=True, progress=False)
    one, two = (peft.load_peft_weights(str(run.path)) for run in (whole, halves))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.tiny
@pytest.mark.parametrize("blocks", [(0, None), (1, 3)])
def test_training_goes_on_from_an_adapter_of_another_form_than_the_config(base, tmp_path, blocks):
    form = {"frozen_blocks": blocks[0], "last_block": blocks[1]}
    config = dataclasses.replace(QUICK, **form, target_modules=["q_proj", "up_proj"])
    first = specialize(base, PAIRS, tmp_path / "first", config, progress=False)
    before = _weights(first.path)
    still = dataclasses.replace(QUICK, rank=8, steps=1, learning_rate=0.0)
    second = specialize(base, TEXTS, tmp_path / "second", still, adapter=first.path, progress=False)
    one, two = (peft.load_peft_weights(str(run.path)) for run in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    settings = [
        json.loads((run.path / "adapter_config.json").read_text()) for run in (first, second)
    ]
    assert settings[0] == settings[1]
    moved = specialize(base, PAIRS, tmp_path / "moved", QUICK, adapter=first.path, progress=False)
    assert _weights(moved.path) != before == _weights(first.path)


@pytest.mark.tiny
def test_an_adapter_that_cannot_be_gone_on_from_is_named(base, tmp_path):
    done = specialize(base, PAIRS, tmp_path / "done", QUICK, progress=False)
    again = {"config": QUICK, "progress": False}
    with pytest.raises(TrainingError, match="has no adapter to go on from"):
        specialize(base, PAIRS, tmp_path / "new", adapter=tmp_path / "nowhere", **again)
    other = saved(tmp_path / "other", "gpt2", "prose")
    with pytest.raises(TrainingError, match=r"cannot be added to|does not fit the base"):
        specialize(other, PAIRS, tmp_path / "new", adapter=done.path, **again)
    config = done.path / "adapter_config.json"
    settings = json.loads(config.read_text())
    for change, message in (
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"layers_to_transform": [0, 2]}, "blocks in a row"),
        ({"r": 4}, "does not fit the base"),
        ({"use_rslora": True}, "LoRA with use_rslora; only plain LoRA"),
        ({"target_modules": None}, "no target_modules"),
    ):
        config.write_text(json.dumps(settings | change))
        with pytest.raises(TrainingError, match=message):
            specialize(base, PAIRS, tmp_path / "new", adapter=done.path, **again)
    config.write_text(json.dumps(settings))
    (done.path / "adapter_model.safetensors").unlink()
    with pytest.raises(TrainingError, match="to go on from"):
        specialize(base, PAIRS, tmp_path / "new", adapter=done.path, **again)
    assert not (tmp_path / "new").exists()


@pytest.mark.tiny
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt_neox"])
def test_cut_model_equals_the_whole_one(arch):
    tokenizer = tiny_tokenizer("prose")
    whole, cut = (tiny(arch, vocab_size=len(tokenizer)) for _ in range(2))
    lower = split_blocks(cut, 2)
    examples = data.encode(tokenizer, [*PAIRS, *TEXTS], max_length=64, block_length=16)
    for indices in ([0, 1, 2, 3], [1, 3], [2], [4, 5]):  # the second and third are known by then
        chosen = [examples[index] for index in indices]
        batch = data.collate(chosen)
        entered = lower.enter(batch, chosen, indices)
        with torch.inference_mode():
            if "targets" in batch:
                expected, found = packed_logits(whole, batch), packed_logits(cut, entered)
            else:
                expected = whole(**batch, use_cache=False).loss
                found = cut(**entered, use_cache=False).loss
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.tiny
@pytest.mark.parametrize("arch", ["gpt2", "opt"])
def test_a_model_that_cannot_be_cut_is_refused(arch):
    with pytest.raises(TrainingError, match="frozen_blocks is not supported for model type"):
        split_blocks(tiny(arch), 2)


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1e30}, "the loss is not a number at step"),
        ({"frozen_blocks": 99}, "frozen_blocks must lie between 0 and"),
        ({"target_modules": ["no_such_layer"]}, r"LoRA cannot be added to \['no_such_layer'\]"),
    ],
)
def test_training_that_cannot_work_leaves_the_old_adapter(base, tmp_path, settings, message):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/old").write_text("old")
    config = dataclasses.replace(QUICK, **settings)
    with pytest.raises(TrainingError, match=message) as error:
        specialize(base, PAIRS, tmp_path / "adapter", config, progress=False)
    assert "\n" not in str(error.value)
    assert (tmp_path / "adapter/old").read_text() == "old"


@pytest.mark.tiny
def test_a_run_of_something_else_is_not_resumed(base, tmp_path):
    config = dataclasses.replace(QUICK, save_steps=2)
    output = tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt):
        specialize(base, PAIRS, output, config, callbacks=[_Stop(3)], progress=False)
    other = specialize(base, PAIRS, tmp_path / "other", QUICK, progress=False).path
    for changes, message in (
        ({"data": PAIRS[1:]}, "data set holds other examples"),
        ({"config": dataclasses.replace(config, learning_rate=1e-5)}, "learning_rate was"),
        ({"adapter": other}, "adapter was null"),
    ):
        given = {"data": PAIRS, "config": config} | changes
        with pytest.raises(TrainingError, match=f"cannot resume .*{message}.*start anew"):
            specialize(base, output=output, resume=True, progress=False, **given)
    specialize(base, PAIRS, output, config, resume=True, progress=False)


@pytest.mark.tiny
def test_nothing_to_resume(base, tmp_path):
    with pytest.raises(TrainingError, match="nothing to resume"):
        specialize(base, PAIRS, tmp_path / "adapter", QUICK, resume=True, progress=False)


def test_missing_base(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded as a causal model") as error:
        specialize(tmp_path, PAIRS, tmp_path / "adapter", QUICK, progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"steps": 2.5}, r"steps must be a whole number of at least 1, not 2\.5"),
        ({"batch_size": "8"}, "batch_size must be a whole number of at least 1, not '8'"),
        ({"learning_rate": -1e-3}, r"learning_rate must be a number of at least 0, not -0\.001"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number of at least 0, not nan"),
        ({"frozen_blocks": -1}, "frozen_blocks must be a whole number of at least 0"),
        ({"block_length": 1}, "block_length must be a whole number of at least 2"),
        ({"warmup": 1.5}, "warmup is a share"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown; known: auto, float32"),
    ],
)
def test_settings_are_checked_when_they_are_made(settings, message):
    with pytest.raises(TrainingError, match=message):
        SpecializeConfig(**settings)
