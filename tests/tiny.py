"""A zoo of tiny random models of real architectures, built from their configs at run time."""

import copy
import functools
import io
import pickle
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.tiny_tokenizers import BOS, EOS, PAD, tiny_tokenizer

HEADS = 4
CONTEXT = 256
SPECIAL_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}

Settings = Callable[[int, int], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one architecture is made tiny.

    Args:
        config: name of its config class in transformers.
        layers: default number of blocks.
        width: default width of its residual stream.
        sizes: (layers, width) to the config's arguments that say its size.
        extra: (layers, width) to the arguments that only this architecture has.
    """

    config: str
    layers: int
    width: int
    sizes: Settings
    extra: Settings = lambda layers, width: {}


def _sizes(layers: int, width: int) -> dict[str, Any]:
    """The names of sizes that most architectures agree on."""
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": CONTEXT,
    }


def _sizes_gpt2(layers: int, width: int) -> dict[str, Any]:
    return {"n_embd": width, "n_layer": layers, "n_head": HEADS, "n_positions": CONTEXT}


def _sizes_opt(layers: int, width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
    }


def _sizes_bloom(layers: int, width: int) -> dict[str, Any]:
    return {"hidden_size": width, "n_layer": layers, "n_head": HEADS}


def _sizes_falcon(layers: int, width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "ffn_hidden_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_kv_heads": HEADS // 2,
        "new_decoder_architecture": True,
        "max_position_embeddings": CONTEXT,
    }


def _sizes_mamba2(layers: int, width: int) -> dict[str, Any]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_heads": HEADS} | {
        "head_dim": 2 * width // HEADS,
        "state_size": 16,
        "n_groups": 1,
        "chunk_size": 8,
    }


def _alternating(first: str, second: str, layers: int) -> list[str]:
    return [first if layer % 2 == 0 else second for layer in range(layers)]


def _sliding(window: int) -> Settings:
    """Every second block sees only the last `window` tokens."""

    def extra(layers: int, width: int) -> dict[str, Any]:
        kinds = _alternating("sliding_attention", "full_attention", layers)
        return {"head_dim": width // HEADS, "sliding_window": window, "layer_types": kinds}

    return extra


def _head_dim(layers: int, width: int) -> dict[str, Any]:
    return {"head_dim": width // HEADS}


def _lfm2(layers: int, width: int) -> dict[str, Any]:
    return {"layer_types": _alternating("conv", "full_attention", layers), "conv_L_cache": 3}


def _bamba(layers: int, width: int) -> dict[str, Any]:
    """State-space blocks, with attention in the second and every second one after it."""
    return {
        "attn_layer_indices": list(range(1, layers, 2)),
        "mamba_n_heads": HEADS,
        "mamba_d_head": 2 * width // HEADS,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    }


def _experts(layers: int, width: int) -> dict[str, Any]:
    return {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width // 2,
        "head_dim": width // HEADS,
    }


RECIPES = {
    "llama": Recipe(config="LlamaConfig", layers=4, width=32, sizes=_sizes),
    "gpt2": Recipe(config="GPT2Config", layers=6, width=48, sizes=_sizes_gpt2),
    "qwen2": Recipe(config="Qwen2Config", layers=5, width=40, sizes=_sizes),
    "qwen3": Recipe(config="Qwen3Config", layers=3, width=32, sizes=_sizes, extra=_head_dim),
    "mistral": Recipe(
        config="MistralConfig",
        layers=4,
        width=40,
        sizes=_sizes,
        extra=lambda layers, width: {"sliding_window": None},
    ),
    "gemma2": Recipe(config="Gemma2Config", layers=4, width=32, sizes=_sizes, extra=_sliding(8)),
    "gemma3_text": Recipe(
        config="Gemma3TextConfig", layers=6, width=40, sizes=_sizes, extra=_sliding(4)
    ),
    "phi3": Recipe(config="Phi3Config", layers=3, width=48, sizes=_sizes),
    "opt": Recipe(config="OPTConfig", layers=5, width=32, sizes=_sizes_opt),
    "gpt_neox": Recipe(
        config="GPTNeoXConfig",
        layers=4,
        width=48,
        sizes=_sizes,
        extra=lambda layers, width: {"rotary_pct": 4 * HEADS / width},
    ),
    "bloom": Recipe(config="BloomConfig", layers=3, width=40, sizes=_sizes_bloom),
    "falcon": Recipe(config="FalconConfig", layers=5, width=48, sizes=_sizes_falcon),
    "olmo2": Recipe(config="Olmo2Config", layers=4, width=32, sizes=_sizes),
    "granite": Recipe(
        config="GraniteConfig",
        layers=5,
        width=40,
        sizes=_sizes,
        extra=lambda layers, width: {"embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    ),
    "cohere": Recipe(
        config="CohereConfig",
        layers=3,
        width=32,
        sizes=_sizes,
        extra=lambda layers, width: {"logit_scale": 1.0},
    ),
    "lfm2": Recipe(config="Lfm2Config", layers=4, width=48, sizes=_sizes, extra=_lfm2),
    "mamba2": Recipe(config="Mamba2Config", layers=4, width=32, sizes=_sizes_mamba2),
    "bamba": Recipe(config="BambaConfig", layers=4, width=40, sizes=_sizes, extra=_bamba),
    "mixtral": Recipe(
        config="MixtralConfig",
        layers=3,
        width=32,
        sizes=_sizes,
        extra=lambda layers, width: {"num_local_experts": 4},
    ),
    "qwen3_moe": Recipe(config="Qwen3MoeConfig", layers=4, width=40, sizes=_sizes, extra=_experts),
}


def tiny_config(
    arch: str, *, vocab_size: int = 96, layers: int | None = None, width: int | None = None
) -> PreTrainedConfig:
    """The config of a tiny model; see `tiny`."""
    recipe = RECIPES[arch]
    layers, width = layers or recipe.layers, width or recipe.width
    settings = recipe.sizes(layers, width) | recipe.extra(layers, width) | SPECIAL_IDS
    return getattr(transformers, recipe.config)(vocab_size=vocab_size, **settings)


def tiny(
    arch: str,
    *,
    vocab_size: int = 96,
    seed: int = 0,
    layers: int | None = None,
    width: int | None = None,
) -> PreTrainedModel:
    """A tiny frozen float32 model in eval mode, the same for the same arguments.

    Args:
        arch: a key of `RECIPES`.
        vocab_size: number of tokens; ids 0, 1, 2 are pad, bos, eos.
        seed: of the weights; the global generator is left as it was.
        layers: number of blocks, the recipe's own by default.
        width: of the residual stream, a multiple of 8; the recipe's own by default.
    """
    return _template(arch, vocab_size, seed, layers, width).copy()


class _Template:
    """A model to be copied: what `copy.deepcopy` does, in a sixth of the time (a twelfth of that of making one)."""

    def __init__(self, model: PreTrainedModel) -> None:
        written = io.BytesIO()
        writer = _Writer(written)
        writer.dump(model)
        self.written, self.kept = written.getvalue(), writer.kept

    def copy(self) -> PreTrainedModel:
        """A model that shares nothing with the others but its code."""
        return _Reader(io.BytesIO(self.written), self.kept).load()


class _Writer(pickle.Pickler):
    """Keeps tensors and functions aside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.kept: dict[int, Any] = {}

    def persistent_id(self, value: Any) -> int | None:
        """The key of what is kept aside; None for all else."""
        if not isinstance(value, torch.Tensor | types.FunctionType):
            return None
        self.kept[id(value)] = value
        return id(value)


class _Reader(pickle.Unpickler):
    """Copies tensors, each once however many share it, and takes functions as they are."""

    def __init__(self, file: io.BytesIO, kept: dict[int, Any]) -> None:
        super().__init__(file)
        self.kept = kept
        self.copied: dict[int, Any] = {}

    def persistent_load(self, key: int) -> Any:
        """What was kept aside under a key."""
        return copy.deepcopy(self.kept[key], self.copied)


@functools.lru_cache(256)
def _template(
    arch: str, vocab_size: int, seed: int, layers: int | None, width: int | None
) -> _Template:
    config = tiny_config(arch, vocab_size=vocab_size, layers=layers, width=width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + zlib.crc32(arch.encode()))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return _Template(model.eval().requires_grad_(False))


TINY: dict[str, Callable[..., PreTrainedModel]] = {
    arch: functools.partial(tiny, arch) for arch in RECIPES
}


def saved(folder: Path, arch: str, tokenizer: str, **settings: Any) -> Path:
    """Writes a tiny model with a tiny tokenizer's vocabulary to `folder/arch-tokenizer`.

    Args:
        folder: where to write, usually `tmp_path`.
        arch: a key of `RECIPES`.
        tokenizer: a kind of `tiny_tokenizer`.
        settings: more arguments of `tiny`.
    """
    path = folder / f"{arch}-{tokenizer}"
    chosen = tiny_tokenizer(tokenizer)
    tiny(arch, vocab_size=len(chosen), **settings).save_pretrained(path)
    chosen.save_pretrained(path)
    return path
