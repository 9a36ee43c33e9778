"""Tiny random models with a tokenizer and text of their own, made at run time: they check a suite, not a claim.

`tiny:llama` and `tiny:gpt2` name them wherever a model's id may stand, `tiny:llama-2` the same with other weights.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rc_agents import packaged
from rc_agents.errors import ConfigError, nearest

PREFIX = "tiny:"
VOCABULARY, CONTEXT, WIDTH, FORMAT = 512, 2048, 32, 2
SPECIAL = ["<pad>", "<s>", "</s>"]
NOUNS = [
    "river",
    "town",
    "doctor",
    "answer",
    "morning",
    "road",
    "teacher",
    "child",
    "letter",
    "garden",
    "window",
    "bridge",
]
VERBS = ["sees", "finds", "asks", "tells", "keeps", "leaves"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CONFIGS: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        **_shared(),
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=WIDTH, n_layer=6, n_head=4, n_positions=CONTEXT, **_shared()
    ),
}


def _shared() -> dict[str, Any]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, **ids}


def place(name: str) -> str:
    """Returns what a model is loaded from: the folder of a stand-in, any other name as it is."""
    return str(path(name)) if name.startswith(PREFIX) else name


def path(name: str) -> Path:
    """Returns the folder of a stand-in, made now where it is missing.

    Raises:
        ConfigError: no such architecture.
    """
    kind, _, number = name.removeprefix(PREFIX).partition("-")
    if kind not in CONFIGS:
        raise ConfigError(f"no stand-in is called {name!r}; {nearest(kind, list(CONFIGS))}")
    folder = packaged.cache_dir() / "stand_ins" / f"{kind}-{number or 0}-v{FORMAT}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(name.encode()))
                model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
            _tokenizer().save_pretrained(folder)
            model.save_pretrained(folder)  # its config comes last
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(text(), trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHAT, **names)


def text() -> list[str]:
    """Returns documents of made-up sentences, all different."""
    rng = random.Random("stand-ins")

    def sentence() -> str:
        one, other = rng.sample(NOUNS, 2)
        return f"The {one} of {rng.randint(2, 999)} {rng.choice(VERBS)} the {other} {rng.randint(2, 999)} times."

    return [" ".join(sentence() for _ in range(6)) for _ in range(120)]
