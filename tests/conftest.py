"""What holds for every test: one thread, no network, the same seed, a tier."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

import ipaddress
import socket
import types
from collections.abc import Iterator

import accelerate.utils.memory
import hypothesis
import pytest
import torch
import transformers

pytest.register_assert_rewrite("tests.llm_standard_suite")

TIERS = {"unit", "tiny", "real", "dist"}

hypothesis.settings.register_profile("untimed", deadline=None)  # no clock decides a test
hypothesis.settings.load_profile("untimed")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that name no tier as `unit`, so that every test has one."""
    for item in items:
        if not TIERS & {marker.name for marker in item.iter_markers()}:
            item.add_marker("unit")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spares the collector what was imported, and most of its rounds: they are a tenth of a run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _collects_when_due() -> Iterator[None]:
    """Trainers end with a collection for the memory of a device; here it would only look through every test so far."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.utils.memory, "gc", types.SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


def _is_loopback(address: object) -> bool:
    if not isinstance(address, tuple):
        return True  # a Unix socket's path
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return address[0] == "localhost"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that leaves this machine fails the test that makes it."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if not _is_loopback(address):
            raise RuntimeError(f"a test tried to reach {address!r}; tests run offline")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
