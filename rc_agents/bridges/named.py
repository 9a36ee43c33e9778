"""Parts of an ensemble by the name of the model that they belong to."""

from __future__ import annotations

from typing import Any

from torch import nn


class Named(nn.Module):
    """Parameters or modules by a model's name.

    Saved under the same keys as `nn.ParameterDict` and `nn.ModuleDict` save them. Those keep each part as an attribute
    and so refuse the names of their own methods; a specialist may be called "train" or "update".
    """

    def __setitem__(self, name: str, part: nn.Parameter | nn.Module) -> None:
        if isinstance(part, nn.Module):
            self._modules[name] = part
        else:
            self._parameters[name] = part

    def __getitem__(self, name: str) -> Any:
        return self._modules[name] if name in self._modules else self._parameters[name]

    def __delitem__(self, name: str) -> None:
        del (self._modules if name in self._modules else self._parameters)[name]
