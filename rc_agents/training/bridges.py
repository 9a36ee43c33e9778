"""Train the bridges of an ensemble on `transformers.Trainer`: the bases stay frozen, gates learn at their own rate."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from rc_agents.backbone import first_line
from rc_agents.checkpoint.identity import fingerprint
from rc_agents.errors import TrainingError
from rc_agents.modeling import CoupledForCausalLM
from rc_agents.training import run_folder
from rc_agents.training.activations import recomputed
from rc_agents.training.arguments import arguments
from rc_agents.training.config import TrainConfig, TrainResult
from rc_agents.training.items import DataSets, Items, Source, read_sets, validation_batches
from rc_agents.training.objectives import Retention, Step, objectives_of
from rc_agents.training.parameters import forget_sources, training
from rc_agents.training.passes import Pass, WholePass
from rc_agents.training.trainer import BridgeTrainer

__all__ = ["TrainConfig", "TrainResult", "retention", "train"]

FREE = ("keep", "report_to")
"""Settings that a resumed run may change."""


def train(
    model: CoupledForCausalLM,
    data: Source,
    output: str | Path | None = None,
    config: TrainConfig | None = None,
    *,
    retain: Source | None = None,
    validation: Source | None = None,
    resume: bool = False,
    states: str | Path | None = None,
    only: str | Sequence[str] | None = None,
    train_bases: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> TrainResult:
    """Trains the bridges, gates, routers and mix of `model` in place, and saves it to `output`.

    Args:
        model: an ensemble; base weights are never changed unless `train_bases`.
        data: whatever `rc_agents.training.data.read` takes: pairs (loss on the answers) and texts.
        output: folder for the trained ensemble, and in its `run` how it was made; until the end its files are in
            `OUTPUT.unfinished`. Nothing is saved where left out.
        config: how to train.
        retain: general text on which the ensemble shall stay the frozen anchor.
        validation: what to judge by, disjoint from `data`; the ensemble ends with the bridges that were best on it.
        resume: go on with the unfinished run from its last checkpoint, to the same bits.
        states: folder in which the specialists' states are kept, so that they run once; for unilateral topologies.
        only: the specialists whose edges train, in and out; all where left out. Other bridges keep every bit.
        train_bases: train the base models too; never needed, and no resume.
        callbacks: more transformers callbacks.
        progress: show a progress bar.

    Raises:
        TrainingError: nothing to train, no tokenizer, settings that do not fit the run, or a loss that is not a number.
        DataError: no data, or malformed.
    """
    config = config or TrainConfig()
    _check(model, config, output=output, resume=resume, states=states, train_bases=train_bases)
    with contextlib.ExitStack() as during:
        parameters = during.enter_context(training(model, only, train_bases=train_bases))
        if config.checkpoint_activations:
            during.enter_context(recomputed(model))
        if output is None:
            place = Path(during.enter_context(tempfile.TemporaryDirectory()))
        else:
            place = run_folder.unfinished(Path(output))
        sets = read_sets(model.tokenizer, data, retain, validation, config)
        run = _Run(model, config, sets, parameters, place, only, states)
        trainer = run.trainer(callbacks, progress=progress)
        start = run.begin(trainer, resume=resume)
        begun = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        trainer.restore_best()
        seconds = time.perf_counter() - begun
    if train_bases:
        forget_sources(model)
    if output is not None and trainer.args.should_save:
        model.save_pretrained(output, include_bases=train_bases)
        run_folder.finish(place, Path(output))
    trainer.accelerator.wait_for_everyone()
    return _result(trainer, parameters, seconds)


def _check(
    model: CoupledForCausalLM,
    config: TrainConfig,
    *,
    output: str | Path | None,
    resume: bool,
    states: str | Path | None,
    train_bases: bool,
) -> None:
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise TrainingError(
            "training needs the anchor's tokenizer with an end-of-text token; pass tokenizers= to couple"
        )
    if output is None and (resume or config.save_steps):
        raise TrainingError(
            "checkpoints are kept beside the output: name an output, or leave out resume and save_steps"
        )
    loaded = [name for name, member in model.members.items() if member.ref.base is None]
    if output is not None and loaded and not train_bases:
        raise TrainingError(
            f"model {loaded[0]!r} was passed in loaded and has no path or id, so the output could not name it; couple "
            "from a path, or leave out the output and call save_pretrained(..., include_bases=True)"
        )
    if resume:
        run_folder.check_there(run_folder.unfinished(Path(str(output))))
    try:
        for reporter in get_reporting_integration_callbacks(list(config.report_to)):
            reporter()
    except (ValueError, RuntimeError, ImportError) as error:
        raise TrainingError(
            f"report_to={list(config.report_to)}: {first_line(error)}; install it, or leave it out"
        ) from error
    if train_bases and (resume or config.save_steps or states is not None):
        raise TrainingError(
            "train_bases changes what checkpoints and cached states take as given; leave out resume, save_steps and "
            "states"
        )


@dataclass
class _Run:
    """One run: what it reads, what it trains and where it writes."""

    model: CoupledForCausalLM
    config: TrainConfig
    sets: DataSets
    parameters: dict[str, nn.Parameter]
    folder: Path
    only: str | Sequence[str] | None
    states: str | Path | None

    def trainer(self, callbacks: Sequence[TrainerCallback], *, progress: bool) -> BridgeTrainer:
        """Builds the trainer."""
        retains, judged = bool(self.sets.retain), validation_batches(self.sets, self.config)
        if self.config.patience is not None and not judged:
            raise TrainingError(
                "patience needs validation data: pass validation, or set validation_share"
            )
        objectives = objectives_of(self.config, self.model, self.sets.kinds(), retains=retains)
        args = arguments(self.config, self.folder, evaluates=bool(judged))
        each = self.config.steps * self.config.gradient_accumulation
        return BridgeTrainer(
            self.model,
            args,
            settings=self.config,
            parameters=self.parameters,
            items=Items(self.sets, self.config, each * args.world_size),
            objectives=objectives,
            runner=self._runner(args, progress=progress),
            validation=judged,
            identity=self._identity(args.world_size),
            callbacks=[run_folder.Metrics(self.folder), *callbacks],
            progress=progress,
        )

    def _runner(self, args: TrainingArguments, *, progress: bool) -> Pass:
        if self.states is None:
            return WholePass(self.model)
        from rc_agents.training.replay import ReplayPass

        with args.main_process_first(local=False, desc="states"):  # the others find them on disk
            return ReplayPass(self.model, self.sets.by_name(), self.states, progress=progress)

    def _identity(self, processes: int) -> dict[str, Any]:
        """Returns what a run must have in common with one that it goes on with."""
        bases = {}
        if self.config.save_steps:
            bases = {name: fingerprint(member) for name, member in self.model.members.items()}
        settings = {name: value for name, value in asdict(self.config).items() if name not in FREE}
        ensemble = {
            "names": self.model.names,
            "edges": [edge.key for edge in self.model.edges],
            "sites": self.model.sites,
            "bridge": {
                edge.key: self.model.config.bridge_form(edge).to_dict() for edge in self.model.edges
            }
            or self.model.config.bridge,
            "only": [self.only] if isinstance(self.only, str) else self.only,
            "bases": bases,
        }
        return {
            "config": settings,
            "data": self.sets.hashes(),
            "ensemble": ensemble,
            "processes": processes,
        }

    def begin(self, trainer: BridgeTrainer, *, resume: bool) -> Path | None:
        """Makes the run's folder, or finds the checkpoint that it goes on from."""
        process = trainer.args.process_index
        if resume:
            place = run_folder.go_on(self.folder, trainer.identity, process)
        elif not process:
            counts = {name: len(examples) for name, examples in self.sets.by_name().items()}
            described = {"identity": trainer.identity, "config": asdict(self.config)}
            run_folder.begin(self.folder, described | {"examples": counts})
        trainer.accelerator.wait_for_everyone()
        return place if resume else None


def _result(
    trainer: BridgeTrainer, parameters: dict[str, nn.Parameter], seconds: float
) -> TrainResult:
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = [entry["loss"] for entry in history[-max(1, len(history) // 10) :]]
    return TrainResult(
        steps=trainer.state.global_step,
        loss=sum(last) / len(last) if last else math.nan,
        seconds=seconds,
        trained_parameters=sum(parameter.numel() for parameter in parameters.values()),
        history=history,
        evaluations=trainer.evaluations(),
        best_step=trainer.best_step(),
    )


def retention(model: CoupledForCausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """KL(frozen anchor || ensemble) in nats a token on (B, T) text."""
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    rows = torch.arange(len(input_ids))
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    batches = {"retain": batch | {"rows": rows, "dataset": "retain"}}
    return Retention(1.0)(Step(WholePass(model), batches, "texts"))
