"""d -> d/2 -> d, two linear layers: the published ablation."""

from __future__ import annotations

from dataclasses import replace

from ..config import BridgeConfig
from .low_rank import LowRankMap


class BottleneckMap(LowRankMap):
    """y = U V x with inner width source_width // 2; U starts at zero unless start="default"."""

    def __init__(self, config: BridgeConfig, source_width: int, target_width: int) -> None:
        rank = max(1, source_width // 2)
        super().__init__(replace(config, kind="low_rank", rank=rank), source_width, target_width)
