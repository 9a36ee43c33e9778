"""Checkpoints: what is saved is loaded, what does not fit is refused, a kill loses nothing."""

import copy
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load as loaded
from safetensors.torch import load_file, save
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import rc_agents
from rc_agents import BridgeConfig, CoupledForCausalLM, ModelRef, backbone
from rc_agents.errors import CheckpointError, ConfigError, TokenError
from tests.ensembles import GREEDY, ensemble, own_state, prompts, wake
from tests.tiny import saved, tiny
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.tiny

FORMS = {
    "linear": {},
    "token": {"bridge": BridgeConfig(gate="token"), "mix": "learned"},
    "random": {"bridge": BridgeConfig(kind="random"), "topology": [("medical", "anchor")]},
    "low_rank": {"bridge": BridgeConfig(kind="low_rank", rank=2), "topology": "star_bilateral"},
    "moe": {"bridge": BridgeConfig(kind="moe")},
    "alone": {},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A Llama and a GPT-2 on disk, of equal width, with one tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    return [saved(folder, arch, "prose", width=32, layers=4) for arch in ("llama", "gpt2")]


@pytest.fixture
def kept(bases, tmp_path):
    """An ensemble whose bridges speak, and the folder it is saved in."""
    model = rc_agents.couple(bases[0], {"medical": bases[1]}, sites=2)
    wake(model)
    model.save_pretrained(tmp_path / "kept")
    return model, tmp_path / "kept"


def _contents(path):
    """Every file below a folder, and what it holds."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def _equal(one, other, ids=None):
    ids = prompts() if ids is None else ids
    return torch.equal(one(ids).logits, other(ids).logits)


# Round trips.


@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_ensemble_is_the_saved_one(bases, tmp_path, form):
    specialists = {} if form == "alone" else {"medical": bases[1]}
    model = rc_agents.couple(bases[0], specialists, sites=2, **FORMS[form])
    wake(model)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "saved")
    for load in (CoupledForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path / "saved")
        assert type(again) is CoupledForCausalLM
        assert _equal(again, model)
        assert again.config.to_dict() == model.config.to_dict()
        assert again.generation_config.max_new_tokens == 7
        assert not again.training
        assert again.tokenizer("The river") == model.tokenizer("The river")
        again.save_pretrained(tmp_path / "again")
        assert _equal(CoupledForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_what_lies_in_the_folder(kept):
    model, path = kept
    config = json.loads((path / "config.json").read_text())
    tensors = load_file(path / config["bridges_file"])
    assert tensors.keys() == own_state(model).keys()
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) < 100_000
    assert config["architectures"] == ["CoupledForCausalLM"]
    assert set(config["fingerprints"]) == {"anchor", "medical"}
    assert isinstance(AutoConfig.from_pretrained(path), rc_agents.CouplingConfig)
    assert AutoTokenizer.from_pretrained(path).chat_template == model.tokenizer.chat_template
    assert GenerationConfig.from_pretrained(path).eos_token_id == 2
    card = (path / "README.md").read_text()
    assert card.startswith("---\n")
    assert "base_model:\n- " in card
    for member in model.members.values():
        assert json.dumps(member.ref.base) in card
    assert not list(path.glob(".*"))


def test_live_models_are_saved_with_their_bases(tmp_path):
    model = ensemble("llama", "gpt2")
    with pytest.raises(CheckpointError, match="include_bases=True"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved", include_bases=True)
    again = CoupledForCausalLM.from_pretrained(tmp_path / "saved")
    assert _equal(again, model)
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    assert _equal(again, model)
    assert _equal(model, ensemble("llama", "gpt2"))  # the taps are back
    model.save_pretrained(tmp_path / "moved", include_bases=True)
    assert len(list((tmp_path / "moved" / "bases").iterdir())) == 2


def test_each_models_dtype_comes_back(bases, tmp_path):
    model = rc_agents.couple(
        bases[0], {"medical": bases[1]}, sites=2, dtype={"medical": torch.bfloat16}
    )
    wake(model)
    model.save_pretrained(tmp_path / "saved")
    again = CoupledForCausalLM.from_pretrained(tmp_path / "saved")
    assert [one.dtype for one in again.models.values()] == [torch.float32, torch.bfloat16]
    assert _equal(again, model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert [one.dtype for one in again.models.values()] == [torch.bfloat16, torch.bfloat16]
    again = CoupledForCausalLM.from_pretrained(tmp_path / "saved", dtype={"anchor": "float16"})
    assert [one.dtype for one in again.models.values()] == [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("included", [False, True], ids=["path", "included"])
def test_models_known_by_their_weights_load_in_another_dtype(bases, tmp_path, included):
    live = AutoModelForCausalLM.from_pretrained(bases[1])
    model = rc_agents.couple(bases[0], {"medical": live}, sites=2)
    model.save_pretrained(tmp_path / "saved", include_bases=included)
    again = CoupledForCausalLM.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert again.models["medical"].dtype == torch.bfloat16
    with torch.no_grad():
        live.transformer.wte.weight.mul_(2)
    changed = rc_agents.couple(bases[0], {"medical": live}, sites=2)
    changed.save_pretrained(tmp_path / "changed")
    with pytest.raises(CheckpointError, match="made for another 'medical'"):
        CoupledForCausalLM.from_pretrained(tmp_path / "changed", dtype="bfloat16")


def test_bases_in_a_checkpoint_are_known_from_elsewhere(kept, tmp_path):
    model, path = kept
    model.save_pretrained(path, include_bases=True)
    again = CoupledForCausalLM.from_pretrained(path, check_fingerprints=False)
    again.save_pretrained(tmp_path / "elsewhere")
    assert _equal(CoupledForCausalLM.from_pretrained(tmp_path / "elsewhere"), model)
    again.save_pretrained(path)
    shutil.rmtree(tmp_path / "elsewhere")
    moved = path.rename(tmp_path / "elsewhere")
    assert _equal(CoupledForCausalLM.from_pretrained(moved), model)


def test_an_ensemble_without_edges_comes_back(kept, tmp_path):
    model = rc_agents.couple(
        kept[0].members["anchor"].ref.base,
        {"medical": kept[0].members["medical"].ref.base},
        topology=[("medical", "anchor")],
        sites=2,
    )
    model.remove_specialist("medical")
    model.save_pretrained(tmp_path / "saved")
    again = CoupledForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.edges == ()
    assert _equal(again, model)


# Tokenizers.


@pytest.fixture
def bare(tmp_path):
    """A Llama and a GPT-2 on disk without tokenizers, for the vocabularies of `prose` and `code`."""
    paths = []
    for arch, kind in (("llama", "prose"), ("gpt2", "code")):
        paths.append(tmp_path / f"bare-{arch}")
        tiny(arch, vocab_size=len(tiny_tokenizer(kind)), width=32, layers=4).save_pretrained(
            paths[-1]
        )
    return paths


def test_tokenizers_that_were_passed_in_come_back(bare, tmp_path):
    given = {"anchor": tiny_tokenizer("prose"), "medical": tiny_tokenizer("code")}
    model = rc_agents.couple(bare[0], {"medical": bare[1]}, tokenizers=given, sites=2)
    wake(model)
    model.save_pretrained(tmp_path / "saved")
    again = CoupledForCausalLM.from_pretrained(tmp_path / "saved")
    ids = model.tokenizer("The river came down", return_tensors="pt").input_ids
    assert _equal(again, model, ids)
    for name, tokenizer in given.items():
        assert again.tokenizers[name]("The river").input_ids == tokenizer("The river").input_ids
        assert again.tokenizers[name].chat_template == tokenizer.chat_template
    again.save_pretrained(tmp_path / "again")
    assert _equal(CoupledForCausalLM.from_pretrained(tmp_path / "again"), model, ids)


def test_no_tokenizer_comes_back_as_none(bare, tmp_path):
    model = rc_agents.couple(bare[0], sites=2)
    model.members["anchor"].tokenizer = None
    model.save_pretrained(tmp_path / "saved")
    tiny_tokenizer("prose").save_pretrained(bare[0])
    assert CoupledForCausalLM.from_pretrained(tmp_path / "saved").tokenizer is None
    assert not list((tmp_path / "saved").glob("*token*"))


def test_the_template_comes_back(kept):
    model, path = kept
    for template in ("MINE", {"default": "D", "tool_use": "T"}, {"default": "D"}, "X", None):
        model.tokenizer.chat_template = template
        model.save_pretrained(path)
        found = CoupledForCausalLM.from_pretrained(path).tokenizer.chat_template
        plain = AutoTokenizer.from_pretrained(path).chat_template
        expected = "D" if template == {"default": "D"} else template
        assert found == plain == expected
        assert (path / "additional_chat_templates").exists() == (len(template or ()) == 2)
    assert not list(path.rglob("chat_template.jinja"))[1:]


def test_other_tokenizers_may_be_given(kept, bases):
    model, path = kept
    mine = AutoTokenizer.from_pretrained(bases[0])
    mine.chat_template = "GIVEN"
    again = CoupledForCausalLM.from_pretrained(path, tokenizers={"anchor": mine})
    assert again.tokenizer is mine
    assert _equal(again, model)
    other = {"medical": tiny_tokenizer("code")}
    with pytest.raises(TokenError, match="'medical' has another tokenizer than the anchor"):
        CoupledForCausalLM.from_pretrained(path, tokenizers=other)
    with pytest.raises(ConfigError, match="tokenizers names an unknown model 'medcal'"):
        CoupledForCausalLM.from_pretrained(path, tokenizers={"medcal": mine})


def test_checkpoints_of_before_take_the_tokenizers_of_their_bases(kept):
    model, path = kept
    for folder in path.glob("tokenizer-*"):
        shutil.rmtree(folder)
    config = json.loads((path / "config.json").read_text())
    kept_keys = {key: value for key, value in config.items() if not key.startswith("tokenizers")}
    (path / "config.json").write_text(json.dumps(kept_keys))
    again = CoupledForCausalLM.from_pretrained(path)
    assert _equal(again, model)
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


def test_equal_tokenizers_are_saved_once(kept):
    assert len(list(kept[1].glob("tokenizer-*"))) == 1


def test_another_base_brings_its_tokenizer(bases, tmp_path):
    code = saved(tmp_path, "gpt2", "code", width=32, layers=4)
    other = saved(tmp_path, "gpt2", "metaspace", width=32, layers=4)
    model = rc_agents.couple(bases[0], {"medical": code}, sites=2)
    model.save_pretrained(tmp_path / "saved")
    again = CoupledForCausalLM.from_pretrained(
        tmp_path / "saved", bases={"medical": other}, check_fingerprints=False
    )
    assert len(again.tokenizers["medical"]) == len(tiny_tokenizer("metaspace"))
    model = rc_agents.couple(bases[0], {"medical": bases[1]}, sites=2)
    model.save_pretrained(tmp_path / "shared")
    with pytest.raises(
        TokenError, match=r"needs the same ids everywhere, but model 'medical' knows 3\d\d ids"
    ):
        CoupledForCausalLM.from_pretrained(
            tmp_path / "shared", bases={"medical": code}, check_fingerprints=False
        )


def test_a_base_that_moved_is_named(bases, tmp_path):
    first = shutil.copytree(bases[1], tmp_path / "first")
    model = rc_agents.couple(bases[0], {"medical": first}, sites=2)
    wake(model)
    model.save_pretrained(tmp_path / "kept")
    moved = first.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"base of 'medical' is missing .*bases=\{'medical'"):
        CoupledForCausalLM.from_pretrained(tmp_path / "kept")
    again = CoupledForCausalLM.from_pretrained(tmp_path / "kept", bases={"medical": moved})
    assert _equal(again, model)
    again.save_pretrained(tmp_path / "kept")
    assert _equal(CoupledForCausalLM.from_pretrained(tmp_path / "kept"), model)


def test_an_adapter_specialist_comes_back(bases, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(bases[0])
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    ref = ModelRef(base=str(bases[0]), adapter=str(tmp_path / "adapter"))
    model = rc_agents.couple(bases[0], {"medical": ref}, sites=2)
    wake(model)
    shared = {id(one) for one in model.lm_anchor.parameters()}
    assert any(id(one) in shared for one in model.lm_medical.parameters())
    model.save_pretrained(tmp_path / "saved")
    again = CoupledForCausalLM.from_pretrained(tmp_path / "saved")
    assert _equal(again, model)
    with pytest.raises(CheckpointError, match="a base with an adapter; merge"):
        model.save_pretrained(tmp_path / "whole", include_bases=True)


def test_after_members_came_and_went(bases, tmp_path):
    model = rc_agents.couple(bases[0], {"medical": bases[1]}, sites=2, mix="sigmoid")
    wake(model)
    model.remove_specialist("medical")
    model.add_specialist("law", bases[1])
    wake(model)
    model.save_pretrained(tmp_path / "saved")
    again = CoupledForCausalLM.from_pretrained(tmp_path / "saved", schedule="threads")
    assert _equal(again, model)
    assert again.config.schedule == "threads"


def test_push_to_hub_uploads_the_checkpoint(kept, tmp_path, monkeypatch):
    model, _ = kept
    made = {}

    def create_repo(self, repo_id, **settings):
        made.update(repo_id=repo_id, **settings)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **settings):
        assert repo_id == made["repo_id"]
        shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    with pytest.warns(UserWarning, match="anchor, medical: loaded from a folder of this machine"):
        model.push_to_hub("someone/coupled", private=True)
    assert made == {"repo_id": "someone/coupled", "private": True, "exist_ok": True}
    assert _equal(CoupledForCausalLM.from_pretrained(tmp_path / "hub"), model)
    assert "base_model:" in (tmp_path / "hub" / "README.md").read_text()


def test_a_checkpoint_on_the_hub_is_loaded_with_its_bases(kept, tmp_path, monkeypatch):
    model, path = kept
    model.tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    model.save_pretrained(path, include_bases=True)
    repository = tmp_path / "cache" / "models--someone--coupled"
    commit = "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = shutil.copytree(path, repository / "snapshots" / commit)
    shutil.rmtree(snapshot / "bases")

    def download(repo_id, *, revision, allow_patterns, cache_dir):
        assert (repo_id, revision) == ("someone/coupled", commit)
        assert cache_dir == tmp_path / "cache"
        for pattern in allow_patterns:
            place = pattern.removesuffix("/*")
            shutil.copytree(path / place, snapshot / place)

    monkeypatch.setattr("rc_agents.checkpoint.loading.snapshot_download", download)
    again = CoupledForCausalLM.from_pretrained("someone/coupled", cache_dir=tmp_path / "cache")
    assert _equal(again, model)
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


# What does not fit is refused, and nothing is half-loaded.


def _edit(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def _rewrite(path, change):
    """Puts other bytes in place of the bridges, with the hash that fits them."""
    (file,) = path.glob("bridges-*")
    data = change(file.read_bytes())
    file.write_bytes(data)
    _edit(path, bridges_sha256=hashlib.sha256(data).hexdigest())


def _truncate(path):
    (file,) = path.glob("bridges-*")
    file.write_bytes(file.read_bytes()[:-100])


def _other_names(data):
    tensors = loaded(data)
    return save(tensors | {"more": tensors.pop(min(tensors))})


def _not_a_number(data):
    tensors = loaded(data)
    tensors[min(tensors)].fill_(torch.nan)
    return save(tensors)


DAMAGES = {
    "truncated": (_truncate, "is truncated or altered: its SHA-256"),
    "garbage": (lambda path: _rewrite(path, lambda data: data[:-100]), "is no safetensors file"),
    "names": (
        lambda path: _rewrite(path, _other_names),
        "do not fit this ensemble: 1 missing .* 1 unexpected .*more",
    ),
    "nan": (lambda path: _rewrite(path, _not_a_number), "holds NaN or infinite values"),
    "no bridges": (lambda path: next(path.glob("bridges-*")).unlink(), "has no bridges-"),
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "no json": (lambda path: (path / "config.json").write_text("{"), "is no JSON"),
    "a list": (lambda path: (path / "config.json").write_text("[]"), "of type 'list'"),
    "foreign": (lambda path: _edit(path, model_type="llama"), "holds a model of type 'llama'"),
    "incomplete": (lambda path: _edit(path, models={}), "is incomplete .*models"),
    "no model": (lambda path: _edit(path, models={"anchor": {}}), "no models of 'medical'"),
    "a tokenizer": (
        lambda path: next(path.glob("tokenizer-*/tokenizer.json")).write_text("{}"),
        "tokenizer.json is truncated or altered: its SHA-256",
    ),
    "no tokenizer": (
        lambda path: next(path.glob("tokenizer-*/tokenizer.json")).unlink(),
        "has no tokenizer-.*/tokenizer.json",
    ),
    "no names": (lambda path: _edit(path, names=[]), "is incomplete"),
    "no topology": (lambda path: _edit(path, topology=None), "is incomplete .*topology"),
    "no sites": (lambda path: _edit(path, site_layers=[[1]]), "is incomplete"),
    "unknown kind": (lambda path: _edit(path, bridge={"kind": "cubic"}), "unknown kind 'cubic'"),
    "too deep": (lambda path: _edit(path, site_layers=[[4, 9]]), "meet at block 9 of 'medical'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_a_sentence(kept, damage):
    _, path = kept
    spoil, message = DAMAGES[damage]
    spoil(path)
    with pytest.raises(ValueError, match=message) as caught:
        CoupledForCausalLM.from_pretrained(path)
    assert "\n" not in str(caught.value)


def test_the_auto_class_refuses_as_we_do(kept):
    _truncate(kept[1])
    with pytest.raises(CheckpointError, match="is truncated or altered"):
        AutoModelForCausalLM.from_pretrained(kept[1])


def test_another_base_is_refused(kept, tmp_path):
    model, path = kept
    other = saved(tmp_path / "other", "gpt2", "prose", width=32, layers=4, seed=5)
    with pytest.raises(CheckpointError, match="made for another 'medical': its fingerprint was"):
        CoupledForCausalLM.from_pretrained(path, bases={"medical": other})
    again = CoupledForCausalLM.from_pretrained(
        path, bases={"medical": other}, check_fingerprints=False
    )
    assert not _equal(again, model)
    again.save_pretrained(tmp_path / "again")
    assert _equal(CoupledForCausalLM.from_pretrained(tmp_path / "again"), again)
    wider = saved(tmp_path / "wider", "gpt2", "prose", width=48, layers=4)
    with pytest.raises(CheckpointError, match=r"has shape \(32, 32\), this ensemble needs"):
        CoupledForCausalLM.from_pretrained(path, bases={"medical": wider}, check_fingerprints=False)


def test_a_hub_base_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, prints = tmp_path / "models--owner--name", []
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        prints.append(backbone.fingerprint(ModelRef(base="owner/name")))
        assert backbone.fingerprint(ModelRef(base="owner/name", revision=commit)) == prints[-1]
    assert prints[0] != prints[1]


def test_bridges_of_another_base_are_not_added(kept, bases, tmp_path):
    _, path = kept
    other = saved(tmp_path / "other", "gpt2", "prose", width=32, layers=4, seed=5)
    model = rc_agents.couple(bases[0], sites=2)
    with pytest.raises(CheckpointError, match="made for another 'medical'"):
        model.add_specialist("medical", other, bridges=path)
    assert model.names == ["anchor"]


def test_a_missing_place_is_named():
    with pytest.raises(CheckpointError, match="no checkpoint at 'nobody/nothing'"):
        CoupledForCausalLM.from_pretrained("nobody/nothing")


# Saving is all or nothing.


def _fail_with(code):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("call", ["fsync", "mkdir"])
def test_a_full_disk_leaves_the_old_checkpoint(kept, monkeypatch, call):
    model, path = kept
    before = _contents(path)
    wake(model, seed=9)
    monkeypatch.setattr(os, call, _fail_with(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=f"cannot save to {path}: No space left") as caught:
        model.save_pretrained(path)
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert _contents(path) == before


def _fail_at(monkeypatch, name):
    """Makes the rename to a file of that name fail, as on a full disk."""
    replace = Path.replace

    def fail(self, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)


def test_another_ensemble_that_cannot_be_committed_changes_nothing(kept, tmp_path, monkeypatch):
    model, path = kept
    before = _contents(path)
    others = [saved(tmp_path, arch, "code", width=32, layers=4) for arch in ("llama", "gpt2")]
    other = rc_agents.couple(others[0], {"medical": others[1]}, sites=2)
    with monkeypatch.context() as patch:
        _fail_at(patch, "config.json")
        with pytest.raises(CheckpointError, match="an earlier checkpoint there is unchanged"):
            other.save_pretrained(path)
    after = _contents(path)
    assert {file: after[file] for file in before} == before
    assert all(file.startswith(("bridges-", "tokenizer-")) for file in after.keys() - before.keys())
    assert _equal(CoupledForCausalLM.from_pretrained(path), model)
    other.save_pretrained(path)
    assert len(AutoTokenizer.from_pretrained(path)) == len(other.tokenizer)
    assert len(list(path.glob("bridges-*"))) == len(list(path.glob("tokenizer-*"))) == 1
    model.save_pretrained(path)
    assert _contents(path) == before


def test_copies_for_other_tools_come_after_the_commit(kept, monkeypatch):
    model, path = kept
    wake(model, seed=9)
    model.tokenizer.chat_template = "MINE"
    with monkeypatch.context() as patch:
        _fail_at(patch, "README.md")
        with pytest.raises(CheckpointError, match=r"is saved, but not the copies .*; save again"):
            model.save_pretrained(path)
    again = CoupledForCausalLM.from_pretrained(path)
    assert _equal(again, model)
    assert again.tokenizer.chat_template == "MINE"


def test_files_of_the_user_stay(kept):
    model, path = kept
    theirs = ["notes.txt", "tokenizer-notes/a.txt", "bases/mine/model.txt", "bridges-old.txt"]
    for name in theirs:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
    wake(model, seed=9)
    model.save_pretrained(path, include_bases=True)
    model.save_pretrained(path)
    assert all((path / name).read_text() == "mine" for name in theirs)
    assert len(list(path.glob("bases/*-*"))) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_is_named(kept):
    model, path = kept
    path.chmod(0o500)
    with pytest.raises(CheckpointError, match=f"cannot save to {path}: Permission denied"):
        model.save_pretrained(path)
    path.chmod(0o700)


def test_a_read_only_file_system_is_named(kept, monkeypatch):
    model, path = kept
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: _fail_with(errno.EROFS)())
    with pytest.raises(CheckpointError, match=f"cannot save to {path}: Read-only file system"):
        model.save_pretrained(path)


def test_a_file_in_the_way_is_named(kept, tmp_path):
    model, _ = kept
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; save_pretrained needs a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot save to"):
        model.save_pretrained(tmp_path / "file" / "deeper")


NURSERY = """
import itertools, os, sys, warnings
import rc_agents
from tests.ensembles import wake
from tests.test_checkpoint import two_tokenizers
for line in sys.stdin:
    path, what = line.split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this process has no other threads
        child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    model = rc_agents.CoupledForCausalLM.from_pretrained(path)
    tokenizers = two_tokenizers()
    print(os.getpid(), flush=True)
    for seed in itertools.count():
        wake(model, seed=seed % 2)
        model.members["anchor"].tokenizer = tokenizers[seed % 2]
        model.save_pretrained(path, include_bases=what == "bases")
"""


def two_tokenizers():
    """Tokenizers that differ in a token, in a template and in how many templates they have."""
    one, two = (copy.deepcopy(tiny_tokenizer("prose")) for _ in range(2))
    one.chat_template = "one"
    two.add_tokens(["<two>"])
    two.chat_template = {"default": "two", "tool_use": "tools"}
    return one, two


@pytest.fixture(scope="module")
def savers():
    """A function that starts a process which saves to a folder without end; returns its id."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", NURSERY]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=root, **pipes) as nursery:

        def start(path, what):
            print(path, what, file=nursery.stdin, flush=True)
            return int(nursery.stdout.readline())

        yield start
        nursery.stdin.close()


@pytest.mark.parametrize(
    ("kills", "what"),
    [
        (3, "bridges"),
        *(
            pytest.param(kills, what, marks=pytest.mark.slow)
            for kills, what in ((3, "bases"), (10, "bridges"), (10, "bases"))
        ),
    ],
)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(kept, savers, what, kills):
    model, path = kept
    ids, known = prompts(1), []
    for seed, tokenizer in enumerate(two_tokenizers()):
        wake(model, seed=seed)
        known.append((model(ids).logits, len(tokenizer), tokenizer.chat_template))
    model.members["anchor"].tokenizer = tokenizer
    model.save_pretrained(path, include_bases=what == "bases")
    generator = torch.Generator().manual_seed(kills)
    for _ in range(kills):
        saver = savers(path, what)
        time.sleep(0.2 * float(torch.rand((), generator=generator)))
        os.kill(saver, signal.SIGKILL)
        again = CoupledForCausalLM.from_pretrained(path)
        logits, held = again(ids).logits, (len(again.tokenizer), again.tokenizer.chat_template)
        assert any(torch.equal(logits, one) and held == (*rest,) for one, *rest in known)
    model.save_pretrained(path)
    assert AutoTokenizer.from_pretrained(path).chat_template == known[1][2]
    assert not list(path.glob(".*"))
    assert len(list(path.glob("bridges-*"))) == 1
    assert len(list(path.glob("tokenizer-*"))) == 2  # the anchor's and the specialist's


def test_a_saved_ensemble_generates_as_before(kept):
    model, path = kept
    again, ids = CoupledForCausalLM.from_pretrained(path), prompts()
    new = model.generate(ids, max_new_tokens=4, **GREEDY)
    assert torch.equal(again.generate(ids, max_new_tokens=4, **GREEDY), new)
    assert torch.equal(
        tiny("llama", width=32, vocab_size=400, layers=4)(ids).logits,
        again(ids, specialists=[]).logits,
    )
