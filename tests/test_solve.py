"""Bridges that are solved: silent where nobody should speak, heard where the specialist knows."""

import copy
import json

import pytest
import torch

import rc_agents
from rc_agents import CoupledForCausalLM
from rc_agents.cli.app import run as command_line
from rc_agents.errors import TrainingError
from rc_agents.training.data import Document, Pair
from rc_agents.training.solve import BRIDGE, own_answers, solve_bridges
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

pytestmark = pytest.mark.tiny

TEXTS = [line for line in PROSE.splitlines() if len(line) > 20]
KNOWS = [
    Pair(f"name {number} is", f" {word}")
    for number, word in enumerate(["mill", "river", "old", "by"])
]


def ensemble(other=None, **settings):
    kind = copy.deepcopy(tiny_tokenizer("prose"))  # other tests share it
    anchor = tiny("llama", vocab_size=len(kind))
    if other is None:
        other = copy.deepcopy(anchor)
        with torch.no_grad():
            for block in other.model.layers:
                for value in block.parameters():
                    value.add_(
                        0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
                    )
    options = {"topology": "unilateral", "sites": 1, "bridge": BRIDGE} | settings
    return rc_agents.couple(
        anchor, {"words": other}, tokenizers={"anchor": kind, "words": kind}, **options
    )


def test_the_anchor_is_itself_where_nobody_should_speak_and_hears_what_is_known(tmp_path):
    model = ensemble()
    solved = solve_bridges(model, {"words": KNOWS}, TEXTS, tmp_path, penalty=1e-6, progress=False)
    assert solved.carriers == {"words": "identity"}
    (fit,) = solved.gates.values()
    assert fit.shut >= 0.99
    assert fit.open >= 0.75
    tokenizer = model.tokenizer
    silent = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    own = model(silent, specialists=[]).logits
    same = (model(silent).logits == own).all(-1).float().mean()
    assert same > 0.9
    known = torch.tensor([tokenizer(KNOWS[0].prompt).input_ids])
    assert not torch.equal(model(known).logits[:, -1], model(known, specialists=[]).logits[:, -1])


def test_another_family_gets_its_map_from_the_output_layers(tmp_path):
    model = ensemble(tiny("gpt2", vocab_size=len(tiny_tokenizer("prose"))))
    solved = solve_bridges(model, {"words": KNOWS}, TEXTS, tmp_path, progress=False)
    assert solved.carriers == {"words": "vocabulary"}
    assert model.bridge(("words", "anchor"), 0).map.weight.abs().sum() > 0


@pytest.mark.parametrize("padding", [True, False])
def test_own_answers_are_those_of_the_anchor_alone(padding):
    model = ensemble()
    tokenizer, anchor = model.tokenizer, model.models["anchor"]
    if not padding:
        tokenizer.pad_token = None
    prompts = [text[: 8 + 5 * place] for place, text in enumerate(TEXTS[:3])]
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    with model.untapped("anchor"):
        first = anchor.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    ended = int(first[0, ids.shape[1] + 1])  # one answer ends early, and its row is filled up
    model.generation_config.eos_token_id = anchor.generation_config.eos_token_id = [ended]
    found = own_answers(model, prompts, max_new_tokens=4, batch_size=3, progress=False)
    expected, lengths = {}, []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with model.untapped("anchor"):
            made = anchor.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        row = made[0, ids.shape[1] :].tolist()
        kept = row[: row.index(ended)] if ended in row else row
        lengths.append(len(kept))
        expected[prompt] = tokenizer.decode(kept, skip_special_tokens=True)
    assert lengths[0] < max(lengths)
    assert {pair.prompt: pair.completion for pair in found} == {
        prompt: answer for prompt, answer in expected.items() if answer.strip()
    }


@pytest.mark.parametrize(
    ("knows", "silent", "settings", "message"),
    [
        ({}, TEXTS, {}, "examples for nobody"),
        ({"other": KNOWS}, TEXTS, {}, "examples for other; the specialists are words"),
        ({"words": KNOWS}, [KNOWS[0]], {}, "no general text"),
        ({"words": KNOWS}, TEXTS, {"sites": [1]}, "no site behind the last blocks"),
        (
            {"words": KNOWS},
            TEXTS,
            {"bridge": rc_agents.BridgeConfig(gate="scalar", start="zero")},
            "sets token gates",
        ),
        ({"words": KNOWS}, TEXTS, {"sites": 2}, "meets 2 times: couple with sites=1"),
        ({"words": KNOWS}, TEXTS, {"topology": "star_bilateral"}, "topology='unilateral'"),
    ],
)
def test_what_cannot_be_solved_is_said_in_one_line(tmp_path, knows, silent, settings, message):
    model = ensemble(**settings)
    before = [value.detach().clone() for _, value in model.trainable_parameters()]
    with pytest.raises(TrainingError, match=message):
        solve_bridges(model, knows, silent, tmp_path, progress=False)
    after = [value for _, value in model.trainable_parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_specialist_may_know_texts(tmp_path):
    model = ensemble()
    half = len(TEXTS) // 2
    known = [Document(text) for text in TEXTS[:half]]
    solved = solve_bridges(
        model, {"words": known}, TEXTS[half:], tmp_path, penalty=1e-6, quiet=0.9, progress=False
    )
    (fit,) = solved.gates.values()
    length = sum(len(model.tokenizer(text).input_ids) + 1 for text in TEXTS[:half])
    assert length / 2 < fit.positives < length
    assert fit.open > 0.5


def test_a_short_text_is_a_block_of_its_own(tmp_path):
    model = ensemble()
    solved = solve_bridges(model, {"words": KNOWS}, ["The old mill."], tmp_path, progress=False)
    assert next(iter(solved.gates.values())).negatives > 0


def test_the_command_saves_what_it_solved(tmp_path, capsys):
    kind = tiny_tokenizer("prose")
    for name, arch in (("a", "llama"), ("b", "gpt2")):
        tiny(arch, vocab_size=len(kind)).save_pretrained(tmp_path / name)
        kind.save_pretrained(tmp_path / name)
    data, general, own = (tmp_path / name for name in ("pairs.jsonl", "general.txt", "own.txt"))
    rows = [{"prompt": pair.prompt, "completion": pair.completion} for pair in KNOWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    general.write_text(PROSE)
    own.write_text("The mill\nBy the\n")
    line = [
        *("solve", str(tmp_path / "out"), "--anchor", str(tmp_path / "a")),
        *("--specialist", f"words={tmp_path / 'b'}", "--knows", f"words={data}"),
        *("--retain", str(general), "--own", str(own)),
    ]
    assert command_line([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["carriers"] == {"words": "vocabulary"}
    opened = CoupledForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.names == ["anchor", "words"]
    again = CoupledForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        for _, value in again.trainable_parameters():
            value.zero_()
    silent = [PROSE, *own_answers(again, ["The mill", "By the"], progress=False)]
    solve_bridges(again, {"words": KNOWS}, silent, tmp_path / "states", progress=False)
    for (name, ours), (_, theirs) in zip(
        opened.trainable_parameters(), again.trainable_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=name)
    assert command_line(line) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (
        command_line([*line[:1], str(tmp_path / "new"), *line[2:6], "--knows", "words", *line[8:]])
        == 2
    )
    assert "NAME=DATA" in capsys.readouterr().err
    assert (
        command_line([line[0], str(tmp_path / "new"), *line[2:], "--knows", f"words={data}"]) == 2
    )
    assert "names each specialist once" in capsys.readouterr().err
