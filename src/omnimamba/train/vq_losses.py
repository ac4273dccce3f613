"""Losses of VQ training beside those of the quantiser (arXiv:2406.06525, section 2.1): pixels, features, and an adversary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ADAPTIVE_WEIGHT = 1e4  # this and the next from VQGAN (arXiv:2012.09841, equation 7) as LlamaGen uses it
GRADIENT_NORM_EPS = 1e-4
UNIT_EPS = 1e-10  # LPIPS (arXiv:1801.03924); under the root here, so that an all-zero feature has a finite gradient


class PatchDiscriminator(nn.Module):
    """PatchGAN (pix2pix, arXiv:1611.07004, appendix 6.1.2): one real-or-fake logit per overlapping patch.

    `num_layers` convolutions of stride 2, of `width` channels and then twice as many each time up to 8 * width, then two of stride 1.
    BatchNorm always uses the statistics of the batch at hand and keeps none, so the parameters are the whole state.
    """

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        self.min_size = 3 * 2**num_layers  # the two convolutions of stride 1 take a pixel each
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        c_in = width
        for i in range(1, num_layers + 1):
            c_out = width * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
            c_in = c_out
        self.layers = nn.Sequential(*layers, nn.Conv2d(c_in, 1, 4, padding=1))
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, 1, h, w], positive for real. images: [b, 3, H, W] in [-1, 1]."""
        height, width = images.shape[2:]
        if min(height, width) < self.min_size:
            raise ValueError(
                f"images of {height}x{width} pixels are too small for the discriminator, which needs {self.min_size}; use fewer layers"
            )
        return self.layers(images)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator: real above 1, fake below -1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Hinge loss of the decoder: reconstructions that are taken for real."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Factor for the adversarial loss that makes both losses pull equally hard at `last_layer`, a constant for the backward pass.

    Ratio of the gradient norms of the two loss scalars, clamped to [0, MAX_ADAPTIVE_WEIGHT]. Keeps both graphs.
    """
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = reconstruction_gradient.float().norm() / (adversarial_gradient.float().norm() + GRADIENT_NORM_EPS)
    return ratio.clamp(0, MAX_ADAPTIVE_WEIGHT).detach()


def reconstruction_loss(reconstruction: Tensor, images: Tensor, *, l1_weight: float, l2_weight: float) -> Tensor:
    """l1_weight * mean |difference| + l2_weight * mean squared difference. Both images: [b, 3, H, W]."""
    assert reconstruction.shape == images.shape, (reconstruction.shape, images.shape)
    return l1_weight * F.l1_loss(reconstruction, images) + l2_weight * F.mse_loss(reconstruction, images)


def perceptual_loss(features_a: list[Tensor], features_b: list[Tensor]) -> Tensor:
    """LPIPS (arXiv:1801.03924) without its learned weights, 0 for equal features and at most 4.

    Lists of feature maps [b, c, h, w], pair by pair of one shape. Each position's channels are scaled to unit length; the squared
    distance of the two unit vectors is averaged over positions, images and maps.
    """
    distances = []
    for a, b in zip(features_a, features_b, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        distances.append((unit_channels(a) - unit_channels(b)).square().sum(1).mean())
    return torch.stack(distances).mean()


def unit_channels(features: Tensor) -> Tensor:
    """Features [b, c, h, w], fp32, with channel vectors of unit length (or zero)."""
    features = features.float()
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + UNIT_EPS)
