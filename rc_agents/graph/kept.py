"""States that no training step changes, computed once and kept on disk.

A node that hears nobody is the same in every step. One that hears at its last token alone is the same below the block
where it hears, and the keys and values of the tokens before the last are the same in all blocks, as no token sees a
later one: a step then runs one token through the upper blocks. One that hears everywhere runs its upper blocks whole.

Files: `<key>/<hash>.safetensors`, put in place by one rename. The key is the hash of a node's frozen model, blocks and
pooling; the name is the hash of the texts in it, so a killed run goes on behind its last whole file.

Shapes: T tokens of a text, D width, H heads of keys and values.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..backbone import cache_argument
from ..errors import TrainingError
from .frozen import FrozenNode
from .model import LatentGraph
from .parts import (
    STATES,
    Enough,
    condensed,
    keeps_cache,
    names_of,
    on_disk,
    parts_of,
    recorded,
    recording,
)
from .reading import Read, Texts, together, tokenize

CHUNK = 32  # texts a file and a pass
FORMAT = 1


@dataclass
class Kept:
    """The states of texts, node by node.

    Args:
        graph: whose nodes.
        folder: where files lie.
        progress: show a bar while states are computed.
        memory: bytes of rows that stay in memory once they were read.
    """

    graph: LatentGraph
    folder: Path
    progress: bool = True
    memory: int = 1 << 30
    places: dict[tuple[str, Read], tuple[Path, int]] = field(default_factory=dict)
    prints: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.graph.remote:
            raise TrainingError(
                f"states are kept of models in this process, and {min(self.graph.remote)!r} runs in another"
            )
        self.prints = self.graph.fingerprints()
        self.open: dict[Path, Any] = {}
        self.read: dict[tuple[str, Read], dict[str, Tensor]] = {}

    def key(self, name: str) -> str:
        """Returns the hash of all that a node's kept states depend on."""
        node = self.graph.nodes[name]
        hears = [node.at, node.node.position] if node.node.hears else None
        parts = [FORMAT, transformers.__version__, self.prints[name], str(node.model.dtype)]
        parts += [hears, node.layer, node.node.pooling]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def complete(self, texts: Texts) -> None:
        """Computes what is missing.

        Raises:
            TrainingError: the folder cannot be written, or a node's cache cannot be kept.
        """
        found = self.graph.texts_of(texts)
        jobs = [job for group in self._groups(found) for job in self._jobs(group, found[group[0]])]
        for names, chunk in tqdm(jobs, "frozen states", disable=not self.progress or not jobs):
            self._compute(names, chunk)

    def _groups(self, found: Mapping[str, Sequence[Read]]) -> Iterable[list[str]]:
        """Nodes of one model that read the same texts, which one pass serves."""
        groups: dict[tuple[str, str, int], list[str]] = {}
        for name, texts in found.items():
            tokens = id(self.graph.members[name].tokenizer)
            groups.setdefault((self.prints[name], _hash(texts), tokens), []).append(name)
        return groups.values()

    def _jobs(
        self, names: list[str], texts: Sequence[Read]
    ) -> Iterator[tuple[list[str], list[Read]]]:
        """Texts in chunks of like lengths, with the nodes for which they are missing."""
        ordered = sorted(set(texts), key=lambda text: (len(str(text)), str(text)))
        for start in range(0, len(ordered), CHUNK):
            chunk = ordered[start : start + CHUNK]
            missing = [name for name in names if not self._known(name, chunk)]
            if missing:
                yield missing, chunk

    def _known(self, name: str, chunk: Sequence[Read]) -> bool:
        file = self.folder / self.key(name) / f"{_hash(chunk)}.safetensors"
        known = file.is_file()
        if known:
            self._note(name, chunk, file)
        return known

    def _note(self, name: str, chunk: Sequence[Read], file: Path) -> None:
        for place, text in enumerate(chunk):
            self.places[name, text] = (file, place)

    def _compute(self, names: Sequence[str], chunk: list[Read]) -> None:
        if names[0] in self.graph.encoders:
            for name in names:
                self._encode(name, chunk)
        else:
            self._read(names, chunk)

    @torch.no_grad()
    def _encode(self, name: str, chunk: list[Any]) -> None:
        node = self.graph.nodes[name]
        states_BSD, real_BS = node.states(together(name, chunk))
        rows = (states[real] for states, real in zip(states_BSD, real_BS, strict=True))
        kept = (condensed(row, node.node.pooling) for row in rows)
        self._save(
            name, chunk, {f"{place}/{STATES}": on_disk(one) for place, one in enumerate(kept)}
        )

    @torch.no_grad()
    def _read(self, names: Sequence[str], chunk: list[Any]) -> None:
        nodes: dict[str, Any] = {name: self.graph.nodes[name] for name in names}
        first: FrozenNode = nodes[names[0]]
        member = self.graph.members[first.name]
        batch = tokenize(first.name, member.tokenizer, chunk, None)
        blocks = {block for node in nodes.values() for block in (node.at, node.layer)}
        caches = any(keeps_cache(node) for node in nodes.values())
        cache = recording(first) if caches else None
        with recorded(first, blocks) as states:
            arguments = first.arguments(batch) | {"use_cache": caches}
            if caches:
                arguments[cache_argument(first.model)] = cache
            with suppress(Enough):
                first.model(**arguments, return_dict=True)
        mask = batch["attention_mask"]
        for name, node in nodes.items():
            tensors: dict[str, Tensor] = {}
            for place in range(len(chunk)):
                begin = int(mask.shape[1] - mask[place].sum())
                for part, tensor in parts_of(node, states, cache, place, begin):
                    tensors[f"{place}/{part}"] = on_disk(tensor)
            self._save(name, chunk, tensors)

    def _save(self, name: str, chunk: Sequence[Read], tensors: dict[str, Tensor]) -> None:
        file = self.folder / self.key(name) / f"{_hash(chunk)}.safetensors"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, staged = tempfile.mkstemp(dir=file.parent, prefix=".saving-")
            os.close(handle)
            try:
                save_file(tensors, staged)
                os.replace(staged, file)
            finally:
                Path(staged).unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"cannot keep states in {file.parent}: {error}; make room, or name another folder"
            ) from error
        self._note(name, chunk, file)

    def row(self, name: str, text: Read) -> dict[str, Tensor]:
        """Returns what is kept of a text for a node, by part."""
        if (name, text) in self.read:
            return self.read[name, text]
        file, place = self.places[name, text]
        if file not in self.open:
            self.open[file] = safe_open(file, "pt")
        opened, start = self.open[file], f"{place}/"
        names = names_of(self.graph.nodes[name])
        found = {part: opened.get_tensor(start + part) for part in names}
        size = sum(tensor.nbytes for tensor in found.values())
        if size <= self.memory:
            self.memory -= size
            self.read[name, text] = found
        return found


def _hash(texts: Sequence[Read]) -> str:
    return hashlib.sha256(json.dumps(list(map(str, texts))).encode()).hexdigest()[:32]
