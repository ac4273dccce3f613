import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from omnimamba.train.frozen import load_frozen, load_weights


def test_frozen_parts(tmp_path):
    module, cpu = nn.Sequential(nn.Linear(2, 3), nn.Dropout()), torch.device("cpu")
    save_file(module.state_dict(), tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
    assert load_frozen(other, str(tmp_path / "a.safetensors"), cpu) is other
    assert torch.equal(other[0].weight, module[0].weight)
    assert not any(parameter.requires_grad for parameter in other.parameters()) and not other.training
    assert load_frozen(other, "", cpu) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none: no such file; the recipe that makes it comes first"),
        ("other", "other.safetensors: tensors do not fit the config: 1 wrongly shaped: weight .3, 2. instead of .4, 2.*"),
        ("damaged", "damaged.safetensors: damaged, or not a file of tensors"),
    ],
)
def test_files_that_do_not_fit(tmp_path, name, message):
    save_file({"weight": torch.zeros(3, 2), "bias": torch.zeros(4)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(ValueError, match=message) as error:
        load_weights(nn.Linear(2, 4), tmp_path / (name if name == "none" else f"{name}.safetensors"))
    assert "\n" not in str(error.value)
