"""A GGUF file to a Hugging Face folder: float32 safetensors, tokenizer with its chat template."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def convert(gguf: Path, target: Path, *, name: str, progress: bool) -> None:
    """Writes the Hugging Face form of a GGUF model to `target`.

    Args:
        gguf: the model's file.
        target: folder to make.
        name: what the progress bar calls it.
        progress: whether to show that bar.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with (
        _quiet_transformers(),
        tqdm(total=4, desc=f"converting {name}", disable=not progress) as bar,
    ):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        bar.update()
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        bar.update()
        _mend_tokenizer(tokenizer, model.config)
        tokenizer.save_pretrained(target)
        bar.update()
        model.save_pretrained(target)
        bar.update()


def _mend_tokenizer(tokenizer: Any, config: Any) -> None:
    """Puts back what reading a GGUF file loses: the context length, and SmolLM2's single digits.

    The file says `tokenizer.ggml.pre = "smollm"`, every digit a token of its own and byte-level
    splitting after that; transformers builds the splitting of GPT-2 instead, which differs where
    digits follow spaces.
    """
    from tokenizers import pre_tokenizers

    tokenizer.model_max_length = config.max_position_embeddings
    if config.model_type == "llama":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bars inside ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
