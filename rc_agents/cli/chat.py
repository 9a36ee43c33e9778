"""`rc-agents chat`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rc_agents import RCError
from rc_agents.errors import InputError, nearest
from rc_agents.service import GenerationParams, GenerationResult, GenerationService

from .generate import Chosen, MaxNewTokens, Seed, Shown, Strength, Temperature, TopK, TopP, part_of
from .models import (
    MODEL_HELP,
    Anchor,
    DeviceMap,
    DType,
    Nodes,
    Specialists,
    by_name,
    names,
    number,
    opened,
)

COMMANDS = (
    "/specialists A,B|all|none, /specialist NAME on|off, /strength X, /show [FILE], "
    "/compare [MESSAGE], /reset, /quit"
)


def chat(
    model: Annotated[
        str | None, typer.Argument(help=f"{MODEL_HELP} Left out with --anchor.")
    ] = None,
    anchor: Anchor = None,
    specialist: Specialists = None,
    system: Annotated[str | None, typer.Option(help="A system message in front.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    specialists: Chosen = None,
    strength: Strength = None,
    show: Shown = None,
    device_map: DeviceMap = None,
    dtype: DType = None,
    nodes: Nodes = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer and its counts as one JSON line.")
    ] = False,
) -> None:
    """Talk to an ensemble.

    Each line is a message; Ctrl-C ends an answer, Ctrl-D the chat. Lines that start with a slash are commands:
    /specialists A,B (or all, none), /specialist NAME on (or off), /strength X, /show FILE (a picture or sound for the
    messages from now on, in the place of another of its kind; without a file nothing more), /compare MESSAGE (the
    frozen anchor's answer beside the ensemble's; without a message the last one's), /reset, /quit.
    """
    params = GenerationParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        specialists=names(specialists),
        strength=by_name(strength, number),
    )
    with opened(model, anchor, specialist, device_map, dtype, nodes) as ensemble:
        talk = Conversation(
            GenerationService(ensemble), params, system, show or (), as_json=as_json
        )
        if sys.stdin.isatty():
            print(f"{', '.join(ensemble.names)}. {COMMANDS}", file=sys.stderr)
        for line in _lines():
            if not talk.take(line):
                return


class Conversation:
    """A chat's messages and choices.

    Args:
        service: answers.
        params: of every answer, until a command changes them.
        system: a message in front.
        show: files for the encoders that take them, with every message until a command changes them.
        as_json: print each answer whole, with its counts, as one line of JSON.

    Raises:
        InputError: the anchor has no chat template, a choice cannot work, or no encoder takes a file.
    """

    def __init__(
        self,
        service: GenerationService,
        params: GenerationParams,
        system: str | None,
        show: Sequence[Path] = (),
        *,
        as_json: bool = False,
    ) -> None:
        self.service, self.params, self.as_json = service, params, as_json
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._first)
        self._parts = [part_of(file) for file in show]
        service.render([*self._first, _message("Hi", self._parts)])
        self._commands: dict[str, Callable[[str], None]] = {
            "specialists": self._choose_specialists,
            "specialist": self._switch_specialist,
            "compare": self._compare,
            "strength": self._choose_strength,
            "show": self._show,
            "reset": self._reset,
        }

    def take(self, line: str) -> bool:
        """Answers a line or does what it says; returns whether the chat goes on. Errors are one line."""
        if line.strip() == "/quit":
            return False
        try:
            if line.startswith("/"):
                self._obey(*line[1:].partition(" ")[::2])
            elif line.strip():
                self._answer(line)
        except RCError as error:
            print(f"error: {error}", file=sys.stderr)
        return True

    def _answer(self, text: str) -> None:
        asked = self.service.render([*self.messages, _message(text, self._parts)])
        with self.service.stream(asked, self.params) as stream:
            try:
                for piece in stream:
                    print("" if self.as_json else piece, end="", flush=True)
            except KeyboardInterrupt:
                stream.close()
        print(_line(stream.result) if self.as_json else "", flush=True)
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": stream.result.text},
        ]

    def _obey(self, name: str, argument: str) -> None:
        if name not in self._commands:
            known = ["/" + one for one in (*self._commands, "quit")]
            raise InputError(f"unknown command {'/' + name!r}; {nearest('/' + name, known)}")
        self._commands[name](argument.strip())

    def _choose_specialists(self, argument: str) -> None:
        chosen = names(argument or "all")
        self._set(replace(self.params, specialists=chosen))
        present = self.service.model.specialists if chosen is None else chosen
        print(f"specialists: {', '.join(present) or 'none'}", file=sys.stderr)

    def _switch_specialist(self, argument: str) -> None:
        name, _, word = argument.partition(" ")
        if word.strip() not in ("on", "off"):
            raise InputError(
                f"expected /specialist NAME on or /specialist NAME off, got {argument!r}"
            )
        known = self.service.model.specialists
        present = known if self.params.specialists is None else self.params.specialists
        wanted = {*present, name} if word.strip() == "on" else {*present} - {name}
        if name not in known:
            raise InputError(f"unknown specialist {name!r}; {nearest(name, known)}")
        self._choose_specialists(",".join(one for one in known if one in wanted) or "none")

    def _compare(self, argument: str) -> None:
        """Answers a message twice, and keeps neither answer."""
        asked = [one for one in self.messages if one["role"] == "user"]
        if not argument and not asked:
            raise InputError("nothing to compare yet; write /compare MESSAGE")
        message = argument or asked[-1]["content"]
        before = self.messages if argument else self.messages[:-2]  # without the last turn
        prompt = self.service.render([*before, _message(message, self._parts)])
        for title, params in (
            ("frozen anchor", replace(self.params, specialists=[])),
            ("ensemble", self.params),
        ):
            began = time.perf_counter()
            found = self.service.generate(prompt, params)
            if self.as_json:
                print(_line(found, who=title), flush=True)
                continue
            rate = found.completion_tokens / (time.perf_counter() - began)
            print(f"{title} ({rate:.1f} tokens/s): {found.text}")

    def _choose_strength(self, argument: str) -> None:
        value = by_name(argument or "1", number)
        self._set(replace(self.params, strength=value))
        print(f"strength: {argument or 1}", file=sys.stderr)

    def _show(self, argument: str) -> None:
        chosen: list[dict[str, Any]] = []
        if argument:
            part = part_of(_file(argument))
            chosen = [*(one for one in self._parts if one["type"] != part["type"]), part]
        self.service.render([_message("Hi", chosen)])
        self._parts = chosen
        shown = [str(one[one["type"]]) for one in chosen]
        print(f"shown: {', '.join(shown) or 'nothing'}", file=sys.stderr)

    def _reset(self, argument: str) -> None:
        self.messages = list(self._first)
        print("a new chat", file=sys.stderr)

    def _set(self, params: GenerationParams) -> None:
        self.service.check(params)
        self.params = params


def _message(text: str, shown: Sequence[Any]) -> dict[str, Any]:
    """A message with what is shown; those before it have their text alone."""
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def _file(argument: str) -> Path:
    try:
        file = Path(argument).expanduser()
        found = file.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, or somebody who is not there
        raise InputError(f"{argument!r:.60} is no file: {error!s:.60}") from error
    if not found:
        raise InputError(f"{argument!r:.60} is no file")
    return file


def _line(result: GenerationResult, **more: str) -> str:
    return json.dumps(more | asdict(result), ensure_ascii=False)


def _lines() -> Iterator[str]:
    """Lines from the keyboard, with a prompt and a history, or from a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401 - gives input() its history

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
