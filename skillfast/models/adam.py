"""Adam, without what the first use of `torch.optim` imports: `torch.compile`, in seconds, which nothing here needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

EPSILON = 1e-8


class Adam:
    """Adam (Kingma and Ba, 2015) on some tensors, in the arithmetic of `torch.optim.Adam`.

    Args:
        tensors: What to change, in place.
        betas: Decay of the means of the gradients and of their squares.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._betas = betas
        self._means = [torch.zeros_like(tensor) for tensor in self._tensors]
        self._squares = [torch.zeros_like(tensor) for tensor in self._tensors]
        self._steps = 0

    def step(self, gradients: Sequence[torch.Tensor], rate: float) -> None:
        """Go one step down.

        Args:
            gradients: One for each tensor.
            rate: The learning rate.
        """
        self._steps += 1
        first, second = self._betas
        size = rate / (1 - first**self._steps)
        unbias = (1 - second**self._steps) ** 0.5
        for tensor, gradient, mean, square in zip(self._tensors, gradients, self._means, self._squares, strict=True):
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            tensor.addcdiv_(mean, (square.sqrt() / unbias).add_(EPSILON), value=-size)
