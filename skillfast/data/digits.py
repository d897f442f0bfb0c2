"""The images that scikit-learn carries: 1,797 handwritten digits of 8 x 8 pixels."""

from __future__ import annotations

import numpy as np
import torch

from skillfast.data.splits import Splits, TensorImages

# of all 1,797 images divided by 16; constants, so that no split depends on another
DIGITS_MEAN = 0.3053
DIGITS_STD = 0.3760


def load_digits(seed: int = 0) -> Splits:
    """Load scikit-learn's digits, split once, stratified by class: 60 % select, 10 % validate, 30 % test.

    Args:
        seed: seed of the split.

    Returns:
        Splits of images float32 `[1, 8, 8]`, normalised to mean 0 and standard deviation 1; `train` is None.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)  # [n, 64] in 0..16
    classes = tuple(str(digit) for digit in range(10))
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=seed, stratify=labels)
    select, validate = train_test_split(rest, test_size=1 / 7, random_state=seed, stratify=labels[rest])

    def part(rows: np.ndarray) -> TensorImages:
        rows = np.sort(rows)
        pixels = torch.from_numpy(images[rows] / 16.0).float().reshape(-1, 1, 8, 8)
        return TensorImages((pixels - DIGITS_MEAN) / DIGITS_STD, torch.from_numpy(labels[rows]).long(), classes)

    return Splits("digits", classes, select=part(select), validate=part(validate), test=part(test))
