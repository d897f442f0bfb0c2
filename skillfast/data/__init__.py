"""Datasets in three parts: the digits that scikit-learn carries, and pictures of the user's own."""

from skillfast.data.digits import load_digits
from skillfast.data.folders import load_cifar10, load_imagefolder
from skillfast.data.splits import LabelledDataset, Splits, TensorImages, loader
from skillfast.data.transforms import Transforms, make_transforms

__all__ = [
    "LabelledDataset",
    "Splits",
    "TensorImages",
    "Transforms",
    "load_cifar10",
    "load_digits",
    "load_imagefolder",
    "loader",
    "make_transforms",
]
