"""The Inception network with random weights: both resizes, and torch-fidelity's numbers for the same images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from omnimamba.eval.fid import FeatureCounter, frechet_distance
from omnimamba.eval.inception import Inception, clean_resize

FEATURES = 2
"""Of the 2048, compared here; the eigenvalues of all would take half a minute."""


def pictures(num: int, seed: int, size: int = 64) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC) for values in coarse]


@pytest.fixture(scope="module")
def network(inception_weights):
    return Inception(inception_weights)


def test_fid_of_images_as_torch_fidelity(network):
    sets = [pictures(4, 0), pictures(4, 1)]
    ours, theirs = [], []
    for images in sets:
        counter = FeatureCounter()
        for batch in (images[:3], images[3:]):
            counter.add(network.features(batch)[:, :FEATURES])
        ours.append(counter.statistics())
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        with torch.no_grad():
            theirs.append(fid_features_to_statistics(network.network(pixels)[0][:, :FEATURES].double()))
    expected = fid_statistics_to_metric(*theirs, verbose=False)[KEY_METRIC_FID]
    assert expected > 0
    assert frechet_distance(*ours) == pytest.approx(expected, rel=1e-4)


def test_clean_resize_enters_the_network(network, inception_weights):
    """An image of 299 pixels needs no resize, so both ways must agree; a smaller one is seen differently."""
    clean = Inception(inception_weights, resize="clean")
    whole, small = pictures(1, 2, 299), pictures(1, 2, 64)
    np.testing.assert_allclose(clean.features(whole), network.features(whole), rtol=1e-4, atol=1e-5)
    assert np.abs(clean.features(small) - network.features(small)).max() > 1e-3
    np.testing.assert_array_equal(network.features(small), Inception(inception_weights).features(small))  # no hook is left


def test_clean_resize():
    """Smoothed, on floats, and clipped: a fine checkerboard becomes grey, an edge keeps within 0 .. 255."""
    board = np.indices((1196, 1196)).sum(0) % 2 * 255
    grey = clean_resize(Image.fromarray(np.repeat(board[..., None], 3, -1).astype(np.uint8)))
    assert grey.shape == (299, 299, 3) and grey.dtype == np.float32
    assert np.abs(grey[10:-10, 10:-10] - 127.5).max() < 1
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 32:] = 255
    values = clean_resize(Image.fromarray(edge))
    assert values.min() == 0 and values.max() == 255 and (values != values.round()).any()


def test_missing_weights_are_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        ValueError, match=r"checkpoints/weights-inception\S+pth: no Inception weights; download https://github\.com/toshas\S+"
    ) as error:
        Inception()
    assert "\n" not in str(error.value) and "--inception" in str(error.value)
    with pytest.raises(ValueError, match="other: no Inception weights"):
        Inception(tmp_path / "other")
    with pytest.raises(ValueError, match="unknown resize 'bicubic'; pass one of tensorflow, clean"):
        Inception(resize="bicubic")


def test_a_file_that_runs_code_is_refused(tmp_path):
    torch.save({"a": print}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="a pickle can run code"):
        Inception(tmp_path / "evil.pth")
