"""What serving costs: `python -m rc_agents.benchmarks.serving`, tokens a second as ratios, a JSON line last.

The same single model behind `rc-agents serve` and behind `transformers serve`, asked the same questions one at a time
and all at once; rounds are interleaved, each figure is the median of its rounds. Servers run on loopback and end with
the benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rc_agents import packaged
from rc_agents.provenance import provenance

QUESTIONS = [
    f"Tell me something about {what}."
    for what in ("rivers", "bread", "the moon", "glass", "trains", "honey", "Rome", "sleep")
]
FLOAT32 = ("--dtype", "float32")


@dataclass
class Server:
    """One that runs.

    Attributes:
        name: in the table.
        url: of its API.
        model: what it calls the model.
    """

    name: str
    url: str
    model: str

    def ask(self, question: str, tokens: int) -> str:
        """Returns one greedy answer."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "temperature": 0.0,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])


def main() -> None:
    """Runs the benchmark by its command line."""
    read = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    read.add_argument("--model", default="package:smollm2-135m")
    read.add_argument("--rounds", type=int, default=3)
    read.add_argument("--tokens", type=int, default=32, help="new tokens of an answer")
    read.add_argument("--threads", type=int, default=None, help="of each server")
    args = read.parse_args()
    place = str(packaged.resolve(args.model)) if packaged.is_packaged(args.model) else args.model
    tokenizer = AutoTokenizer.from_pretrained(place)
    with contextlib.ExitStack() as stack:
        started = [ours(place, args.threads), theirs(place, args.threads)]
        servers = [stack.enter_context(one) for one in started]
        rates: dict[str, list[float]] = {}
        for turn in range(args.rounds + 1):
            for server in servers:
                for at_once in (1, len(QUESTIONS)):
                    rate = _rate(server, tokenizer, at_once, args.tokens)
                    if turn:  # the first round warms up
                        rates.setdefault(f"{server.name}, {at_once} at once", []).append(rate)
    _report(rates, args)


def _rate(server: Server, tokenizer: Any, at_once: int, tokens: int) -> float:
    """Tokens a second of all questions."""
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda one: server.ask(one, tokens), QUESTIONS))
    seconds = time.perf_counter() - began
    return sum(len(tokenizer(one)["input_ids"]) for one in answers) / seconds


def ours(
    place: str, threads: int | None, *options: str
) -> contextlib.AbstractContextManager[Server]:
    """Runs `rc-agents serve` over a model in float32, with more options."""
    command = [sys.executable, "-m", "rc_agents.cli", "serve", place, "--name", "m", *FLOAT32]
    return _running("rc-agents serve", [*command, *options], "m", threads)


def theirs(
    place: str, threads: int | None, *options: str
) -> contextlib.AbstractContextManager[Server]:
    """Runs `transformers serve` over a model in float32, with more options."""
    script = str(Path(sys.executable).parent / "transformers")
    command = [script, "serve", place, *FLOAT32, "--log-level", "error"]
    return _running("transformers serve", [*command, *options], place, threads)


@contextlib.contextmanager
def _running(name: str, command: list[str], model: str, threads: int | None) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limited = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, **limited},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, name)
        yield Server(name, url, model)
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], name: str) -> None:
    for _ in range(600):
        if process.poll() is not None:
            sys.exit(f"{name} ended with {process.returncode} before it listened")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.5)
    sys.exit(f"{name} did not listen within five minutes")


def _report(rates: dict[str, list[float]], args: argparse.Namespace) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print("| server | tokens a second, median | all rounds |\n|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {medians[name]:.1f} | {', '.join(f'{one:.1f}' for one in values)} |")
    many = len(QUESTIONS)
    ratios = {
        "batched over one at a time": (
            f"rc-agents serve, {many} at once",
            "rc-agents serve, 1 at once",
        ),
        "over transformers serve, one at a time": (
            "rc-agents serve, 1 at once",
            "transformers serve, 1 at once",
        ),
        f"over transformers serve, {many} at once": (
            f"rc-agents serve, {many} at once",
            f"transformers serve, {many} at once",
        ),
    }
    found = {}
    for name, (above, below) in ratios.items():
        each = [a / b for a, b in zip(rates[above], rates[below], strict=True)]
        found[name] = [statistics.median(each), min(each), max(each)]
        print(f"{name}: {found[name][0]:.2f} ({found[name][1]:.2f} to {found[name][2]:.2f})")
    made = {"model": args.model, "tokens": args.tokens, "rounds": args.rounds, "ratios": found}
    print(json.dumps({"benchmark": "serving", **made, "rates": rates, **provenance(0)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
