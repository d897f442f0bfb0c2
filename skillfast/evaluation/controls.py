"""What random neurons cost a class, over many draws of them."""

from __future__ import annotations

import numpy as np

from skillfast.evaluation.intervals import Strata, difference_limits
from skillfast.results.bench import OwnControl


def own_control(predictions: np.ndarray, intact: np.ndarray, labels: np.ndarray) -> OwnControl:
    """What draws of neurons cost the class that they were drawn for, the mean over classes.

    Another run would have other images and other draws; the interval is for both.

    Args:
        predictions: int64 [draws, n], each image under a draw of its own class's control.
        intact: int64 [n], of the intact model.
        labels: int64 [n].
    """
    before, after = intact == labels, predictions == labels
    values = np.stack([before & ~after, ~before & after]).astype(np.float64)  # [2, draws, n], lost and gained
    strata = Strata(labels)
    per_draw = np.stack([(values[0] - values[1])[:, labels == c].mean(1) for c in strata.classes], 1)  # [draws, K]
    lost, gained = np.clip(strata.mean(values).mean(-1), 0, 1).tolist()  # sums of weights may miss 1 by an ulp
    return OwnControl(
        draws=len(predictions),
        n_examples=len(labels),
        target_drop=float(per_draw.mean()),
        per_class=per_draw.mean(0).tolist(),
        spread=float(per_draw.std(0, ddof=1).mean()) if len(predictions) > 1 else None,
        ci95=list(difference_limits(lost, gained, strata.crossed_covariance(values), strata.effective)),
    )
