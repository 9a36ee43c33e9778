"""Hidden states that no training step changes, computed once and kept on disk.

In a unilateral topology the specialists hear nobody, and the anchor hears nothing before the first site: their states
are those of the frozen models in every step. A store keeps, for each example, the anchor's states behind the first
site's block and what each bridge reads at each site, already at the anchor's positions.

Files: `<key>/chunk-00012-<hash>.safetensors`, named by the hash of its bytes and put in place by one rename, so a
killed run goes on behind its last whole chunk and a damaged chunk is computed again. The key is the hash of all that
the states depend on. Shapes: B rows, T tokens of a row, D width.
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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from rc_agents.errors import TrainingError
from rc_agents.execution.exchange import EXCHANGE, Exchange
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.topology import ANCHOR
from rc_agents.training.data import Encoded

CHUNK = 64  # examples a file
ROWS = 16  # examples a pass
FORMAT = 1


class Recording(Exchange):
    """Nobody speaks; what every bridge into the anchor would read is kept."""

    found: dict[str, Tensor]

    def __call__(self, site: int, states: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the states as they came."""
        shown = self._show(site, states)
        if site == 0:
            self.found[ANCHOR] = states[ANCHOR]
        for edge in self.edges:
            read = self._source(edge, states, shown, states[ANCHOR])
            self.found[f"{edge.source}.{site}"] = read
        return states


@torch.no_grad()
def record(
    model: CoupledForCausalLM, input_ids: Tensor, attention_mask: Tensor
) -> dict[str, Tensor]:
    """Returns what does not change.

    Returns:
        `anchor`, its states (B, T, D) at the first site, and as `<specialist>.<site>` what it reads there.
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


@dataclass
class StateStore:
    """The states of one data set, example by example.

    Args:
        model: a unilateral ensemble.
        examples: the data set.
        folder: where stores lie; this one takes a folder of its own in it.
        progress: show a bar while states are computed.
    """

    model: CoupledForCausalLM
    examples: Sequence[Encoded]
    folder: Path
    progress: bool = True
    _open: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_constant(self.model)
        self.folder = Path(self.folder) / self._key()
        self._starts = [0] * len(self.examples)
        for chunk in range(0, len(self.examples), CHUNK):
            start = 0
            for index in range(chunk, min(chunk + CHUNK, len(self.examples))):
                self._starts[index] = start
                start += len(self.examples[index].ids)
        self._files = self._complete()

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Returns the states of some examples, (B, T, D) by name, right-padded with zeros."""
        parts: dict[str, list[Tensor]] = {}
        for index in indices:
            handle = self._handle(index // CHUNK)
            start = self._starts[index]
            end = start + len(self.examples[index].ids)
            for name in handle.keys():  # noqa: SIM118 - not a dict
                parts.setdefault(name, []).append(handle.get_slice(name)[start:end])
        return {
            name: torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
            for name, found in parts.items()
        }

    def _handle(self, chunk: int) -> Any:
        if chunk not in self._open:
            self._open[chunk] = safe_open(self._files[chunk], "pt")
        return self._open[chunk]

    def _key(self) -> str:
        """The hash of what the states depend on."""
        digest = hashlib.sha256()
        config = self.model.config
        about = {
            "format": FORMAT,
            "sites": self.model.sites,
            "edges": [edge.key for edge in self.model.edges],
            "alignment": config.alignment,
            "dtypes": {name: str(model.dtype) for name, model in self.model.models.items()},
            "weights": self.model.base_fingerprint(),
            "tokenizers": [
                hashlib.sha256(
                    json.dumps(sorted(tokenizer.get_vocab().items())).encode()
                ).hexdigest()
                for tokenizer in self.model.tokenizers.values()
                if tokenizer is not None
            ],
        }
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
        for example in self.examples:
            digest.update(json.dumps(example.ids).encode())
        return digest.hexdigest()[:24]

    def _complete(self) -> list[Path]:
        """Computes what is missing; returns the chunks' files."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"states cannot be kept in {self.folder}: {error.strerror}"
            ) from error
        starts = range(0, len(self.examples), CHUNK)
        found = [self._sound(number) for number in range(len(starts))]
        missing = [number for number, file in enumerate(found) if file is None]
        for number in tqdm(missing, desc="states", disable=not (self.progress and missing)):
            found[number] = self._make(number)
        return [file for file in found if file is not None]

    def _sound(self, number: int) -> Path | None:
        """Returns the file of a chunk if it is there and whole."""
        for file in sorted(self.folder.glob(f"chunk-{number:05}-*.safetensors")):
            if _hash(file) == file.stem.rsplit("-", 1)[1]:
                return file
            warnings.warn(f"{file} is damaged; its states are computed again", stacklevel=4)
            file.unlink()
        return None

    def _make(self, number: int) -> Path:
        examples = self.examples[number * CHUNK : (number + 1) * CHUNK]
        parts: dict[str, list[Tensor]] = {}
        order = sorted(range(len(examples)), key=lambda place: len(examples[place].ids))
        by_place: dict[int, dict[str, Tensor]] = {}
        for start in range(0, len(order), ROWS):
            places = order[start : start + ROWS]
            by_place |= dict(zip(places, self._run([examples[p] for p in places]), strict=True))
        for place in range(len(examples)):
            for name, states_TD in by_place[place].items():
                parts.setdefault(name, []).append(states_TD)
        tensors = {name: torch.cat(found).contiguous() for name, found in parts.items()}
        handle, scratch = tempfile.mkstemp(dir=self.folder, prefix=".making-")
        os.close(handle)
        try:
            save_file(tensors, scratch)
            target = self.folder / f"chunk-{number:05}-{_hash(Path(scratch))}.safetensors"
            os.replace(scratch, target)
        except OSError as error:
            Path(scratch).unlink(missing_ok=True)
            raise TrainingError(f"states cannot be kept in {self.folder}: {error}") from error
        return target

    def _run(self, examples: Sequence[Encoded]) -> list[dict[str, Tensor]]:
        device = self.model.device
        rows = [torch.tensor(example.ids, device=device) for example in examples]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True
        )
        found = record(self.model, ids, mask)
        return [
            {name: states[row, : len(example.ids)].cpu() for name, states in found.items()}
            for row, example in enumerate(examples)
        ]


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
