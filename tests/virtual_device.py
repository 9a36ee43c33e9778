"""Several devices on a machine that has none: CPU numbers behind tensors that report `vgpu:i`.

PyTorch leaves one device type (PrivateUse1) for backends written outside it. Here it is a tensor
subclass over a CPU tensor: operations compute on the CPU, mixing devices raises as CUDA would, and
every copy from one device to another is logged, and every read of a number for which a processor
would wait. It needs no dispatch mode, so it holds in every thread.

    with virtual_devices(2) as devices:
        model.to(devices[1])
        ...
        devices.transfers       # [Transfer(source=cpu, target=vgpu:1, shape=..., dtype=...), ...]
        devices.reads           # ["aten._local_scalar_dense.default", ...]
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "vgpu"
LIMIT = 16  # devices the backend reports to PyTorch; how many exist is up to the context
CPU = torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
"""What makes the processor wait for a device: its answer is a number or a shape."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


@dataclass(frozen=True)
class Transfer:
    """One tensor that went from one device to another."""

    source: torch.device
    target: torch.device
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """What crossed, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class VirtualDevices(Sequence[torch.device]):
    """The devices of one context, and what went from one to another in it."""

    count: int
    transfers: list[Transfer] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.device:
        return [torch.device(NAME, i) for i in range(self.count)][index]

    def between(self, *ends: torch.device | str) -> list[Transfer]:
        """The transfers that start and end on these devices; on any virtual ones by default."""
        wanted = {torch.device(end) for end in ends} or set(self)
        return [one for one in self.transfers if {one.source, one.target} <= wanted]


_active: VirtualDevices | None = None


class VirtualTensor(torch.Tensor):
    """A CPU tensor that reports a virtual device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, inner: Tensor, device: torch.device | None = None, requires_grad: bool = False
    ) -> Tensor:
        if device is None:  # accelerate makes a parameter's class anew around what it has moved
            return torch.nn.Parameter(inner, requires_grad=requires_grad)
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self) -> str:
        return f"VirtualTensor({self.inner!r}, device={self.device})"

    def data_ptr(self) -> int:
        """Tells tensors from one another, as on any device."""
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        """As on any device, which PyTorch refuses for subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._can_decompose():  # inference mode has not done so yet
            return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Computes on the CPU and gives the result the device it would have had."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    device = _result_device(func, tensors, kwargs.get("device"))
    if func in READS and _active is not None:
        _active.reads.append(str(func))
    if device.type == "meta":
        return func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if func in COPIES:
        source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], device)
        _log(source, target.device if isinstance(target, Tensor) else target)
    if "device" in kwargs:
        kwargs = kwargs | {"device": CPU}
    if func is aten.histc.default:  # counts integers on accelerators only
        args = (args[0].float(), *args[1:])
    wrappers = {id(one.inner): one for one in tensors if isinstance(one, VirtualTensor)}
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if device == CPU:
        return result
    return tree_map(lambda leaf: _wrap(leaf, device, wrappers), result)


def _unwrap(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, VirtualTensor) else leaf


def _wrap(leaf: Any, device: torch.device, known: dict[int, VirtualTensor]) -> Any:
    """An in-place operation returns the tensor it was given."""
    if not isinstance(leaf, Tensor):
        return leaf
    if id(leaf) in known:
        return known[id(leaf)]
    return VirtualTensor(leaf, device)


def _result_device(func: Any, tensors: list[Tensor], asked: torch.device | None) -> torch.device:
    """Raises unless the tensors lie together, as CUDA does: CPU scalars and CPU indices may differ."""
    if func is aten.copy_.default:
        return tensors[0].device
    if asked is not None:
        return _existing(torch.device(asked))
    if func in INDEXED:
        bound = [tensors[0], *(one for one in tensors[1:] if one.device != CPU)]
    else:
        bound = [one for one in tensors if one.dim() > 0 or one.device != CPU]
    devices = sorted({str(one.device) for one in bound})
    if len(devices) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(devices)}! (in {func})"
        )
    return bound[0].device


def _existing(device: torch.device) -> torch.device:
    """The device with its index, if this context has it."""
    if device.type != NAME:
        return device
    if _active is None:
        raise RuntimeError(f"{device} exists only inside virtual_devices()")
    index = device.index or 0
    if index >= len(_active):
        raise RuntimeError(f"invalid device ordinal: {device}, there are {len(_active)}")
    return torch.device(NAME, index)


def _log(tensor: Tensor, target: torch.device) -> None:
    if _active is not None and tensor.device != target and tensor.numel():
        _active.transfers.append(Transfer(tensor.device, target, tuple(tensor.shape), tensor.dtype))


def _empty(size: Any, *, device: Any, dtype: Any = None, **_: Any) -> VirtualTensor:
    return VirtualTensor(torch.empty(size, dtype=dtype), _existing(device))


def _empty_strided(
    size: Any, stride: Any, *, device: Any, dtype: Any = None, **_: Any
) -> VirtualTensor:
    return VirtualTensor(torch.empty_strided(size, stride, dtype=dtype), _existing(device))


def _copy_from(source: Tensor, target: VirtualTensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor(..., device=...)` ends in, past the subclass."""
    _log(source, target.device)
    target.inner.copy_(_unwrap(source))
    return target


class _Module(backend_registration._DummyBackendModule):
    """`torch.vgpu`: says no accelerator is there, so that nothing picks it without being asked."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return LIMIT


@functools.cache
def _register() -> torch.library.Library:
    """Makes PyTorch know the device type, once a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    return library


@contextlib.contextmanager
def virtual_devices(count: int) -> Iterator[VirtualDevices]:
    """Devices `vgpu:0` to `vgpu:(count - 1)`, and a log of what goes from one to another.

    Args:
        count: how many there are; a higher index raises.
    """
    global _active
    if _active is not None:
        raise RuntimeError("virtual_devices() does not nest")
    _register()
    _active = VirtualDevices(count)
    try:
        # The autograd engine counts devices once, maybe before these were known.
        with torch.autograd.set_multithreading_enabled(False):
            yield _active
    finally:
        _active = None
