"""Hidden states that no training step changes, computed once and kept on disk.

In a unilateral topology the specialists hear nobody, and the anchor hears nothing before the first site: their states
are those of the frozen models in every step. A store keeps, for each example, the anchor's states behind each site's
block while nobody speaks, and what each bridge reads there, already at the anchor's positions. What bridges read of
encoders changes with their pools, and is not kept.

Files: `<key>/chunk-<hash>.safetensors`, named by the hash of its bytes and put in place by one rename. The key is the
hash of the frozen models, their tokenizers and sites; a chunk says in its header which examples it holds, so other
seeds, splits and runs find those that they share, a killed run goes on behind its last whole chunk, and a damaged chunk
is computed again. Shapes: B rows, T tokens of a row, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from rc_agents import selection
from rc_agents.errors import TrainingError
from rc_agents.execution.exchange import EXCHANGE, Exchange
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import ANCHOR
from rc_agents.training.data import Encoded

CHUNK = 64  # examples a file
ROWS = 16  # examples a pass
FORMAT = 3


class Recording(Exchange):
    """Nobody speaks; what every bridge into the anchor would read is kept."""

    found: dict[str, Tensor]

    def __call__(self, site: int, states: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the states as they came."""
        shown = self._show(site, states)
        self.found[f"{ANCHOR}.{site}" if site else ANCHOR] = states[ANCHOR]
        for edge in self.edges:
            read = self._source(edge, site, states, shown, states[ANCHOR])
            self.found[f"{edge.source}.{site}"] = read
        return states


@torch.no_grad()
def record(
    model: CoupledForCausalLM, input_ids: Tensor, attention_mask: Tensor
) -> dict[str, Tensor]:
    """Returns what does not change.

    Returns:
        `anchor`, its states (B, T, D) at the first site, `anchor.<site>` at later ones as long as nobody speaks, and as
        `<specialist>.<site>` what it reads there.
    """
    found: dict[str, Tensor] = {}

    def exchange(*arguments: Any) -> Recording:
        made = Recording(*arguments)
        made.found = found
        return made

    token = EXCHANGE.set(exchange)
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=1)
    finally:
        EXCHANGE.reset(token)
    return found


def check_constant(model: CoupledForCausalLM) -> None:
    """Raises `TrainingError` unless every specialist's states are the same in every step."""
    moved = [edge for edge in model.edges if edge.target != ANCHOR]
    if moved or not model.edges:
        shown = ", ".join(f"{edge.source}->{edge.target}" for edge in moved) or "no edges"
        raise TrainingError(
            "states can be kept only where every edge leads into the anchor (topology='unilateral'); "
            f"this ensemble has {shown}: train without states="
        )
    if cut := selection.cut_names(model):
        raise TrainingError(
            f"states are kept for the whole ensemble, and {', '.join(sorted(cut))} is disabled here; leave the block"
        )
    if model.mixer.kind != ANCHOR:
        raise TrainingError(
            f"states replay the anchor's own output, and this ensemble mixes outputs (mix={model.mixer.kind!r}): train "
            "without states="
        )


@dataclass(frozen=True)
class _Place:
    """Where an example's states lie: rows `start` to `end` of a chunk."""

    file: Path
    start: int
    end: int


@dataclass
class StateStore:
    """The states of data sets, example by example.

    Args:
        model: a unilateral ensemble.
        folder: where stores lie; this one takes a folder of its own in it.
        progress: show a bar while states are computed.

    Raises:
        TrainingError: another topology, or a folder that cannot be written.
    """

    model: CoupledForCausalLM
    folder: Path
    progress: bool = True
    _places: dict[str, _Place] = field(default_factory=dict)
    _open: dict[Path, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_constant(self.model)
        self.folder = Path(self.folder) / _key(self.model)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"states cannot be kept in {self.folder}: {error.strerror}"
            ) from error
        for file in sorted(self.folder.glob("chunk-*.safetensors")):
            if _hash(file) == file.stem.removeprefix("chunk-"):
                self._learn(file)
            else:
                warnings.warn(f"{file} is damaged; its states are computed again", stacklevel=3)
                file.unlink()

    def complete(self, examples: Sequence[Encoded]) -> None:
        """Computes the states of those examples that are not there yet, and writes them."""
        missing = {_name(one): one for one in examples if _name(one) not in self._places}
        order = sorted(missing.values(), key=lambda one: len(one.ids))
        starts = range(0, len(order), CHUNK)
        for start in tqdm(starts, desc="states", disable=not (self.progress and order)):
            self._learn(self._make(order[start : start + CHUNK]))

    def rows(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Returns the states of examples, (B, T, D) by name, right-padded with zeros."""
        parts: dict[str, list[Tensor]] = {}
        for example in examples:
            place = self._places[_name(example)]
            if place.file not in self._open:
                self._open[place.file] = safe_open(place.file, "pt")
            handle = self._open[place.file]
            for name in handle.keys():  # noqa: SIM118 - not a dict
                parts.setdefault(name, []).append(handle.get_slice(name)[place.start : place.end])
        return {
            name: torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
            for name, found in parts.items()
        }

    def _learn(self, file: Path) -> None:
        with safe_open(file, "pt") as handle:
            start = 0
            for name, length in json.loads(handle.metadata()["examples"]):
                self._places[name] = _Place(file, start, start + length)
                start += length

    def _make(self, examples: Sequence[Encoded]) -> Path:
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(examples), ROWS):
            for found in self._run(examples[start : start + ROWS]):
                for name, states_TD in found.items():
                    parts.setdefault(name, []).append(states_TD)
        tensors = {name: torch.cat(found).contiguous() for name, found in parts.items()}
        about = {"examples": json.dumps([(_name(one), len(one.ids)) for one in examples])}
        handle, scratch = tempfile.mkstemp(dir=self.folder, prefix=".making-")
        os.close(handle)
        try:
            save_file(tensors, scratch, metadata=about)
            target = self.folder / f"chunk-{_hash(Path(scratch))}.safetensors"
            os.replace(scratch, target)
        except OSError as error:
            Path(scratch).unlink(missing_ok=True)
            raise TrainingError(f"states cannot be kept in {self.folder}: {error}") from error
        return target

    def _run(self, examples: Sequence[Encoded]) -> list[dict[str, Tensor]]:
        device = self.model.device
        rows = [torch.tensor(example.ids, device=device) for example in examples]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        ones = [torch.ones_like(row) for row in rows]
        mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
        found = record(self.model, ids, mask)
        return [
            {name: states[row, : len(example.ids)].cpu() for name, states in found.items()}
            for row, example in enumerate(examples)
        ]


def _key(model: CoupledForCausalLM) -> str:
    """The hash of what the states of any text depend on."""
    about = {
        "format": FORMAT,
        "sites": model.sites,
        "edges": [edge.key for edge in model.edges],
        "alignment": model.config.alignment,
        "dtypes": {name: str(one.dtype) for name, one in model.models.items()},
        "weights": model.base_fingerprint(),
        "configs": {name: one.config.to_dict() for name, one in model.models.items()},
        "adapters": {
            name: {key: _numbers(value) for key, value in getattr(one, "peft_config", {}).items()}
            for name, one in model.models.items()
        },
        "tokenizers": {
            name: hashlib.sha256(_rules(one).encode()).hexdigest()
            for name, one in model.tokenizers.items()
            if one is not None
        },
        "versions": [torch.__version__, transformers.__version__],
    }
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _numbers(config: Any) -> dict[str, Any]:
    """The numbers and switches of an adapter's config, such as its scaling."""
    return {key: value for key, value in vars(config).items() if isinstance(value, int | float)}


def _rules(tokenizer: Any) -> str:
    """All that decides how a tokenizer cuts text, as far as it can be read off."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(tokenizer.get_vocab().items()))
    )


def _name(example: Encoded) -> str:
    """What an example's states are found by: the hash of its tokens."""
    return hashlib.sha256(json.dumps(example.ids).encode()).hexdigest()[:24]


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
