"""Tiny random encoders of real architectures, and what they are shown."""

import zlib
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

SIZE, SAMPLES = 16, 400
_BLOCKS = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_PICTURE = {**_BLOCKS, "image_size": SIZE, "patch_size": 8}
_SOUND = {
    **_BLOCKS,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTConfig", _PICTURE),
    "clip": ("CLIPVisionConfig", _PICTURE),
    "siglip": ("SiglipVisionConfig", _PICTURE),
    "wav2vec2": ("Wav2Vec2Config", _SOUND),
}
PICTURES = ("vit", "clip", "siglip")


def tiny_encoder(kind: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A tiny frozen float32 encoder in eval mode, the same for the same arguments."""
    name, usual = CONFIGS[kind]
    config = getattr(transformers, name)(**{**usual, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + zlib.crc32(kind.encode()))
        model = AutoModel.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def shown(kind: str, rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a kind of encoder, (rows, ...); sounds of different lengths, with their mask."""
    generator = torch.Generator().manual_seed(seed)
    if kind in PICTURES:
        return {"pixel_values": torch.randn(rows, 3, SIZE, SIZE, generator=generator)}
    lengths = torch.tensor([SAMPLES - 60 * row for row in range(rows)])
    mask = (torch.arange(SAMPLES) < lengths[:, None]).long()
    values = torch.randn(rows, SAMPLES, generator=generator) * mask
    return {"input_values": values, "attention_mask": mask}
