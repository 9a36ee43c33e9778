"""The benchmark of a graph that sees: what it asks, of whom, and what its record says."""

import json

import pytest
from rc_agents.benchmarks import graph_pictures as bench
from rc_agents.benchmarks.pictures import COLOURS, SHAPES, Counts, caption, splits
from rc_agents.benchmarks.small_eye import new_eye

from tests.tiny import tiny
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny

FEW = Counts(eye=1, train=1, validation=1, test=1, unseen=1)


def test_neither_colour_nor_shape_alone_is_enough():
    pictures = splits(0, FEW).test
    asked, shown = bench.questions(pictures, 0)
    for question, (colour, shape), one in zip(asked, pictures.labels.tolist(), shown, strict=True):
        right, named = question.choices[question.label], list(COLOURS)[colour]
        assert right == caption(colour, shape)
        assert len(set(question.choices)) == 4
        assert sum(f" {named} " in choice for choice in question.choices) == 2
        assert sum(choice.endswith(list(SHAPES)[shape]) for choice in question.choices) == 2
        assert one["pixel_values"].shape == (1, 3, 24, 24)
    assert len({question.label for question in asked}) == 4


def test_no_picture_and_no_unseen_combination_is_in_two_parts():
    parts = splits(1, FEW)
    combinations = {tuple(one) for one in parts.unseen.labels.tolist()}
    for part in (parts.train, parts.validation, parts.test):
        assert not combinations & {tuple(one) for one in part.labels.tolist()}
        assert not set(part.hashes()) & set(parts.unseen.hashes())
    assert not set(parts.train.hashes()) & set(parts.test.hashes())


def test_exchanged_pictures_leave_texts_and_answers():
    tokenizer = tiny_tokenizer("prose")
    reader = tiny("llama", vocab_size=len(tokenizer))
    config = bench.graph_config(at=2)
    asked = bench.asked(config, splits(0, FEW).test, 0)
    for one, other, after in zip(
        asked, bench.exchanged(asked), [*asked[1:], asked[0]], strict=True
    ):
        assert other.texts["reader"] == one.texts["reader"]
        assert other.texts["eye"] == after.texts["eye"]
        assert other.label == one.label
    graph = bench.graphs.build(
        config, {"eye": new_eye(), "reader": reader}, tokenizers={"reader": tokenizer}
    )
    head = bench.head_config(graph.num_trainable(), graph.widths)
    built = bench.graphs.build(
        head, {"eye": new_eye(), "reader": reader}, tokenizers={"reader": tokenizer}
    )
    assert built.num_trainable() >= graph.num_trainable()
    for one in (graph, built):
        for choice in one.choose(asked[:3]):
            assert sum(choice.probabilities) == pytest.approx(1)


def test_the_table_pairs_graph_and_head_by_picture(tmp_path):
    ways = ("seen_shuffled", "unseen_shuffled", "seen_reader", "unseen_reader")
    for name, right in (("graph", [1, 1, 1, 0]), ("head", [1, 0, 0, 0])):
        cell = {"seen": right, "unseen": right, **dict.fromkeys(ways, (0, 0, 0, 1))}
        (tmp_path / f"{name}-0.json").write_text(json.dumps(cell))
    table = bench.table(tmp_path)
    assert "| graph | 3 of 4, 75.0%" in table
    assert "| graph minus head, points | +50.0 (" in table
    with pytest.raises(SystemExit, match="seed 0 chooses the learning rates"):
        bench.searched(None, None, None, 1, tmp_path / "none.json")
