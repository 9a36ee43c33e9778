"""A training run that `accelerate launch` starts in several processes: FOLDER OUTPUT ACCUMULATION [resume]."""

import sys
from pathlib import Path

import torch
import transformers

from tests.training_runs import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    folder, output, accumulation, *rest = sys.argv[1:]
    changes = {"steps": 6, "save_steps": 2, "gradient_accumulation": int(accumulation)}
    run(Path(folder), Path(output), resume=bool(rest), **changes)
