"""Messages between the processes of one ensemble: frames over TCP, each wait with a deadline.

A frame is `RCN1`, the lengths of header and body, a JSON header, and the tensors' bytes one after another. Nothing is
ever unpickled. The header names what the frame is, the pass and site that it belongs to, and each tensor's dtype and
shape, all checked on arrival.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import select
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelRunError, nearest

MAGIC = b"RCN1"
PREFIX = struct.Struct("!4sIQ")
MOST_HEADER = 1 << 22
MOST_BODY = 1 << 36
MOST_BEFORE = 1 << 16  # bytes of a body from somebody who is not yet let in
MOST_PARTS = 1000  # buffers that the kernel takes at once
CHUNK = 1 << 20
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
WIRES = ("exact", "bfloat16", "int8")
"""How states cross: as they are, rounded to bfloat16, or as int8 with one scale a token."""


class LinkError(ModelRunError):
    """A link to another process is gone or speaks nonsense; the message says which and why."""


class NotYet(LinkError):
    """A link cannot be made now; it may later."""


@dataclass
class Frame:
    """One message.

    Args:
        kind: what it is.
        fields: JSON values by name.
        tensors: by name, on the CPU.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def parts(self, number: int = 0) -> list[bytes | memoryview]:
        """Returns the bytes to send as the link's frame of this number, the tensors' own memory among them."""
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()
        }
        listed = [[name, _name_of(one), list(one.shape)] for name, one in tensors.items()]
        header = json.dumps(
            {"kind": self.kind, "n": number, "tensors": listed, **self.fields}
        ).encode()
        views = [_bytes_of(one) for one in tensors.values() if one.numel()]
        prefix = PREFIX.pack(MAGIC, len(header), sum(len(view) for view in views))
        return [prefix + header, *views]

    @classmethod
    def read(cls, header: bytes, body: bytearray, number: int = 0) -> Frame:
        """Makes the link's frame of this number out of what came.

        Raises:
            LinkError: another number, or a header and a body that contradict each other.
        """
        try:
            fields = json.loads(header)
            kind, listed, came = fields.pop("kind"), fields.pop("tensors"), fields.pop("n")
            tensors, start = {}, 0
            for name, dtype, shape in listed:
                size = math.prod(shape) * DTYPES[dtype].itemsize
                data = body[start : start + size]
                if len(data) != size:
                    raise ValueError(f"{name!r} needs {size} bytes and has {len(data)}")
                tensors[name] = _tensor_of(data, DTYPES[dtype], shape)
                start += size
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise LinkError(
                f"a frame came that is none: {type(error).__name__}: {error}"
            ) from error
        if came != number:
            raise LinkError(f"frame {came} came where frame {number} was to come")
        if start != len(body):
            raise LinkError(
                f"a frame came with {len(body)} bytes of tensors, its header names {start}"
            )
        return cls(kind, fields, tensors)


def _name_of(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise LinkError(
            f"tensors of {name} do not cross between processes; {nearest(name, DTYPES)}"
        )
    return name


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # one element counts as contiguous whatever its stride
        flat = flat.new_empty(flat.shape).copy_(flat)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _tensor_of(data: bytearray, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def check_wire(wire: str) -> str:
    """Raises `ConfigError` unless states can cross in this form; returns it."""
    if wire not in WIRES:
        raise ConfigError(f"unknown wire format {wire!r}; {nearest(str(wire), WIRES)}")
    return wire


def packed(state: Tensor, wire: str) -> dict[str, Tensor]:
    """Returns a state, (B, T, D), as it crosses."""
    if wire == "bfloat16":
        return {"state": state.to(torch.bfloat16)}
    if wire == "int8":
        scale = state.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127  # (B, T, 1)
        return {"state": (state.float() / scale).round().to(torch.int8), "scale": scale}
    return {"state": state}


def unpacked(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Returns the state, (B, T, D), that `packed` was given, as far as the wire kept it."""
    state = tensors["state"]
    return (state.float() * tensors["scale"] if "scale" in tensors else state).to(dtype)


class Channel:
    """One TCP connection to another process of the ensemble.

    Sending never blocks the caller: what the kernel does not take at once, a thread of the channel's sends on.

    Args:
        sock: connected and authenticated.
        name: the other end's model.
        deadline: seconds after which unacknowledged bytes count as a cut link.
    """

    def __init__(self, sock: socket.socket, name: str, deadline: float) -> None:
        self.sock, self.name, self.deadline = sock, name, deadline
        self.sent = self.received = 0
        self.most = MOST_BEFORE  # until whoever it is has been let in
        self._numbers = [0, 0]  # frames sent and received
        self._rest: queue.Queue[bytes | None] | None = None
        self._lock = threading.Lock()
        self._want, self._got = PREFIX.size, bytearray()
        self._header: bytes | None = None
        self._sizes: tuple[int, int] | None = None
        self._broken: str | None = None
        _configure(sock, deadline)

    def fileno(self) -> int:
        """The socket's."""
        return self.sock.fileno()

    @property
    def open(self) -> bool:
        """Whether nothing has broken it yet."""
        return self._broken is None

    def send(self, frame: Frame) -> None:
        """Sends a frame, or leaves what does not fit to the channel's thread.

        Raises:
            LinkError: the link is broken.
        """
        with self._lock:
            if self._broken is not None:
                raise LinkError(f"the link to {self.name!r} is gone: {self._broken}")
            parts = frame.parts(self._numbers[0])
            self._numbers[0] += 1
            total = sum(len(part) for part in parts)
            self.sent += total
            done = 0
            if self._rest is None:
                try:
                    done = self.sock.sendmsg(parts[:MOST_PARTS])
                except BlockingIOError:
                    pass
                except OSError as error:
                    raise self._break(error) from error
            if done < total:
                self._later(b"".join(parts)[done:])

    def _later(self, data: bytes) -> None:
        if self._rest is None:
            self._rest = queue.Queue()
            threading.Thread(target=self._write, args=(self._rest,), daemon=True).start()
        self._rest.put(data)

    def _write(self, rest: queue.Queue[bytes | None]) -> None:
        """Sends what was left over, until nothing is."""
        while True:
            with self._lock:
                if rest.empty():
                    self._rest = None
                    return
            data = rest.get()
            view = memoryview(data or b"")
            while view:
                try:
                    if not _ready(self.sock, select.POLLOUT, self.deadline):
                        raise TimeoutError(f"it took no byte for {self.deadline:g} s")
                    view = view[self.sock.send(view[:CHUNK]) :]
                except BlockingIOError:
                    continue
                except (OSError, ValueError) as error:
                    with self._lock:
                        self._break(error)
                        self._rest = None
                    return

    def _break(self, error: BaseException) -> LinkError:
        self._broken = str(error) or type(error).__name__
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        return LinkError(f"the link to {self.name!r} broke: {self._broken}")

    @property
    def ready(self) -> bool:
        """Whether a part of a frame lies here unread, left behind by whoever stopped reading `frames`."""
        return len(self._got) >= self._want

    def frames(self) -> Iterator[Frame]:
        """Yields the frames that are there, without waiting for more.

        Raises:
            LinkError: the other end is gone, or sends what is no frame.
        """
        while True:
            while len(self._got) >= self._want:
                frame = self._step()
                if frame is not None:
                    yield frame
            try:
                data = self.sock.recv(min(max(self._want - len(self._got), 4096), CHUNK))
            except BlockingIOError:
                return
            except OSError as error:
                raise self._break(error) from error
            if not data:
                raise self._break(ConnectionError("the other end has closed it"))
            self.received += len(data)
            self._got += data

    def _step(self) -> Frame | None:
        """Takes the next part off the buffer: prefix, header or body."""
        part, self._got = self._got[: self._want], self._got[self._want :]
        if self._sizes is None:
            magic, header, body = PREFIX.unpack(part)
            if magic != MAGIC or header > MOST_HEADER or body > self.most:
                raise self._break(ConnectionError("it sends what is no frame"))
            self._sizes, self._want = (header, body), header
            return None
        if self._header is None:
            self._header, self._want = bytes(part), self._sizes[1]
            if self._want:
                return None
            part = bytearray()
        try:
            frame = Frame.read(self._header, part, self._numbers[1])
        except LinkError as error:
            raise self._break(error) from error
        self._numbers[1] += 1
        self._sizes, self._header, self._want = None, None, PREFIX.size
        return frame

    def close(self) -> None:
        """Ends the link; what was not sent yet is lost."""
        with self._lock:
            self._broken = self._broken or "it was closed here"
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def _ready(sock: socket.socket, event: int, seconds: float) -> bool:
    """Waits until a socket can be read or written; `select` knows no descriptors beyond 1,023."""
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def readable(channel: Channel, seconds: float) -> bool:
    """Waits until there is something to read on a link; returns whether there is."""
    return channel.ready or _ready(channel.sock, select.POLLIN, seconds)


def _configure(sock: socket.socket, deadline: float) -> None:
    """No delay for small frames; a link that is cut is noticed by the kernel within the deadline."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = max(1, round(deadline / 3))
    options = {
        "TCP_KEEPIDLE": seconds,
        "TCP_KEEPINTVL": seconds,
        "TCP_KEEPCNT": 2,
        "TCP_USER_TIMEOUT": max(1000, round(deadline * 1000)),
    }
    for name, value in options.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
