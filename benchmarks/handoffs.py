"""What text between models costs beside one coupled pass, as the hand-over, the answer, the context and the team grow.

`python -m rc_agents.benchmarks.handoffs` times, one after another in every round so that a slow moment hits all alike,

`coupled`     one `generate` of the ensemble;
`one_shot`    every specialist writes the hand-over, the anchor reads all of them and answers;
`multi_turn`  the anchor drafts, the specialist criticises, the anchor revises, the specialist speaks again, and the
              anchor answers: four hand-overs;
`anchor`      the anchor by itself;

each with exactly so many tokens (random ones: only time is measured), and writes every round's seconds to
`results/agents/sweep.json`, which the report of the suite `agents` reads. Points that the file has already are skipped,
so a killed run goes on; delete the file to take all of them again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rc_agents.benchmarks import files
from rc_agents.benchmarks.speed import interleaved
from torch import Tensor

import rc_agents
from rc_agents.provenance import provenance
from rc_agents.training.solve import BLEND

BASE = "package:smollm2-135m"
ADAPTERS = ("package:medical-coding", "package:python")
SWEEPS = {
    "told": (4, 16, 64, 256),
    "answer": (4, 16, 64, 128),
    "context": (16, 64, 256, 512),
    "agents": (1, 2, 3),
}
OUTPUT = Path(__file__).parent / "results" / "agents" / "sweep.json"


@dataclass(frozen=True)
class Point:
    """Where times are taken.

    Attributes:
        told: tokens of a hand-over.
        answer: tokens of the answer.
        context: tokens of the question.
        agents: specialists.
    """

    told: int = 16
    answer: int = 16
    context: int = 64
    agents: int = 1


def points() -> list[Point]:
    """Returns every point once: one length varies, the others stay as they are."""
    found = [
        replace(Point(), **{name: value}) for name, values in SWEEPS.items() for value in values
    ]
    return list(dict.fromkeys(found))


def ensemble(agents: int) -> Any:
    """Returns the anchor with so many specialists, each bridged behind the last block."""
    others = {
        f"agent{number}": rc_agents.ModelRef(base=BASE, adapter=ADAPTERS[number % len(ADAPTERS)])
        for number in range(agents)
    }
    return rc_agents.couple(
        BASE, others, topology="unilateral", bridge=BLEND, sites=1, dtype="float32"
    )


def cases(model: Any, point: Point) -> dict[str, Callable[[], Any]]:
    """Returns what is timed at a point."""
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> Tensor:
        return torch.randint(100, vocabulary, (1, count), generator=generator)

    def write(one: Any, read: Tensor, tokens: int) -> None:
        one.generate(
            input_ids=read,
            attention_mask=torch.ones_like(read),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
        )

    anchor = model.models["anchor"]
    others = [model.models[name] for name in model.specialists]
    asked, told, answer = point.context, point.told, point.answer
    question, read = ids(asked), ids(asked + len(others) * told)
    turns = [ids(asked), *(ids(asked + told * min(turn, 2)) for turn in (1, 2)), ids(asked)]
    last = ids(asked + told)

    def one_shot() -> None:
        for one in others:
            write(one, question, told)
        write(anchor, read, answer)

    def multi_turn() -> None:
        for one, text in zip((anchor, others[0], anchor, others[0]), turns, strict=True):
            write(one, text, told)
        write(anchor, last, answer)

    return {
        "coupled": lambda: write(model, question, answer),
        "one_shot": one_shot,
        "multi_turn": multi_turn,
        "anchor": lambda: write(anchor, question, answer),
    }


def main() -> None:
    """Takes the times and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = provenance(0)
    rows = files.read(arguments.output)["rows"] if arguments.output.is_file() else []
    known = [{name: row[name] for name in SWEEPS} for row in rows]
    models: dict[int, Any] = {}
    for point in [one for one in points() if asdict(one) not in known]:
        model = models.get(point.agents) or ensemble(point.agents)
        models[point.agents] = model
        times = interleaved(cases(model, point), arguments.rounds)
        rows.append({**asdict(point), "seconds": times})
        middle = {name: round(statistics.median(values), 3) for name, values in times.items()}
        print(point, middle, flush=True)
        files.write(arguments.output, {"rows": rows, "provenance": started})


if __name__ == "__main__":
    main()
