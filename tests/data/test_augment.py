"""Augmentations: each setting changes what it is for and nothing else."""

import dataclasses
import math

import pytest
import torch

from omnimamba.data.augment import Augmentation, augment, collage, normalise, turn, unit_range

EVERYTHING = Augmentation(
    scale=0.3,
    rotate=20,
    shear=10,
    shift=0.1,
    brightness=0.4,
    contrast=0.4,
    saturation=0.8,
    hue=0.5,
    grey=0.3,
    outline=0.3,
    erase=0.5,
)


def changed(images, seed=0, **settings):
    return augment(images, Augmentation(**settings), torch.Generator().manual_seed(seed))


@pytest.fixture
def images():
    """Noise of middling brightness, so that no change reaches black or white."""
    return 0.4 + 0.2 * torch.rand(16, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def blobs():
    """A coloured square on white, off the middle."""
    images = torch.ones(16, 3, 32, 32)
    images[:, :, 10:20, 8:22] = torch.tensor([0.9, 0.3, 0.2]).view(3, 1, 1)
    return images


def luma(images):
    return (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)


def mass(images):
    """Ink of each image and its centre (x, y) in pixels."""
    ink = (1 - images).mean(1)
    axis = torch.arange(images.shape[-1]).float()
    total = ink.sum((1, 2))
    return total, (ink.sum(1) * axis).sum(1) / total, (ink.sum(2) * axis).sum(1) / total


def test_no_settings_are_the_identity(images):
    assert torch.equal(changed(images), images)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Augmentation)])
def test_each_setting(blobs, name):
    value = {"rotate": 30.0, "shear": 20.0, "shift": 0.2}.get(name, 0.5)
    before = blobs.clone()
    result = changed(blobs, **{name: value})
    assert torch.equal(blobs, before)  # a copy is changed
    assert result.shape == blobs.shape and result.min() >= -1e-6 and result.max() <= 1 + 1e-6
    assert not torch.equal(result, blobs)
    assert len({tuple(row.flatten().tolist()) for row in result}) > 1  # images differ
    assert torch.equal(result, changed(blobs, **{name: value}))
    assert not torch.equal(result, changed(blobs, seed=1, **{name: value}))
    with pytest.raises(ValueError, match=f"augmentation {name}=-0.1 is negative"):
        Augmentation(**{name: -0.1})


@pytest.mark.parametrize("size", [(24, 24), (33, 33), (17, 30)])
def test_everything_at_once(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(32, 3, *size, generator=generator)
    result = augment(images, EVERYTHING, generator)
    assert result.shape == images.shape and result.isfinite().all()
    assert result.min() >= -1e-6 and result.max() <= 1 + 1e-6


def test_empty_batch():
    assert augment(torch.empty(0, 3, 8, 8), EVERYTHING, torch.Generator()).shape == (0, 3, 8, 8)


def test_shift_moves_all_by_the_same(blobs):
    ink, x, y = mass(blobs)
    shifted = mass(changed(blobs, shift=0.1))
    torch.testing.assert_close(shifted[0], ink, rtol=1e-3, atol=0)  # nothing left the picture, and white came in
    moved = torch.stack([shifted[1] - x, shifted[2] - y])
    assert moved.abs().max() <= 0.1 * 32 + 1e-3 and moved.abs().max() > 1.5
    assert moved.min() < 0 < moved.max()


def test_scale_changes_the_area(blobs):
    ratio = mass(changed(blobs, scale=0.3))[0] / mass(blobs)[0]
    assert 0.45 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.75  # (1 - 0.3)^2 to (1 + 0.3)^2


def test_rotation_keeps_area_and_distance_to_the_middle(blobs):
    def distance(images):
        _, x, y = mass(images)
        return ((x - 15.5) ** 2 + (y - 15.5) ** 2).sqrt()

    turned = changed(blobs, rotate=90.0)
    torch.testing.assert_close(mass(turned)[0], mass(blobs)[0], rtol=0.02, atol=0)
    torch.testing.assert_close(distance(turned), distance(blobs), rtol=0, atol=0.1)


def test_brightness_is_a_factor(images):
    factor = changed(images, brightness=0.3) / images
    per_image = factor.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(factor, per_image.expand_as(factor))
    assert 0.7 <= per_image.min() < 0.9 and 1.1 < per_image.max() <= 1.3


def test_contrast_keeps_the_mean(images):
    result = changed(images, contrast=0.5)
    torch.testing.assert_close(result.mean((1, 2, 3)), images.mean((1, 2, 3)))
    spread = result.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.5 <= spread.min() < 0.9 and 1.1 < spread.max() <= 1.5


def test_saturation_keeps_luma(images):
    result = changed(images, saturation=0.5)
    torch.testing.assert_close(luma(result), luma(images))
    assert not torch.allclose(result, images)


def test_hue_keeps_grey_and_the_distance_from_it(images):
    grey = images.mean(1, keepdim=True).expand_as(images)
    torch.testing.assert_close(changed(grey, hue=0.5), grey)
    primary = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1).expand(64, 3, 2, 2)
    turned = changed(primary, hue=0.5)
    spread = (turned - luma(primary)[:, None]).square().sum(1).sqrt()
    torch.testing.assert_close(spread, (primary - luma(primary)[:, None]).square().sum(1).sqrt(), rtol=0.01, atol=0)
    assert all(turned[:, channel].max() > 0.55 for channel in range(3))  # every colour is reached


def test_grey_takes_the_colour_of_some(images):
    result = changed(images, grey=0.5)
    is_grey = (result.amax(1) - result.amin(1)).amax((1, 2)) < 1e-6
    assert 0 < is_grey.sum() < 16
    torch.testing.assert_close(luma(result), luma(images))
    torch.testing.assert_close(result[~is_grey], images[~is_grey])


def test_outline_draws_edges_on_white(blobs):
    result = changed(blobs, outline=0.5)
    is_drawn = (result != blobs).flatten(1).any(1)
    assert 0 < is_drawn.sum() < 16
    drawn = result[is_drawn]
    assert (drawn.amax(1) == drawn.amin(1)).all()
    assert (drawn[:, :, 12:18, 12:18] == 1).all() and (drawn[:, :, :8] == 1).all()  # flat inside and outside
    assert (drawn[:, 0, 15, 7:9] < 0.8).all()


def test_erase_fills_one_rectangle_with_one_colour(images):
    result = changed(images, erase=1.0)
    for before, after in zip(images, result, strict=True):
        is_erased = (before != after).any(0)
        if not is_erased.any():
            continue  # it lay at the border
        rows, columns = is_erased.any(1).nonzero(), is_erased.any(0).nonzero()
        rectangle = after[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert is_erased.sum() == rectangle[0].numel() <= math.ceil(24 / 3) ** 2
        assert (rectangle.flatten(1) == rectangle[:, :1, :1].flatten(1)).all()
    num_erased = (changed(images.repeat(8, 1, 1, 1), erase=0.3) != images.repeat(8, 1, 1, 1)).flatten(1).any(1).sum()
    assert 15 < num_erased < 60  # of 128


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (32, 32)])
def test_collage_takes_every_pixel_from_its_place_in_an_image_of_the_group(size):
    groups = torch.tensor([0, 1, 0, 0, 1, 2])
    images = torch.arange(6.0).view(6, 1, 1, 1) + torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) / 2
    result = collage(images, groups, torch.Generator().manual_seed(1))
    source = result[:, 0].floor().long()
    torch.testing.assert_close(result - source[:, None], images[:1].expand_as(result), atol=1e-6, rtol=0)
    assert torch.equal(groups[source], groups.view(6, 1, 1).expand_as(source))
    assert source[0].unique().tolist() == [0, 2, 3] and source[5].unique().tolist() == [5]


def test_collage_has_tiles_of_an_eighth_of_the_side_or_more():
    source = collage(torch.arange(64.0).view(64, 1, 1, 1).expand(64, 3, 32, 32), torch.zeros(64), torch.Generator().manual_seed(0))[:, 0]
    tiles = source.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    assert (tiles == tiles[..., :1]).all()
    nums = [len(image.unique()) for image in source]
    assert 1 in nums and any(1 < num <= 4 for num in nums) and any(4 < num <= 16 for num in nums) and max(nums) > 16


def test_turn_has_the_eight_symmetries_and_moves_pixels_only():
    image = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    result = turn(image.expand(200, 3, 6, 6), torch.Generator().manual_seed(1))
    symmetries = [mirrored.rot90(k, (1, 2)) for mirrored in (image, image.flip(2)) for k in range(4)]
    found = torch.stack([(result == symmetry).flatten(1).all(1) for symmetry in symmetries], 1)
    assert (found.sum(1) == 1).all() and found.any(0).all()


def test_unit_range_and_normalise():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    images = unit_range(pixels)
    torch.testing.assert_close(images.flatten(), torch.tensor([0.0, 0.2, 1.0]))
    result = normalise(images, (0.5, 0.1, 0.0), (0.5, 0.1, 2.0))
    torch.testing.assert_close(result.flatten(), torch.tensor([-1.0, 1.0, 0.5]))
