"""lm-eval's harness over ensembles and scorers: the same figures as lm-eval's own model where bridges are off."""

import json
import os
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from rc_agents.adapters.lm_eval import LOCAL_TASKS, EnsembleLM, ScorerLM, evaluate, report
from rc_agents.adapters.lm_eval.report import TASKS, to_json
from rc_agents.adapters.lm_eval.running import quiet

import rc_agents
from rc_agents.cli.app import run
from rc_agents.errors import InputError, RCError
from rc_agents.scoring import CausalScorer
from tests.tiny import CONTEXT, saved, tiny
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny
TOKENIZER = tiny_tokenizer("prose")
PAIRS = [
    ("The river came down", " from the hills"),
    ("What is the name of the city where the two rivers meet? It is", " the one"),
    ("The doctor said that the patient had", " a fever"),
    ("Some of them said that", " the water was higher"),
    ("", "The river"),
]
TEXTS = [
    "The river came down from the hills in spring, and the people of the town went to the bank. "
    * 12
]
DATA = os.environ.get("RC_AGENTS_DATA") or str(Path(__file__).parents[2] / "shared" / "data")


def coupled(*others, **more):
    size = len(TOKENIZER)
    names = [f"s{number}" for number in range(len(others))]
    tokenizers = {"anchor": TOKENIZER} | {
        name: tokenizer for name, (_, tokenizer) in zip(names, others, strict=True)
    }
    return rc_agents.couple(
        tiny("llama", vocab_size=size),
        {name: model for name, (model, _) in zip(names, others, strict=True)},
        tokenizers=tokenizers,
        bridge={"start": "default", "gate": "fixed"},
        **more,
    )


@pytest.fixture(scope="module")
def model():
    size = len(TOKENIZER)
    return coupled(
        (tiny("qwen2", vocab_size=size, seed=1), TOKENIZER),
        (tiny("gpt2", vocab_size=size, seed=2), TOKENIZER),
    )


def asked(kind, args):
    return [Instance(kind, {}, one, number) for number, one in enumerate(args)]


def answers(lm):
    """One of each kind of request."""
    until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    contexts = [context for context, _ in PAIRS if context]
    return (
        lm.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True),
        lm.loglikelihood_rolling(
            asked("loglikelihood_rolling", [(t,) for t in TEXTS]), disable_tqdm=True
        ),
        lm.generate_until(
            asked("generate_until", [(one, until) for one in contexts]), disable_tqdm=True
        ),
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_without_bridges_the_figures_are_those_of_the_frozen_model(model, batch_size):
    with quiet():
        frozen = HFLM(
            tiny("llama", vocab_size=len(TOKENIZER)),
            backend="causal",
            tokenizer=TOKENIZER,
            batch_size=batch_size,
            max_length=CONTEXT,
        )
    off = EnsembleLM(model, specialists="none", batch_size=batch_size)
    assert off.max_length == CONTEXT
    assert answers(off) == answers(frozen)
    assert answers(EnsembleLM(model, batch_size=batch_size)) != answers(frozen)


def test_with_bridges_a_likelihood_is_the_ensembles_own(model):
    context, end = PAIRS[0]
    ids = TOKENIZER(context + end, return_tensors="pt").input_ids
    size = len(TOKENIZER(context).input_ids)
    for chosen in (None, ["s1"]):
        with torch.no_grad():
            logprobs = model(ids, specialists=chosen).logits[0].log_softmax(-1)
        expected = sum(float(logprobs[n - 1, ids[0, n]]) for n in range(size, ids.shape[1]))
        lm = EnsembleLM(model, specialists=chosen)
        found = lm.loglikelihood(asked("loglikelihood", PAIRS[:1]), disable_tqdm=True)
        assert found[0][0] == pytest.approx(expected, rel=1e-5)


def test_specialists_and_strength_reach_every_request(model):
    one, both, half = (
        answers(EnsembleLM(model, **chosen))
        for chosen in ({"specialists": "s0"}, {"specialists": "s0+s1"}, {"strength": 0.5})
    )
    assert both == answers(EnsembleLM(model))
    assert one[0] != both[0] != half[0]
    assert one[1] != both[1] != half[1]
    with pytest.raises(RCError, match="s2"):
        EnsembleLM(model, specialists="s2")


def test_a_specialist_with_its_own_tokens_takes_part():
    other = tiny_tokenizer("metaspace")
    model = coupled((tiny("gemma2", vocab_size=len(other), seed=3), other))
    room = {"max_length": CONTEXT // 2}
    found = answers(EnsembleLM(model, batch_size=2, **room))
    assert found[0] != answers(EnsembleLM(model, specialists="none", **room))[0]
    alone = EnsembleLM(model, batch_size=1).loglikelihood(
        asked("loglikelihood", PAIRS), disable_tqdm=True
    )
    assert [one for one, _ in found[0]] == pytest.approx([one for one, _ in alone], abs=1e-4)


def test_an_ensemble_is_loaded_by_its_path_and_by_lm_evals_registry(tmp_path):
    path = saved(tmp_path, "llama", "prose")
    lm = get_model("rc_agents").create_from_arg_string(f"pretrained={path},dtype=float32")
    assert isinstance(lm, EnsembleLM)
    assert answers(lm) == answers(EnsembleLM(path))


# Scorers.


def test_a_scorer_answers_as_the_ensemble_does(model):
    contexts = [pair for pair in PAIRS if pair[0]]
    requests = asked("loglikelihood", contexts)
    own = EnsembleLM(model).loglikelihood(requests, disable_tqdm=True)
    found = ScorerLM(CausalScorer(model)).loglikelihood(requests)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in own], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in own]


def test_a_scorers_answer_ends_before_the_first_stop_string(model):
    scorer = ScorerLM(CausalScorer(model))
    whole = scorer.scorer.generate(["The river came down"], 12)[0]
    stop = whole[4:6]
    options = {"until": ["never", stop], "max_gen_toks": 12}
    cut = scorer.generate_until(asked("generate_until", [("The river came down", options)]))[0]
    assert cut == whole[: whole.index(stop)]


def test_a_scorers_text_is_the_sum_of_its_windows(model):
    scorer = CausalScorer(model)
    lm = ScorerLM(scorer, window=64, stride=32)
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", [(TEXTS[0],)]))
    assert found == [-scorer.rolling_nll(TEXTS, 64, 32)[0].nll]


def test_a_scorer_refuses_what_it_cannot_answer(model):
    lm = ScorerLM(CausalScorer(model))
    with pytest.raises(InputError, match="empty"):
        lm.loglikelihood(asked("loglikelihood", [("", "The")]))
    sampled = {"until": [], "do_sample": True, "temperature": 0.7}
    with pytest.raises(InputError, match="samples"):
        lm.generate_until(asked("generate_until", [("The", sampled)]))


# Whole evaluations.

TASK = """
task: rivers
custom_dataset: !function rivers.rows
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
ROWS = """
from datasets import Dataset

def rows(**options):
    one = {"question": "The river came", "choices": ["down", "up", "out of the house"], "label": 0}
    two = {"question": "The doctor said", "choices": ["that", "water"], "label": 1}
    return {"test": Dataset.from_list([one, two])}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rivers.yaml").write_text(TASK)
    (tmp_path / "rivers.py").write_text(ROWS)
    return tmp_path


def test_an_evaluation_counts_what_the_model_likes_best(model, folder):
    lm = EnsembleLM(model, batch_size=4)
    found = evaluate(lm, ["rivers"], include=folder, bootstrap_iters=0)
    scorer = CausalScorer(model)
    asked_of = {"The river came": (["down", "up", "out of the house"], 0)}
    asked_of["The doctor said"] = (["that", "water"], 1)
    right = []
    for question, (choices, label) in asked_of.items():
        likely = [
            one.logprob for one in scorer.loglikelihood([(question, f" {c}") for c in choices])
        ]
        right.append(likely.index(max(likely)) == label)
    assert found["results"]["rivers"]["acc,none"] == sum(right) / 2
    assert found["n-samples"]["rivers"] == {"original": 2, "effective": 2}
    assert "samples" not in json.loads(to_json(found))


@pytest.fixture
def own_tasks_alone(monkeypatch):
    """lm-eval's thousands of tasks take half a minute to index."""
    alone = partial(report.TaskManager, include_defaults=False)
    monkeypatch.setattr(report, "TaskManager", lambda include_path, **_: alone(None, include_path))


def test_no_task_is_one_clear_error(model):
    with pytest.raises(InputError, match=r"at least one task.*openbookqa_local"):
        evaluate(EnsembleLM(model), [])


@pytest.mark.parametrize(
    "among",
    ["own_tasks_alone", pytest.param("model", marks=pytest.mark.slow, id="all_tasks")],
)
def test_an_unknown_task_is_one_clear_error(model, folder, among, request):
    request.getfixturevalue(among)
    with pytest.raises(InputError, match=r"no task 'riverz'; did you mean rivers"):
        evaluate(EnsembleLM(model), ["riverz"], include=folder)


def test_the_command_prints_json_and_writes_it(tmp_path, folder, capsys):
    path = saved(tmp_path, "llama", "prose")
    words = ["eval", path, "--tasks", "rivers", "--include", folder, "--json"]
    out = tmp_path / "results" / "rivers.json"
    assert run([str(word) for word in [*words, "--output", out]]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["results"]["rivers"] == json.loads(out.read_text())["results"]["rivers"]
    assert run(["eval", str(path), "--tasks", "list"]) == 0
    assert capsys.readouterr().out.split() == list(LOCAL_TASKS)
    assert run(["eval", str(path), "--tasks", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tasks": list(LOCAL_TASKS)}


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_the_local_tasks_have_right_answers_among_their_choices(name, monkeypatch):
    monkeypatch.setenv("RC_AGENTS_DATA", DATA)
    if name.startswith(("arc", "truthfulqa")) and not Path(DATA).is_dir():
        pytest.skip("needs the evaluation data of shared/data, or RC_AGENTS_DATA")
    from rc_agents.adapters.lm_eval.report import find

    with quiet():
        task = find([name]).load([name])["tasks"][name]
    docs = list(task.test_docs())
    assert len(docs) > 50
    for doc in docs[:50]:
        choices, target = task.doc_to_choice(doc), task.doc_to_target(doc)
        right = choices.index(target) if isinstance(target, str) else target
        assert 0 <= right < len(choices) == len(set(choices))
        assert task.doc_to_text(doc).strip()


def test_a_local_task_without_its_file_says_where_to_put_it(model, monkeypatch):
    monkeypatch.delenv("RC_AGENTS_DATA", raising=False)
    with pytest.raises(InputError, match=r"arc_challenge_test.jsonl.*RC_AGENTS_DATA.*not set"):
        evaluate(EnsembleLM(model), ["arc_challenge_local"])


def test_the_wheel_takes_every_file_of_the_adapters():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["rc_agents.adapters"]
    taken = {path for pattern in patterns for path in (root / "adapters").glob(pattern)}
    found = {path for path in (root / "adapters").rglob("*.*") if "__pycache__" not in path.parts}
    data = {path for path in found if path.suffix not in (".py", ".pyc")}
    assert TASKS / "rows.py" in taken  # its folder is no package
    assert data <= taken
    assert len(data) > 8


@pytest.mark.slow
def test_without_lm_eval_the_import_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; import rc_agents.adapters.lm_eval"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: rc_agents.adapters.lm_eval needs lm-eval; run: pip install 'rc-agents[eval]'"
    )
