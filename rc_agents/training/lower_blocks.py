"""Train the upper blocks of a model alone: what the frozen blocks below compute is computed once.

An adapter on blocks `count` and up changes nothing below them, so the hidden states that enter block
`count` are those of the frozen base, in every step of the training. `split_blocks` cuts the model in
two at that depth; the upper part then reads hidden states in the place of token embeddings.

Shapes: B rows, T tokens of a row, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rc_agents.backbone import find_blocks, share_weights
from rc_agents.errors import TrainingError
from rc_agents.training.data import Batch, Batches, Encoded


class LowerBlocks:
    """The frozen blocks below an adapter, and what they have computed so far.

    Args:
        model: the part of the base up to and with the last block below.
        block: that block.
    """

    def __init__(self, model: nn.Module, block: nn.Module) -> None:
        self.model, self.block = model, block
        self._known: dict[int, Tensor] = {}

    def enter(self, batch: Batch, examples: Sequence[Encoded], indices: Sequence[int]) -> Batch:
        """Returns the batch with the hidden states that enter the upper part in place of the tokens.

        Args:
            batch: as `collate` made it from the examples.
            examples: the examples of the batch.
            indices: their places in the data; states of pairs are kept under these.
        """
        rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
        if "targets" not in batch:  # rows, of text or padded
            inputs = {
                name: batch[name] for name in ("input_ids", "attention_mask") if name in batch
            }
            return rest | {"inputs_embeds": self._run(inputs)}
        lengths = [len(example.ids) - 1 for example in examples]
        # pack() lays out the shared prefix and then the rest of each example
        shared = (sum(lengths) - batch["input_ids"].shape[1]) // max(len(lengths) - 1, 1)
        if len(lengths) == 1:
            shared = 0
        if not all(index in self._known for index in indices):
            self._learn(batch, lengths, shared, indices)
        parts_TD = [self._known[indices[0]][:shared], *(self._known[i][shared:] for i in indices)]
        return rest | {"inputs_embeds": torch.cat(parts_TD)[None]}

    def _learn(
        self, batch: Batch, lengths: Sequence[int], shared: int, indices: Sequence[int]
    ) -> None:
        names = ("input_ids", "position_ids", "attention_mask")
        states_TD = self._run({name: batch[name] for name in names})[0]
        prefix_TD, start = states_TD[:shared], shared
        for index, length in zip(indices, lengths, strict=True):
            own_TD = states_TD[start : start + length - shared]
            self._known[index] = torch.cat([prefix_TD, own_TD])
            start += length - shared

    @torch.no_grad()
    def _run(self, inputs: Batch) -> Tensor:
        """Returns the hidden states (B, T, D) that leave the last lower block."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)

        device = next(self.block.parameters()).device
        handle = self.block.register_forward_hook(catch)
        try:
            self.model(
                **{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False
            )
        finally:
            handle.remove()
        return caught[0]


def split_blocks(model: PreTrainedModel, count: int) -> LowerBlocks:
    """Cuts the first `count` blocks out of `model`, in place, and returns them.

    Raises:
        TrainingError: there are not that many blocks, or the cut model does not compute what the whole
            one does, as with architectures that scale their embeddings or tell their blocks apart.
    """
    total = len(find_blocks(model))
    if not 0 < count < total:
        raise TrainingError(f"frozen_blocks must lie between 0 and {total - 1}, not {count}")
    probe_BT = torch.arange(4, 12, device=model.device)[None]
    with torch.no_grad():
        expected_BTV = model(probe_BT, use_cache=False).logits
    below = share_weights(model)
    kept = find_blocks(below)
    lower = LowerBlocks(below.base_model, kept[count - 1])
    del kept[count:]
    del find_blocks(model)[:count]
    model.config.num_hidden_layers = total - count
    below.config.num_hidden_layers = count
    embeds_BTD = lower._run({"input_ids": probe_BT})
    with torch.no_grad():
        found_BTV = model(inputs_embeds=embeds_BTD, use_cache=False).logits
    if not torch.allclose(found_BTV, expected_BTV, rtol=1e-3, atol=1e-2):
        kind = model.config.model_type
        raise TrainingError(f"frozen_blocks is not supported for model type {kind!r}: set it to 0")
    return lower


class EnteredBatches(Batches):
    """The batches of a plan as the upper part reads them."""

    def __init__(
        self,
        examples: Sequence[Encoded],
        steps: Sequence[Sequence[int]],
        lower: LowerBlocks,
        *,
        packed: bool = True,
    ) -> None:
        super().__init__(examples, steps, packed=packed)
        self.lower = lower

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of that step."""
        chosen = [self.examples[index] for index in self.steps[step]]
        return self.lower.enter(super().__getitem__(step), chosen, self.steps[step])
