"""The README of a checkpoint, with the front matter that the hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import ModelRef
from .identity import state_of

if TYPE_CHECKING:
    from ..modeling import CoupledForCausalLM


def model_card(ensemble: CoupledForCausalLM, config: Mapping[str, Any]) -> str:
    """Returns the model card of an ensemble that is saved with `config`."""
    refs = {name: ModelRef(**config["models"][name]) for name in ensemble.names}
    bases = sorted({str(part) for ref in refs.values() for part in (ref.base, ref.adapter) if part})
    lines = ["---", "library_name: rc_agents", "tags: [residual-coupling]", "base_model:"]
    lines += [f"- {json.dumps(base)}" for base in bases]
    lines += ["---", "", "# Coupled frozen language models", ""]
    lines += ["| model | from | tokens meet the anchor's |", "|---|---|---|"]
    how = config["alignment"] or {}
    lines += [f"| {name} | {ref} | {how.get(name, '-')} |" for name, ref in refs.items()]
    edges = ", ".join(f"{edge.source} -> {edge.target}" for edge in ensemble.edges) or "none"
    lines += ["", f"Edges: {edges}. Sites (anchor blocks): {[row[0] for row in ensemble.sites]}."]
    count = sum(tensor.numel() for tensor in state_of(ensemble).values())
    included = "are" if config["bases_included"] else "are not"
    lines += [
        f"Bridges: {json.dumps(config['bridge'])}, {count:,} values. Base weights {included} included.",
        *(
            f"Those of {edge.source} -> {edge.target}: {json.dumps(config['edge_bridges'][edge.key])}."
            for edge in ensemble.edges
            if edge.key in (config.get("edge_bridges") or {})
        ),
        "",
        "```python",
        "import rc_agents",
        'model = rc_agents.CoupledForCausalLM.from_pretrained("...")',
        "```",
    ]
    return "\n".join(lines) + "\n"
