"""What the frozen anchor answers, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks import files
from safetensors.torch import load_file, save_file
from torch import Tensor

from rc_agents.scoring import Scorer

FORMAT = 1


@dataclass
class Reference:
    """The frozen anchor's answers.

    Args:
        scorer: makes the anchor's scorer when something is missing.
        fingerprint: of the anchor's weights.
        folder: where answers are kept.
    """

    scorer: Callable[[], Scorer]
    fingerprint: str
    folder: Path

    def answers(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Greedy answers of so many tokens."""
        return self._kept(
            ["answers", tokens, list(prompts)], lambda: self.scorer().generate(prompts, tokens)
        )

    def nll(self, texts: Sequence[str], tokens: int) -> list[list[float]]:
        """Summed loss and scored tokens of each text."""
        return self._kept(["nll", tokens, list(texts)], lambda: self.scorer().nll(texts, tokens))

    def logprobs(self, prompts: Sequence[str]) -> Tensor:
        """Log-probabilities of the next token, (N, V)."""
        path = self._path(["logprobs", list(prompts)], ".safetensors")
        if not path.exists():
            found = self.scorer().next_logprobs(prompts).half()
            files.put(path, lambda scratch: save_file({"logprobs": found}, scratch))
        return load_file(path)["logprobs"].float().log_softmax(-1)

    def _kept(self, asked: list[Any], make: Callable[[], Any]) -> Any:
        path = self._path(asked, ".json")
        if not path.exists():
            found = make()
            files.write(path, found, indent=None)
        return json.loads(path.read_text(encoding="utf-8"))

    def _path(self, asked: list[Any], suffix: str) -> Path:
        versions = [torch.__version__, importlib.metadata.version("transformers")]
        about = json.dumps([FORMAT, self.fingerprint, versions, asked])
        return self.folder / (hashlib.sha256(about.encode()).hexdigest()[:24] + suffix)
