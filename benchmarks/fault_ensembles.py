"""The ensembles that faults strike, with bridges that are heard."""

from __future__ import annotations

import torch

import rc_agents


def tiny_ensemble(folder: str, seed: int = 0) -> None:
    """Saves three random tiny models, coupled all ways, with bridges that are heard."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(seed)
    models = [
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        for kind in ("llama", "qwen2", "mistral")
    ]
    model = rc_agents.couple(
        models[0], {"medical": models[1], "law": models[2]}, alignment="shared", sites=2
    )
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder, include_bases=True)


def real_ensemble(folder: str, seed: int = 0) -> None:
    """Saves SmolLM2-135M with a twin of its own, coupled both ways, with bridges that are heard."""
    place = "package:smollm2-135m"
    model = rc_agents.couple(place, {"twin": place}, topology="star_bilateral", dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            scale = 0.02 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
