"""Augmentations of image batches, on whatever device the batch is. All randomness comes from the generator that is passed in."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Half-ranges and probabilities of the random changes; the defaults change nothing. White is what comes in at the border."""

    scale: float = 0.0
    """Zoom in [1 - scale, 1 + scale]."""
    rotate: float = 0.0
    """Degrees."""
    shear: float = 0.0
    """Degrees, along both axes."""
    shift: float = 0.0
    """Share of the image's side."""
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Rotation of the colour circle as a share of a full turn."""
    grey: float = 0.0
    """Probability that an image loses its colours."""
    outline: float = 0.0
    """Probability that an image becomes a black line drawing of its edges."""
    erase: float = 0.0
    """Probability that one rectangle of up to 1/9 of the image is replaced by one colour."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"augmentation {field.name}={getattr(self, field.name)} is negative")


def augment(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """A changed copy of images [b, 3, h, w] in [0, 1]; each image has changes of its own."""
    if not len(images):
        return images
    images = _affine(images, settings, generator)
    images = _outline(images, settings, generator)
    images = _colour(images, settings, generator)
    if settings.erase:
        images = _erase(images, settings.erase, generator)
    return images


def collage(images: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Images [b, 3, h, w] of 1, 2x2, 4x4 or 8x8 tiles, each tile taken from the same place of a random image of the group.

    What an image shows is lost but in the quarter that stays whole, what its group [b] has in common stays. The sides are multiples of 8.
    """
    b, _, h, w = images.shape
    device = images.device
    same = (groups[:, None] == groups[None, :]).float().to(generator.device)
    partners = torch.multinomial(same, 64, replacement=True, generator=generator).to(device)
    tiles = 2 ** torch.randint(0, 4, (b, 1, 1), generator=generator, device=generator.device).to(device)  # per side
    y, x = torch.arange(h, device=device)[None, :, None], torch.arange(w, device=device)[None, None, :]
    tile = y * tiles // h * tiles + x * tiles // w
    source = partners.gather(1, tile.flatten(1)).view(b, h, w)
    return images[source, :, y, x].permute(0, 3, 1, 2)


def turn(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [b, 3, s, s], each turned or mirrored by one of the eight symmetries of the square: every pixel keeps its colour."""
    b = len(images)
    images = torch.where(_chosen(b, 0.5, images, generator), images.flip(3), images)
    images = torch.where(_chosen(b, 0.5, images, generator), images.flip(2), images)
    return torch.where(_chosen(b, 0.5, images, generator), images.mT, images)


def _uniform(b: int, half_range: float, like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(b, generator=generator, device=generator.device).to(like.device) * 2 - 1) * half_range


def _chosen(b: int, probability: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """[b, 1, 1, 1] bool, true with the given probability."""
    return (torch.rand(b, generator=generator, device=generator.device).to(like.device) < probability).view(b, 1, 1, 1)


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue  # no tensor of LUMA: a GPU would have to wait for it


def _affine(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    if not (settings.scale or settings.rotate or settings.shear or settings.shift):
        return images
    b = images.shape[0]
    zoom = 1 / (1 + _uniform(b, settings.scale, images, generator))
    angle = _uniform(b, math.radians(settings.rotate), images, generator)
    shear_x, shear_y = (_uniform(b, math.radians(settings.shear), images, generator).tan() for _ in range(2))
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    x, y = (_uniform(b, 2 * settings.shift, images, generator) for _ in range(2))
    # rotation and zoom after a shear
    first = torch.stack([cos - sin * shear_y, cos * shear_x - sin, x], -1)
    second = torch.stack([sin + cos * shear_y, sin * shear_x + cos, y], -1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid.to(images.dtype), padding_mode="zeros", align_corners=False) + 1  # zeros are white


def _outline(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    if not settings.outline:
        return images
    b, _, h, w = images.shape
    padded = F.pad(_luma(images), (1, 1, 1, 1), mode="replicate")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    strength = 2 + 4 * torch.rand(b, generator=generator, device=generator.device).to(images).view(b, 1, 1, 1)
    lines = (1 - strength * (dx.abs() + dy.abs())).clamp(0, 1).expand(b, 3, h, w)
    return torch.where(_chosen(b, settings.outline, images, generator), lines, images)


def _colour(images: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    if not (settings.brightness or settings.contrast or settings.saturation or settings.hue or settings.grey):
        return images
    b = images.shape[0]
    column = (b, 1, 1, 1)
    images = images * (1 + _uniform(b, settings.brightness, images, generator)).view(column)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * (1 + _uniform(b, settings.contrast, images, generator)).view(column)
    luma = _luma(images)
    chroma = images - luma
    angle = _uniform(b, 2 * math.pi * settings.hue, images, generator).view(column)
    # a turn of the chroma around the grey axis: Rodrigues' formula without the term along the axis, which would brighten blue
    crossed = torch.stack([chroma[:, 2] - chroma[:, 1], chroma[:, 0] - chroma[:, 2], chroma[:, 1] - chroma[:, 0]], 1) / math.sqrt(3)
    chroma = chroma * angle.cos() + crossed * angle.sin()
    saturation = (1 + _uniform(b, settings.saturation, images, generator)).view(column)
    saturation = saturation.masked_fill(_chosen(b, settings.grey, images, generator), 0)
    return (luma + chroma * saturation).clamp(0, 1)


def _erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    b, _, h, w = images.shape
    random = torch.rand(b, 8, generator=generator, device=generator.device).to(images)
    top, left = random[:, 0] * h, random[:, 1] * w
    height, width = random[:, 2] * h / 3, random[:, 3] * w / 3
    rows, columns = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
    in_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    erased = in_rows[:, :, None] & in_columns[:, None, :] & (random[:, 4] < probability)[:, None, None]
    return torch.where(erased[:, None], random[:, 5:8, None, None], images)


def unit_range(pixels: Tensor) -> Tensor:
    """uint8 images as fp32 in [0, 1]."""
    return pixels.float() / 255


def normalise(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(images - mean) / std per channel; images: [b, 3, h, w] in [0, 1]."""
    return torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], 1)
