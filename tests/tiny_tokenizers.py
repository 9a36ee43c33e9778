"""Small real tokenizers with different vocabularies, trained at run time on the text below.

Three kinds, as they differ in the field:

- ``prose``: byte-level BPE, adds no special token by itself (GPT-2, Qwen, SmolLM2).
- ``code``: byte-level BPE over other text, single digits, adds bos (Llama 3).
- ``metaspace``: BPE over characters with "▁" for spaces and byte fallback, adds bos (Llama 2, Gemma).

All three give pad, bos and eos the ids 0, 1 and 2.
"""

import functools
import json
from collections.abc import Callable

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ["<pad>", "<s>", "</s>"]

PROSE = """\
The river came down from the hills in spring, and the people of the town went to the bank to see it.
Some of them said that the water was higher than it had been in any year that they could remember.
The doctor said that the patient had a fever and that the medicine should be taken with water.
There are three things that a good answer needs: a question, a reason, and the time to think.
When the morning came, the children walked along the road to the school, and the teacher was there.
What is the name of the city where the two rivers meet? It is the one that stands on the hill.
Acute infection of the upper airways is common in the winter and in the early spring of the year.
She wrote that nothing in the world was as quiet as the house after the other people had left it.
"""

CODE = """\
def add(left: int, right: int) -> int:
    return left + right

class Reader:
    def __init__(self, path):
        self.path = path
        self.lines = []

    def read(self):
        with open(self.path) as file:
            for line in file:
                self.lines.append(line.strip())
        return self.lines

for index in range(10):
    if index % 2 == 0:
        print(f"index = {index}")
    else:
        continue

import os, sys
values = {"a": 1, "b": 2, "c": [1, 2, 3]}
result = [value for value in values.values() if value is not None]
while True:
    try:
        result.append(None)
    except ValueError as error:
        raise RuntimeError("no result") from error
    break
"""

OTHER = """\
naïve café, déjà vu; der Fluß, die Straße; señor, mañana; здравствуй, мир; 你好，世界; שלום עולם
"""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "<s>{% for message in messages %}### {{ message['role'] }}:\n"
    "{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
BRACKETS = (
    "<s>{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] }}</s>{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}"
    "{% endfor %}"
)


def _prose() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    chat = ["<|im_start|>", "<|im_end|>"]
    _train_bytes(tokenizer, PROSE, vocab_size=400, special=SPECIAL + chat)
    return _wrap(tokenizer, CHATML, more=chat)


def _code() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|[^\S\n]+(?=\S)|\n+|\w+|[^\w\s]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train_bytes(tokenizer, CODE, vocab_size=360, special=SPECIAL)
    _add_bos(tokenizer)
    return _wrap(tokenizer, HEADERS)


def _metaspace() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=220, show_progress=False)
    trained.train_from_iterator((PROSE + CODE + OTHER).splitlines(), trainer)
    tokenizer = Tokenizer(_with_byte_fallback(trained))
    tokenizer.add_special_tokens([*SPECIAL, "<unk>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _add_bos(tokenizer)
    return _wrap(tokenizer, BRACKETS, unk_token="<unk>")


def _with_byte_fallback(trained: Tokenizer) -> models.BPE:
    """The trained merges behind special tokens and one token for each byte.

    The trainer has no way to ask for byte tokens that are not special.
    """
    model = json.loads(trained.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    return models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )


def _train_bytes(tokenizer: Tokenizer, text: str, *, vocab_size: int, special: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)


def _add_bos(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )


def _wrap(
    tokenizer: Tokenizer, chat_template: str, *, more: list[str] | None = None, **special: str
) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=more or [],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        **special,
    )
    wrapped.chat_template = chat_template
    return wrapped


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "prose": _prose,
    "code": _code,
    "metaspace": _metaspace,
}


@functools.cache
def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of that kind: trained once a session, shared by all who ask.

    Args:
        kind: "prose", "code" or "metaspace".
    """
    return KINDS[kind]()
