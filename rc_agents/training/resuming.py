"""A transformers Trainer whose checkpoints are ours: everything that the next step depends on, without pickle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer

from rc_agents.training import checkpoints, snapshot
from rc_agents.training.config import RunConfig
from rc_agents.training.tally import Tally

STATE = "trainer_state.json"


class ResumableTrainer(Trainer):
    """Saves and loads what a run needs to go on to the same bits.

    Attributes:
        settings: how to train.
        identity: what a run must have in common with one it goes on with, for JSON.
        tally: what was summed up since the last line of metrics.
        best: the bridges of the best validation loss, by name; empty before the first.
    """

    settings: RunConfig
    identity: dict[str, Any]
    tally: Tally
    best: dict[str, Tensor]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        tensors, described = snapshot.optimizer(self.optimizer.state_dict())
        own = {
            "tally": self.tally.state(),
            "loss": self._tr_loss.item(),
            "logged": self._globalstep_last_logged,
            "generators": snapshot.generators(),
        }
        progress = {
            "identity": self.identity,
            "optimizer": described,
            "scheduler": self.lr_scheduler.state_dict(),
            "processes": gather_object([own]),
        }
        if self.args.should_save:
            files = {
                snapshot.BRIDGES: snapshot.bridges(self.model),
                snapshot.OPTIMIZER: tensors,
                snapshot.PROGRESS: snapshot.as_bytes(progress),
                STATE: snapshot.as_bytes(dataclasses.asdict(self.state)),
            }
            if self.best:
                files[snapshot.BEST] = snapshot.tensors(self.best)
            folder, step = Path(self.args.output_dir), self.state.global_step
            checkpoints.save(folder, step, files, keep=self.settings.keep)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        place = Path(resume_from_checkpoint)
        snapshot.put_bridges(self.model, place / snapshot.BRIDGES)
        if (place / snapshot.BEST).exists():
            self.best = snapshot.read_tensors(place / snapshot.BEST)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        progress = snapshot.read_json(Path(checkpoint) / snapshot.PROGRESS)
        found = snapshot.read_optimizer(
            Path(checkpoint) / snapshot.OPTIMIZER, progress["optimizer"]
        )
        self.optimizer.load_state_dict(found)
        self.lr_scheduler.load_state_dict(progress["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Also what the loop has summed up since the last line of metrics; it starts at zero before this is called."""
        if checkpoint is None:
            return
        progress = snapshot.read_json(Path(checkpoint) / snapshot.PROGRESS)
        own = progress["processes"][self.args.process_index]
        self.tally = Tally(own["tally"])
        self._tr_loss += own["loss"]
        self._globalstep_last_logged = own["logged"]
        snapshot.set_generators(own["generators"])
