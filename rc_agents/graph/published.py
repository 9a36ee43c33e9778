"""The published form: three small models encode, two larger ones hear them, one output node reads both.

Armstrong, Ayoobi and Mukherjee, 2026 (arXiv 2604.08335). The abstract gives the models, plain linear projections, the
mean, injection by residual hooks, a cross-attention output node and 17.6 M trained parameters. It gives no width, layer
or pooling; a latent width of 1,024 and an output width of 512, read at the last token, come to 17,567,744.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..assembly import Member
from ..backbone import skeleton
from ..config import ModelRef
from .config import GraphConfig
from .model import LatentGraph
from .settings import LatentConfig, NodeConfig, OutputConfig

LEVEL_ONE = {
    "llama": "meta-llama/Llama-3.2-1B",
    "qwen": "Qwen/Qwen2.5-1.5B",
    "gemma": "google/gemma-2-2b",
}
LEVEL_TWO = {
    "phi": "microsoft/Phi-3-mini-4k-instruct",
    "mistral": "mistralai/Mistral-7B-v0.1",
}
KINDS = {
    "llama": "llama",
    "qwen": "qwen2",
    "gemma": "gemma2",
    "phi": "phi3",
    "mistral": "mistral",
}
"""Model types of the published models."""
WIDTHS = {"llama": 2048, "qwen": 1536, "gemma": 2304, "phi": 3072, "mistral": 4096}
"""Of the residual streams of the published models."""


def published(
    models: Mapping[str, Any] | None = None,
    *,
    latent_width: int = 1024,
    output_width: int = 512,
    choices: int = 4,
) -> GraphConfig:
    """Returns the published graph.

    Args:
        models: other references by node (`llama`, `qwen`, `gemma`; `phi`, `mistral`), for example of smaller models.
        latent_width, output_width: 1,024 and 512 give the published count of parameters.
        choices: of a question.
    """
    refs = {**LEVEL_ONE, **LEVEL_TWO, **(models or {})}
    nodes = {name: NodeConfig(model=_ref(refs[name])) for name in LEVEL_ONE}
    nodes |= {
        name: NodeConfig(model=_ref(refs[name]), hears=tuple(LEVEL_ONE), at=0.5)
        for name in LEVEL_TWO
    }
    return GraphConfig(
        nodes=nodes,
        latent=LatentConfig(width=latent_width, normalize=False, aggregate="mean"),
        output=OutputConfig(width=output_width, heads=8, choices=choices),
    )


def _ref(value: Any) -> ModelRef:
    return value if isinstance(value, ModelRef) else ModelRef(base=str(value))


def num_parameters(config: GraphConfig, model_configs: Mapping[str, PreTrainedConfig]) -> int:
    """Counts what a graph trains without any weights, on the meta device.

    Args:
        config: the graph.
        model_configs: of each node's model.
    """
    members = {
        name: Member(name, node.model, skeleton(model_configs[name], torch.float32), None)
        for name, node in config.nodes.items()
    }
    with torch.device("meta"):
        return LatentGraph(config, members).num_trainable()


def published_configs() -> dict[str, PreTrainedConfig]:
    """Returns the five architectures at their published widths, shallow, as no count depends on depth."""
    return {
        name: AutoConfig.for_model(
            kind,
            hidden_size=WIDTHS[name],
            num_hidden_layers=2,
            vocab_size=64,
            intermediate_size=64,
            pad_token_id=0,
        )
        for name, kind in KINDS.items()
    }
