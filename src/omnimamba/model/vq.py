"""Image tokenizer of the generation path: LlamaGen's VQ-16 (Sun et al. 2024, arXiv:2406.06525, section 2.1).

A convolutional encoder, a codebook, a convolutional decoder. Features and codes are l2-normalised, so the nearest code is the one
with the largest cosine, and it is the unit code that is decoded. Parameter names are those of the published checkpoints.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omnimamba.config import VQConfig
from omnimamba.model.batch import doubled_if_alone

NORM_GROUPS = 32
NORM_EPS = 1e-6
MAX_SCORES = 2**26
"""Most feature-code cosines held at once (256 MiB in fp32); larger searches run in chunks."""
ENTROPY_TEMPERATURE = 0.01  # LlamaGen, tokenizer_image/vq_model.py
ENTROPY_EPS = 1e-5  # same place; a code that no feature is near has probability 0 in fp32


class VQCodes(NamedTuple):
    """What the encoder makes of images."""

    ids: Tensor
    """[b, h, w] int64, row-major grid of code indices."""
    quantised: Tensor
    """[b, c, h, w] unit code vectors, the input of `VQModel.decode`."""
    pre_quant: Tensor
    """[b, c, h, w] features before normalisation and search."""


class VQTrainOutput(NamedTuple):
    """A reconstruction and the loss terms of the quantiser, none of them weighted."""

    reconstruction: Tensor
    """[b, 3, H, W], not clamped."""
    codes: VQCodes
    codebook_loss: Tensor
    """Mean squared distance that moves the codes towards the features."""
    commitment_loss: Tensor
    """The same distance, moving the features towards the codes."""
    entropy_loss: Tensor
    codebook_usage: float
    """Share of the codebook that occurs in the batch."""


class GroupNorm(nn.GroupNorm):
    """On a CPU each image by itself: PyTorch deals the pixels of a whole batch to its threads, and an image that two of them share is
    summed up in another order."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        images = [torch.group_norm(image, self.num_groups, self.weight, self.bias, self.eps) for image in input.split(1)]
        return torch.cat(images) if len(images) > 1 else images[0]


def group_norm(channels: int) -> GroupNorm:
    return GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and swish, around a skip (1x1 convolution where the channels change)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # In one expression, so that what a step reads is freed before the next: at full size, a tensor less at the peak.
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.nin_shortcut(x) + y


class Attention(nn.Module):
    """Single-head self-attention over all positions of a feature map, with a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (proj(y).flatten(2).mT[:, None] for proj in (self.q, self.k, self.v))  # [b, 1, h*w, c]: one head
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y[:, 0].mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the published weights expect


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if `has_attention`, then the way to the next resolution."""

    def __init__(
        self, c_in: int, c_out: int, *, num_res_blocks: int, has_attention: bool, downsample: bool = False, upsample: bool = False
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(num_res_blocks))
        self.attn = nn.ModuleList(Attention(c_out) for _ in range(num_res_blocks if has_attention else 0))
        self.downsample = Downsample(c_out) if downsample else nn.Identity()
        self.upsample = Upsample(c_out) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, res in enumerate(self.res):
            x = res(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels))


class Encoder(nn.Module):
    """[b, 3, H, W] to [b, z_channels, H / downsample, W / downsample]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        lowest = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(c_in, c_out, num_res_blocks=config.num_res_blocks, has_attention=i == lowest, downsample=i != lowest)
            for i, (c_in, c_out) in enumerate(pairwise([config.ch, *widths]))
        )
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[b, z_channels, h, w] to [b, 3, h * downsample, w * downsample]; one residual block more per level than the encoder."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in reversed(config.ch_mult)]
        highest = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(c_in, c_out, num_res_blocks=config.num_res_blocks + 1, has_attention=i == 0, upsample=i != highest)
            for i, (c_in, c_out) in enumerate(pairwise([widths[0], *widths]))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def cosines(features: Tensor, codes: Tensor) -> Tensor:
    """[t, n] products of unit features [t, c] and unit codes [n, c], in fp32 under autocast too: in bf16 near codes tie."""
    with torch.autocast(features.device.type, enabled=False):
        return features @ codes.mT


def soft_assignment_sums(features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over t of p = softmax(-|feature - code|^2 / temperature): of p itself [n], and of its entropy []."""
    log_p = (2 / ENTROPY_TEMPERATURE * cosines(features, codes)).log_softmax(-1)  # unit vectors: |f - e|^2 = 2 - 2 cos
    p = log_p.exp()
    return p.sum(0), -(p * log_p).sum()


def entropy_loss(features: Tensor, codes: Tensor) -> Tensor:
    """Mean entropy of the soft assignments minus the entropy of their mean: low if each is sharp and all codes are used.

    features: [t, c], codes: [n, c], both of unit length. Several chunks are recomputed in the backward pass, so that memory stays
    near MAX_SCORES numbers.
    """
    chunks = features.split(rows_per_chunk(len(codes)))
    if len(chunks) == 1:
        sums = [soft_assignment_sums(features, codes)]
    else:
        sums = [checkpoint(soft_assignment_sums, chunk, codes, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    p, entropy = (torch.stack(parts).sum(0) / len(features) for parts in zip(*sums, strict=True))
    return entropy + (p * (p + ENTROPY_EPS).log()).sum()


def rows_per_chunk(codebook_size: int) -> int:
    return max(1, MAX_SCORES // codebook_size)


class Quantizer(nn.Module):
    """The codebook. Its rows are normalised whenever they are used, so their stored length means nothing."""

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        with torch.no_grad():
            self.embedding.weight.copy_(self.codes())

    def codes(self) -> Tensor:
        """[n, c] unit code vectors, fp32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """[t] index of the code nearest to each unit feature; features: [t, c]."""
        codes = self.codes()
        return torch.cat([cosines(chunk, codes).argmax(-1) for chunk in features.split(rows_per_chunk(len(codes)))])


class VQModel(nn.Module):
    """Images [b, 3, H, W] in [-1, 1] to a grid of code indices and back; H and W are multiples of `config.downsample`.

    Gradients are not switched off here: callers that only tokenize or paint do so.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, where the adversarial loss is balanced."""
        return self.decoder.conv_out.weight

    def encode(self, images: Tensor) -> VQCodes:
        """Code indices, unit code vectors and features of images [b, 3, H, W] in [-1, 1]."""
        pre_quant = self.features(images)
        ids = self.quantize.nearest(unit_rows(pre_quant)).view(-1, *pre_quant.shape[2:])
        return VQCodes(ids, self.lookup(ids).to(pre_quant.dtype), pre_quant)

    def decode(self, quantised: Tensor) -> Tensor:
        """Images [b, 3, H, W], near [-1, 1] but not clamped, of unit code vectors [b, c, h, w]."""
        return self.decoder(self.post_quant_conv(quantised.to(self.post_quant_conv.weight.dtype)))

    def decode_ids(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images [b, 3, H, W] of code indices [b, t] in row-major order; on a CPU, the same whatever else is in the batch.

        grid: (h, w) with h * w = t; the square of `config.grid_size` unless given.
        """
        h, w = grid or (self.config.grid_size, self.config.grid_size)
        if ids.dim() != 2 or ids.shape[1] != h * w:
            raise ValueError(f"image ids of shape {list(ids.shape)} do not fill a grid of {h}x{w}; pass [b, {h * w}] or another grid")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"image ids are {ids.dtype}; pass integers from 0 to {self.config.codebook_size - 1}")
        if ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.config.codebook_size:
                wrong = low if low < 0 else high
                raise ValueError(f"image id {wrong} is not in the codebook; pass ids from 0 to {self.config.codebook_size - 1}")
        return self.decode(self.lookup(doubled_if_alone(ids.long().view(-1, h, w))))[: len(ids)]

    def forward(self, images: Tensor) -> VQTrainOutput:
        """Reconstruction and quantiser losses for training; the gradient passes the search as if it were the identity."""
        pre_quant = self.features(images)
        rows = unit_rows(pre_quant)
        ids = self.quantize.nearest(rows)
        codes = self.quantize.codes()
        chosen = F.embedding(ids, codes)
        straight_through = rows + (chosen - rows).detach()
        grid = (len(images), *pre_quant.shape[2:])
        quantised = chosen.view(*grid, -1).movedim(-1, 1)
        reconstruction = self.decode(straight_through.view(*grid, -1).movedim(-1, 1))
        losses = F.mse_loss(chosen, rows.detach()), F.mse_loss(rows, chosen.detach()), entropy_loss(rows, codes)
        used = torch.zeros(len(codes), dtype=torch.bool, device=ids.device).index_fill(0, ids, True)
        codebook_usage = used.sum().item() / len(codes)  # last: it waits for the device
        return VQTrainOutput(reconstruction, VQCodes(ids.view(grid), quantised, pre_quant), *losses, codebook_usage)

    def features(self, images: Tensor) -> Tensor:
        """[b, c, h, w] encoder output before normalisation. ValueError for images of a wrong shape or type."""
        step = self.config.downsample
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {list(images.shape)}; pass [b, 3, H, W]")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; pass floating point in [-1, 1]")
        height, width = images.shape[2:]
        if height % step or width % step or not height or not width:
            raise ValueError(f"images of {height}x{width} pixels: both sides must be positive multiples of {step}; resize or crop them")
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))

    def lookup(self, ids: Tensor) -> Tensor:
        """[b, c, h, w] unit code vectors, fp32, of a grid of indices [b, h, w]."""
        return F.embedding(ids, self.quantize.codes()).movedim(-1, 1)


def unit_rows(pre_quant: Tensor) -> Tensor:
    """[b*h*w, c] l2-normalised features, fp32, of [b, c, h, w]."""
    return F.normalize(pre_quant.float().movedim(1, -1).flatten(0, 2), dim=-1)
