"""Losses of VQ training by values that can be worked out by hand."""

import pytest
import torch
from torch import nn

from omnimamba.config import preset
from omnimamba.model.vq import VQModel
from omnimamba.train.vq_losses import (
    MAX_ADAPTIVE_WEIGHT,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    perceptual_loss,
    reconstruction_loss,
)


@pytest.mark.parametrize(
    ("num_layers", "size", "patches"),
    [(3, (64, 64), (6, 6)), (3, (24, 40), (1, 3)), (2, (32, 32), (6, 6)), (1, (6, 6), (1, 1)), (5, (96, 96), (1, 1))],
)
def test_discriminator_gives_a_logit_per_patch(num_layers, size, patches):
    discriminator = PatchDiscriminator(width=8, num_layers=num_layers)
    assert discriminator(torch.randn(2, 3, *size)).shape == (2, 1, *patches)
    widths = [module.out_channels for module in discriminator.layers if isinstance(module, nn.Conv2d)]
    assert widths == [8 * min(2**i, 8) for i in range(num_layers + 1)] + [1]


def test_discriminator_has_the_published_number_of_parameters():
    convolutions = (3 * 64 * 16 + 64) + 16 * (64 * 128 + 128 * 256 + 256 * 512) + (512 * 16 + 1)  # only the first and last have a bias
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == convolutions + 2 * (128 + 256 + 512) == 2_765_633


def test_state_of_the_discriminator_is_its_parameters():
    discriminator = PatchDiscriminator(width=8)
    assert discriminator.state_dict().keys() == dict(discriminator.named_parameters()).keys()


def test_too_small_for_the_discriminator():
    with pytest.raises(ValueError, match="20x32 pixels are too small for the discriminator, which needs 24"):
        PatchDiscriminator(width=8)(torch.zeros(1, 3, 20, 32))


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert generator_loss(torch.tensor([1.0, 2.0, -6.0])).item() == pytest.approx(1.0)
    assert discriminator_loss(torch.full((3,), 1.5), torch.full((3,), -1.5)).item() == 0


def test_discriminator_learns_to_tell_images_apart():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8, num_layers=2)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    real, fake = torch.full((4, 3, 16, 16), 0.5) + 0.1 * torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    losses = []
    for _ in range(20):
        losses.append(discriminator_loss(discriminator(real), discriminator(fake)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.8 and losses[-1] < 0.3
    assert discriminator(real).mean() > discriminator(fake).mean()


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    last_layer = nn.Parameter(torch.ones(4))
    assert adaptive_weight((6 * last_layer).sum(), (2 * last_layer).sum(), last_layer).item() == pytest.approx(3, rel=1e-3)
    weight = adaptive_weight((1e6 * last_layer).sum(), (0 * last_layer).sum(), last_layer)
    assert weight.item() == MAX_ADAPTIVE_WEIGHT
    assert not weight.requires_grad and last_layer.grad is None


def test_adaptive_weight_balances_a_vq_model_at_its_last_layer():
    torch.manual_seed(0)
    model, discriminator = VQModel(preset("tiny").vq), PatchDiscriminator(width=8, num_layers=2)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = model(images)
    reconstruction = reconstruction_loss(out.reconstruction, images, l1_weight=1, l2_weight=1)
    adversarial = generator_loss(discriminator(out.reconstruction))
    weight = adaptive_weight(reconstruction, adversarial, model.last_layer)
    norms = [torch.autograd.grad(loss, model.last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, weight * adversarial)]
    torch.testing.assert_close(norms[0], norms[1], rtol=0.02, atol=0)
    (reconstruction + weight * adversarial).backward()  # both graphs are still there
    assert model.encoder.conv_in.weight.grad.abs().max() > 0


def test_reconstruction_loss():
    a, b = torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[0.0, 0.0]]]])
    assert reconstruction_loss(a, b, l1_weight=1, l2_weight=0).item() == 2
    assert reconstruction_loss(a, b, l1_weight=0, l2_weight=1).item() == 5
    assert reconstruction_loss(a, b, l1_weight=0.5, l2_weight=2).item() == 11


def test_perceptual_loss_compares_directions():
    x, y = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    x[:, 0], y[:, 1] = 5, 0.1
    assert perceptual_loss([x], [x]).item() == 0
    assert perceptual_loss([x], [x * 7]).item() == pytest.approx(0, abs=1e-6)
    assert perceptual_loss([x], [y]).item() == pytest.approx(2, rel=1e-4)
    assert perceptual_loss([x], [-x]).item() == pytest.approx(4, rel=1e-4)
    big = torch.cat([y, x], dim=3)  # half of its positions equal
    assert perceptual_loss([torch.cat([x, x], dim=3)], [big]).item() == pytest.approx(1, rel=1e-4)
    assert perceptual_loss([x, x], [x, y]).item() == pytest.approx(1, rel=1e-4)  # mean over maps


def test_perceptual_loss_of_dead_features_has_a_finite_gradient():
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    perceptual_loss([x], [torch.ones(1, 2, 3, 3)]).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_perceptual_loss_wants_pairs_of_maps():
    x = torch.ones(1, 2, 3, 3)
    with pytest.raises(ValueError, match="zip"):
        perceptual_loss([x, x], [x])
