"""Trains the edges and the output of a graph on `transformers.Trainer`; its models stay frozen.

A run is resumed to the same bits: edges, optimizer, schedule and random generators are in its checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..errors import TrainingError
from ..questions import Question
from ..training import run_folder
from ..training.arguments import arguments
from ..training.config import RunConfig, TrainResult
from ..training.data import Pair
from .asking import Asked, OneRun, ask, texts_by_node
from .kept import Kept
from .model import LatentGraph
from .replay import Replay
from .trainer import GraphTrainer, Steps

Example = Question | Asked | Pair
CHECKED = 4  # examples by which a replay is compared with the whole graph


@dataclass(frozen=True, kw_only=True)
class GraphTrainConfig(RunConfig):
    """How a graph is trained: what `RunConfig` has, and:

    Args:
        output_learning_rate: peak for the output; that of the edges, `learning_rate`, where left out.
        gate_learning_rate: peak for learned strengths, gates and weights of the aggregates.
    """

    output_learning_rate: float | None = None
    gate_learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = self.output_learning_rate
        if rate is not None and not (isinstance(rate, int | float) and rate > 0):
            raise TrainingError(f"output_learning_rate must be positive, not {rate!r}")


def train(
    graph: LatentGraph,
    examples: Sequence[Example],
    output: str | Path | None = None,
    config: GraphTrainConfig | None = None,
    *,
    validation: Sequence[Example] = (),
    keep: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> TrainResult:
    """Trains a graph in place, and saves it to `output`.

    Args:
        graph: its models are never changed.
        examples: questions with their choices; pairs of prompt and completion for a graph that speaks.
        output: folder for the trained graph, and in its `run` how it was made. Nothing is saved where left out.
        config: how to train.
        validation: what to judge by, none of it in `examples`; the graph ends as it was best on it.
        keep: folder in which states that never change are kept, so that a step runs the upper blocks of one token
            alone (`kept`); every step runs all models where left out.
        resume: go on with the unfinished run from its last checkpoint.
        callbacks: more transformers callbacks.
        progress: show bars.

    Raises:
        TrainingError: no example, validation that is trained on, or settings that do not fit.
        DataError: examples of another kind than the graph answers.
    """
    config = config or GraphTrainConfig()
    _check(graph, examples, validation, config, output=output, resume=resume, keep=keep)
    if graph.config.voice is None:
        taught, judged = ask(graph.config, examples), ask(graph.config, validation)
    else:
        taught, judged = list(examples), list(validation)
    run_of = (
        _replayed(graph, [*taught, *judged], keep, progress=progress) if keep is not None else None
    )
    with contextlib.ExitStack() as during:
        if output is None:
            place = Path(during.enter_context(tempfile.TemporaryDirectory()))
        else:
            place = run_folder.unfinished(Path(output))
        trainer = _trainer(
            graph, taught, judged, config, place, run_of, callbacks, progress=progress
        )
        start = _begin(place, trainer, config, len(taught), resume=resume)
        begun = time.perf_counter()
        graph.train()
        during.enter_context(graph.complete())
        try:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
        finally:
            graph.eval()
        trainer.restore_best()
        seconds = time.perf_counter() - begun
    if output is not None and trainer.args.should_save:
        from .checkpoint import save

        save(graph, output)
        run_folder.finish(place, Path(output))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = [entry["loss"] for entry in history[-max(1, len(history) // 10) :]]
    return TrainResult(
        steps=trainer.state.global_step,
        loss=sum(last) / len(last) if last else float("nan"),
        seconds=seconds,
        trained_parameters=graph.num_trainable(),
        history=history,
        evaluations=trainer.evaluations(),
        best_step=trainer.best_step(),
    )


def _check(
    graph: LatentGraph,
    examples: Sequence[Example],
    validation: Sequence[Example],
    config: GraphTrainConfig,
    *,
    output: str | Path | None,
    resume: bool,
    keep: str | Path | None,
) -> None:
    if not examples:
        raise TrainingError("a graph is trained on examples; got none")
    speaks = graph.config.voice is not None
    for one in (*examples, *validation):
        if isinstance(one, Pair) != speaks:
            wanted = "pairs of prompt and completion" if speaks else "questions with choices"
            raise TrainingError(f"this graph is trained on {wanted}, got {type(one).__name__}")
    if speaks and graph.encoders:
        raise TrainingError(
            f"pairs of prompt and completion show nothing to {graph.encoders[0]!r}, an encoder; couple it with the "
            "model that speaks (rc_agents.couple)"
        )
    known = {_key(one) for one in examples}
    shared = [one for one in validation if _key(one) in known]
    if shared:
        raise TrainingError(
            f"validation and training share {len(shared)} examples; split them, as rc_agents.questions.load does"
        )
    if config.patience is not None and not validation:
        raise TrainingError("patience needs validation examples")
    if output is None and (resume or config.save_steps):
        raise TrainingError(
            "checkpoints are kept beside the output: name an output, or leave out resume and save_steps"
        )
    if keep is not None and speaks:
        raise TrainingError(
            "states are kept for graphs that choose; leave out keep for one that speaks"
        )
    if keep is not None and graph.remote:
        raise TrainingError(
            f"states are kept of models in this process; leave out keep, as {min(graph.remote)!r} runs in another"
        )
    if resume:
        run_folder.check_there(run_folder.unfinished(Path(str(output))))


def _key(one: Example) -> str:
    if isinstance(one, Question):
        return one.key
    if isinstance(one, Pair):
        return " ".join(one.prompt.split())
    return json.dumps(
        {name: list(map(str, each)) for name, each in one.texts.items()}, sort_keys=True
    )


def _replayed(
    graph: LatentGraph, asked: Sequence[Asked], folder: str | Path, *, progress: bool
) -> OneRun:
    kept = Kept(graph, Path(folder), progress)
    kept.complete(texts_by_node(asked))
    replay = Replay(graph, kept)
    replay.check(texts_by_node(asked[:CHECKED]))
    return replay.of


def _trainer(
    graph: LatentGraph,
    taught: Sequence[Any],
    judged: Sequence[Any],
    config: GraphTrainConfig,
    place: Path,
    run_of: OneRun | None,
    callbacks: Sequence[TrainerCallback],
    *,
    progress: bool,
) -> GraphTrainer:
    args = arguments(config, place, evaluates=bool(judged))
    count = config.steps * config.gradient_accumulation * args.world_size
    batches = [
        list(judged[at : at + config.batch_size]) for at in range(0, len(judged), config.batch_size)
    ]
    return GraphTrainer(
        graph,
        args,
        run_of=run_of,
        settings=config,
        parameters=dict(graph.trainable_parameters()),
        items=Steps(taught, config.batch_size, count, config.seed),
        validation=batches,
        identity=_identity(graph, taught, judged, config, args.world_size),
        callbacks=[run_folder.Metrics(place), *callbacks],
        progress=progress,
    )


def _identity(
    graph: LatentGraph,
    taught: Sequence[Any],
    judged: Sequence[Any],
    config: GraphTrainConfig,
    processes: int,
) -> dict[str, Any]:
    """Returns what a run must have in common with one that it goes on with."""
    bases = {}
    if config.save_steps:
        bases = graph.fingerprints()
    settings = {
        name: value for name, value in asdict(config).items() if name not in ("keep", "report_to")
    }
    data = {"data": _hash(taught), "validation": _hash(judged)}
    shape = graph.config.to_dict() | {"bases": bases}
    return {"config": settings, "data": data, "graph": shape, "processes": processes}


def _hash(examples: Sequence[Any]) -> str:
    rows = [one if isinstance(one, str) else asdict(one) for one in examples]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def _begin(
    place: Path, trainer: GraphTrainer, config: GraphTrainConfig, count: int, *, resume: bool
) -> Path | None:
    if resume:
        return run_folder.go_on(place, trainer.identity, trainer.args.process_index)
    described = {"identity": trainer.identity, "config": asdict(config), "examples": count}
    run_folder.begin(place, described)
    return None
