from __future__ import annotations

import torch

from skillfast.models.adam import Adam


def test_it_is_torchs():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator) for size in ((3, 5), (7,))]
    ours, theirs = ([tensor.clone() for tensor in start] for _ in "ab")
    one, other = Adam(ours, (0.8, 0.95)), torch.optim.Adam(theirs, lr=0.1, betas=(0.8, 0.95))
    for step in range(20):
        other.param_groups[0]["lr"] = 0.1 / (1 + step)
        for tensor in theirs:
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        one.step([tensor.grad for tensor in theirs], 0.1 / (1 + step))
        other.step()
    for tensor, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor, want)
