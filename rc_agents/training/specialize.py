"""Teach a copy of a base model texts or question-answer pairs: a LoRA adapter, the base frozen."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from rc_agents import packaged
from rc_agents.backbone import find_blocks, first_line, freeze
from rc_agents.errors import ModelError, RCError, TrainingError, nearest
from rc_agents.training import data as training_data
from rc_agents.training.adapter_files import (
    load_adapter,
    read_config,
    save_adapter,
    weights_hash,
)
from rc_agents.training.adapter_trainer import AdapterTrainer, LossWatch, can_pack
from rc_agents.training.lower_blocks import EnteredBatches, split_blocks
from rc_agents.training.run_folder import difference

_FORMS = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "modules_to_save")
RUN = "run.json"  # what an unfinished run is of
DTYPES = ("auto", "float32", "bfloat16")
_NUMBERS: dict[str, tuple[float, Any]] = {  # the least value of each, and its type
    **dict.fromkeys(("rank", "alpha", "steps", "batch_size", "text_batch_size"), (1, int)),
    **dict.fromkeys(("frozen_blocks", "save_steps", "seed"), (0, int)),
    **dict.fromkeys(("max_length", "block_length"), (2, int)),
    "learning_rate": (0, int | float),
    "warmup": (0, int | float),
}


@dataclass(frozen=True, kw_only=True)
class SpecializeConfig:
    """How a specialist is trained.

    Args:
        frozen_blocks: the first blocks that get no adapter. What they compute is computed once and
            kept, so training costs only the blocks above.
        last_block: the last block that gets an adapter, 1-based; None for the model's last.
        rank: of the adapter's matrices.
        alpha: the adapter's update is scaled by alpha / rank.
        target_modules: names of the layers that get an adapter, or `all-linear`.
        steps: optimizer steps.
        learning_rate: its peak; it falls as a cosine.
        warmup: share of the steps until the peak.
        batch_size: pairs a step.
        max_length: tokens of the longest pair allowed.
        text_batch_size: blocks of text a step.
        block_length: tokens of a block of text.
        mix: share of the steps by group of pairs, and `text` for documents; equal epochs by default.
        answer_only: count the loss of pairs on the completion alone.
        dtype: of the frozen base; `auto` is bfloat16 where the processor multiplies it natively. The
            adapter trains in float32.
        seed: of the adapter's start and the order of the data.
        save_steps: steps between checkpoints to resume from; 0 for none.
    """

    frozen_blocks: int = 0
    last_block: int | None = None
    rank: int = 8
    alpha: int = 16
    target_modules: str | Sequence[str] = "all-linear"
    steps: int = 300
    learning_rate: float = 1e-3
    warmup: float = 0.05
    batch_size: int = 32
    max_length: int = 256
    text_batch_size: int = 8
    block_length: int = 128
    mix: Mapping[str, float] | None = None
    answer_only: bool = True
    dtype: str = "auto"
    seed: int = 0
    save_steps: int = 0

    def __post_init__(self) -> None:
        for name, (least, kind) in _NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not value >= least:
                what = "a whole number" if kind is int else "a number"
                raise TrainingError(f"{name} must be {what} of at least {least}, not {value!r}")
        if self.warmup >= 1:
            raise TrainingError(f"warmup is a share of the steps below 1, not {self.warmup!r}")
        if self.last_block is not None and not self.last_block > self.frozen_blocks:
            raise TrainingError(
                f"last_block must lie above frozen_blocks={self.frozen_blocks}, not {self.last_block!r}"
            )
        if self.dtype not in DTYPES:
            raise TrainingError(f"dtype {self.dtype!r} is unknown; {nearest(self.dtype, DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class Specialist:
    """A finished training run."""

    path: Path
    steps: int
    loss: float  # mean over the last tenth of the steps
    seconds: float
    trained_parameters: int


def specialize(
    base: str | Path,
    data: str | Path | Iterable[training_data.Record | Mapping[str, Any]],
    output: str | Path,
    config: SpecializeConfig | None = None,
    *,
    adapter: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    progress: bool = True,
) -> Specialist:
    """Trains an adapter and writes it to a folder for `ModelRef(base, adapter=output)` and PEFT.

    Args:
        base: `package:NAME`, a path or a hub id; it is written into the adapter's config as given.
        data: whatever `rc_agents.training.data.read` takes.
        output: folder to make; replaced whole when training ends, untouched before.
        config: how to train.
        adapter: folder of a LoRA adapter on the same base, to go on from with other data; its rank, alpha, layers and
            blocks are kept, and those of the config not read. The folder itself stays as it is.
        callbacks: more transformers callbacks; they find the PEFT model as `kwargs["model"]`.
        resume: go on from the last checkpoint of the same run (needs `save_steps` then and now).
        progress: show a progress bar.

    Raises:
        ModelError: the base cannot be loaded.
        DataError: no data, or malformed.
        TrainingError: settings that cannot work, nothing to resume or a run that was of something else, or a loss that
            is not a number.
    """
    config = config or SpecializeConfig()
    if adapter is not None:
        config = form_of(adapter, config)
    output = Path(output)
    records = training_data.read(data)
    unfinished = output.with_name(output.name + ".unfinished")
    arguments = _arguments(config, unfinished, progress)
    model, tokenizer = load_base(base, config.dtype)
    batches = _batches(records, tokenizer, model.to(arguments.device), config)
    model = _with_adapter(model, config)
    if adapter is not None:  # of this form by now
        load_adapter(model, adapter, config.frozen_blocks)
    checkpoint = _begin(unfinished, _identity(base, records, config, adapter), resume=resume)
    log = LossWatch()
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=lambda items: items[0],
        callbacks=[log, *callbacks],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    save_adapter(
        model,
        output,
        base=str(base),
        first_block=config.frozen_blocks,
        last_block=config.last_block,
        log=history,
        card=_card(base, config, history),
    )
    shutil.rmtree(unfinished, ignore_errors=True)
    return Specialist(
        path=output,
        steps=trainer.state.global_step,
        loss=_mean_loss(history),
        seconds=log.seconds,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def form_of(adapter: str | Path, config: SpecializeConfig) -> SpecializeConfig:
    """Returns the config with the rank, alpha, layers and blocks of a LoRA adapter.

    Raises:
        TrainingError: the folder has no plain LoRA adapter, or blocks that do not follow one another.
    """
    found = read_config(adapter)
    blocks = found.get("layers_to_transform")
    blocks = [blocks] if isinstance(blocks, int) else blocks or []
    if blocks and sorted(blocks) != [*range(min(blocks), max(blocks) + 1)]:
        raise TrainingError(
            f"{adapter} adapts the blocks {blocks}; only blocks in a row can be trained further"
        )
    targets = found.get("target_modules")
    others = [name for name in _FORMS if found.get(name)]
    if others or not targets:
        what = ", ".join(others) or "no target_modules"
        raise TrainingError(
            f"{adapter} is LoRA with {what}; only plain LoRA can be trained further"
        )
    return replace(
        config,
        frozen_blocks=min(blocks, default=0),
        last_block=max(blocks) + 1 if blocks else None,
        rank=found["r"],
        alpha=found["lora_alpha"],
        target_modules=targets if isinstance(targets, str) else sorted(targets),
    )


def load_base(base: str | Path, dtype: str = "auto") -> tuple[Any, Any]:
    """Returns the frozen base model in evaluation mode, and its tokenizer.

    Args:
        base: `package:NAME`, a path or a hub id.
        dtype: `auto`, float32 or bfloat16.

    Raises:
        ModelError: it cannot be loaded, or its tokenizer has no end-of-text token.
    """
    place = packaged.resolve(str(base)) if packaged.is_packaged(base) else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=_torch_dtype(dtype))
    except (OSError, ValueError) as error:
        if isinstance(error, RCError):
            raise
        raise ModelError(
            f"{base} cannot be loaded as a causal model with its tokenizer: {first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {base} has no end-of-text token, so no answer could be taught to stop"
        )
    return freeze(model), tokenizer


def _torch_dtype(name: str) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    native = (
        torch.cuda.is_bf16_supported()
        if torch.cuda.is_available()
        else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.bfloat16 if native else torch.float32


def _batches(
    records: list[training_data.Record], tokenizer: Any, model: Any, config: SpecializeConfig
) -> training_data.Batches:
    """Returns what the trainer reads; cuts the blocks that get no adapter out of the model."""
    examples = training_data.encode(
        tokenizer,
        records,
        max_length=config.max_length,
        block_length=config.block_length,
        answer_only=config.answer_only,
    )
    steps = training_data.plan(
        examples,
        batch_size=config.batch_size,
        text_batch_size=config.text_batch_size,
        steps=config.steps,
        seed=config.seed,
        mix=config.mix,
    )
    packed = can_pack(model, examples)
    if config.frozen_blocks:
        lower = split_blocks(model, config.frozen_blocks)
        return EnteredBatches(examples, steps, lower, packed=packed)
    return training_data.Batches(examples, steps, packed=packed)


def _with_adapter(model: Any, config: SpecializeConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = (
        config.target_modules
        if isinstance(config.target_modules, str)
        else list(config.target_modules)
    )
    some_blocks = {}
    if config.last_block is not None:
        if targets == "all-linear":  # PEFT takes no choice of blocks beside this word
            targets = _linear_names(model)
        some_blocks["layers_to_transform"] = [*range(config.last_block - config.frozen_blocks)]
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        task_type="CAUSAL_LM",
        **some_blocks,
    )
    torch.manual_seed(config.seed)
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise TrainingError(f"LoRA cannot be added to {targets}: {first_line(error)}") from error


def _linear_names(model: Any) -> list[str]:
    """Returns what the linear layers of the blocks are called."""
    blocks = find_blocks(model)
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for block in blocks
            for name, layer in block.named_modules()
            if isinstance(layer, torch.nn.Linear)
        }
    )


def _arguments(config: SpecializeConfig, folder: Path, progress: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,  # an item of the data set is a whole batch already
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup * config.steps),
        weight_decay=0.0,
        logging_steps=max(1, min(10, config.steps // 10)),
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or config.steps,
        save_total_limit=1,
        logging_nan_inf_filter=False,  # a loss that is not a number ends the run
        seed=config.seed,
        report_to="none",
        disable_tqdm=not progress,
        dataloader_pin_memory=False,
    )


def _mean_loss(history: Sequence[Mapping[str, float]]) -> float:
    last = [entry["loss"] for entry in history[-max(1, len(history) // 10) :]]
    return sum(last) / len(last) if last else math.nan


def _identity(
    base: str | Path,
    records: Sequence[training_data.Record],
    config: SpecializeConfig,
    adapter: str | Path | None,
) -> dict[str, Any]:
    """Returns what a run must have in common with one that it goes on with."""
    told = hashlib.sha256(json.dumps([asdict(record) for record in records], default=str).encode())
    settings = {name: value for name, value in asdict(config).items() if name != "save_steps"}
    return {
        "base": str(base),
        "adapter": None if adapter is None else weights_hash(adapter),
        "data": {"data": told.hexdigest()[:16]},
        "config": settings,
    }


def _begin(unfinished: Path, identity: dict[str, Any], *, resume: bool) -> str | None:
    """Returns the checkpoint to go on from; notes what a new run is in its folder."""
    if not resume:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / RUN).write_text(json.dumps(identity), encoding="utf-8")
        return None
    found = get_last_checkpoint(str(unfinished)) if unfinished.is_dir() else None
    if found is None:
        raise TrainingError(
            f"nothing to resume: {unfinished} has no checkpoint; train with save_steps and without resume"
        )
    if not (unfinished / RUN).is_file():
        raise TrainingError(
            f"cannot resume {unfinished}: it does not say what it was of; start anew without resume"
        )
    before = json.loads((unfinished / RUN).read_text(encoding="utf-8"))
    if other := difference(before, json.loads(json.dumps(identity))):
        raise TrainingError(f"cannot resume {unfinished}: {other}; start anew without resume")
    return found


def _card(
    base: str | Path, config: SpecializeConfig, history: Sequence[Mapping[str, float]]
) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in asdict(config).items())
    return f"""---
library_name: peft
base_model: {base}
tags: [rc_agents, lora]
---
# A specialist over `{base}`

Made by `rc_agents.training.specialize`; the base stays frozen. To couple it as a specialist:

```python
specialist = rc_agents.ModelRef("{base}", adapter="path of this folder")
model = rc_agents.couple("{base}", {{"specialist": specialist}})
```

Mean loss over the last tenth of training: {_mean_loss(history):.4f}. The run's losses are in `training.jsonl`.

| setting | value |
|---|---|
{rows}
"""
