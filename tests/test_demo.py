"""The demo's measures and report; its figures on real models are in the slow tier."""

import json
import math
import re
import socket
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, is_offline_mode

import rc_agents
from rc_agents import packaged
from rc_agents.cli.app import run as command_line
from rc_agents.demo import facts, measure, recipe_bridges, report, texts
from rc_agents.errors import PackageError
from rc_agents.provenance import git_hash, provenance
from rc_agents.training import data
from tests.ensembles import wake
from tests.tiny import tiny
from tests.tiny_tokenizers import PROSE, tiny_tokenizer


class Knows:
    """A subject that answers from a table."""

    def __init__(self, titles):
        self.titles = titles

    def answer(self, prompts, titles=()):
        return [self.titles.get(prompt.split("code ")[1][:3], "no idea") for prompt in prompts]


def needs(what, *arguments):
    try:
        return what(*arguments)
    except PackageError as error:
        pytest.skip(str(error))


def test_no_held_out_fact_is_in_bridge_training():
    splits = needs(facts.load)
    needs(packaged.text, "general")
    tokenizer = tiny_tokenizer("prose")
    held_out = {fact.code for fact in splits.held_out}
    titles = {facts.normalise(fact.title) for fact in splits.held_out}
    pairs = needs(recipe_bridges.known, tokenizer)["medical"]
    assert len(pairs) >= 3 * 250
    assert not [p for p in pairs if held_out & set(re.findall(r"[A-Z]\d\d", p.prompt))]
    assert not titles & {facts.normalise(pair.completion) for pair in pairs}


@pytest.mark.tiny
def test_the_shipped_folder_has_no_path_of_the_machine_that_made_it(tmp_path):
    kind = tiny_tokenizer("prose")
    model = rc_agents.couple(
        tiny("llama", vocab_size=len(kind)), {}, tokenizers={"anchor": kind}, topology="unilateral"
    )
    model.save_pretrained(tmp_path / "one", include_bases=True)
    file = tmp_path / "one" / "config.json"
    config = json.loads(file.read_text())
    config["model_configs"]["anchor"]["_name_or_path"] = str(tmp_path)
    file.write_text(json.dumps(config))
    assert list(file.parent.glob("tokenizer-*"))
    recipe_bridges._slim(file.parent)
    assert str(tmp_path) not in file.read_text()
    assert not list(file.parent.glob("tokenizer-*"))
    assert "tokenizers" not in json.loads(file.read_text())
    shipped = (packaged.ASSETS / "demo" / "config.json").read_text()
    assert '"_name_or_path": "/' not in shipped


def test_no_measured_document_is_in_training():
    needs(packaged.text, "general")
    for kind in packaged.TEXTS:
        split = texts.split(kind)
        assert split.test
        data.check_disjoint(split.train, split.validation, split.test)  # nor is a near-duplicate
        split.test.clear()
        assert texts.split(kind).test


def test_exact_match_counts_normalised_titles():
    chosen = [facts.Fact("A00", "Cholera"), facts.Fact("A38", "Scarlet fever")]
    share = measure.exact_match(Knows({"A00": " cholera.\nand more", "A38": "Fever"}), chosen)
    assert (share.hits, share.count) == (1, 2)


def test_a_share_has_its_wilson_interval():
    low, high = measure.Share(90, 100).interval
    assert (low, high) == (pytest.approx(0.8256, abs=1e-3), pytest.approx(0.9448, abs=1e-3))
    assert measure.Share(0, 50).interval[0] == pytest.approx(0)


@pytest.mark.tiny
def test_perplexity_and_log_probabilities_are_the_models_own():
    tokenizer = tiny_tokenizer("prose")
    model = tiny("llama", vocab_size=len(tokenizer))
    subject = measure.Subject(model, tokenizer)
    text = PROSE.splitlines()[0]
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    found = measure.perplexity(subject, [text], length=1000)
    assert found.value == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.tokens == ids.shape[1] - 1
    shorter = text[: len(text) // 2]
    parts = [measure.perplexity(subject, [one], length=1000) for one in (text, shorter)]
    both = measure.perplexity(subject, [text, shorter], length=1000)
    bits = sum(math.log(part.value) * part.tokens for part in parts)
    assert both.tokens == sum(part.tokens for part in parts)
    assert math.log(both.value) * both.tokens == pytest.approx(bits, rel=1e-4)


@pytest.mark.tiny
def test_mean_log_probabilities_do_not_depend_on_their_neighbours():
    tokenizer = tiny_tokenizer("prose")
    subject = measure.Subject(tiny("llama", vocab_size=len(tokenizer)), tokenizer)
    prompts = ["The river", "Down from the far hills"]
    endings = [[" came", " came down from the hills"], [" the river came", " rain"]]
    together = measure.mean_logprobs(subject, prompts, endings)
    for prompt, row, scores in zip(prompts, endings, together, strict=True):
        head = tokenizer(prompt, return_tensors="pt").input_ids
        for ending, score in zip(row, scores, strict=True):
            tail = tokenizer(ending, return_tensors="pt").input_ids
            ids = torch.cat([head, tail], dim=1)
            with torch.no_grad():
                logprobs = subject.model(ids).logits[0, :-1].log_softmax(-1)
            own = logprobs[range(ids.shape[1] - 1), ids[0, 1:]][-tail.shape[1] :]
            assert score == pytest.approx(float(own.mean()), abs=1e-4)


@pytest.mark.tiny
def test_an_answer_is_its_first_line_that_is_not_empty():
    tokenizer = tiny_tokenizer("prose")
    done = measure.FirstLine(tokenizer, 2)
    rows = ["ab\n\nline", "ab\nline\n", "abline"]
    for text, ended in zip(rows, [False, True, False], strict=True):
        ids = torch.cat(
            [
                torch.zeros(1, 2, dtype=torch.long),
                tokenizer(text[2:], return_tensors="pt").input_ids,
            ],
            1,
        )
        assert done(ids, None).tolist() == [ended]


@pytest.mark.parametrize(
    ("text", "ended"),
    [("", False), (" chol", False), (" Cholera", False), (" cholera.\n", True), (" colic", True)],
)
def test_a_wrong_answer_ends_at_once_and_a_right_one_does_not(text, ended):
    tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: [text] * len(ids))
    done = measure.FirstLine(tokenizer, 2, ["Cholera, unspecified", "Cholera"])
    assert done(torch.zeros(2, 5), None).tolist() == [ended, ended]


@pytest.mark.tiny
def test_answers_that_share_a_start_are_those_of_single_prompts():
    tokenizer = tiny_tokenizer("prose")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [facts.qa_prompt(facts.Fact(code, "")) for code in ("A00", "B12", "Z99")]
    parts = [tiny("llama", seed=seed, vocab_size=len(tokenizer)) for seed in range(2)]
    pair = rc_agents.couple(parts[0], {"medical": parts[1]}, alignment="shared")
    wake(pair)
    for model in (tiny("llama", vocab_size=len(tokenizer)), pair):
        subject = measure.Subject(model, tokenizer)
        assert subject.answer(prompts) == [subject.answer([prompt])[0] for prompt in prompts]


def test_the_report_shows_the_results_and_escapes_text(tmp_path):
    share = {"value": 0.5, "hits": 1, "count": 2, "wilson_95": (0.1, 0.9)}
    ppl = {"value": 12.0, "documents": 1, "tokens": 9}
    results = {
        "answers": [
            {"code": "A00", "title": "Cholera", "frozen anchor": "<b>", "ensemble": "Cholera"}
        ],
        "accuracy": {"ensemble": {"exact_match": share, "choice_of_10": share}},
        "perplexity": {"general": {"frozen anchor": ppl, "ensemble": ppl, "change": 0.0}},
        "latency": {"handoff": {"median_s": 2.0, "all_s": [2.0], "right": 1, "count": 1}},
        "provenance": provenance(0),
        "settings": {},
        "seconds": 1.0,
    }
    json.dumps(results)
    page = report.write(results, tmp_path).read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page
    assert "50.0 % (1/2" in page
    assert page.count("<svg") == 2


def test_a_figure_names_its_commit():
    assert git_hash() == "none" or len(git_hash().split("+")[0]) == 12


@pytest.mark.real
@pytest.mark.slow
def test_the_shipped_ensemble_answers_held_out_questions():
    model = needs(rc_agents.CoupledForCausalLM.from_pretrained, "package:demo")
    chosen = facts.load().held_out[::5]
    frozen = measure.exact_match(measure.Subject(model, model.tokenizer, []), chosen)
    ensemble = measure.exact_match(measure.Subject(model, model.tokenizer), chosen)
    assert frozen.value < 0.1
    assert ensemble.value > 0.5


@pytest.mark.parametrize("given", [[], ["--offline"]])
def test_offline_bars_the_hub(given, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("rc_agents.demo.run.run", lambda _: asked.append(is_offline_mode()))
    command_line(["demo", "--output", str(tmp_path), *given])
    assert asked == [bool(given)]


def test_the_demo_prints_what_it_measured_as_json(monkeypatch, tmp_path, capsys):
    def shown(config):
        print("    ensemble       Plague")
        return {"settings": {"seed": config.seed}, "accuracy": {"ensemble": 0.5}}

    monkeypatch.setattr("rc_agents.demo.run.run", shown)
    words = ["demo", "--output", str(tmp_path), "--seed", "3"]
    assert command_line([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    expected = {"settings": {"seed": 3}, "accuracy": {"ensemble": 0.5}, "path": str(tmp_path)}
    assert json.loads(out) == expected
    assert err == "    ensemble       Plague\n"
    assert command_line(words) == 0
    assert capsys.readouterr() == ("    ensemble       Plague\n", "")


@pytest.mark.real
def test_everything_the_demo_reads_is_on_this_machine(monkeypatch):
    def refuse(*_):
        raise AssertionError("the demo opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = needs(rc_agents.CoupledForCausalLM.from_pretrained, "package:demo")
    assert needs(facts.load).held_out
    assert all(needs(texts.split, kind).test for kind in packaged.TEXTS)
    assert set(model.names) == {"anchor", "medical", "code"}
