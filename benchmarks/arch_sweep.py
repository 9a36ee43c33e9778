"""Tries every causal-LM type of the installed transformers: `make arch-sweep`, docs/architectures.md.

Each type is built tiny and random, coupled both ways with a tiny Llama, and must pass four checks. A type that
`rc_agents.couple` refuses is listed with its reason; one that cannot be built here, with what stood in the way.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rc_agents
from rc_agents import BridgeConfig, CoupledForCausalLM

LAYERS, WIDTH, VOCABULARY = 4, 32, 96
MOST_PARAMETERS = 30_000_000
SECONDS = 25

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), WIDTH
    ),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "hc_lowrank"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner"), 2 * WIDTH),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dim_ff"), 2 * WIDTH),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH // 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "indexer_n_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "d_head"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "indexer_head_dim"), 8),
    **dict.fromkeys(("qk_head_dim", "q_lora_rank", "kv_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "state_size"), 16),
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups", "num_mem_blocks"), 1),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "n_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    "sliding_window": 4,
    **dict.fromkeys(("image_size", "input_size"), 16),
    "patch_size": 8,
    "is_decoder": True,
}
"""Settings that make a model small, for every config that has them."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16},
    "prophetnet": {"num_encoder_layers": LAYERS},
    "qwen4_exp_text": {
        "indexer_kv_heads": 2,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * LAYERS},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single types need beside that."""

CHECKS = {
    "off": "untrained or disabled, the ensemble's logits are the frozen model's bit for bit (without gradients)",
    "heard": "with speaking bridges both models' logits change",
    "gradient": "the loss reaches every bridge, and no base weight",
    "cache": "six tokens decoded with a cache are those decoded without",
}


@dataclass
class Row:
    """What became of one type: `works`, `refused` by `couple`, `fails` a check, or `untried`."""

    kind: str
    state: str = "works"
    reason: str = ""
    checks: dict[str, bool] = field(default_factory=dict)


class Late(BaseException):
    """A type took longer than it may; no error of a model, so that nothing takes it for one."""


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raises `Late` in the block after so many seconds."""

    def ring(*_: Any) -> None:
        raise Late(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tiny_config(kind: str) -> PreTrainedConfig:
    """The config of a small model of a type."""
    return _small(CONFIG_MAPPING[kind], OVERRIDES.get(kind, {}))


def _small(make: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A config in which every size that it has is small, those of the configs in it too."""
    takes = inspect.signature(make.__init__).parameters
    sizes = {key: value for key, value in SIZES.items() if key in takes}
    if "kv_lora_rank" in takes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # keys are made for every head
    for part in set(make.sub_configs) & set(takes):
        inner = getattr(make(), part)
        if isinstance(inner, PreTrainedConfig):
            sizes[part] = _small(type(inner), overrides.get(part, {}))
    sizes |= overrides
    kinds = getattr(make(**sizes), "layer_types", None) if "layer_types" in takes else None
    if kinds and len(kinds) != LAYERS:
        sizes["layer_types"] = (list(dict.fromkeys(kinds)) * LAYERS)[:LAYERS]
    return make(**sizes)


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random float32 model, frozen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def llama() -> PreTrainedModel:
    """The model that every type is coupled with."""
    return tiny_model(tiny_config("llama"), seed=1)


def coupled(
    anchor: PreTrainedModel, other: PreTrainedModel, start: Literal["zero", "default"]
) -> CoupledForCausalLM:
    """Two models at two sites, with bridges that speak where `start` is "default"."""
    torch.manual_seed(0)
    bridge = BridgeConfig(start=start, gate_init=1.0)
    return rc_agents.couple(anchor, {"other": other}, alignment="shared", sites=2, bridge=bridge)


def check(config: PreTrainedConfig) -> dict[str, bool]:
    """Runs the four checks on one type; see `CHECKS`."""
    ids = torch.randint(1, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(0))
    as_anchor = coupled(tiny_model(config), llama(), "default")
    as_specialist = coupled(llama(), tiny_model(config), "default")
    with torch.no_grad():
        frozen = tiny_model(config)(input_ids=ids, use_cache=False).logits
        off = [coupled(tiny_model(config), llama(), "zero")(ids).logits]
        with as_anchor.disabled():
            off.append(as_anchor(ids).logits)
        with as_specialist.disabled():
            alone = as_specialist(ids).logits
        heard = [
            not torch.equal(as_anchor(ids).logits, frozen),
            not torch.equal(as_specialist(ids).logits, alone),
        ]
    return {
        "off": all(torch.equal(logits, frozen) for logits in off),
        "heard": all(heard),
        "gradient": _learns(as_anchor, ids) and _learns(as_specialist, ids),
        "cache": _caches(as_anchor, ids) and _caches(as_specialist, ids),
    }


def _learns(model: CoupledForCausalLM, ids: Tensor) -> bool:
    steered = model(ids, output_steered=True).steered_logits
    assert steered is not None
    sum(logits.logsumexp(-1).mean() for logits in steered.values()).backward()
    reached = [p.grad is not None and bool(p.grad.any()) for _, p in model.trainable_parameters()]
    bases = [p for one in model.models.values() for p in one.parameters()]
    return all(reached) and not any(p.grad is not None for p in bases)


def _caches(model: Any, ids: Tensor) -> bool:
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, **settings)
    return torch.equal(
        cached, model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    )


def one_line(error: BaseException) -> str:
    """The error's type and text, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def attempt(kind: str) -> Row:
    """Tries one type."""
    try:
        with limit(SECONDS):
            config = tiny_config(kind)
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(config).num_parameters()
            if size > MOST_PARAMETERS:
                return Row(kind, "untried", f"no tiny config: {size / 1e6:.0f} M parameters")
            model, ids = tiny_model(config), torch.arange(1, 8)[None]
            model(input_ids=ids, use_cache=False)
    except Late as error:
        return Row(kind, "untried", f"not built in {error}")
    except Exception as error:
        return Row(kind, "untried", f"no tiny model: {one_line(error)}")
    try:
        with limit(SECONDS):
            checks = check(config)
    except Late as error:
        return Row(kind, "untried", f"the checks take {error}")
    except rc_agents.RCError as error:
        refused = type(error).__name__ == "ModelError"
        return Row(kind, "refused" if refused else "fails", str(error).splitlines()[0])
    except Exception as error:
        return Row(kind, "fails", one_line(error))
    failed = [CHECKS[name] for name, passed in checks.items() if not passed]
    if not failed:
        return Row(kind, checks=checks)
    alone = "" if checks["cache"] or _caches(model, ids) else " (nor does the model alone)"
    return Row(kind, "fails", "it does not hold that " + "; ".join(failed) + alone, checks)


def page(rows: list[Row], date: str) -> str:
    """The support table as Markdown."""
    by_state = {
        state: [row for row in rows if row.state == state]
        for state in ("works", "refused", "fails", "untried")
    }
    counts = ", ".join(f"{len(found)} {state}" for state, found in by_state.items())
    lines = [
        "# Which architectures couple",
        "",
        f"Written by `make arch-sweep` on {date} with transformers {transformers.__version__} and "
        f"torch {torch.__version__}. All {len(rows)} causal-LM types of that transformers, built tiny and random and "
        f"coupled with a tiny Llama, as anchor and as specialist: {counts}.",
        "",
        "A type works when all four hold:",
        "",
        *[f"- *{name}*: {text}" for name, text in CHECKS.items()],
        "",
        f"## Works ({len(by_state['works'])})",
        "",
        ", ".join(f"`{row.kind}`" for row in by_state["works"]) or "none",
    ]
    titles = {
        "refused": "Refused by `couple`, with the reason",
        "fails": "Fails a check",
        "untried": "Could not be tried here",
    }
    for state, title in titles.items():
        lines += ["", f"## {title} ({len(by_state[state])})", ""]
        if by_state[state]:
            lines += ["| type | why |", "|---|---|"]
            lines += [
                f"| `{row.kind}` | {row.reason.replace('|', '/')} |" for row in by_state[state]
            ]
        else:
            lines += ["None."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Tries the types that are named, or all of them and writes the page; a JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types; all by default")
    parser.add_argument("--output", type=Path, default=Path("docs/architectures.md"))
    chosen = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of the types' own code, which is not ours to mend
    torch.set_num_threads(1)
    rows = []
    for kind in chosen.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append(attempt(kind))
        print(f"{kind:28} {rows[-1].state:8} {rows[-1].reason}", flush=True)
    if not chosen.kinds:
        date = datetime.date.today().isoformat()
        chosen.output.write_text(page(rows, date), encoding="utf-8")
    states = [row.state for row in rows]
    print(json.dumps({state: states.count(state) for state in sorted(set(states))}))


if __name__ == "__main__":
    main()
