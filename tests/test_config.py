"""Presets have the published sizes, configs survive JSON, and wrong values are refused with their name."""

import dataclasses
import json

import pytest
import torch

from omnimamba.config import (
    PRESETS,
    SPECIAL_TOKENS,
    BackboneConfig,
    OmniMambaConfig,
    PromptStyle,
    TowerConfig,
    VQConfig,
    preset,
)
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.vq import VQModel

TOWER = {"timm_name": "some", "dim": 4, "image_size": 8, "num_tokens": 2}


def num_parameters(config):
    with torch.device("meta"):
        modules = OmniMambaModel(config), VQModel(config.vq)
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_released_sizes():
    config = preset("1.3b")
    assert num_parameters(config) == 1_548_173_451  # counted on the authors' classes; towers excluded
    assert (config.num_image_tokens, config.num_vision_tokens, config.vision_dim) == (256, 729, 1024 + 1152)
    assert (config.t2i_prompt_length, config.t2i_positions, config.mmu_positions) == (72, 329, 1500)
    assert (config.text_vocab_size, config.image_vocab_size) == (50288, 16384)
    assert (config.backbone.d_in_proj, config.backbone.conv_dim, config.backbone.nheads) == (8512, 4352, 64)


def test_released_special_ids(recorded):
    ids = recorded.json("prompts.json").get("gpt_neox_20b_special_ids")
    if ids is None:
        pytest.skip("this golden folder says nothing about the released tokenizer")
    config = preset("1.3b")
    assert config.base_vocab_size == ids["base_tokenizer_length"] and config.text_vocab_size == ids["embedding_rows"]
    ours = {name: config.base_vocab_size + i for i, name in enumerate(SPECIAL_TOKENS)}
    assert ours.pop("[PAD]") == ids["pad_id"] == ids["ids"].pop("<|pad|>")
    assert ours == ids["ids"]


def test_size_of_the_other_presets():
    assert 0.4e9 < num_parameters(preset("L")) < 0.6e9
    nano = num_parameters(preset("nano"))
    assert nano * 2 < 20 * 2**20, "nano no longer fits its 20 MiB in half precision"
    assert num_parameters(preset("tiny")) < 1e6


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name):
    config = preset(name)
    assert config.name == name
    values = json.loads(json.dumps(config.to_dict()))
    assert OmniMambaConfig.from_dict(values) == config
    assert OmniMambaConfig.from_dict(values).to_dict() == config.to_dict()


def test_parts_may_be_left_out():
    assert OmniMambaConfig.from_dict({}) == OmniMambaConfig()
    for name, has_one in (("nano", True), ("1.3b", False)):  # configs without it keep the form, and the fingerprint, that they had
        assert all(("mean_token" in tower) == has_one for tower in preset(name).to_dict()["towers"].values())
    config = OmniMambaConfig.from_dict({"backbone": {"n_layer": 2}, "towers": {"a": TOWER | {"timm_kwargs": {"depths": [1, 2]}}}})
    assert config.backbone == BackboneConfig(n_layer=2)
    assert config.towers["a"] == TowerConfig("some", 4, 8, 2, timm_kwargs=(("depths", (1, 2)),))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bakcbone": {}}, "unknown key 'bakcbone' in config; did you mean 'backbone'"),
        ({"backbone": {"d_modle": 1}}, "unknown key 'd_modle' in backbone; did you mean 'd_model'"),
        ({"lora": {"zzz": 1}}, "unknown key 'zzz' in lora; valid: alpha, dropout, rank"),
        ({"towers": {"a": TOWER | {"dims": 3}}}, "unknown key 'dims' in towers.a; did you mean 'dim'"),
        ({"towers": {"a": {"dim": 3}}}, "missing in towers.a: timm_name, image_size, num_tokens"),
        ({"towers": []}, "towers=.* is not a dict"),
        ({"backbone": 5}, "backbone=5 is not a dict"),
        ({"backbone": {"d_model": "2048"}}, "d_model='2048' in backbone is not of type int"),
        ({"backbone": {"n_layer": True}}, "n_layer=True in backbone is not of type int"),
        ({"backbone": {"n_layer": 2.0}}, "n_layer=2.0 in backbone is not of type int"),
        ({"backbone": {"n_layer": 0}}, "n_layer=0 is not positive"),
        ({"backbone": {"norm_eps": float("nan")}}, "norm_eps=nan is not positive"),
        ({"backbone": {"d_model": 100}}, "expand.d_model=200 is not a multiple of headdim=64"),
        ({"backbone": {"d_model": 96, "ngroups": 2}}, "nheads=3 is not a multiple of ngroups=2"),
        ({"lora": {"rank": -8}}, "lora rank=-8 is negative; pass 0 for none"),
        ({"lora": {"dropout": 1.0}}, r"lora dropout=1.0 is outside \[0, 1\)"),
        ({"vq": {"ch": 48}}, "vq.ch=48 is not a multiple of 32"),
        ({"vq": {"image_size": 100}}, "vq.image_size=100 is not a multiple of the 16-fold downsampling"),
        ({"vq": {"ch_mult": []}}, r"vq.ch_mult=\(\) must hold a positive whole number"),
        ({"vq": {"ch_mult": [1, 0.5]}}, "vq.ch_mult=.* must hold a positive whole number"),
        ({"vq": {"ch_mult": 4}}, "ch_mult=4 in vq is not of type tuple"),
        ({"text_vocab_size": 50286}, "text_vocab_size=50286 has no room for base_vocab_size=50277 and 10 special tokens"),
        ({"eos_id": 50277}, "eos_id=50277 is not among the base_vocab_size=50277 ids"),
        ({"mmu_positions": 733, "towers": {"a": TOWER | {"num_tokens": 729}}}, "mmu_positions=733 leaves no room for text after 729"),
        ({"towers": {"a": TOWER, "b": TOWER | {"num_tokens": 3}}}, "towers differ in num_tokens"),
        ({"towers": {"a": TOWER | {"mean": [0.5]}}}, r"mean=\(0.5,\)"),
        ({"towers": {"a": TOWER | {"std": [1, 1, 0]}}}, r"std=\(1, 1, 0\)"),
        ({"max_caption_tokens": 0}, "max_caption_tokens=0 is not positive"),
        ({"prompt_style": "in-out"}, "unknown prompt_style 'in-out'; did you mean 'in_out'"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message) as error:
        OmniMambaConfig.from_dict(values)
    assert "\n" not in str(error.value)


def test_prompt_style_may_be_a_string():
    assert OmniMambaConfig(prompt_style="in_out").prompt_style is PromptStyle.IN_OUT


def test_configs_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VQConfig().ch = 64


@pytest.mark.parametrize(
    ("name", "hint"), [("1.3B", "did you mean '1.3b'"), ("nanoo", "did you mean 'nano'"), ("xyz", "valid: 1.3b, L, nano, tiny")]
)
def test_unknown_preset(name, hint):
    with pytest.raises(ValueError, match=f"unknown preset '{name}'; {hint}"):
        preset(name)
