"""How much memory a method needs to answer, measured in a process that holds this method alone."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rc_agents.benchmarks.apart import apart
from rc_agents.benchmarks.domains import KINDS
from rc_agents.benchmarks.memory import give_back, high_water, resident
from rc_agents.benchmarks.methods import Bench, NotApplicable, method
from rc_agents.benchmarks.scores import Score
from rc_agents.benchmarks.settings import Setting

from rc_agents.errors import ConfigError
from rc_agents.scoring import CausalScorer, Scorer

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak resident memory while answering, one question at a time.

    The method is fitted once more, in a process of its own; then everything is let go that does not answer, and the
    peak of each answer is read apart from those before it.

    Args:
        words: of a prompt, from general text that scores nothing.
        new_tokens: of an answer at most.
        count: answers.
    """

    words: int = 128
    new_tokens: int = 32
    count: int = 3

    def __post_init__(self) -> None:
        if min(self.words, self.new_tokens, self.count) < 1:
            raise ConfigError("words, new_tokens and count are numbers of at least 1")

    def texts(self, bench: Any) -> list[str]:
        """None: what the answers say is not scored."""
        return []

    def run(self, bench: Bench, scorer: Scorer) -> dict[str, Score]:
        """`peak_mib`, of the whole process, and `above_empty_mib`, beyond what it had before any model.

        Raises:
            NotApplicable: the models are not in this machine's memory, or the system does not tell.
            ProcessDied: the process that measured did not live to its end.
        """
        if torch.device(bench.device or "cpu").type != "cpu":
            raise NotApplicable("resident memory says nothing of a model on an accelerator")
        words = " ".join(KINDS["general"]()).split()
        starts = range(0, self.words * self.count, self.words)
        prompts = [" ".join(words[start : start + self.words]) for start in starts]
        named = (bench.setting, bench.seed, bench.folder, bench.method, bench.code)
        found = apart(peaks, named, prompts, self.new_tokens, torch.get_num_threads())
        if found is None:
            raise NotApplicable("this system does not tell how much memory a process had at most")
        empty, values = found
        each = {"peak_mib": values, "above_empty_mib": [value - empty for value in values]}
        return {
            name: Score(values=[value / MIB for value in sizes], kind="count", better="lower")
            for name, sizes in each.items()
        }


class AnchorApart(Bench):
    """A bench whose anchor answers as the model that it is, so that its scorer holds no specialist."""

    def anchor(self) -> CausalScorer:
        """Returns the frozen anchor's scorer."""
        return CausalScorer(self.frozen.models["anchor"], self.tokenizer)


def peaks(
    named: tuple[Setting, int, Path, str, str], prompts: list[str], new_tokens: int, threads: int
) -> tuple[int, list[int]] | None:
    """Fits a method in this process and answers with it.

    Args:
        named: the setting, seed and folder of a bench, the method's name and the hash of its code.
        prompts: to answer.
        new_tokens: of an answer at most.
        threads: of torch.

    Returns:
        Bytes that the process had before it loaded a model, and at most during each answer; None where the system
        does not tell.
    """
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    try:
        empty = resident()
    except OSError:
        return None
    scorer = _fitted(*named)
    gc.collect()
    values = []
    for prompt in prompts:
        give_back()
        resident()
        scorer.generate([prompt], new_tokens)
        values.append(high_water())
    return empty, values


def _fitted(setting: Setting, seed: int, folder: Path, name: str, code: str) -> Scorer:
    """Returns a method's scorer, and leaves all else of its bench behind."""
    bench = AnchorApart(setting, seed, folder, method=name, code=code)
    return method(name)(bench).scorer
