"""Linear maps between two models' states by closed form, from sums that do not grow with the text.

Shapes: N tokens, D width. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NormalEquations:
    """Running sums of a regression of y on x.

    Attributes:
        xx: sum of x x^T over tokens, (D_source, D_source).
        yx: sum of y x^T, (D_target, D_source).
        yy: sum of |y|^2.
        count: tokens seen.
    """

    xx: Tensor
    yx: Tensor
    yy: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, source_width: int, target_width: int) -> NormalEquations:
        """Nothing seen yet."""
        zeros = torch.zeros(target_width + source_width, source_width, dtype=torch.float64)
        return cls(zeros[:source_width], zeros[source_width:])

    def add(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """Takes in N tokens."""
        self.xx += x_ND.T @ x_ND
        self.yx += y_ND.T @ x_ND
        self.yy += float(y_ND.square().sum())
        self.count += len(x_ND)

    def ridge(self, strength: float) -> Tensor:
        """W = argmin sum |W x - y|^2 + lambda |W|^2, (D_target, D_source).

        Args:
            strength: lambda as a share of the mean squared value of x.
        """
        scale = float(self.xx.diagonal().mean())
        eye = torch.eye(len(self.xx), dtype=self.xx.dtype)
        return torch.linalg.solve(self.xx + strength * scale * eye, self.yx, left=False)

    def procrustes(self) -> Tensor:
        """The best scaled map with orthonormal rows or columns: s Q, Q = U V^T of yx (Schoenemann, 1966)."""
        u, values, vh = torch.linalg.svd(self.yx, full_matrices=False)
        q = u @ vh
        return q * (values.sum() / ((q @ self.xx) * q).sum())

    def reduced_rank(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The map of a rank that is nearest to W on the states seen (reduced-rank regression; Izenman, 1975).

        Returns:
            up (D_target, rank) with orthonormal columns, and down (rank, D_source).
        """
        _, vectors = torch.linalg.eigh(weight @ self.xx @ weight.T)
        up = vectors[:, -rank:].flip(1)
        return up, up.T @ weight

    def explained(self, weight: Tensor) -> float:
        """The share of |y|^2 that W x explains."""
        cross = 2 * float((weight * self.yx).sum())
        return (cross - float(((weight @ self.xx) * weight).sum())) / self.yy if self.yy else 0.0
