"""A feedforward graph of frozen models: levels of nodes that hear the level below through a shared latent space.

After Armstrong, Ayoobi and Mukherjee, "Dead Weights, Live Signals: Feedforward Graphs of Frozen Language Models", 2026
(arXiv 2604.08335). Equations in `latent` and `output`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..assembly import Member
from ..checkpoint.identity import fingerprint
from ..errors import ConfigError, InputError, nearest
from . import levels, pooling
from .config import GraphConfig
from .frozen import Batch, frozen_node
from .latent import Encode, HearDirectly
from .latent import Hear as LatentHear
from .output import READOUTS, VocabularyReadout
from .reading import Texts, texts_of, together, tokenize
from .remote import TEXTS, RemoteNode
from .signals import GraphOutput, Node, Run, Signals, WholeRun

if TYPE_CHECKING:
    from .choosing import Choice


class LatentGraph(nn.Module):
    """Frozen nodes, trained edges, and an output. Built by `rc_agents.graph.build`.

    Args:
        config: the graph.
        members: the loaded models by name of their node.
        schedule: "lockstep", one node after another, or "threads", the nodes of a level at once.
        remote: the nodes whose models run in other processes.

    Attributes:
        strict: whether a node that is lost is an error outside of training too; it shows nothing otherwise.
        temperature: by which scores are divided before they are called probabilities; see `choosing.calibrate`.
        routing: by node that the output reads, its mean share of the output's attention; empty before `calibrate`.
    """

    def __init__(
        self,
        config: GraphConfig,
        members: Mapping[str, Member],
        schedule: str = "lockstep",
        remote: Mapping[str, RemoteNode] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.members, self.schedule = config, dict(members), schedule
        self.remote = dict(remote or {})
        self.strict = False
        self.temperature = 1.0
        self.routing: dict[str, float] = {}
        self.nodes: dict[str, Node] = {
            name: self.remote[name]
            if name in self.remote
            else frozen_node(name, members[name].model, node)
            for name, node in config.nodes.items()
        }
        self.encoders = [name for name, node in self.nodes.items() if node.encodes]
        self._check_voice()
        for name, member in self.members.items():
            setattr(self, f"lm_{name}", member.model)
        self.widths = {name: node.width for name, node in self.nodes.items()}
        self.pools = nn.ModuleDict(
            {
                name: pooling.AttentionPool(self.widths[name])
                for name, node in config.nodes.items()
                if node.pooling == "attention"
            }
        )
        latent = config.latent
        direct = latent.link == "direct"
        self.encode = nn.ModuleDict(
            {} if direct else {name: Encode(latent, self.widths[name]) for name in config.heard}
        )
        self.hear = nn.ModuleDict({name: self._hear(name) for name in config.hearing})
        self.readout = self._readout()
        self.eval()

    def _check_voice(self) -> None:
        voice = self.config.voice
        if voice in self.encoders:
            raise ConfigError(f"the output's voice {voice!r} is an encoder, which has no words")
        if voice in self.remote:
            raise ConfigError(f"the output's voice {voice!r} speaks in this process; load it here")

    def _hear(self, name: str) -> nn.Module:
        latent, node, width = self.config.latent, self.config.nodes[name], self.widths[name]
        if latent.link == "direct":
            return HearDirectly(latent, node, width, self.widths)
        return LatentHear(latent, node, width)

    def _readout(self) -> nn.Module:
        output, normalize = self.config.output, self.config.latent.normalize
        widths = {name: self.widths[name] for name in self.config.read}
        if self.config.voice is None:
            return READOUTS[output.readout](output, widths, normalize)
        return VocabularyReadout(output, widths, normalize, self.widths[self.config.voice])

    def train(self, mode: bool = True) -> LatentGraph:
        """Trains the edges and the output alone; the models are frozen and stay in eval mode."""
        self.training = mode
        for name, child in self.named_children():
            if not name.startswith("lm_"):
                child.train(mode)
        return self

    # What is trained.

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields what trains, by name: edges, pooling and output."""
        for name, parameter in self.named_parameters():
            if not name.startswith("lm_") and parameter.requires_grad:
                yield name, parameter

    def num_trainable(self) -> int:
        """Returns how many values train."""
        return sum(parameter.numel() for _, parameter in self.trainable_parameters())

    def fingerprints(self) -> dict[str, str]:
        """Returns a hash by node that tells its model from another."""
        here = {name: fingerprint(member) for name, member in self.members.items()}
        return here | {name: node.fingerprint for name, node in self.remote.items()}

    # A pass.

    def texts_of(self, texts: Texts) -> dict[str, list[Any]]:
        """Returns what each node reads, checked; see `reading.texts_of`."""
        return texts_of(texts, list(self.nodes), self.encoders)

    def read_texts(self, texts: Texts) -> dict[str, dict[str, Any]]:
        """Returns what every node reads, in its own tokens; of an encoder, its own inputs as one batch.

        Raises:
            InputError, TokenError: see `reading`.
        """
        return {name: self._batch(name, each) for name, each in self.texts_of(texts).items()}

    def _batch(self, name: str, read: list[Any]) -> dict[str, Any]:
        if name in self.encoders:
            return together(name, read)
        if name in self.remote:
            return {TEXTS: read}
        return tokenize(name, self.members[name].tokenizer, read, self.nodes[name].context)

    def forward(
        self,
        batches: Mapping[str, Batch] | None = None,
        *,
        labels: Tensor | None = None,
        run: Run | None = None,
        without: Sequence[str] = (),
    ) -> GraphOutput:
        """Answers.

        Args:
            batches: by node its `input_ids` and `attention_mask`, (B, T), padded on the left; see `read_texts`.
            labels: the right choices (B,), or the voice's tokens (B, T) with -100 where none is predicted.
            run: where states come from in place of `batches`.
            without: nodes that are left out: they show nothing (zeros).

        Raises:
            InputError: neither batches nor a run, or an unknown node.
        """
        for name in without:
            if name not in self.nodes:
                raise InputError(
                    f"without names an unknown node {name!r}; {nearest(name, self.nodes)}"
                )
        if run is None:
            if batches is None:
                raise InputError("a graph needs batches; make them with graph.read_texts([...])")
            run = WholeRun(self.nodes, batches)
        if self.config.voice is None:
            signals = self.signals(run, self.nodes, without)
            shown = {name: signals.shown[name] for name in self.config.read}
            logits, routing = self.readout(shown)
            return GraphOutput(logits, routing, signals, _loss(logits, labels))
        from .voice import speak

        assert batches is not None, "a voice runs its whole model"
        return speak(self, batches, run, labels, without)

    def signals(self, run: Run, names: Any, without: Sequence[str] = ()) -> Signals:
        """Runs some nodes level by level; see `levels.signals`."""
        return levels.signals(self, run, names, without)

    # Who answers.

    def choose(self, questions: Sequence[Any], *, batch_size: int = 16) -> list[Choice]:
        """Answers questions with calibrated probabilities; see `choosing.choose`."""
        from .choosing import choose

        return choose(self, questions, batch_size=batch_size)

    def generate(self, texts: Texts, **options: Any) -> list[str]:
        """Continues texts with the voice's words; see `voice.generate`."""
        from .voice import generate

        return generate(self, texts, **options)

    @classmethod
    def published(cls, models: Mapping[str, Any] | None = None, **options: Any) -> LatentGraph:
        """Builds the published graph, of its five models or of others in their places.

        Args:
            models: by node, references or loaded models; see `published.published` for the nodes.
            options: as for `build`.
        """
        from .building import build
        from .published import published

        loaded = {name: one for name, one in (models or {}).items() if isinstance(one, nn.Module)}
        named = {name: one for name, one in (models or {}).items() if name not in loaded}
        return build(published(named), loaded, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the edges and the output; see `checkpoint.save`."""
        from .checkpoint import save

        save(self, folder)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> LatentGraph:
        """Loads a graph that was saved; see `checkpoint.load`."""
        from .checkpoint import load

        return load(path, **options)

    @contextlib.contextmanager
    def complete(self) -> Iterator[None]:
        """While inside, a node that is lost is an error."""
        before, self.strict = self.strict, True
        try:
            yield
        finally:
            self.strict = before

    @contextlib.contextmanager
    def scheduled(self, schedule: str) -> Iterator[None]:
        """While inside, another schedule."""
        before, self.schedule = self.schedule, schedule
        try:
            yield
        finally:
            self.schedule = before


def _loss(logits_BK: Tensor, labels: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    return nn.functional.cross_entropy(logits_BK, labels.to(logits_BK.device))
