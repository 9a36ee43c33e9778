"""Checkpoints: what is saved is loaded, what does not fit is refused, a kill loses nothing."""

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
from rc_agents.errors import CheckpointError
from tests.ensembles import GREEDY, ensemble, own_state, prompts, wake
from tests.tiny import saved, tiny

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
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    wake(model, seed=9)
    monkeypatch.setattr(os, call, _fail_with(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=f"cannot save to {path}: No space left") as caught:
        model.save_pretrained(path)
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


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
for line in sys.stdin:
    path, what = line.split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this process has no other threads
        child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    model = rc_agents.CoupledForCausalLM.from_pretrained(path)
    print(os.getpid(), flush=True)
    for seed in itertools.count():
        wake(model, seed=seed % 2)
        model.save_pretrained(path, include_bases=what == "bases")
"""


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


@pytest.mark.parametrize("what", ["bridges", "bases"])
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(kept, savers, what, kills):
    model, path = kept
    ids, known = prompts(1), []
    for seed in (1, 0):
        wake(model, seed=seed)
        known.append(model(ids).logits)
    model.save_pretrained(path, include_bases=what == "bases")
    generator = torch.Generator().manual_seed(kills)
    for _ in range(kills):
        saver = savers(path, what)
        time.sleep(0.2 * float(torch.rand((), generator=generator)))
        os.kill(saver, signal.SIGKILL)
        logits = CoupledForCausalLM.from_pretrained(path)(ids).logits
        assert any(torch.equal(logits, one) for one in known)
        assert len(AutoTokenizer.from_pretrained(path)) == 400
    model.save_pretrained(path)
    assert not list(path.glob(".*"))
    assert len(list(path.glob("bridges-*"))) == 1


def test_a_saved_ensemble_generates_as_before(kept):
    model, path = kept
    again, ids = CoupledForCausalLM.from_pretrained(path), prompts()
    new = model.generate(ids, max_new_tokens=4, **GREEDY)
    assert torch.equal(again.generate(ids, max_new_tokens=4, **GREEDY), new)
    assert torch.equal(
        tiny("llama", width=32, vocab_size=400, layers=4)(ids).logits,
        again(ids, specialists=[]).logits,
    )
