"""Copies beside the models' own work, on streams that write down what they are told."""

from contextlib import contextmanager

import pytest
import torch

from rc_agents.execution.copies import carried, marks, side_stream

A, B = torch.device("cuda", 0), torch.device("cuda", 1)


class Cuda:
    """`torch.cuda` without a GPU: keeps the order in which streams wait, record and copy."""

    def __init__(self):
        self.log = []
        self.active = {A: Stream(self, A, "main"), B: Stream(self, B, "main")}

    def Stream(self, device):
        return Stream(self, device, "side")

    def current_stream(self, device):
        return self.active[device]

    @contextmanager
    def stream(self, stream):
        before = self.active[stream.device]
        self.active[stream.device] = stream
        try:
            yield
        finally:
            self.active[stream.device] = before


class Stream:
    def __init__(self, cuda, device, kind):
        self.cuda, self.device, self.name = cuda, device, f"{kind}{device.index}"

    def record_event(self):
        self.cuda.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.cuda.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class State:
    """A tensor that is somewhere, as far as copies ask."""

    is_cuda = True

    def __init__(self, cuda, device, name="state"):
        self.cuda, self.device, self.name = cuda, device, name

    def to(self, device, non_blocking=False):
        if device == self.device:
            return self
        ends = [self.cuda.active[end].name for end in (self.device, device)]
        self.cuda.log.append(f"copy on {ends[0]} and {ends[1]}, non_blocking={non_blocking}")
        return State(self.cuda, device, "copy")

    def record_stream(self, stream):
        self.cuda.log.append(f"{self.name} is held for {stream.name}")


def test_a_copy_runs_beside_and_only_its_reader_waits():
    cuda = Cuda()
    copy = carried(State(cuda, A), B, ready="event of the site", cuda=cuda)
    assert copy.device == B
    assert cuda.log == [
        "side0 waits for event of the site",
        "copy on side0 and side1, non_blocking=True",
        "state is held for side0",
        "copy is held for main1",
        "main1 waits for side1",
    ]
    assert {one.name for one in cuda.active.values()} == {"main0", "main1"}


def test_without_an_event_a_copy_waits_for_what_is_queued():
    cuda = Cuda()
    carried(State(cuda, A), B, cuda=cuda)
    assert cuda.log[:2] == ["main0 records", "side0 waits for event of main0"]


def test_a_device_has_one_side_stream():
    cuda = Cuda()
    assert side_stream(A, cuda) is side_stream(A, cuda)
    assert side_stream(A, cuda) is not side_stream(B, cuda)


def test_states_are_marked_where_they_lie_apart():
    cuda = Cuda()
    together = {"anchor": State(cuda, A), "law": State(cuda, A)}
    assert marks(together, cuda) == {}
    found = marks(together | {"law": State(cuda, B)}, cuda)
    assert found == {"anchor": "event of main0", "law": "event of main1"}
    assert cuda.log == ["main0 records", "main1 records"]


@pytest.mark.parametrize("ends", [("cpu", "cpu"), ("cpu", "meta")])
def test_other_devices_copy_as_pytorch_does(ends):
    source, target = map(torch.device, ends)
    tensor = torch.ones(2, device=source)
    found = carried(tensor, target, cuda=None)
    assert found.device == target
    assert (found is tensor) == (source == target)


def test_a_tensor_that_is_there_already_stays():
    cuda = Cuda()
    state = State(cuda, A)
    assert carried(state, A, cuda=cuda) is state
    assert not cuda.log
