"""A graph that speaks: one node of the last level goes on with the text, and hears the others while it does.

The levels below read the prompt once. What they say is injected into the voice where it hears, at the prompt's last
token and at every token after it (`last`), or at all tokens (`all`); behind its last block it hears, by the output's
cross-attention, what the nodes of the last level showed of the prompt. Everything else of `generate` is the voice's
own: its cache, beams, sampling and streamers.

Shapes: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from . import levels
from .frozen import Batch, Hear
from .reading import Texts
from .signals import GraphOutput, Run, Signals, WholeRun

if TYPE_CHECKING:
    from .model import LatentGraph


def speak(
    graph: LatentGraph,
    batches: Mapping[str, Batch],
    run: Run,
    labels: Tensor | None,
    without: Sequence[str] = (),
) -> GraphOutput:
    """Runs the graph over prompts, and the voice over its whole text.

    Args:
        graph: with a voice.
        batches: the prompts of all nodes; of the voice its prompt and answer, (B, T), padded on the left.
        run: of the prompts.
        labels: the voice's tokens (B, T), -100 where none is predicted; its answers. None reads the batch's end.
        without: nodes that show nothing.
    """
    voice = graph.config.voice
    assert voice is not None
    batch, node = batches[voice], graph.nodes[voice]
    prompt = batch["attention_mask"].bool()
    if labels is not None:
        prompt = prompt & (labels == -100)
    heard = _heard(graph, run, without)
    routing: list[Tensor] = []
    states = node.arguments(batch)
    with node.tapped(*_acts(graph, heard, prompt, routing)):
        logits = node.model(**states, return_dict=True).logits
    return GraphOutput(logits, routing[0], heard, _answer_loss(logits, labels))


def _heard(graph: LatentGraph, run: Run, without: Sequence[str]) -> Signals:
    """Runs all nodes but the voice, and adds what reaches the voice."""
    return graph.signals(run, [name for name in graph.nodes if name != graph.config.voice], without)


def _acts(
    graph: LatentGraph, heard: Signals, prompt_BT: Tensor, routing: list[Tensor]
) -> tuple[Hear | None, Hear | None, Hear | None]:
    """Returns what happens at the voice's taps: where it hears, is read and speaks.

    What is read is the prompt's last state; it is kept while later tokens come one by one.
    """
    voice = graph.config.voice
    assert voice is not None
    node, first = graph.nodes[voice], {"pass": True}
    hear = levels.hearing(graph, voice, heard)

    def listen(states_BTD: Tensor) -> Tensor:
        assert hear is not None
        added_BTD = hear(states_BTD)
        if node.node.position == "last" and states_BTD.shape[1] >= prompt_BT.shape[1]:
            hears_BT = _from_last(prompt_BT, states_BTD.shape[1])
            added_BTD = added_BTD * hears_BT.to(added_BTD)[..., None]
        return states_BTD + added_BTD

    def show(states_BTD: Tensor) -> Tensor:
        if first["pass"]:
            heard.shown[voice] = levels.pooled(graph, voice, states_BTD, prompt_BT)
            first["pass"] = False
        return states_BTD

    def answer(states_BTD: Tensor) -> Tensor:
        shown = {name: heard.shown[name] for name in graph.config.read}
        new_BTD, weights = graph.readout(shown, states_BTD)
        routing.append(weights)
        return new_BTD

    return (listen if hear is not None else None, show, answer)


def _from_last(prompt_BT: Tensor, width: int) -> Tensor:
    """Returns which tokens of prompt and answer hear: the prompt's last one and all behind it, (B, width)."""
    counted = torch.arange(1, prompt_BT.shape[1] + 1)
    last_B = (prompt_BT.long().cpu() * counted).argmax(-1)
    return torch.arange(width)[None] >= last_B[:, None]


def _answer_loss(logits_BTV: Tensor, labels_BT: Tensor | None) -> Tensor | None:
    if labels_BT is None:
        return None
    wanted = labels_BT[:, 1:].to(logits_BTV.device)
    if not bool((wanted != -100).any()):
        raise InputError("labels hold no token to predict; -100 everywhere")
    return nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), wanted.flatten(), ignore_index=-100
    )


@torch.inference_mode()
def generate(graph: LatentGraph, texts: Texts, **options: Any) -> list[str]:
    """Continues texts.

    Args:
        graph: with a voice.
        texts: for all nodes, or by node.
        options: of the voice's own `generate`, such as `max_new_tokens`.

    Returns:
        The voice's words behind each text.

    Raises:
        ConfigError: the graph only chooses.
    """
    voice = graph.config.voice
    if voice is None:
        raise ConfigError(
            "this graph chooses and has no voice; build it with output readout='vocabulary'"
        )
    batches = graph.read_texts(texts)
    node, batch = graph.nodes[voice], batches[voice]
    rows = max(int(options.get(name) or 1) for name in ("num_beams", "num_return_sequences"))
    heard = _heard(graph, WholeRun(graph.nodes, batches), ())
    for signals in (heard.shown, heard.written):
        for name in signals:
            signals[name] = signals[name].repeat_interleave(rows, 0)
    prompt = batch["attention_mask"].bool().repeat_interleave(rows, 0)
    tokenizer: Any = graph.members[voice].tokenizer
    placed = {name: tensor.to(node.device) for name, tensor in batch.items()}
    options.setdefault("pad_token_id", tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    with node.tapped(*_acts(graph, heard, prompt, [])):
        made: Any = node.model.generate(**placed, **options)
    words: list[str] = tokenizer.batch_decode(
        made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return words
