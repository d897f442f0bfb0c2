"""What two processes and one trace in `test_streaming`: a model and data that import neither timm nor pytest."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

CASES = ((101, 128), (301, 8))
"""Numbers of points, and bins: rows are kept to be exact, and the table is filled."""
SITES = {"blocks.0.mlp": "0.down", "blocks.1.mlp": "1.down", "head": "2"}


class Block(nn.Module):
    """An MLP on the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def model() -> nn.Module:
    """Two blocks and a classifier of five classes."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(24, 5)).eval()


def points(n: int) -> TensorDataset:
    """Normal points of five classes by turns."""
    return TensorDataset(torch.randn(n, 24, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 5)
