"""The core of FID against torch-fidelity and against formulas."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from omnimamba.eval.fid import FeatureCounter, FeatureStatistics, frechet_distance


def features(num: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated, positive, as those of a network are."""
    rng = np.random.default_rng(seed)
    return np.abs(rng.normal(size=(num, dim)) @ rng.normal(size=(dim, dim))) / dim + shift


def counted(values: np.ndarray, size: int = 7) -> FeatureStatistics:
    counter = FeatureCounter()
    for start in range(0, len(values), size):
        counter.add(values[start : start + size])
    return counter.statistics()


def theirs(first: np.ndarray, second: np.ndarray) -> float:
    statistics = [fid_features_to_statistics(torch.from_numpy(values)) for values in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_statistics_do_not_depend_on_batches(size):
    values = features(100, 12, 0, shift=1000)  # far from zero, where a sum of squares would lose digits
    statistics = counted(values, size)
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.covariance, np.cov(values, rowvar=False), rtol=1e-9, atol=1e-12)
    assert statistics.num == 100


@pytest.mark.parametrize(("num", "dim", "shift"), [(500, 64, 0.3), (500, 64, 0.0), (2000, 192, 0.1)])
def test_as_torch_fidelity(num, dim, shift):
    first, second = features(num, dim, 1), features(num + 30, dim, 2, shift)
    assert frechet_distance(counted(first), counted(second)) == pytest.approx(theirs(first, second), rel=1e-7)


def test_fewer_images_than_features():
    """The covariance is singular; torch-fidelity's eigenvalues then carry rounding of the root of the machine precision."""
    first, second = features(20, 64, 1), features(20, 64, 2, 0.1)
    assert frechet_distance(counted(first), counted(second)) == pytest.approx(theirs(first, second), rel=1e-4)


def test_by_formula():
    """Of commuting covariances: the squared differences of means and of standard deviations, summed."""
    first = FeatureStatistics(9, np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    second = FeatureStatistics(9, np.array([1.0, 5.0]), np.diag([1.0, 25.0]))
    assert frechet_distance(first, second) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 5) ** 2)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))


def test_file(tmp_path):
    statistics = counted(features(30, 5, 0))
    statistics.save(tmp_path / "s.npz")
    again = FeatureStatistics.load(tmp_path / "s.npz")
    assert again.num == 30
    assert (again.mean == statistics.mean).all() and (again.covariance == statistics.covariance).all()
    np.savez(tmp_path / "pytorch-fid.npz", mu=statistics.mean, sigma=statistics.covariance)
    assert FeatureStatistics.load(tmp_path / "pytorch-fid.npz").num == 0


def test_what_is_no_statistics(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no")
    np.savez(tmp_path / "b.npz", mean=np.zeros(3))
    np.savez(tmp_path / "c.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    for name, message in {"a": "expected an .npz file with mu and sigma", "b": "mu and sigma", "c": "do not fit"}.items():
        with pytest.raises(ValueError, match=message):
            FeatureStatistics.load(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="1 images have no covariance"):
        counted(features(1, 4, 0))
    with pytest.raises(ValueError, match="features of 4 and 5 numbers"):
        frechet_distance(counted(features(9, 4, 0)), counted(features(9, 5, 0)))
