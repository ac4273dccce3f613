"""8-bit storage: size, error, and folders that read like any other."""

import pytest
import torch
from safetensors.torch import load_file

from omnimamba.config import preset
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.model.files import TensorFile
from omnimamba.model.packing import SMALLEST_PACKED, pack, unpack


def test_error_is_half_a_step_of_each_row():
    tensor = torch.randn(40, 200) * torch.logspace(-6, 3, 40)[:, None]
    packed = pack({"w": tensor})
    assert packed["w"].dtype is torch.int8 and packed["w"].abs().amax(1).eq(127).all()
    error = (unpack(packed["w"], packed["w.scale"]) - tensor).abs()
    assert (error <= packed["w.scale"][:, None] * 0.5001).all()


def test_convolutions_zero_rows_and_small_tensors():
    conv, small, ids = torch.randn(64, 16, 3, 3), torch.randn(SMALLEST_PACKED - 1), torch.arange(SMALLEST_PACKED * 2).view(2, -1)
    conv[3] = 0
    packed = pack({"conv": conv, "small": small, "ids": ids})
    assert set(packed) == {"conv", "conv.scale", "small", "ids"}
    assert packed["small"] is small and packed["ids"] is ids
    unpacked = unpack(packed["conv"], packed["conv.scale"])
    assert unpacked.shape == conv.shape and not unpacked[3].any()


@pytest.fixture(scope="module")
def omni():
    return OmniMamba.from_config(preset("tiny"))


def test_a_packed_folder_reads_like_any_other(omni, tmp_path):
    omni.save_pretrained(tmp_path / "whole")
    omni.save_pretrained(tmp_path / "packed", dtype="int8")
    stored = load_file(tmp_path / "packed/model.safetensors")
    assert stored["text_embedding.weight"].dtype is torch.int8
    assert stored["backbone.layers.0.mixer.A_log"].dtype is torch.float32
    size = {name: sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("whole", "packed")}
    assert size["packed"] < 0.4 * size["whole"]
    again = OmniMamba.from_pretrained(tmp_path / "packed", device="cpu", dtype="float32")
    for ours, theirs in zip(again.bundle.model.parameters(), omni.bundle.model.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= theirs.abs().max() / 127
    again.save_pretrained(tmp_path / "again", dtype="int8")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load_file(tmp_path / "again/model.safetensors").items())


def test_a_file_without_packed_tensors_keeps_names_that_end_in_scale(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.ones(2), "a.scale": torch.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert set(TensorFile(tmp_path / "x.safetensors")) == {"a", "a.scale"}


def test_unknown_storage_type(omni, tmp_path):
    with pytest.raises(ValueError, match="int4.*did you mean 'int8'"):
        omni.save_pretrained(tmp_path / "x", dtype="int4")
