"""Frechet inception distance (Heusel et al. 2017, arXiv:1706.08500): its numerical core.

FID = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the means and covariances of two sets of features.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from omnimamba.model.files import whole_file


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features, in float64."""

    num: int
    mean: np.ndarray
    """[d]"""
    covariance: np.ndarray
    """[d, d], divided by num - 1"""

    @classmethod
    def load(cls, path: Path) -> FeatureStatistics:
        """Of an .npz file with `mu` and `sigma`, as pytorch-fid writes them; `num` is 0 where the file does not say it."""
        try:
            with np.load(path) as values:
                mean, covariance = values["mu"].astype(np.float64), values["sigma"].astype(np.float64)
                num = int(values["num"]) if "num" in values else 0
        except (ValueError, KeyError, zipfile.BadZipFile):
            raise ValueError(f"{path}: no statistics of features; expected an .npz file with mu and sigma") from None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: mu {mean.shape} and sigma {covariance.shape} do not fit; expected [d] and [d, d]")
        return cls(num, mean, covariance)

    def save(self, path: Path) -> None:
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, num=self.num)


class FeatureCounter:
    """Gathers the statistics of features that come in batches (Chan et al. 1979, the pairwise update of mean and scatter)."""

    def __init__(self) -> None:
        self.num = 0
        self.mean: np.ndarray | float = 0.0
        self.scatter: np.ndarray | float = 0.0

    def add(self, features: np.ndarray) -> None:
        """features: [b, d]"""
        features = features.astype(np.float64)
        num, mean = len(features), features.mean(0)
        deviations = features - mean
        shift = mean - self.mean
        total = self.num + num
        self.scatter = self.scatter + deviations.T @ deviations + np.outer(shift, shift) * (self.num * num / total)
        self.mean = self.mean + shift * (num / total)
        self.num = total

    def statistics(self) -> FeatureStatistics:
        if self.num < 2:
            raise ValueError(f"{self.num} images have no covariance; pass at least 2")
        return FeatureStatistics(self.num, np.asarray(self.mean), np.asarray(self.scatter) / (self.num - 1))


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of {len(first.mean)} and {len(second.mean)} numbers cannot be compared; take one network for both")
    # tr (C1 C2)^(1/2) is that of the symmetric R C2 R with R = C1^(1/2), whose eigenvalues are real and not negative
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ second.covariance @ root).clip(0)).sum()
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap)
