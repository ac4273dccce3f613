"""Official checkpoints to model folders and back, bitwise, and the parts that are published elsewhere."""

import argparse
import dataclasses
import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from omnimamba.config import LoraConfig, OmniMambaConfig, TowerConfig, VQConfig, preset
from omnimamba.model import convert as conversion
from omnimamba.model import weights
from omnimamba.model.convert import convert
from omnimamba.model.files import TensorFile
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.shapes import infer_config
from omnimamba.model.vision import VisionTowers
from omnimamba.model.vq import VQModel

LM_HEAD = "llm_backbone.mamba.lm_head.weight"
TEXT_EMBEDDING = "llm_backbone.mamba.backbone.embedding.weight"
CODEBOOK_USED = "llm_backbone.vqvae.quantize.codebook_used"


@pytest.fixture(scope="module")
def folder(redraw, tmp_path_factory):
    """A tiny model folder in fp16, as the released checkpoint is."""
    config = preset("tiny")
    parts = OmniMambaModel(config), VisionTowers(config.towers), VQModel(config.vq)
    bundle = weights.Bundle(config, *(redraw(part, seed) for seed, part in enumerate(parts)), None)
    path = tmp_path_factory.mktemp("convert") / "model"
    weights.save(bundle, path, dtype=torch.float16)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder):
    return convert(folder, folder.parent / "official.pth", to="official").path


def stored(folder):
    return {f"{path.stem}.{name}": tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name


# ---- there and back


def test_there_and_back_is_bitwise(folder, checkpoint, tmp_path):
    lines = []
    done = convert(checkpoint, tmp_path / "back", config="tiny", progress=lines.append)
    assert_same(stored(tmp_path / "back"), stored(folder))
    assert weights.load(tmp_path / "back").config == preset("tiny")
    model = weights.load(folder)
    parts = {"model": model.model, "vision": model.vision, "vq": model.vq}
    assert done.num_parameters == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert done.missing == ("tokenizer.json",)
    assert lines == [f"opening {checkpoint}", f"writing {tmp_path / 'back'}"]


def test_official_names(checkpoint):
    official = torch.load(checkpoint, weights_only=True)
    assert official[LM_HEAD].data_ptr() == official[TEXT_EMBEDDING].data_ptr()
    assert official["llm_backbone.mamba.backbone.pos_embed"].shape == (1, 32 + 5 + 64, 64)
    assert torch.equal(official[CODEBOOK_USED], torch.zeros(65536))
    assert "vision_backbone.vit_featurizer.blocks.0.attn.qkv.weight" in official
    assert checkpoint.stat().st_size < 2e6  # tied copies are stored once


@pytest.mark.parametrize("without", [("vision",), ("vq",), ("vision", "vq")])
def test_without_encoders(folder, checkpoint, tmp_path, without):
    path = convert(folder, tmp_path, to="official", without=without).path
    assert path == tmp_path / "OmniMamba-tiny.pth"
    prefixes = {name.split(".")[0] + "." + name.split(".")[1] for name in torch.load(path, weights_only=True)}
    assert ("vision_backbone.vit_featurizer" in prefixes) == ("vision" not in without)
    assert ("llm_backbone.vqvae" in prefixes) == ("vq" not in without)
    done = convert(checkpoint, tmp_path / "back", config="tiny", without=without)
    assert done.missing == (*without, "tokenizer.json")
    kept = {name: tensor for name, tensor in stored(folder).items() if not name.startswith(without)}
    assert_same(stored(tmp_path / "back"), kept)


def test_types(folder, checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "single", config="tiny", dtype="float32")
    assert_same(stored(tmp_path / "single"), {name: tensor.float() for name, tensor in stored(folder).items()})
    path = convert(folder, tmp_path / "b.pth", to="official", dtype="bfloat16").path
    official = torch.load(path, weights_only=True)
    assert official[TEXT_EMBEDDING].dtype is torch.bfloat16
    assert official["llm_backbone.mamba.backbone.layers.0.mixer.A_log"].dtype is torch.float32


def test_generation_defaults_and_tokenizer_move_along(folder, tmp_path):
    source = tmp_path / "source"
    convert(folder, source)
    (source / "generation.json").write_text('{"top_k": 5}')
    (tmp_path / "t.json").write_text("{}")
    done = convert(source, tmp_path / "out", tokenizer=tmp_path / "t.json", dtype="bfloat16")
    assert (tmp_path / "out" / "generation.json").read_text() == '{"top_k": 5}'
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}" and done.missing == ()


def test_heads_stored_apart_from_their_embeddings(checkpoint, tmp_path):
    """As after `.half()` of each tensor: equal copies are one tensor, different ones an error."""
    official = {name: tensor.clone() for name, tensor in torch.load(checkpoint, weights_only=True).items()}
    torch.save(official, tmp_path / "apart.pth")
    convert(tmp_path / "apart.pth", tmp_path / "out", config="tiny")
    official[LM_HEAD][5, 5] += 1
    torch.save(official, tmp_path / "apart.pth")
    with pytest.raises(ValueError, match=f"{LM_HEAD} differs from {TEXT_EMBEDDING}"):
        convert(tmp_path / "apart.pth", tmp_path / "out", config="tiny")


def test_golden_checkpoint_there_and_back(golden, recorded, tmp_path):
    source = TensorFile(golden / "weights.safetensors")
    stored = weights.open_official(golden / "weights.safetensors", recorded.config)
    folder = tmp_path / "model"
    weights.write(stored, folder)
    path = conversion.write_official(weights.open_folder(folder), tmp_path / "back.pth")
    back = torch.load(path, weights_only=True)
    assert source.keys() <= back.keys()
    for name in source:
        if name != CODEBOOK_USED:
            assert torch.equal(back[name], source[name]), name
    assert back.keys() - source.keys() <= {CODEBOOK_USED, *weights.TIED}


# ---- what is wrong with a checkpoint is said in one line


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"x": Malicious(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth: holds more than tensors"):
        weights.load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def damaged(checkpoint, path, change):
    official = torch.load(checkpoint, weights_only=True)
    change(official)
    torch.save(official, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda source, path: path.write_bytes(source.read_bytes()[:5000]), "damaged, or not a file of tensors"),
        (lambda source, path: path.write_text("hello"), "damaged, or not a file of tensors"),
        (lambda source, path: path.write_bytes(b""), "damaged, or not a file of tensors"),
        (lambda source, path: torch.save([1], path), "holds no state dict"),
        (lambda source, path: torch.save({"a": 1}, path), "holds no state dict"),
        (lambda source, path: torch.save({"a.b": torch.ones(1)}, path), "1 unexpected tensors: a.b"),
        (lambda source, path: torch.save({}, path), "holds no tensor of the language model"),
        (lambda source, path: damaged(source, path, lambda t: t.pop(TEXT_EMBEDDING)), "'text_embedding.weight' is missing"),
        (lambda source, path: None, "there is no file or folder"),
    ],
)
def test_damaged_checkpoints(checkpoint, tmp_path, make, message):
    path = tmp_path / "bad.pth"
    make(checkpoint, path)
    with pytest.raises(ValueError, match=message) as caught:
        weights.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "offical"}, "unknown format 'offical'; did you mean 'official'"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"without": ["model"]}, "cannot leave out model"),
        ({"config": "tiny"}, "has its own config.json"),
        ({"tokenizer": "no.json"}, "there is no file 'no.json'"),
        ({"vq": "no.pt"}, "there is no file 'no.pt'"),
    ],
)
def test_impossible_requests(folder, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_do_not_fit_the_config_are_listed(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"model: tensors do not fit the config: .* missing: .*backbone.layers.2.* wrongly shaped"):
        convert(checkpoint, tmp_path / "out", config="nano")
    with pytest.raises(ValueError, match="the projector reads 32 features, the published towers give 2176; pass the model's config"):
        convert(checkpoint, tmp_path / "out")


# ---- the config of a checkpoint


def meta(config: OmniMambaConfig, with_vq: bool):
    return {part: weights.outline(part, config).state_dict() for part in (("model", "vq") if with_vq else ("model",))}


@pytest.mark.parametrize("with_vq", [False, True])
@pytest.mark.parametrize("name", ["1.3b", "L"])
def test_presets_are_recognised(name, with_vq):
    assert infer_config(meta(preset(name), with_vq)) == preset(name)


def test_other_sizes_are_read_off():
    published = preset("1.3b")
    backbone = dataclasses.replace(published.backbone, d_model=64, n_layer=3, d_state=16, headdim=32, expand=4, d_conv=3)
    vq = VQConfig(image_size=96, ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=24, codebook_size=48, codebook_dim=4)
    config = dataclasses.replace(
        published, name="official", backbone=backbone, lora=LoraConfig(rank=4), vq=vq, text_vocab_size=50304, mmu_positions=900
    )
    assert infer_config(meta(config, with_vq=True)) == config


# ---- parts that are published elsewhere


def test_llamagen_vq_is_merged_in(folder, tmp_path):
    tensors = load_file(folder / "vq.safetensors")
    content = {"model": {**tensors, "quantize.codebook_used": torch.zeros(65536)}, "args": argparse.Namespace(vq_model="VQ-16"), "steps": 3}
    torch.save(content, tmp_path / "vq_ds16_t2i.pt")
    bare = convert(folder, tmp_path / "bare", without=["vq"]).path
    assert convert(bare, tmp_path / "whole", vq=tmp_path / "vq_ds16_t2i.pt").missing == ("tokenizer.json",)
    assert_same(stored(tmp_path / "whole"), stored(folder))


@pytest.fixture(scope="module")
def two_towers():
    """The released towers in small: register tokens without position embeddings, and none; the first pretrained at another size."""
    small = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    return {
        name: TowerConfig(timm_name, dim=32, image_size=70, num_tokens=25, timm_kwargs=tuple(small.items()))
        for name, timm_name in (("dino", "vit_large_patch14_reg4_dinov2.lvd142m"), ("siglip", "vit_so400m_patch14_siglip_384"))
    }


def test_timm_towers_are_merged_in_as_timm_would_load_them(folder, two_towers, tmp_path):
    files, expected = {}, {}
    for (name, tower), size in zip(two_towers.items(), (98, 70), strict=True):
        kwargs = dict(tower.timm_kwargs)
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(timm.create_model(tower.timm_name, num_classes=0, img_size=size, **kwargs).state_dict(), files[name])
        loaded = timm.create_model(
            tower.timm_name, pretrained=True, pretrained_cfg_overlay={"file": str(files[name])}, num_classes=0, img_size=70, **kwargs
        )
        expected |= {f"towers.{name}.{key}": tensor for key, tensor in loaded.state_dict().items()}
    config = dataclasses.replace(preset("tiny"), towers=two_towers)
    assert_same(conversion.read_towers(config, files), expected)
    model = OmniMambaModel(config)
    weights.save(weights.Bundle(config, model, None, None, None), tmp_path / "bare")
    done = convert(tmp_path / "bare", tmp_path / "whole", towers=files)
    assert done.missing == ("vq", "tokenizer.json")
    assert_same(weights.load(tmp_path / "whole").vision.state_dict(), expected)
    with pytest.raises(ValueError, match="checkpoints are for towers dino; pass one for each of dino, siglip"):
        convert(tmp_path / "bare", tmp_path / "whole", towers={"dino": files["dino"]})
    with pytest.raises(ValueError, match=r"vision: tensors do not fit the config: .*towers.dino"):
        convert(tmp_path / "bare", tmp_path / "whole", towers={"dino": files["siglip"], "siglip": files["siglip"]})


def test_hub_sources_of_the_released_towers():
    assert [conversion.timm_source(tower) for tower in preset("1.3b").towers.values()] == [
        ("timm/vit_large_patch14_reg4_dinov2.lvd142m", "model.safetensors"),
        ("timm/vit_so400m_patch14_siglip_384.webli", "model.safetensors"),
    ]
    with pytest.raises(ValueError, match="knows no pretrained weights of 'vit_base_patch16_18x2_224'"):
        conversion.timm_source(dataclasses.replace(preset("1.3b").towers["dino"], timm_name="vit_base_patch16_18x2_224"))
