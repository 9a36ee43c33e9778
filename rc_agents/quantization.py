"""How a model's weights are held in fewer bits: what transformers offers, as data that a checkpoint can keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import ConfigError, ModelError, nearest

Quantization = str | Mapping[str, Any] | QuantizationConfigMixin
INT8 = "int8"
SHORT = (INT8,)


def as_data(value: Quantization | None) -> str | dict[str, Any] | None:
    """Returns a quantization as plain data: "int8", or the fields of a configuration of transformers.

    Raises:
        ConfigError: an unknown short form, a dict without its `quant_method`, or something else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if value not in SHORT:
            raise ConfigError(
                f"quantization {value!r} is unknown; {nearest(value, SHORT)}; or a configuration of transformers, "
                "such as BitsAndBytesConfig(load_in_8bit=True)"
            )
        return value
    if isinstance(value, QuantizationConfigMixin):
        return json.loads(value.to_json_string(use_diff=False))
    if isinstance(value, Mapping):
        if "quant_method" not in value:
            raise ConfigError(
                "quantization as a dict needs its 'quant_method', for example "
                f"{{'quant_method': 'bitsandbytes', 'load_in_8bit': True}}; got {sorted(value)}"
            )
        return dict(value)
    raise ConfigError(
        "quantization is 'int8', a configuration of transformers or its dict, "
        f"got {type(value).__name__}: {value!r}"
    )


def loader_config(name: str, value: Quantization | None) -> QuantizationConfigMixin | None:
    """Returns what `from_pretrained(quantization_config=...)` takes.

    "int8" holds the weights of linear layers as int8, a scale a row, and rounds what they multiply as it comes
    (torchao's dynamic int8), on any device; the output layer and embeddings stay as they are.

    Args:
        name: the model, for messages.
        value: a ModelRef's quantization.

    Raises:
        ModelError: the library that the quantization needs is not installed, or the fields do not fit.
    """
    data = as_data(value)
    if data is None:
        return None
    try:
        return _int8() if isinstance(data, str) else _restored(data)
    except ImportError as error:
        raise ModelError(_missing(name, data, error)) from error
    except (AssertionError, KeyError, NameError, TypeError, ValueError) as error:
        if "to be installed" in str(error) or isinstance(error, NameError):
            raise ModelError(_missing(name, data, error)) from error
        raise ConfigError(
            f"model {name!r}: quantization does not fit: {type(error).__name__}: {error}"
        ) from error


def _restored(data: dict[str, Any]) -> QuantizationConfigMixin:
    from transformers.quantizers.auto import AutoQuantizationConfig  # loads what it finds installed

    return AutoQuantizationConfig.from_dict(dict(data))


def _int8() -> QuantizationConfigMixin:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    # Its default would also set the inductor and the precision of every float32 product in the process.
    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))


def _missing(name: str, data: str | dict[str, Any], error: BaseException) -> str:
    kind = data if isinstance(data, str) else data["quant_method"]
    remedy = (
        "run: pip install 'rc-agents[quantize]'"
        if kind in (INT8, "torchao")
        else f"install what transformers needs for {kind!r}"
    )
    return f"model {name!r}: quantization {kind!r} lacks its library ({error}); {remedy}"


def bits(value: Quantization | None) -> int | None:
    """Returns the bits of a linear layer's weight under a quantization, None where its fields do not tell."""
    data = as_data(value)
    if data is None or isinstance(data, str):
        return None if data is None else 8
    if data.get("load_in_8bit"):
        return 8
    if data.get("load_in_4bit"):
        return 4
    for key in ("bits", "w_bit", "nbits"):
        if data.get(key) in (4, 8):
            return int(data[key])
    kind = str(data.get("quant_type") or data.get("weights") or "").lower()
    return next(
        (count for count in (4, 8) if f"int{count}weight" in kind or kind == f"int{count}"), None
    )
