"""From what the user passes to loaded, frozen, matching models and the config that describes them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from . import backbone, placement
from .alignment import check_spells, same_tokenizer, site_rows
from .bridges.router import check_widths
from .config import POOL, BridgeConfig, CouplingConfig, ModelRef, check_choice, check_name
from .errors import ConfigError, ModelError, TokenError
from .topology import ANCHOR, DEFAULT, Edge, Topology, resolve

Reference = str | Path | ModelRef | PreTrainedModel


@dataclass
class Member:
    """One model: where it came from, its weights, its tokenizer.

    A remote one runs in another process: its weights are shapes alone (on the meta device).
    """

    name: str
    ref: ModelRef
    model: PreTrainedModel
    tokenizer: Any | None
    live: bool = False
    remote: bool = False

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder, which speaks and neither reads the text nor listens."""
        return backbone.is_encoder(self.model.config)


@dataclass
class Loader:
    """Loads members one after another; adapter specialists share the weights of a base that is loaded already.

    Args:
        names: all models that the settings may name.
        device_map: see `placement.device_map_of`.
        dtype: one for all, or a dict by model name.
        tokenizers: by name, in place of what a model's base would give; None for a model that has none.
        trust_remote_code: passed on to Hugging Face; off unless the user asks for it.
        quantization: in place of what the references say: see `placement.quantization_of`.
        offload_folder: where weights go that a device map puts on disk and that cannot be read from where they lie.
    """

    names: Sequence[str]
    device_map: Any = None
    dtype: Any = None
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    quantization: Any = None
    offload_folder: str | Path | None = None
    members: dict[str, Member] = field(default_factory=dict)

    def add(self, name: str, reference: Reference) -> Member:
        """Loads (or takes over) one model and freezes it."""
        if isinstance(reference, PreTrainedModel):
            member = self._take_over(name, reference)
        else:
            given = as_ref(name, reference)
            ref = placement.quantization_of(name, given, self.quantization, self.names)
            options = {
                "dtype": placement.dtype_of(name, self.dtype, self.names),
                "device_map": placement.device_map_of(name, self.device_map, self.names),
                "offload_folder": self.offload_folder,
            }
            base = self._loaded_base(name, ref)
            model = backbone.load(
                name, ref, base=base, trust_remote_code=self.trust_remote_code, **options
            )
            member = Member(name, ref, model, None)
            member.tokenizer = None if member.encodes else self._tokenizer(name, ref)
        backbone.check(name, member.model)
        self._check_role(member)
        self.members[name] = member
        return member

    def _check_role(self, member: Member) -> None:
        """Refuses an encoder in the place of a model that reads the text."""
        if not member.encodes:
            return
        if member.name == ANCHOR:
            raise ModelError(
                f"the anchor is a causal language model, got an encoder of type {member.model.config.model_type!r}; "
                "pass the encoder as a specialist"
            )
        if self.tokenizers.get(member.name) is not None:
            raise ConfigError(
                f"model {member.name!r} is an encoder and reads no tokens; leave it out of tokenizers"
            )

    def _take_over(self, name: str, model: PreTrainedModel) -> Member:
        if placement.quantization_of(name, ModelRef(), self.quantization, self.names).quantization:
            raise ConfigError(
                f"model {name!r} was passed in loaded and is quantized or not already; pass its path or id, "
                "or leave it out of quantization"
            )
        if any(member.model is model for member in self.members.values()):
            model = backbone.share_weights(model)
        device_map = placement.device_map_of(name, self.device_map, self.names)
        if isinstance(device_map, (str, int, torch.device)) and device_map != "auto":
            _move(name, model, device_map)
        elif device_map is not None:
            warnings.warn(
                f"device_map has no effect on {name!r}, which was passed in loaded", stacklevel=4
            )
        dtype = placement.dtype_of(name, self.dtype, self.names)
        if dtype is not None and dtype != "auto":
            wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            if model.dtype != wanted:
                raise ConfigError(
                    f"model {name!r} was passed in loaded as {model.dtype}, but dtype={wanted} is asked for; "
                    "load it in that dtype or leave dtype out"
                )
        path = getattr(model.config, "_name_or_path", "") or None
        ref = ModelRef(base=path)
        reads = not backbone.is_encoder(model.config) and name not in self.tokenizers
        found = backbone.load_tokenizer(ref) if path and reads else None
        tokenizer = self.tokenizers.get(name, found)
        return Member(name, ref, backbone.freeze(model), tokenizer, live=True)

    def _loaded_base(self, name: str, ref: ModelRef) -> PreTrainedModel | None:
        """A loaded model with the same base weights on the same device in the same dtype, which `ref` adapts."""
        if ref.adapter is None:
            return None
        for other in self.members.values():
            same = bare(other.ref) == bare(ref)
            place = [
                placement.device_map_of(n, self.device_map, self.names) for n in (name, other.name)
            ]
            kind = [placement.dtype_of(n, self.dtype, self.names) for n in (name, other.name)]
            if (
                same
                and not other.live
                and not other.remote
                and other.ref.adapter is None
                and place[0] == place[1]
                and kind[0] == kind[1]
            ):
                return other.model
        return None

    def _tokenizer(self, name: str, ref: ModelRef) -> Any | None:
        if name in self.tokenizers:
            return self.tokenizers[name]
        for other in self.members.values():
            if (other.ref.base, other.ref.revision) == (
                ref.base,
                ref.revision,
            ) and other.tokenizer is not None:
                return other.tokenizer
        return backbone.load_tokenizer(ref, trust_remote_code=self.trust_remote_code)


def _move(name: str, model: PreTrainedModel, device: Any) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(
            f"model {name!r} cannot go to device_map={device!r}: {backbone.first_line(error)}; name another device"
        ) from error


def bare(ref: ModelRef) -> ModelRef:
    """Returns the reference of the base alone."""
    return replace(ref, adapter=None, adapter_revision=None)


def as_ref(name: str, reference: Any) -> ModelRef:
    """Returns a model's reference: an id, a path, `package:NAME` or a `ModelRef`."""
    if isinstance(reference, ModelRef):
        if reference.base is None:
            raise ConfigError(
                f"model {name!r}: ModelRef needs a base (an id, a path or 'package:NAME')"
            )
        return reference
    if isinstance(reference, (str, Path)) and str(reference):
        return ModelRef(base=str(reference))
    raise ConfigError(
        f"model {name!r}: expected an id, a path, 'package:NAME', a ModelRef or a loaded PreTrainedModel, "
        f"got {type(reference).__name__}: {str(reference)[:60]!r}"
    )


def member_names(specialists: Any) -> list[str]:
    """Returns the anchor's name and the specialists', checked."""
    if specialists is None:
        return [ANCHOR]
    if not isinstance(specialists, Mapping):
        raise ConfigError(
            f"specialists is a dict of name -> model, got {type(specialists).__name__}; "
            "for example {'medical': 'path/to/model'}"
        )
    for name in specialists:
        check_name(name)
    folded = [name.casefold() for name in specialists]
    twice = {name for name in specialists if folded.count(name.casefold()) > 1}
    if twice:
        raise ConfigError(
            f"specialists' names differ by case only: {', '.join(sorted(twice))}; give each its own name"
        )
    return [ANCHOR, *specialists]


def alignment_of(anchor: Member, member: Member, asked: str) -> str:
    """Returns how a specialist's tokens meet the anchor's: shared, span or clamp; pool for an encoder, which has none.

    Raises:
        TokenError: the tokenizers at hand do not allow what is asked for.
    """
    if member.encodes:
        if asked not in ("auto", POOL):
            raise TokenError(
                f"alignment={asked!r} says how tokens meet, and {member.name!r} is an encoder, which reads none; "
                "leave alignment out"
            )
        return POOL
    check_choice("alignment", asked)
    if asked == "auto":
        if anchor.tokenizer is None or member.tokenizer is None:
            missing = ANCHOR if anchor.tokenizer is None else member.name
            raise TokenError(
                f"model {missing!r} has no tokenizer, so alignment='auto' cannot tell whether tokens coincide; "
                "pass tokenizers={name: tokenizer}, or alignment='shared' if all models use the same ids"
            )
        asked = "shared" if same_tokenizer(anchor.tokenizer, member.tokenizer) else "span"
    if asked == "shared":
        sizes = [m.model.config.get_text_config(decoder=True).vocab_size for m in (anchor, member)]
        if sizes[1] < sizes[0]:
            raise TokenError(
                f"alignment='shared' needs the same ids everywhere, but model {member.name!r} knows {sizes[1]} ids and "
                f"the anchor {sizes[0]}; use alignment='span'"
            )
        known = anchor.tokenizer is not None and member.tokenizer is not None
        if known and not same_tokenizer(anchor.tokenizer, member.tokenizer):
            raise TokenError(
                f"alignment='shared' was asked for, but model {member.name!r} has another tokenizer than the anchor; "
                "use alignment='span'"
            )
    if asked == "span" and (anchor.tokenizer is None or member.tokenizer is None):
        missing = ANCHOR if anchor.tokenizer is None else member.name
        raise TokenError(
            f"alignment='span' needs the tokenizer of {missing!r}; pass tokenizers={{{missing!r}: ...}}"
        )
    if asked == "span":
        for one in (anchor, member):
            check_spells(one.tokenizer, one.name)
    return asked


def describe(
    members: Mapping[str, Member],
    *,
    topology: Any,
    bridge: Any,
    edge_bridges: Mapping[tuple[str, str], Any],
    sites: Any,
    alignment: str,
    mix: str,
    schedule: str,
) -> CouplingConfig:
    """Checks every setting against the loaded models and returns the ensemble's config."""
    check_choice("mix", mix)
    check_choice("schedule", schedule)
    names = list(members)
    form = BridgeConfig.of(bridge)
    edges = resolve(topology, names)
    depths = {name: backbone.num_blocks(member.model) for name, member in members.items()}
    widths = {name: backbone.stream_width(member.model) for name, member in members.items()}
    if form.kind == "moe":
        check_widths(widths)
        if topology != DEFAULT:
            raise ConfigError(
                "kind='moe' is a router over all models, without edges; leave topology out"
            )
    anchor = members[ANCHOR]
    readers = [name for name in names[1:] if not members[name].encodes]
    kinds = {
        # what is asked for concerns the models that read tokens, where there are any
        name: alignment_of(
            anchor, members[name], "auto" if readers and members[name].encodes else alignment
        )
        for name in names[1:]
    }
    check_mix(mix, form.kind, kinds)
    check_edges(edges, kinds)
    forms = _forms(edge_bridges)
    check_forms(form, forms, edges, kinds)
    rows = site_rows(sites, depths, still=[name for name in kinds if kinds[name] == POOL])
    return CouplingConfig(
        names=names,
        models={name: member.ref.to_dict() for name, member in members.items()},
        model_configs={name: member.model.config for name, member in members.items()},
        topology=topology if isinstance(topology, str) else [list(edge) for edge in edges],
        bridge=form.to_dict(),
        edge_bridges={edge.key: one.to_dict() for edge, one in forms.items()},
        site_layers=rows,
        alignment=kinds,
        mix=mix,
        schedule=schedule,
        history={edge.key: names for edge in edges},
        dtype=anchor.model.dtype,
    )


def _forms(edge_bridges: Any) -> dict[Edge, BridgeConfig]:
    """Returns the forms by edge; raises for what is no mapping from pairs of names."""
    if not isinstance(edge_bridges, Mapping):
        raise ConfigError(
            f"edge_bridges is a mapping from (source, target) to a form, got {type(edge_bridges).__name__}"
        )
    found = {}
    for key, form in edge_bridges.items():
        if not isinstance(key, tuple) or len(key) != 2:
            raise ConfigError(f"edge_bridges has keys such as ('medical', 'anchor'), got {key!r}")
        found[Edge(*key)] = BridgeConfig.of(form)
    return found


def check_forms(
    form: BridgeConfig,
    forms: Mapping[Edge, BridgeConfig],
    edges: Sequence[Edge],
    alignment: Mapping[str, str],
) -> None:
    """Raises where an edge is given a form that it cannot have."""
    for edge, one in forms.items():
        if edge not in edges:
            known = ", ".join(f"{e.source}->{e.target}" for e in edges) or "none"
            raise ConfigError(
                f"edge_bridges names {edge.source!r} -> {edge.target!r}, which is no edge; known: {known}"
            )
        if "moe" in (form.kind, one.kind):
            raise ConfigError("kind='moe' is a router over all models; leave edge_bridges out")
    for edge in edges:
        others = [name for name in edge if alignment.get(name, "shared") != "shared"]
        if forms.get(edge, form).reads == "prediction" and others:
            raise TokenError(
                f"reads='prediction' needs one vocabulary at both ends of {edge.source!r} -> {edge.target!r}, but "
                f"{others[0]!r} is aligned by {alignment[others[0]]!r}; use reads='state'"
            )


def check_edges(edges: Sequence[Edge], alignment: Mapping[str, str]) -> None:
    """Raises `ConfigError` where an edge goes into an encoder."""
    for edge in edges:
        if alignment.get(edge.target) == POOL:
            raise ConfigError(
                f"edge {edge.source!r} -> {edge.target!r} goes into an encoder, which does not listen; use "
                "topology='unilateral', or a Topology whose edges only leave it"
            )


def check_mix(mix: str, kind: str, alignment: Mapping[str, str]) -> None:
    """Raises where logits cannot be mixed or states routed because positions differ."""
    encoders = [name for name, how in alignment.items() if how == POOL]
    if encoders and mix != "anchor":
        raise ConfigError(
            f"mix={mix!r} mixes every model's logits, and {encoders[0]!r} is an encoder without any; use mix='anchor'"
        )
    if encoders and kind == "moe":
        raise ConfigError(
            f"kind='moe' mixes states by position, and {encoders[0]!r} is an encoder with positions of its own; "
            "use kind='linear'"
        )
    spans = [name for name, how in alignment.items() if how == "span"]
    if spans and mix != "anchor":
        raise TokenError(
            f"mix={mix!r} averages logits by index and needs one tokenizer, but {', '.join(spans)} has its own; "
            "use mix='anchor'"
        )
    if spans and kind == "moe":
        raise TokenError(
            f"kind='moe' mixes states by position, but {', '.join(spans)} has its own tokenizer"
        )


def specialist_layers(
    config: CouplingConfig, name: str, depth: int, *, may_stand: bool = False
) -> list[int]:
    """Returns the blocks at which a new specialist meets an existing ensemble's sites.

    With `may_stand` it may be read twice behind one block, as an encoder may.
    """
    assert config.site_layers is not None
    anchor_depth = config.num_hidden_layers
    layers = [max(1, row[0] * depth // anchor_depth) for row in config.site_layers]
    anchors = [row[0] for row in config.site_layers]
    if len(set(layers)) < len(set(anchors)) and not may_stand:
        raise ModelError(
            f"model {name!r} has {depth} blocks, too few for this ensemble's {len(layers)} sites "
            f"(it would meet twice on one block); couple anew with fewer sites"
        )
    return layers


def custom_topology(config: CouplingConfig, name: str, edges: Any) -> str | list[list[str]]:
    """Returns the topology after a specialist was added."""
    names = [*(config.names or []), name]
    if isinstance(config.topology, str) and edges is None:
        return config.topology
    present = [list(edge) for edge in config.edges]
    new = Topology(edges).edges if edges is not None else Topology.unilateral([ANCHOR, name]).edges
    wrong = [edge for edge in new if name not in edge]
    if wrong:
        raise ConfigError(
            f"edges for {name!r} must each touch it, got {wrong[0].source!r} -> {wrong[0].target!r}"
        )
    merged = Topology([*present, *new])
    merged.check(names)
    return [list(edge) for edge in merged.edges]
