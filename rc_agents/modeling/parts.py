"""What an ensemble is made of: frozen models with taps, bridges between them, a mixer."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import backbone, placement
from ..assembly import Member
from ..bridges import Bridge, Prediction, Router
from ..config import CouplingConfig
from ..errors import ConfigError, InputError
from ..execution import Elsewhere
from ..mixing import OutputMixer
from ..topology import ANCHOR, Edge

_KEYS = itertools.count()


def _untap(handles: dict[str, list[Any]]) -> None:
    """Takes the taps of an ensemble that is gone off the models that live on."""
    for handle in itertools.chain.from_iterable(handles.values()):
        handle.remove()


class EnsembleParts(PreTrainedModel):
    """The parts of an ensemble, and where they are.

    Args:
        config: the ensemble.
        members: the loaded models in the order of `config.names`.
        elsewhere: where the remote ones among them run.
    """

    config: CouplingConfig
    config_class = CouplingConfig
    base_model_prefix = "rc"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = False

    def __init__(
        self,
        config: CouplingConfig,
        members: Mapping[str, Member] | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        if members is None:
            raise ConfigError(
                "an ensemble is built with rc_agents.couple(...) or from_pretrained(...), not from a config"
            )
        super().__init__(config)
        self.members = dict(members)
        self._handles: dict[str, list[Any]] = {}
        self.key = next(_KEYS)
        self.elsewhere = elsewhere
        for name, member in self.members.items():
            if (
                not member.remote
            ):  # what has no weights here is no part that moves, trains or is saved
                setattr(self, f"lm_{name}", member.model)
        self.bridges = nn.ModuleDict()
        self.routers = nn.ModuleList()
        self.mixer = OutputMixer(config.mix, self.names)
        for edge in self.edges:
            self._build_bridges(edge)
        if config.bridge_config.kind == "moe":
            self._build_routers()
        for name in self.names:
            if not self.members[name].remote:
                self._tap(name)
        weakref.finalize(self, _untap, self._handles)
        self.generation_config = copy.deepcopy(self.models[ANCHOR].generation_config)
        self.name_or_path = ""
        self.eval()

    # The ensemble's parts.

    @property
    def names(self) -> list[str]:
        """The models, "anchor" first, then the specialists in order of addition."""
        return list(self.members)

    @property
    def specialists(self) -> list[str]:
        """The specialists' names in order of addition."""
        return self.names[1:]

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The frozen models by name."""
        return {name: member.model for name, member in self.members.items()}

    @property
    def readers(self) -> dict[str, PreTrainedModel]:
        """The models that read the text, the anchor first: all but encoders."""
        return {name: member.model for name, member in self.members.items() if not member.encodes}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """Each model's tokenizer by name, None where it has none."""
        return {name: member.tokenizer for name, member in self.members.items()}

    @property
    def tokenizer(self) -> Any:
        """The anchor's tokenizer."""
        return self.members[ANCHOR].tokenizer

    @property
    def remote_names(self) -> list[str]:
        """The models that run in other processes."""
        return [name for name, member in self.members.items() if member.remote]

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The directed edges between the models."""
        return () if (self.config.bridge or {})["kind"] == "moe" else self.config.edges

    @property
    def sites(self) -> list[list[int]]:
        """For each site the 1-based block of every model, in the order of `names`."""
        return self.config.site_layers or []

    def bridge(self, edge: Edge | tuple[str, str], site: int) -> Bridge:
        """Returns the bridge on an edge at a site (0-based index into `sites`)."""
        edge = Edge(*edge)
        if edge.key not in self.bridges:
            known = ", ".join(f"{e.source}->{e.target}" for e in self.edges) or "none"
            raise InputError(f"no bridge {edge.source!r} -> {edge.target!r}; known: {known}")
        if not 0 <= site < len(self.sites):
            raise InputError(
                f"no site {site}; this ensemble has {len(self.sites)}, numbered from 0"
            )
        return self.bridges[edge.key][site]  # type: ignore[index]

    def _tap(self, name: str) -> None:
        column = self.names.index(name)
        layers = [row[column] for row in self.sites]
        self._handles[name] = backbone.tap(self.models[name], layers, self.key)

    @contextmanager
    def untapped(self, name: str) -> Iterator[None]:
        """Takes the taps off one model inside a `with` block."""
        for handle in self._handles.pop(name):
            handle.remove()
        try:
            yield
        finally:
            self._tap(name)

    def _build_bridges(self, edge: Edge) -> None:
        """Makes one edge's bridges, each on the device of its target's block."""
        if self.config.bridge_config.kind == "moe":
            return
        source, target = self.models[edge.source], self.models[edge.target]
        blocks, column = backbone.find_blocks(target), self.names.index(edge.target)
        widths = backbone.stream_width(source), backbone.stream_width(target)
        form = self.config.bridge_form(edge)
        pools = self.members[edge.source].encodes
        made = [Bridge(form, *widths, pools=pools) for _ in self.sites]
        remote = self.members[edge.target].remote
        if form.reads == "prediction" and not remote:
            embeddings: Any = target.get_input_embeddings()
            if embeddings.weight.shape[1] != widths[1]:
                raise ConfigError(
                    f"reads='prediction' needs embeddings as wide as the stream, but {edge.target!r} has "
                    f"{embeddings.weight.shape[1]} and {widths[1]}; use reads='state'"
                )
            if self.members[edge.source].remote:
                assert self.elsewhere is not None
                says: Any = self.elsewhere.lens(edge.source)
            else:
                says = backbone.Lens(source)
            reading = Prediction(says, embeddings)
            for bridge in made:
                bridge.reading = reading
        for bridge, row in zip(made, self.sites, strict=True):
            device = placement.execution_device(blocks[row[column] - 1])
            held = self.elsewhere is not None and self.elsewhere.trains
            bridge.to("cpu" if remote and held else device)
        self.bridges[edge.key] = nn.ModuleList(made)

    def _build_routers(self) -> None:
        """Makes a router a site, each on the device of the anchor's block."""
        blocks = backbone.find_blocks(self.models[ANCHOR])
        for row in self.sites:
            router = Router(self.names, self.config.hidden_size)
            self.routers.append(router.to(placement.execution_device(blocks[row[0] - 1])))

    def _init_weights(self, module: nn.Module) -> None:
        """Keeps every weight: the bases are loaded and the bridges made."""

    def get_input_embeddings(self) -> nn.Module:
        """The anchor's."""
        return self.models[ANCHOR].get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The anchor's."""
        return self.models[ANCHOR].get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: base weights never change."""
        raise InputError(
            "the bases are frozen: the ensemble's embeddings cannot be replaced or resized"
        )

    @property
    def device(self) -> torch.device:
        """Where the anchor's tokens go."""
        return placement.input_device(self.models[ANCHOR])

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """Model name -> device, where the models lie on several; trainers and pipelines then move nothing.

        There is no such attribute (AttributeError) where one device holds all.
        """
        devices = {name: placement.input_device(model) for name, model in self.models.items()}
        if len({parameter.device for parameter in self.parameters()}) < 2:
            raise AttributeError("one device holds all models")
        return devices

    @property
    def dtype(self) -> torch.dtype:
        """The anchor's."""
        return self.models[ANCHOR].dtype

    def train(self, mode: bool = True) -> Self:
        """Sets the bridges' mode; the frozen models stay in eval."""
        super().train(mode)
        for model in self.models.values():
            model.eval()
        return self

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the bridges', routers' and mixer's parameters by name."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not name.startswith("lm_"):
                yield name, parameter

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters train, and their share of all."""
        trained = sum(parameter.numel() for _, parameter in self.trainable_parameters())
        total = sum(parameter.numel() for parameter in self.parameters())
        print(
            f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
        )
