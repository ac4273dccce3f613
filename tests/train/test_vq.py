"""Training of the image tokenizer."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from omnimamba.data.images import open_parquet_images
from omnimamba.model.vq import VQModel
from omnimamba.processor.image import load_image, to_pil
from omnimamba.train import loop
from omnimamba.train.run import make_objective

CPU = torch.device("cpu")


def run(recipe):
    objective = make_objective(recipe, CPU)
    before = {name: tensor.clone() for name, tensor in objective.vq.state_dict().items()}
    model = loop.run(objective, recipe, CPU)
    return objective, before, load_file(model / "vq.safetensors")


@pytest.mark.parametrize("kind", ["vq", "vq_adversarial"])
def test_four_steps(recipe, log_lines, kind):
    r = recipe(kind, val_every=4, sample_every=4)
    _, before, after = run(r)
    assert all(not torch.equal(before[name], after[name]) for name in after if not name.endswith("k.bias"))  # softmax ignores it
    assert [line["step"] for line in log_lines(r.out)] == [1, 2, 3, 4]
    (line,) = log_lines(r.out, "val")
    assert 0 < line["psnr"] < 40 and 0 < line["codes_used"] <= 1
    shown = load_image(f"{r.out}/samples/step-00000004/reconstructions.png")
    assert shown.size == (6 * 32 + 5 * 4, 2 * 32 + 4)  # six validation images over their reconstructions
    if kind == "vq_adversarial":
        assert [{"adversarial", "discriminator_loss"} <= line.keys() for line in log_lines(r.out)] == [False, True, True, True]


def test_it_learns(recipe, log_lines, change, tmp_path):
    r = change(recipe("vq", steps=30, lr=2e-3, batch=6), "augment", scale=0, rotate=0, brightness=0)
    run(r)
    figures = [line["reconstruction"] for line in log_lines(r.out)]
    assert sum(figures[-5:]) < 0.6 * sum(figures[:5])


def test_decoder_only(recipe, change):
    _, before, after = run(change(recipe("vq"), "vq", decoder_only=True))
    for name in after:
        if not name.endswith("k.bias"):
            assert torch.equal(before[name], after[name]) == name.startswith(("encoder.", "quant_conv.", "quantize.")), name


def test_start_from_weights(recipe, encoders):
    objective = make_objective(recipe("vq"), CPU)
    start = load_file(encoders / "vq.safetensors")
    assert all(torch.equal(tensor, start[name]) for name, tensor in objective.vq.state_dict().items())


def test_perceptual_loss(recipe, change, log_lines):
    r = change(recipe("vq"), "vq", perceptual=1.0)
    towers = {name: tensor.clone() for name, tensor in make_objective(r, CPU).perceptual_towers.state_dict().items()}
    objective, _, _ = run(r)
    assert all(torch.equal(tensor, towers[name]) for name, tensor in objective.perceptual_towers.state_dict().items())
    assert log_lines(r.out)[0]["reconstruction"] > 0
    with pytest.raises(ValueError, match="vq.perceptual needs a tower: name init.vision"):
        make_objective(change(r, "init", vision=""), CPU)


def test_psnr_is_the_textbooks(recipe, data_folder):
    r = recipe("vq")
    objective = make_objective(r, CPU)
    images = open_parquet_images(data_folder, "val", 32)
    model: VQModel = objective.vq.eval()
    psnr = []
    for i in range(len(images)):
        original = images.get([i])
        with torch.no_grad():
            painted = model.decode(model.encode(original / 127.5 - 1).quantised).clamp(-1, 1)
        mse = (((painted + 1) / 2 - original / 255) ** 2).mean().item()
        psnr.append(-10 * math.log10(mse))
        assert np.asarray(to_pil(painted)[0]).shape == (32, 32, 3)
    assert objective.validate()["psnr"] == pytest.approx(sum(psnr) / len(psnr), abs=1e-3)


def test_without_validation(recipe, change):
    r = change(recipe("vq", val_every=2, sample_every=4), "data", val_split="", in_memory=True)
    objective, _, _ = run(r)
    assert objective.validate() == {}
