"""Slots: views, copies, forks, snapshots in memory and on disk."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimamba.config import BackboneConfig, Task
from omnimamba.model import files
from omnimamba.model.state import MambaState

CONFIG = BackboneConfig(d_model=32, n_layer=2, d_state=16, headdim=16)


@pytest.fixture
def state():
    """Four slots, all different."""
    generator = torch.Generator().manual_seed(0)
    state = MambaState.zeros(CONFIG, 4)
    state.conv.normal_(generator=generator)
    state.ssm.normal_(generator=generator)
    state.position.copy_(torch.arange(4) * 10)
    return state


def same(a, b):
    return torch.equal(a.conv, b.conv) and torch.equal(a.ssm, b.ssm) and torch.equal(a.position, b.position)


def test_a_new_state_has_seen_nothing():
    state = MambaState.zeros(CONFIG, 3, conv_dtype=torch.bfloat16)
    assert state.conv.shape == (2, 3, CONFIG.conv_dim, CONFIG.d_conv) and state.conv.dtype == torch.bfloat16
    assert state.ssm.shape == (2, 3, CONFIG.nheads, CONFIG.headdim, CONFIG.d_state) and state.ssm.dtype == torch.float32
    assert not state.conv.any() and not state.ssm.any() and state.position.tolist() == [0, 0, 0]
    assert state.bytes_per_slot == 2 * (2 * CONFIG.conv_dim * CONFIG.d_conv + 4 * CONFIG.nheads * CONFIG.headdim * CONFIG.d_state) + 8


def test_a_released_slot_takes_104_megabytes():
    state = MambaState.zeros(BackboneConfig(), 1, device="meta")
    assert round(state.bytes_per_slot / 1e6) == 104


@pytest.mark.parametrize("slot_idx", [[0], [3], [1, 2], [0, 1, 2, 3], [2, 0], [3, 2], [1, 3], []])
def test_taking_slots_and_storing_them(state, slot_idx):
    taken, before = state.slots(slot_idx), state.clone()
    assert taken.num_slots == len(slot_idx)
    for i, slot in enumerate(slot_idx):
        assert same(taken.slots([i]), before.slots([slot]))
    taken.conv += 1
    taken.ssm *= 2
    taken.position += 5
    state.store(slot_idx, taken)
    for slot in range(4):
        if slot in slot_idx:
            assert torch.equal(state.ssm[:, slot], 2 * before.ssm[:, slot]) and state.position[slot] == before.position[slot] + 5
            assert torch.equal(state.conv[:, slot], before.conv[:, slot] + 1)
        else:
            assert same(state.slots([slot]), before.slots([slot]))


def test_store_converts_the_dtype(state):
    pool = MambaState.zeros(CONFIG, 2, ssm_dtype=torch.bfloat16)
    pool.store([1], state.slots([3]))
    assert torch.equal(pool.ssm[:, 1], state.ssm[:, 3].bfloat16()) and not pool.ssm[:, 0].any()


@pytest.mark.parametrize("slot_idx", [[4], [-1], [3, 4]])
def test_slots_that_are_not_there(state, slot_idx):
    with pytest.raises(AssertionError):
        state.slots(slot_idx)


def test_fork_and_reset(state):
    before = state.clone()
    state.copy_slot(1, [0, 3])
    assert all(same(state.slots([slot]), before.slots([1])) for slot in (0, 1, 3))
    state.reset([1, 3])
    assert same(state.slots([0]), before.slots([1])) and same(state.slots([2]), before.slots([2]))
    assert all(same(state.slots([slot]), MambaState.zeros(CONFIG, 1)) for slot in (1, 3))
    state.reset([])


def test_clone_shares_nothing(state):
    clone = state.clone()
    state.reset([0, 1, 2, 3])
    assert clone.ssm.all() and clone.conv.all() and clone.position.tolist() == [0, 10, 20, 30]


@torch.no_grad()
def test_a_restored_snapshot_continues_the_sequence(backbone, tmp_path):
    x = torch.randn(1, 12, CONFIG.d_model, generator=torch.Generator().manual_seed(0))
    state = MambaState.zeros(CONFIG, 1)
    backbone(x[:, :7], Task.MMU, state=state)
    snapshot = state.clone()
    state.save(tmp_path / "state.safetensors", fingerprint="f")
    expected = backbone(x[:, 7:], Task.MMU, state=state)
    for restored in (snapshot, MambaState.load(tmp_path / "state.safetensors", CONFIG, fingerprint="f")[0]):
        assert restored.position.item() == 7
        assert torch.equal(backbone(x[:, 7:], Task.MMU, state=restored), expected)
        assert same(restored, state)


def test_file_keeps_every_bit(state, tmp_path):
    path = tmp_path / "state.safetensors"
    odd = state.slots([1, 2])  # views: not contiguous
    odd.ssm[0, 0, 0, 0, 0] = float("inf")
    half = dataclasses.replace(odd, conv=odd.conv.bfloat16())
    half.save(path, fingerprint="f", metadata={"question": "What is it? 🍎"})
    loaded, metadata = MambaState.load(path, CONFIG, fingerprint="f")
    assert same(loaded, half) and loaded.conv.dtype == torch.bfloat16 and metadata == {"question": "What is it? 🍎"}
    half.save(path, fingerprint="f")
    assert MambaState.load(path, CONFIG, fingerprint="f")[1] == {}


def test_a_file_is_whole_or_stays_as_it_was(saved, state, monkeypatch):
    before = saved.read_bytes()

    def fill_disk(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", fill_disk)
    with pytest.raises(OSError, match="no space left"):
        state.save(saved, fingerprint="g")
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


@pytest.fixture
def saved(state, tmp_path):
    path = tmp_path / "state.safetensors"
    state.save(path, fingerprint="f")
    return path


def check_error(path, message, *, config=CONFIG, fingerprint="f"):
    with pytest.raises(ValueError, match=message) as error:
        MambaState.load(path, config, fingerprint=fingerprint)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_another_model(saved):
    check_error(saved, r"saved by another model \(fingerprint f, this model has g\)", fingerprint="g")


def test_another_size(saved):
    check_error(saved, "state of shape .* this model needs", config=dataclasses.replace(CONFIG, n_layer=3))
    check_error(saved, "state of shape .* this model needs", config=dataclasses.replace(CONFIG, d_conv=3))


def test_no_file(tmp_path):
    check_error(tmp_path / "absent", "no such state file")
    check_error(tmp_path, "no such state file")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 64])
def test_file_of_another_kind(tmp_path, content):
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    check_error(path, "not a state file")


def test_truncated_file(saved):
    content = saved.read_bytes()
    for size in (4, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        check_error(saved, "not a state file")


def test_safetensors_file_that_is_no_state(saved):
    tensors, header = {name: tensor.clone() for name, tensor in load_file(saved).items()}, {"fingerprint": "f", "metadata": "{}"}
    others = [({key: value for key, value in tensors.items() if key != name}, header) for name in tensors]
    others += [(tensors, None), (tensors, {"fingerprint": "f"}), ({**tensors, "position": torch.tensor(3)}, header)]
    others += [({**tensors, "position": tensors["position"].double()}, header), ({**tensors, "ssm": tensors["ssm"].long()}, header)]
    others += [(tensors, {"fingerprint": "f", "metadata": text}) for text in ("", "5", "[]", "{")]
    for content, metadata in others:
        save_file(content, saved, metadata=metadata)
        check_error(saved, "not a state file")
