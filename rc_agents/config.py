"""What an ensemble is made of, as data: model references, the form of a bridge, the whole coupling."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from dataclasses import field as data_field
from typing import Any, Literal

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .errors import ConfigError, nearest
from .quantization import Quantization, as_data
from .topology import ANCHOR, DEFAULT, Edge, resolve

Kind = Literal["linear", "low_rank", "bottleneck", "random", "moe"]
GateKind = Literal["fixed", "scalar", "token"]
GateReads = Literal["source", "target", "both"]
Start = Literal["zero", "ridge", "identity", "default"]
Update = Literal["add", "blend"]
Reads = Literal["state", "prediction"]

POOL = "pool"
"""How the positions of an encoder meet the anchor's tokens: each of these reads out of all of them."""

CHOICES: dict[str, tuple[str, ...]] = {
    "kind": ("linear", "low_rank", "bottleneck", "random", "moe"),
    "gate": ("fixed", "scalar", "token"),
    "gate_reads": ("source", "target", "both"),
    "start": ("zero", "ridge", "identity", "default"),
    "update": ("add", "blend"),
    "reads": ("state", "prediction"),
    "alignment": ("auto", "shared", "span", "clamp"),
    "mix": ("anchor", "average", "learned", "sigmoid"),
    "schedule": ("lockstep", "threads"),
}


def check_choice(field: str, value: Any) -> None:
    """Raises `ConfigError` unless `value` is one of the words that `field` allows."""
    if value not in CHOICES[field]:
        raise ConfigError(f"unknown {field} {value!r}; {nearest(str(value), CHOICES[field])}")


def check_name(name: Any) -> str:
    """Raises `ConfigError` unless `name` can name a specialist; returns it."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*", name):
        raise ConfigError(
            f"model name {name!r}: expected letters and digits, joined by single '_' or '-' (for example 'medical_2')"
        )
    if name.casefold() == ANCHOR:
        raise ConfigError(
            f"the name {name!r} belongs to the anchor; give the specialist another name"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """The form of every bridge of an ensemble: h_i <- h_i + sigmoid(g) W n(h_j).

    Args:
        kind: `linear` (W: d_i x d_j), `low_rank` (W = B A of `rank`), `bottleneck` (d_j -> d_j // 2 -> d_i,
            the published ablation), `random` (W frozen at its random start, only the gate learns) or
            `moe` (no bridges: a router mixes the states of all models, the published baseline).
        rank: inner width of `low_rank`; None elsewhere.
        gate: `fixed` (the constant 1), `scalar` (one sigmoid a bridge) or `token` (a sigmoid of a linear read of
            the normalised states, so that the bridge speaks only where it helps).
        gate_init: the gate's value before the sigmoid; -2 in the published form, sigmoid(-2) = 0.12.
        gate_reads: what a token gate reads.
        gate_floor: token gates below it are shut, exactly 0: where a bridge has nothing to say, the target keeps
            every bit.
        start: `zero` (an untrained ensemble equals the frozen anchor bit for bit), `identity` (`linear`, equal
            widths), `ridge` (`linear`, zero until `rc_agents.training.warm_start` solves for it) or `default`
            (nn.Linear's own, which `random` has in any case).
        update: `add`, the published form, or `blend`, h_i <- (1 - gate) h_i + gate W n(h_j): an open gate puts the
            source's state in the place of the target's own instead of on top of it.
        reads: `state`, the source's residual stream, or `prediction`, what the source would say next if that state
            were its last, as a mean of the target's input embeddings (one vocabulary for both; made for sites that
            read a source at its end and write into a target at its beginning).
        normalize_source: n is RMS normalisation carried to the target's scale, rms(h_i) h_j / rms(h_j);
            False is the published form, n(h) = h.

    Raises:
        ConfigError: an unknown word, a missing rank, or a field set that the others leave without a meaning.
    """

    kind: Kind = "linear"
    rank: int | None = None
    gate: GateKind = "scalar"
    gate_init: float = -2.0
    gate_reads: GateReads = "both"
    gate_floor: float = 0.0
    start: Start = "zero"
    update: Update = "add"
    reads: Reads = "state"
    normalize_source: bool = True

    def __post_init__(self) -> None:
        for field in ("kind", "gate", "gate_reads", "start", "update", "reads"):
            check_choice(field, getattr(self, field))
        if self.kind == "low_rank" and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1
        ):
            raise ConfigError(
                f"kind='low_rank' needs a rank, an integer of at least 1; got rank={self.rank!r}"
            )
        number = isinstance(self.gate_init, (int, float)) and not isinstance(self.gate_init, bool)
        if not number or not math.isfinite(self.gate_init):
            raise ConfigError(f"gate_init is a finite number, got {self.gate_init!r}")
        floor = self.gate_floor
        if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 <= floor < 1:
            raise ConfigError(f"gate_floor is a number of at least 0 and below 1, got {floor!r}")
        if not isinstance(self.normalize_source, bool):
            raise ConfigError(f"normalize_source is True or False, got {self.normalize_source!r}")
        if self.start in ("identity", "ridge") and self.kind != "linear":
            raise ConfigError(f"start={self.start!r} needs kind='linear', got kind={self.kind!r}")
        for name, reason in self._unread().items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(f"{name}={getattr(self, name)!r} has no meaning for {reason}")
        if self.update == "blend" and self.start in ("zero", "ridge") and not self._begins_shut():
            raise ConfigError(
                f"update='blend' with start={self.start!r} would wipe the target's state before the map is known: "
                "use start='identity', or a token gate that begins below its gate_floor"
            )

    def _begins_shut(self) -> bool:
        return self.gate == "token" and 1 / (1 + math.exp(-self.gate_init)) < self.gate_floor

    def _unread(self) -> dict[str, str]:
        """Returns the fields that this form never reads, each with the reason."""
        unread = {}
        if self.gate != "token":
            unread["gate_reads"] = f"gate={self.gate!r}; only 'token' reads the states"
            unread["gate_floor"] = f"gate={self.gate!r}; only 'token' shuts itself"
        if self.gate == "fixed":
            unread["gate_init"] = "gate='fixed', which is the constant 1; use 'scalar' or 'token'"
        if self.kind == "moe":
            parts = ("gate", "gate_init", "gate_reads", "gate_floor", "start", "update", "reads")
            bridge = (*parts, "normalize_source")
            unread = dict.fromkeys(bridge, "kind='moe', a router without bridges; leave it out")
        if self.kind != "low_rank":
            unread["rank"] = f"kind={self.kind!r}; only 'low_rank' takes a rank"
        return unread

    @classmethod
    def of(cls, value: BridgeConfig | dict[str, Any] | str | None) -> BridgeConfig:
        """Returns `value` as a config: a dict of fields, the name of a kind, or None for the default."""
        if isinstance(value, cls):
            return value
        if value is None:
            return cls()
        if isinstance(value, str):
            check_choice("kind", value)
            return cls(kind=value)  # type: ignore[arg-type]
        if isinstance(value, dict):
            return from_fields(cls, value)
        raise ConfigError(
            f"bridge is a BridgeConfig, a kind's name or a dict, got {type(value).__name__}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """Where a frozen model comes from.

    Args:
        base: hub id, local directory or `package:NAME`; None for a model that was passed in loaded.
        adapter: hub id or directory of a PEFT adapter on top of the base.
        revision: branch, tag or commit of the base on the hub.
        adapter_revision: the same for the adapter.
        subfolder: folder of the base inside its repository.
        dtype: the model's own dtype, for example "bfloat16"; None leaves it to the ensemble.
        quantization: how its weights are held: a configuration of transformers (`BitsAndBytesConfig`, `TorchAoConfig`,
            ...), the same as a dict, or "int8"; kept as plain data.
    """

    base: str | None = None
    adapter: str | None = None
    revision: str | None = None
    adapter_revision: str | None = None
    subfolder: str | None = None
    dtype: str | None = None
    quantization: Quantization | None = data_field(default=None, hash=False)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "quantization":
                object.__setattr__(self, one.name, as_data(value))
            elif value is not None and not isinstance(value, str):
                raise ConfigError(
                    f"ModelRef.{one.name} is a string, got {type(value).__name__}: {value!r}"
                )

    def __str__(self) -> str:
        return f"{self.base} + {self.adapter}" if self.adapter else str(self.base)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that are set."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def from_fields(cls: type, values: dict[str, Any]) -> Any:
    """Builds a dataclass from a dict; an unknown key is an error that names the nearest field."""
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{cls.__name__} has no field {key!r}; {nearest(key, known)}")
    return cls(**values)


def _own_config(values: dict[str, Any]) -> PreTrainedConfig:
    """A model's own config; of the general class where its type comes with code of its own."""
    known = values.get("model_type") in CONFIG_MAPPING
    config: PreTrainedConfig = (AutoConfig.for_model if known else PreTrainedConfig)(**values)
    return config


class CouplingConfig(PreTrainedConfig):
    """The whole ensemble as data; saved as config.json beside the bridges.

    Args:
        names: the models, "anchor" first, then the specialists in order of addition.
        models: for each name the fields of its `ModelRef`.
        model_configs: for each name its own Hugging Face config.
        fingerprints: for each name the hash of its base (and adapter) files; None where unknown.
        dtypes: for each name the dtype of its weights when the ensemble was saved.
        topology: a preset's name or a list of [source, target] pairs.
        preset: the preset that the topology was before `add_specialist(edges=...)` made it a list; None elsewhere.
        bridge: fields of `BridgeConfig`.
        edge_bridges: the same for edges whose bridges have another form, `{"source__target": fields}`.
        site_layers: for each site the 1-based block of every model, in the order of `names`.
        alignment: for each name how its tokens meet the anchor's: shared, span or clamp; pool for an encoder, which
            reads no tokens.
        mix: anchor, average, learned or sigmoid (two models, m A + (1 - m) B).
        schedule: lockstep or threads.
        history: models present when each edge's bridges were made, `{"source__target": [names]}`.
        bases_included: whether the base weights lie in the checkpoint too.
    """

    model_type = "residual_coupling"
    names: list[str] | None = None
    models: dict[str, Any] | None = None
    model_configs: dict[str, Any] | None = None
    fingerprints: dict[str, Any] | None = None
    dtypes: dict[str, Any] | None = None
    topology: str | list[Any] = DEFAULT
    preset: str | None = None
    bridge: dict[str, Any] | None = None
    edge_bridges: dict[str, Any] | None = None
    site_layers: list[Any] | None = None
    alignment: dict[str, Any] | None = None
    mix: str = "anchor"
    schedule: str = "lockstep"
    history: dict[str, Any] | None = None
    bases_included: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.names = list(self.names or [ANCHOR])
        self.models = dict(self.models or {})
        self.model_configs = {
            name: _own_config(value) if isinstance(value, dict) else value
            for name, value in (self.model_configs or {}).items()
        }
        self.bridge = BridgeConfig.of(self.bridge).to_dict()
        self.edge_bridges = {
            key: BridgeConfig.of(form).to_dict() for key, form in (self.edge_bridges or {}).items()
        }
        self.alignment = dict(self.alignment or {})
        self.fingerprints = dict(self.fingerprints or {})
        self.dtypes = dict(self.dtypes or {})
        self.history = dict(self.history or {})
        kwargs.setdefault("tie_word_embeddings", False)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The directed edges that the topology gives for these names."""
        return resolve(self.topology, self.names or [])

    def set_edges(self, edges: Sequence[Edge]) -> None:
        """Writes the topology as a list of edges, or as the preset that it was where these are the preset's edges."""
        preset = self.topology if isinstance(self.topology, str) else self.preset
        back = preset is not None and set(edges) == set(resolve(preset, self.names or []))
        self.topology = preset if back and preset else [list(edge) for edge in edges]
        self.preset = None if back else preset

    @property
    def bridge_config(self) -> BridgeConfig:
        """The form of the bridges."""
        return BridgeConfig.of(self.bridge)

    def bridge_form(self, edge: Edge) -> BridgeConfig:
        """Returns the form of one edge's bridges."""
        return BridgeConfig.of((self.edge_bridges or {}).get(edge.key, self.bridge))

    @property
    def span_names(self) -> list[str]:
        """The specialists that read the text in tokens of their own."""
        return [name for name, how in (self.alignment or {}).items() if how == "span"]

    @property
    def encoder_names(self) -> list[str]:
        """The specialists that are encoders: sources with inputs of their own, which read no text."""
        return [name for name, how in (self.alignment or {}).items() if how == POOL]

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """Returns the anchor's text config, so that callers see the ensemble as the anchor."""
        if not self.model_configs or ANCHOR not in self.model_configs:
            return self
        return self.model_configs[ANCHOR].get_text_config(decoder=decoder, encoder=encoder)

    @property
    def vocab_size(self) -> int:
        """The anchor's vocabulary size."""
        return int(self.get_text_config().vocab_size)

    @property
    def hidden_size(self) -> int:
        """Width of the anchor's residual stream."""
        return int(self.get_text_config().hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        """Number of the anchor's blocks."""
        return int(self.get_text_config().num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, the models' own configs included."""
        output = super().to_dict()
        output["model_configs"] = {
            name: value
            if isinstance(value, dict)
            else {**value.to_dict(), "model_type": value.model_type}
            for name, value in (self.model_configs or {}).items()
        }
        return output

    @classmethod
    def published(cls, form: str, num_anchor_layers: int = 12) -> dict[str, Any]:
        """Returns the keyword arguments of `rc_agents.couple` for a published form (Ekin, 2026).

        Both forms: nn.Linear's default start, gates at -2, no normalisation, clamped ids, and the reference code's
        block numbers (0-based there, so one more here). `two_models` mixes both logits by one sigmoid;
        `three_models` answers with the anchor's own.

        Args:
            form: "two_models" (benchmark.py of the reference) or "three_models" (three_qa.py).
            num_anchor_layers: the anchor's depth; the reference names blocks for 12, 24 and 36.

        Example:
            `couple(a, {"b": b}, **CouplingConfig.published("two_models"))`
        """
        sites = {
            "two_models": {12: [4, 7, 10], 24: [5, 9, 13, 17, 21], 36: [7, 13, 19, 25, 31]},
            "three_models": {12: [3, 5, 7, 9, 11]},
        }
        if form not in sites:
            raise ConfigError(f"unknown published form {form!r}; {nearest(str(form), sites)}")
        if num_anchor_layers not in sites[form]:
            raise ConfigError(
                f"published form {form!r} names blocks for anchors of {list(sites[form])} blocks, "
                f"not {num_anchor_layers}; pass sites= yourself"
            )
        return {
            "topology": "multi_bilateral",
            "bridge": BridgeConfig(
                start="default", gate="scalar", gate_init=-2.0, normalize_source=False
            ),
            "sites": sites[form][num_anchor_layers],
            "alignment": "clamp",
            "mix": "sigmoid" if form == "two_models" else "anchor",
        }


AutoConfig.register(CouplingConfig.model_type, CouplingConfig)
