"""The understanding towers against timm's own features."""

import dataclasses

import pytest
import timm
import torch
from torch import nn

from omnimamba.config import TowerConfig, preset
from omnimamba.model.vision import VisionTowers

VIT = preset("tiny").towers["vit"]
REGISTERS = TowerConfig(
    "vit_small_patch14_reg4_dinov2",
    dim=48,
    image_size=56,
    num_tokens=16,
    timm_kwargs=(("embed_dim", 48), ("depth", 4), ("num_heads", 2)),
)
CONVNEXT = TowerConfig("convnext_atto", dim=32, image_size=64, num_tokens=64, layer=1, timm_kwargs=(("dims", (16, 32, 48, 64)),))


def pixels(config, b=2):
    return torch.randn(b, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [VIT, REGISTERS], ids=["class token", "class and register tokens"])
@torch.no_grad()
def test_vit_features_are_timms_second_to_last_layer(config):
    towers = VisionTowers({"vit": config})
    model, x = towers.towers["vit"], pixels(config)
    features = towers({"vit": x})
    assert features.shape == (2, config.num_tokens, config.dim)
    (expected,) = model.get_intermediate_layers(x, n=[len(model.blocks) - 2])
    assert torch.equal(features, expected)
    (last,) = model.get_intermediate_layers(x, n=[len(model.blocks) - 1])
    assert not torch.allclose(features, last)


@pytest.mark.parametrize("config", [VIT, CONVNEXT, *preset("nano").towers.values()], ids=lambda config: config.timm_name)
@torch.no_grad()
def test_features_do_not_depend_on_the_batch(config):
    """Equal bits: an answer must not change because another image was encoded in the same pass."""
    towers, x = VisionTowers({"tower": config}), pixels(config, 5)
    features = towers({"tower": x})
    for part in (slice(0, 1), slice(4, 5), slice(1, 3), slice(1, 4)):
        assert torch.equal(towers({"tower": x[part]}), features[part])


@torch.no_grad()
def test_the_mean_token_follows_the_patches():
    config = dataclasses.replace(CONVNEXT, num_tokens=65, mean_token=True)
    torch.manual_seed(0)
    plain = VisionTowers({"tower": CONVNEXT})
    towers = VisionTowers({"tower": config})
    towers.load_state_dict(plain.state_dict())
    x = {"tower": pixels(config, 3)}
    features, patches = towers(x), plain(x)
    assert features.shape == (3, 65, 32) and torch.equal(features[:, :-1], patches)
    torch.testing.assert_close(features[:, -1], patches.mean(1))
    with pytest.raises(ValueError, match="gives num_tokens=65, .* says num_tokens=64"):
        VisionTowers({"tower": dataclasses.replace(CONVNEXT, mean_token=True)})


def test_blocks_after_the_layer_do_not_run():
    class Broken(nn.Module):
        def forward(self, x):
            raise AssertionError("ran")

    towers = VisionTowers({"vit": VIT})
    towers.towers["vit"].blocks[-1] = Broken()
    towers({"vit": pixels(VIT)})
    towers.feature_maps({"vit": pixels(VIT)})
    towers.towers["vit"].blocks[-2] = Broken()
    with pytest.raises(AssertionError, match="ran"):
        towers({"vit": pixels(VIT)})


@torch.no_grad()
def test_convnet_features_are_the_stages_map_row_by_row():
    towers = VisionTowers({"cnn": CONVNEXT})
    model, x = towers.towers["cnn"], pixels(CONVNEXT)
    features = towers({"cnn": x})
    expected = model.stages[1](model.stages[0](model.stem(x)))  # [b, c, 8, 8]
    assert features.shape == (2, 64, 32)
    for i in range(expected.shape[2]):
        for j in range(expected.shape[3]):
            assert torch.equal(features[:, i * expected.shape[3] + j], expected[:, :, i, j])


@pytest.mark.parametrize("config", [VIT, REGISTERS, CONVNEXT], ids=["vit", "registers", "convnet"])
@torch.no_grad()
def test_what_no_feature_depends_on(config):
    with torch.device("meta"):
        unread = VisionTowers({"t": config}).unread()
    towers = VisionTowers({"t": config})
    x = {"t": pixels(config)}
    expected = towers(x)
    assert 0 < len(unread) < len(list(towers.parameters()))
    parameters = dict(towers.named_parameters())
    for name in unread:
        parameters[name].fill_(torch.nan)
    assert torch.equal(towers(x), expected)
    for name in parameters.keys() - unread:
        before = parameters[name].clone()
        parameters[name].fill_(torch.nan)
        assert not torch.equal(towers(x), expected), name
        parameters[name].copy_(before)


@torch.no_grad()
def test_nano_preset():
    config = preset("nano")
    towers = VisionTowers(config.towers)
    (name,) = config.towers
    assert towers({name: pixels(config.towers[name])}).shape == (2, config.num_vision_tokens, config.vision_dim)


@torch.no_grad()
def test_towers_are_concatenated_in_their_order():
    towers = VisionTowers({"b": REGISTERS, "a": VIT})
    x = {"a": pixels(VIT), "b": pixels(REGISTERS)}  # the order of the pixels does not matter
    features = towers(x)
    assert features.shape == (2, 16, 48 + 32)
    (first,) = towers.towers["b"].get_intermediate_layers(x["b"], n=[2])
    (second,) = towers.towers["a"].get_intermediate_layers(x["a"], n=[1])
    assert torch.equal(features, torch.cat([first, second], dim=-1))


def test_released_towers_build_with_timms_names():
    configs = preset("1.3b").towers
    with torch.device("meta"):
        towers = VisionTowers(configs)  # checks num_tokens and dim
        for name, config in configs.items():
            alone = timm.create_model(config.timm_name, num_classes=0, img_size=config.image_size)
            shapes = {key: value.shape for key, value in towers.towers[name].state_dict().items()}
            assert shapes == {key: value.shape for key, value in alone.state_dict().items()}
            assert f"towers.{name}.patch_embed.proj.weight" in towers.state_dict()
        features = towers({name: torch.empty(1, 3, config.image_size, config.image_size) for name, config in configs.items()})
    assert features.shape == (1, 729, 1024 + 1152)
    assert all(parameter.is_meta for parameter in towers.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 17}, "gives num_tokens=16, dim=32 .*says num_tokens=17, dim=32"),
        ({"dim": 40}, "gives num_tokens=16, dim=32 .*says num_tokens=16, dim=40"),
        ({"image_size": 40}, "gives num_tokens=25, dim=32 at 40 pixels.*says num_tokens=16"),
        ({"layer": 3}, "layer=3, but vit_tiny_patch16_224 has 3 layers; pass -3 to 2"),
        ({"layer": -4}, "layer=-4, but"),
        ({"timm_name": "no_such_model"}, "has no model 'no_such_model'"),
    ],
)
def test_config_that_does_not_fit_timms_model(change, message):
    with pytest.raises(ValueError, match=message):
        VisionTowers({"vit": dataclasses.replace(VIT, **change)})


def test_wrong_pixels():
    towers = VisionTowers({"vit": VIT})
    for wrong in (torch.zeros(1, 3, 40, 40), torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"pass \[b, 3, 32, 32\]"):
            towers({"vit": wrong})
    with pytest.raises(ValueError, match="pixels are for towers none; pass one entry for each of vit"):
        towers({})
    with pytest.raises(ValueError, match="pixels are for towers vit, dino; pass one entry for each of vit"):
        towers({"vit": pixels(VIT), "dino": pixels(VIT)})
    with pytest.raises(ValueError, match="no vision towers"):
        VisionTowers({})({})


def test_train_leaves_the_towers_in_eval_mode():
    config = dataclasses.replace(VIT, timm_kwargs=(*VIT.timm_kwargs, ("proj_drop_rate", 0.5)))
    towers = VisionTowers({"vit": config})
    assert not towers.towers["vit"].training
    parent = nn.ModuleDict({"towers": towers}).train()
    assert parent.training and towers.training
    assert not any(module.training for module in towers.towers.modules())
    assert torch.equal(towers({"vit": pixels(config)}), towers({"vit": pixels(config)}))
    towers.towers["vit"].train()  # what trains a tower does this
    assert not torch.equal(towers({"vit": pixels(config)}), towers({"vit": pixels(config)}))
    assert towers.eval() is towers and not towers.towers["vit"].training


@torch.no_grad()
def test_feature_maps_end_with_the_layer():
    towers = VisionTowers({"vit": VIT, "reg": REGISTERS})
    x = {"vit": pixels(VIT), "reg": pixels(REGISTERS)}
    maps = towers.feature_maps(x)
    assert [tuple(part.shape) for part in maps] == [(2, 32, 4, 4)] * 2 + [(2, 48, 4, 4)] * 3
    torch.testing.assert_close(torch.cat([maps[1], maps[4]], dim=1).flatten(2).mT, towers(x))


def test_gradient_reaches_the_pixels():
    towers = VisionTowers({"cnn": CONVNEXT}).requires_grad_(False)
    x = pixels(CONVNEXT).requires_grad_()
    maps = towers.feature_maps({"cnn": x})
    assert [tuple(part.shape[1:]) for part in maps] == [(16, 16, 16), (32, 8, 8)]
    torch.stack([part.square().mean() for part in maps]).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


@torch.no_grad()
def test_bf16_towers_take_fp32_pixels():
    towers = VisionTowers({"vit": VIT})
    expected = towers({"vit": pixels(VIT)})
    found = towers.bfloat16()({"vit": pixels(VIT)})
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
