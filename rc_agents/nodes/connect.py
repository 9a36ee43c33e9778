"""The anchor's side of an ensemble in several processes, and what launchers such as torchrun need."""

from __future__ import annotations

import datetime
import os
import weakref
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..modeling import CoupledForCausalLM
from .hub import Hub
from .node import Node
from .settings import NodeSettings, address_of


def connect(
    path: str | Path,
    *,
    listen: str = "127.0.0.1:0",
    settings: NodeSettings | None = None,
    wait: float | None = 120.0,
    trains: bool = False,
    **options: Any,
) -> CoupledForCausalLM:
    """Loads the anchor of a saved ensemble, and couples it with specialists that run in processes of their own.

    Args:
        path: the checkpoint, a folder, a hub id or `package:NAME`; every process has the same.
        listen: address at which the specialists' processes join; port 0 takes a free one.
        settings: deadlines, wire format, secret.
        wait: seconds within which all specialists must have joined; None does not wait, and texts begin without those
            who are not there.
        trains: hold copies of all bridges here, so that a trainer trains them and `save_pretrained` saves them.
        options: as for `CoupledForCausalLM.from_pretrained`, for the anchor.

    Returns:
        The ensemble; `.elsewhere` is the hub: `connected`, `events`, `wait_for`, `close`.

    Raises:
        LinkError: who has not joined in time; ConfigError, CheckpointError: as for `from_pretrained`.
    """
    hub = Hub(path, settings=settings, listen=address_of(listen), trains=trains, **options)
    try:
        if wait is not None:
            hub.wait_for(hub.copies, wait)
    except BaseException:
        hub.close()
        raise
    model = hub.take_model()
    weakref.finalize(model, hub.close)
    return model


def launched(
    path: str | Path,
    *,
    settings: NodeSettings | None = None,
    host: str | None = None,
    **arguments: Any,
) -> CoupledForCausalLM | None:
    """Plays this process's part under torchrun, `accelerate launch` or any launcher that sets RANK and WORLD_SIZE.

    Rank 0 is the anchor, rank i the i-th specialist. They find each other through the launcher's TCPStore.

    Args:
        path: the checkpoint.
        settings: as for `connect`.
        host: the address under which other machines reach this one; by default MASTER_ADDR on rank 0.
        arguments: as for `connect` (rank 0) or `Node` (others): those of `from_pretrained`, and on rank 0 `trains`.

    Returns:
        The ensemble on rank 0; None on the others, after the anchor has said goodbye.
    """
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as missing:
        raise ConfigError(
            f"no launcher has set {missing}; start this with torchrun or accelerate launch"
        ) from None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    settings = settings or NodeSettings()
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = datetime.timedelta(seconds=settings.join)
    store = TCPStore(
        master, port, is_master=rank == 0 and not agent, timeout=timeout, wait_for_workers=False
    )
    key = f"rc_agents/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/anchor"
    if rank == 0:
        wait = arguments.pop("wait", 120.0)
        place = host or ("127.0.0.1" if master in ("localhost", "127.0.0.1") else "0.0.0.0")
        model = connect(path, listen=f"{place}:0", settings=settings, wait=None, **arguments)
        hub: Any = model.elsewhere
        if size != len(hub.copies) + 1:
            raise ConfigError(
                f"{size} processes for {len(hub.copies) + 1} models; launch one for each: "
                f"{', '.join(model.names)}"
            )
        told = host or (master if place == "0.0.0.0" else place)
        store.set(key, f"{told}:{hub.door.address[1]}")
        model.__dict__["_store"] = store  # lives as long as others may ask it
        if wait is not None:
            hub.wait_for(hub.copies, wait)
        return model
    arguments.pop("trains", None)
    arguments.pop("wait", None)
    names = _names(path)
    if rank >= len(names):
        raise ConfigError(f"rank {rank} has no model to run; the ensemble's are {', '.join(names)}")
    place = host or ("127.0.0.1" if master in ("localhost", "127.0.0.1") else "0.0.0.0")
    node = Node(
        path, names[rank], settings=settings, listen=(place, 0), advertise=host, **arguments
    )
    try:
        node.serve(address_of(store.get(key).decode()), once=True)
    finally:
        node.close()
    return None


def _names(path: str | Path) -> list[str]:
    from transformers import AutoConfig

    from ..backbone import locate

    return list(AutoConfig.from_pretrained(locate(str(path))).names)
