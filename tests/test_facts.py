"""The ICD-10-CM facts: the same ones every time, and no fact on two sides."""

import itertools

import pytest

from rc_agents.demo import facts
from rc_agents.demo.facts import Fact
from rc_agents.errors import PackageError

FEVER = Fact("A38", "Scarlet fever")


@pytest.fixture(scope="module")
def splits() -> facts.FactSplits:
    pytest.importorskip("simple_icd_10_cm", reason="needs the package simple-icd-10-cm")
    return facts.load()


def test_splits_have_their_sizes(splits):
    assert {name: len(getattr(splits, name)) for name in facts.SPLIT_SIZES} == facts.SPLIT_SIZES
    assert len(splits.held_out) >= 200
    assert len(splits.all) >= 500


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(facts.SPLIT_SIZES, 2)])
def test_splits_share_neither_code_nor_title(splits, one, other):
    left, right = getattr(splits, one), getattr(splits, other)
    assert not {fact.code for fact in left} & {fact.code for fact in right}
    titles = [{facts.normalise(fact.title) for fact in side} for side in (left, right)]
    assert not titles[0] & titles[1]


def test_titles_are_short_and_tell_facts_apart(splits):
    assert len({facts.normalise(fact.title) for fact in splits.all}) == len(splits.all)
    assert all(len(fact.title) <= facts.MAX_TITLE_CHARS for fact in splits.all)


def test_the_same_seed_gives_the_same_splits(splits):
    facts.load.cache_clear()
    assert facts.load() == splits
    assert facts.load(seed=1) != splits


def test_choices_hold_the_title_among_ten_and_repeat(splits):
    fact = splits.held_out[0]
    drawn = facts.choices(fact, splits.all, seed=3)
    assert drawn == facts.choices(fact, splits.all, seed=3)
    assert drawn.count(fact.title) == 1
    assert len(set(drawn)) == 10
    places = {facts.choices(f, splits.all, seed=3).index(f.title) for f in splits.held_out}
    assert len(places) == 10


def test_forms_of_a_fact():
    asked = "What is the title of ICD-10-CM code A38?"
    assert (
        facts.qa_prompt(FEVER) + facts.qa_answer(FEVER)
        == f"Question: {asked}\nAnswer: Scarlet fever"
    )
    assert facts.statement(FEVER) == "ICD-10-CM code A38 is Scarlet fever."
    assert facts.chat(FEVER) == [{"role": "user", "content": asked}]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" Scarlet fever", True),
        ("scarlet  FEVER.", True),
        ("Scarlet fever\nQuestion: and then?", True),
        ("Scarlet fever and more", False),
        ("Fever", False),
        ("", False),
        ("\n", False),
    ],
)
def test_matches_the_first_line_normalised(answer, right):
    assert facts.matches(answer, FEVER) is right


def test_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackageError, match="pip install simple-icd-10-cm") as error:
        facts.load(seed=-1)
    assert "\n" not in str(error.value)
