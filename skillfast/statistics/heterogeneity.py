"""Whether correlations differ between windows of the same texts: Cochran's Q of Fisher's z, by a jackknife over texts.

The windows of a text depend on each other, so Q takes the whole covariance of the z, from what they are without each
group of texts. With the observations of heavy-tailed neurons that covariance is itself poorly known: what the groups
add to it tells how well (Mardia's kurtosis), and with it the degrees of freedom of Hotelling's T squared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from scipy import stats

if TYPE_CHECKING:
    import numpy as np

_SINGULAR = 1e-9  # of a unit variance given the others, what rounding leaves of none


def heterogeneity(z: torch.Tensor, left_out: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Test whether z is the same in all windows.

    Args:
        z: float64 [..., windows], Fisher's z.
        left_out: float64 [groups, ..., windows], the z without each group of texts.

    Returns:
        Q, and p of no difference, float64 [...]; NaN where a z is not defined or windows cannot be told apart.
    """
    groups, p = len(left_out), z.shape[-1] - 1
    apart = (z[..., 1:] - z[..., :1])[..., None]  # [..., p, 1]
    changes = (left_out[..., 1:] - left_out[..., :1]).movedim(0, -1)  # [..., p, groups]
    changes = changes - changes.mean(-1, keepdim=True)
    scale = (changes.square().sum(-1, keepdim=True) * (groups - 1) / groups).sqrt()  # standard errors [..., p, 1]
    defined = torch.isfinite(apart).all(-2) & torch.isfinite(changes).all((-2, -1))[..., None] & (scale > 0).all(-2)
    safe = defined[..., None]
    unit = torch.where(safe, changes / scale, 0.0)
    correlation = unit @ unit.mT * (groups - 1) / groups
    factor, failed = torch.linalg.cholesky_ex(torch.where(safe, correlation, torch.eye(p, dtype=z.dtype)))
    defined = defined[..., 0] & (failed == 0) & (factor.diagonal(dim1=-2, dim2=-1).square() > _SINGULAR).all(-1)
    factor = torch.where(defined[..., None, None], factor, torch.eye(p, dtype=z.dtype))
    q = _solved(factor, torch.where(safe, apart / scale, 0.0))[..., 0]
    spread = _solved(factor, unit) * (groups - 1)  # their mean is p
    kurtosis = spread.square().mean(-1) / (p * (p + 2))  # 1 for normal changes
    freedom = 2 * groups / (3 * kurtosis - 1).clamp(2 * groups / (groups - 1), 2 * groups / (p + 0.5))
    found = q.masked_fill(~defined, torch.nan).numpy()
    rest = freedom.numpy() - p + 1
    return found, stats.f.sf(found * rest / (p * freedom.numpy()), p, rest)


def _solved(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """X' S^-1 x of each column of x [..., p, n], S by its Cholesky factor: [..., n]."""
    return torch.linalg.solve_triangular(factor, x, upper=False).square().sum(-2)
