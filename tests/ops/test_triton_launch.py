"""Which launches a card gets."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from omnimamba.ops.triton import launch

CARDS = {"NVIDIA H200": 227, "NVIDIA H100 80GB HBM3": 227, "NVIDIA A100-SXM4-80GB": 163, "NVIDIA GeForce RTX 4090": 99}


@pytest.fixture
def cards(monkeypatch):
    """A device for each."""
    devices = {name: torch.device("cuda", i) for i, name in enumerate(CARDS)}

    def properties(device):
        name = list(CARDS)[device.index]
        return SimpleNamespace(name=name, shared_memory_per_block_optin=CARDS[name] * 1024)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    launch.own_launches.cache_clear()
    yield devices
    launch.own_launches.cache_clear()


def test_the_table_is_everyones_but_for_what_a_card_has_of_its_own(cards):
    for kernel, choices in launch.LAUNCHES.items():
        for name, device in {"none": None, "cpu": torch.device("cpu"), **cards}.items():
            own = launch.CARD_LAUNCHES.get(name, {})
            if CARDS.get(name, 227) < 227:
                own = own | launch.SMALL_LAUNCHES
            expected = own.get(kernel, choices)[-1][1]
            assert launch.launch(kernel, 10**9, device) == expected, (kernel, name)


def test_own_launches_are_of_kernels_in_the_table():
    for own in (launch.SMALL_LAUNCHES, *launch.CARD_LAUNCHES.values()):
        assert own.keys() <= launch.LAUNCHES.keys()


def test_fp32_has_choices_of_its_own():
    for kernel in ("ssd_forward", "lora_down"):
        for dtype, name in ((torch.bfloat16, kernel), (torch.float16, kernel), (torch.float32, f"{kernel}_fp32")):
            assert launch.launch_for(torch.empty(1, dtype=dtype), kernel, 64) == launch.launch(name, 64)


def test_a_changed_table_is_seen(cards, monkeypatch):
    """As benchmarks change it that look for faster choices."""
    changed = launch.Launch(1, 1, num_warps=1, num_stages=1)
    device = cards["NVIDIA H100 80GB HBM3"]
    launch.launch("conv_forward", 64, device)
    monkeypatch.setitem(launch.LAUNCHES, "conv_forward", ((torch.inf, changed),))
    assert launch.launch("conv_forward", 64, device) == changed
