"""How long one exchange of a state takes: `python -m rc_agents.benchmarks.transport`, a JSON line last.

Two processes on loopback send each other 576 floats at once and wait for the other's: by TCP sockets, as links do, and
by gloo's `isend` and `recv`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rc_agents.benchmarks.fault_cluster import PROCESSES

from rc_agents.provenance import provenance

NUMBERS = 576


def over_sockets(sock: socket.socket) -> Callable[[], None]:
    """One exchange over a connected socket."""
    data, buffer = bytes(4 * NUMBERS), bytearray(4 * NUMBERS)

    def exchange() -> None:
        sock.sendall(data)
        view = memoryview(buffer)
        while view:
            view = view[sock.recv_into(view) :]

    return exchange


def over_gloo(rank: int) -> Callable[[], None]:
    """One exchange over gloo."""
    mine, theirs = torch.zeros(NUMBERS), torch.zeros(NUMBERS)

    def exchange() -> None:
        sending: Any = dist.isend(mine, 1 - rank)
        dist.recv(theirs, 1 - rank)
        sending.wait()

    return exchange


def timed(exchange: Callable[[], None], rounds: int) -> list[float]:
    """Microseconds of each exchange, after ten that do not count."""
    times = []
    for number in range(rounds + 10):
        start = time.perf_counter()
        exchange()
        if number >= 10:
            times.append(1e6 * (time.perf_counter() - start))
    return times


def run(rank: int, pipe: Any, rounds: int) -> dict[str, list[float]]:
    """One of the two processes; rank 0 tells the other where to connect."""
    torch.set_num_threads(1)
    if rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            pipe.send(server.getsockname()[1])
            sock = server.accept()[0]
    else:
        sock = socket.create_connection(("127.0.0.1", pipe.recv()))
    with contextlib.closing(sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found = {"sockets": timed(over_sockets(sock), rounds)}
    patience = datetime.timedelta(seconds=30)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        pipe.send(store.port)
    else:
        store = dist.TCPStore("127.0.0.1", pipe.recv(), 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    found["gloo"] = timed(over_gloo(rank), rounds)
    dist.destroy_process_group()
    return found


def main() -> None:
    """Prints a table, writes a record, prints it as a JSON line last."""
    parser = argparse.ArgumentParser(description="Time one exchange between two processes.")
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed"))
    arguments = parser.parse_args()
    near, far = multiprocessing.Pipe()
    other = PROCESSES.Process(target=run, args=(1, far, arguments.rounds), daemon=True)
    other.start()
    found = run(0, near, arguments.rounds)
    other.join(30)
    microseconds = {}
    for name, times in found.items():
        low, middle, high = statistics.quantiles(times, n=4)
        microseconds[name] = {"median": middle, "quartiles": [low, high]}
        print(f"{name:8} {middle:7.1f} us ({low:.1f} to {high:.1f})")
    record = {
        "benchmark": "transport",
        "numbers": NUMBERS,
        "rounds": arguments.rounds,
        "microseconds": microseconds,
        **provenance(0),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "transport.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
