"""Pictures of one coloured shape each, drawn in code, and their captions: what a coupled encoder is tried on.

Place, size, brightness, background and noise vary, so no two are alike. Some combinations of colour and shape are never
shown to the bridges in training: whoever answers them has put together what it learnt apart. N pictures are
(N, 3, SIZE, SIZE).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 24
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.15, 0.2, 1.0),
    "yellow": (1.0, 0.95, 0.1),
    "purple": (0.55, 0.1, 0.75),
    "pink": (1.0, 0.55, 0.75),
    "brown": (0.5, 0.27, 0.1),
    "white": (1.0, 1.0, 1.0),
}
Inside = Callable[[Tensor, Tensor], Tensor]
SHAPES: dict[str, Inside] = {
    "circle": lambda x, y: x.hypot(y) < 0.9,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) < 0.8,
    "triangle": lambda x, y: (y < 0.75) & (y > 2 * x.abs() - 1),
    "cross": lambda x, y: (torch.minimum(x.abs(), y.abs()) < 0.28) & (x.hypot(y) < 1.05),
    "ring": lambda x, y: (x.hypot(y) < 1) & (x.hypot(y) > 0.55),
    "diamond": lambda x, y: x.abs() + y.abs() < 1.05,
}
"""Whether a point lies inside, in units of the shape's radius from its middle; y points down."""

Combination = tuple[int, int]
"""Indices into `COLOURS` and `SHAPES`."""


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures.

    Args:
        pixels: (N, 3, SIZE, SIZE), from -1 to 1.
        labels: indices into `COLOURS` and `SHAPES`, (N, 2).
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def captions(self) -> list[str]:
        """Returns what each shows, such as "a red circle"."""
        return [caption(*one) for one in self.labels.tolist()]

    def hashes(self) -> list[str]:
        """Returns a hash of each picture's pixels."""
        return [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in self.pixels]


def caption(colour: int, shape: int) -> str:
    """Returns a combination in words."""
    return f"a {list(COLOURS)[colour]} {list(SHAPES)[shape]}"


def draw(combinations: Sequence[Combination], each: int, generator: torch.Generator) -> Pictures:
    """Draws so many pictures of each combination, in a shuffled order."""
    labels = torch.tensor([one for one in combinations for _ in range(each)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    count = len(labels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    radius = uniform(6.5, 9)
    middle = [10 + 3 * torch.rand(count, 1, 1, generator=generator) for _ in range(2)]
    place = torch.arange(SIZE).float()
    x, y = (place - middle[0]) / radius, (place[:, None] - middle[1]) / radius
    masks = torch.stack([inside(x, y).expand(count, SIZE, SIZE) for inside in SHAPES.values()], 1)
    inside = masks[torch.arange(count), labels[:, 1]][:, None]
    colours = torch.tensor(list(COLOURS.values()))[labels[:, 0]][..., None, None]
    colours = colours * uniform(0.8, 1)[:, None]
    pixels = torch.where(inside, colours, uniform(0, 0.3)[:, None])
    pixels = pixels + 0.04 * torch.randn(pixels.shape, generator=generator)
    return Pictures(pixels.clamp(0, 1) * 2 - 1, labels)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Pictures of each combination in each part."""

    eye: int = 150
    train: int = 40
    validation: int = 4
    test: int = 8
    unseen: int = 20


@dataclass(frozen=True)
class Splits:
    """The parts of one seed.

    `eye` trains the encoder on every combination. Bridges and probe train on `train`; `unseen` has the combinations
    that neither `train` nor `validation` nor `test` shows.
    """

    eye: Pictures
    train: Pictures
    validation: Pictures
    test: Pictures
    unseen: Pictures


def splits(seed: int, counts: Counts | None = None) -> Splits:
    """Draws a seed's parts. Each colour has one shape in which bridges and probe never see it."""
    counts = counts or Counts()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(SHAPES), generator=generator).tolist()
    unseen = [(colour, order[colour % len(order)]) for colour in range(len(COLOURS))]
    every = list(itertools.product(range(len(COLOURS)), range(len(SHAPES))))
    seen = [one for one in every if one not in unseen]
    return Splits(
        draw(every, counts.eye, generator),
        draw(seen, counts.train, generator),
        draw(seen, counts.validation, generator),
        draw(seen, counts.test, generator),
        draw(unseen, counts.unseen, generator),
    )
