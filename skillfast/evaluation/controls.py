"""What random neurons cost a class, over many draws of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skillfast.results.bench import OwnControl

if TYPE_CHECKING:
    from skillfast.evaluation.resampling import Bootstrap


def own_control(
    predictions: np.ndarray, intact: np.ndarray, labels: np.ndarray, bootstrap: Bootstrap, seed: int
) -> OwnControl:
    """What draws of neurons cost the class that they were drawn for, the mean over classes.

    Another run would have other images and other draws, so the interval resamples both (the pigeonhole bootstrap of
    Owen, 2007, which is a little wide): the images of each class, and each class's draws.

    Args:
        predictions: int64 [draws, n], each image under a draw of its own class's control.
        intact: int64 [n], of the intact model.
        labels: int64 [n].
        bootstrap: Resamples of the n images.
        seed: Seed of the resamples of the draws.
    """
    lost = (intact == labels).astype(np.float64) - (predictions == labels)  # [draws, n]
    rng, draws = np.random.default_rng(seed), len(lost)
    per_draw = np.stack([lost[:, members].mean(1) for members in bootstrap.members], 1)  # [draws, K]
    resampled = np.zeros(bootstrap.replicates)
    for members, weights in zip(bootstrap.members, bootstrap.weights, strict=True):
        times = rng.multinomial(draws, np.full(draws, 1 / draws), size=bootstrap.replicates) / draws
        resampled += ((times @ lost[:, members]) * weights.T).sum(1) / len(bootstrap.members)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return OwnControl(
        draws=draws,
        target_drop=float(per_draw.mean()),
        per_class=per_draw.mean(0).tolist(),
        spread=float(per_draw.std(0, ddof=1).mean()) if draws > 1 else None,
        ci95=[float(low), float(high)],
    )
