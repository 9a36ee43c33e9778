"""The benchmark of pictures: its parts are disjoint, its measures are what they say, its table is right."""

import json

import pytest
import torch
from rc_agents.benchmarks import multimodal
from rc_agents.benchmarks.pictures import COLOURS, SHAPES, SIZE, Counts, caption, splits
from rc_agents.benchmarks.small_eye import Probe, new_eye, trained_eye
from rc_agents.benchmarks.statistics import wilson

import rc_agents
from tests.ensembles import prompts, wake
from tests.tiny import tiny

FEW = Counts(eye=2, train=2, validation=1, test=1, unseen=2)


def test_the_parts_share_no_picture_and_unseen_combinations_are_unseen():
    for seed in range(3):
        parts = splits(seed)
        hashes = [one for part in vars(parts).values() for one in part.hashes()]
        assert len(hashes) == len(set(hashes)) == sum(map(len, vars(parts).values()))
        shown = {part: set(map(tuple, vars(parts)[part].labels.tolist())) for part in vars(parts)}
        assert len(shown["eye"]) == len(COLOURS) * len(SHAPES)
        assert shown["train"] == shown["validation"] == shown["test"]
        assert shown["train"].isdisjoint(shown["unseen"])
        assert shown["train"] | shown["unseen"] == shown["eye"]
        for part in (shown["train"], shown["unseen"]):  # every word is learnt, and asked for
            assert {colour for colour, _ in part} == set(range(len(COLOURS)))
        assert {shape for _, shape in shown["train"]} == set(range(len(SHAPES)))


def test_pictures_are_those_of_their_seed():
    one, same, other = (splits(seed, FEW).train for seed in (0, 0, 1))
    assert torch.equal(one.pixels, same.pixels)
    assert torch.equal(one.labels, same.labels)
    assert not set(one.hashes()) & set(other.hashes())
    assert one.pixels.shape[1:] == (3, SIZE, SIZE)
    assert caption(0, 0) == "a red circle"


def test_the_middle_has_the_colour_that_the_caption_names():
    parts = splits(0, FEW)
    for pixels, (colour, shape) in zip(parts.eye.pixels, parts.eye.labels.tolist(), strict=True):
        if list(SHAPES)[shape] == "ring":
            continue
        middle = (pixels[:, SIZE // 2 - 1 : SIZE // 2 + 1, SIZE // 2 - 1 : SIZE // 2 + 1] + 1) / 2
        wanted = torch.tensor(list(COLOURS.values()))
        found = torch.nn.functional.cosine_similarity(middle.mean((1, 2))[None], wanted)
        assert found[colour] > found.max() - 0.02


def test_a_shuffled_picture_is_another_ones():
    part = splits(0, FEW).test
    moved = multimodal.shuffled(part, 0)
    assert not (moved == part.pixels).flatten(1).all(1).any()
    key = sorted(one.sum().item() for one in moved)
    assert key == sorted(one.sum().item() for one in part.pixels)


@pytest.mark.tiny
def test_log_probabilities_are_those_of_whole_passes():
    model = rc_agents.couple(tiny("llama"), {"eye": new_eye(1).eval()}, topology="unilateral")
    wake(model)
    ids, shown = prompts(2, 5), {"eye": {"pixel_values": torch.randn(2, 3, SIZE, SIZE)}}
    levels = [[7], [8, 9, 10], [11, 12]]
    found = multimodal.log_probabilities(model, ids, levels, shown)
    assert found.shape == (2, 1, 3, 2)
    for second in range(3):
        for third in range(2):
            answer = torch.tensor([[7, levels[1][second], levels[2][third]]] * 2)
            with torch.no_grad():
                logits = model(torch.cat([ids, answer], 1), sources=shown).logits[:, 4:-1]
            whole = logits.log_softmax(-1).gather(2, answer[..., None]).sum((1, 2))
            torch.testing.assert_close(found[:, 0, second, third], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.tiny
def test_an_eye_learns_and_a_probe_reads_it():
    parts = splits(0, Counts(eye=6, train=4, validation=1, test=1, unseen=2))
    eye = trained_eye(parts.eye, 0, epochs=3)
    assert not any(one.requires_grad for one in eye.parameters())
    right = (Probe(eye, parts.train).read(parts.test) == parts.test.labels).float().mean(0)
    assert right[0] > 0.5  # colours come first; chance is 1 in 8


def _record(folder, method, seed, values):
    scores = {"seen/choice": {"kind": "share", "better": "higher", "values": values}}
    record = {"method": method, "seed": seed, "scores": scores}
    (folder / f"{method}-{seed}.json").write_text(json.dumps(record))


def test_the_table_adds_the_seeds_up(tmp_path):
    _record(tmp_path, "coupled", 0, "1110")
    _record(tmp_path, "coupled", 1, "1111")
    _record(tmp_path, "anchor", 0, "0000")
    first, second = multimodal.table(tmp_path)
    assert (first["method"], first["hits"], first["items"]) == ("coupled", 7, 8)
    assert first["seeds"] == [75.0, 100.0]
    assert first["low"] == round(100 * wilson(7, 8).low, 1)
    assert second["hits"] == 0
    assert "| coupled | seen/choice | 7 of 8, 87.5 % |" in multimodal.report(tmp_path)
