"""Copies between devices: on CUDA beside the models' own work, elsewhere as PyTorch does them.

A plain copy between two CUDA devices is queued among the kernels of both: it waits for what the target has been given
to do, and what comes after it on the source waits for it. Here it runs on a stream of its own at either end. It begins
when the state is there, and only what reads the copy waits for it; the processor waits for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def marks(states: Mapping[str, Tensor], cuda: Any = torch.cuda) -> dict[str, Any]:
    """Returns for each state on a CUDA device the event after which it is there, by name.

    Taken where the models stand still, as each goes on at once with work of its own that no copy should wait for. Empty
    where one device holds all.

    Args:
        states: by model.
        cuda: what gives streams; `torch.cuda`.
    """
    if len({state.device for state in states.values()}) < 2:
        return {}
    there = {name: state.device for name, state in states.items() if state.is_cuda}
    return {name: cuda.current_stream(device).record_event() for name, device in there.items()}


def carried(
    tensor: Tensor, device: torch.device, ready: Any = None, cuda: Any = torch.cuda
) -> Tensor:
    """Returns a tensor on a device, itself where it is there already.

    Args:
        tensor: what crosses.
        device: where to.
        ready: the event after which it is there; None for what is queued on its device by now.
        cuda: what gives streams; `torch.cuda`.
    """
    source = tensor.device
    if source == device or not source.type == device.type == "cuda":
        return tensor.to(device)
    here, there = side_stream(source, cuda), side_stream(device, cuda)
    here.wait_event(ready or cuda.current_stream(source).record_event())
    with cuda.stream(there), cuda.stream(here):
        copy = tensor.to(device, non_blocking=True)
    # Their memory may not be given away while the copy, or what reads it, still runs.
    tensor.record_stream(here)
    copy.record_stream(cuda.current_stream(device))
    cuda.current_stream(device).wait_stream(there)
    return copy


@functools.cache
def side_stream(device: torch.device, cuda: Any = torch.cuda) -> Any:
    """Returns the stream of a device that copies run on, made once."""
    return cuda.Stream(device)
