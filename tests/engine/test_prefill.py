"""Passes in buckets against plain passes. The graphs themselves need a GPU: benchmarks/prefill.py compares them there."""

import dataclasses

import pytest
import torch

from omnimamba.config import Task
from omnimamba.engine.engine import Engine
from omnimamba.engine.prefill import LENGTHS, MAX_POSITIONS, ROWS, PrefillGraphs
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.engine.runner import Runner, missing_for_decoding
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.quantize import quantize_model
from omnimamba.ops import plain_path
from omnimamba.processor import prompt


def chunks_of(model, lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randn(length, model.config.backbone.d_model, generator=generator) for length in lengths]


def runners(model):
    """A plain one, and one with buckets; all slots hold a past."""
    pair = Runner(model, 5), Runner(model, 5)
    for runner in pair:
        generator = torch.Generator().manual_seed(0)
        for part in (runner.state.conv, runner.state.ssm):
            part.copy_(torch.randn(part.shape, generator=generator))
        runner.state.position.copy_(torch.tensor([3, 0, 7, 90, 2]))
    pair[1].prefill_graphs = PrefillGraphs(model, pair[1].state, use_graphs=False)
    return pair


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("lengths", [(1,), (5, 9, 2), (64,), (65, 3)])
def test_a_bucket_changes_nothing(model, lengths, task):
    plain, bucketed = runners(model)
    slots = [4, 0, 3][: len(lengths)]
    for _ in range(2):  # the second time, the bucket holds the rests of another pass
        torch.testing.assert_close(
            bucketed.prefill(slots, chunks_of(model, lengths), task), plain.prefill(slots, chunks_of(model, lengths), task)
        )
        lengths = lengths[::-1]
    for found, expected in ((bucketed.state.ssm, plain.state.ssm), (bucketed.state.conv, plain.state.conv)):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # products of other sizes are rounded otherwise
    assert torch.equal(bucketed.state.position, plain.state.position)
    assert len(bucketed.prefill_graphs._buckets) == 1


def test_what_no_bucket_holds(model):
    _, bucketed = runners(model)
    graphs = bucketed.prefill_graphs
    assert graphs.covers(1, MAX_POSITIONS) and not graphs.covers(1, MAX_POSITIONS + 1)
    assert graphs.covers(2, 2048) and not graphs.covers(2, 2049)
    assert graphs.covers(ROWS[-1], 512) and not graphs.covers(ROWS[-1] + 1, 1)
    assert sum(b * l <= MAX_POSITIONS for b in ROWS for l in LENGTHS) == 40
    bucketed.prefill([0, 1, 2, 3, 4], chunks_of(model, (5,) * 5), Task.T2I)
    assert [key[:2] for key in graphs._buckets] == [(8, 64)]


def test_an_engine_with_buckets_says_the_same(model, tokenizer):
    requests = [
        Request(Task.T2I, tuple(prompt.t2i_prompt(tokenizer, caption)), sampling=SamplingParams(seed=0, max_new_tokens=6))
        for caption in ("a zoo", "red apple")
    ]
    expected = Engine(model).run(requests)
    engine = Engine(model, max_prefill_tokens=11)
    engine.runner.prefill_graphs = PrefillGraphs(model, engine.runner.state, use_graphs=False)
    assert [samples[0].tokens for samples in engine.run(requests)] == [samples[0].tokens for samples in expected]


@pytest.mark.parametrize(
    ("scheme", "num_groups", "capability", "reason"),
    [
        (None, 1, (8, 0), None),
        ("int8", 1, (8, 0), None),
        ("fp8", 1, (9, 0), None),
        (None, 1, (7, 5), "compute capability 8.0, this GPU has 7.5"),
        ("fp8", 1, (8, 0), "compute capability 8.9, this GPU has 8.0"),
        ("int4", 1, (9, 0), "no kernel for int4 weights"),
        (None, 2, (9, 0), "no kernel for ngroups=2"),
    ],
)
def test_what_has_decode_kernels(config, monkeypatch, scheme, num_groups, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("omnimamba.engine.runner.missing_for_kernels", lambda: None)
    model = OmniMambaModel(dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, ngroups=num_groups)))
    if scheme is not None:
        quantize_model(model, scheme)
    found = missing_for_decoding(model)
    assert found == reason or (reason is not None and found is not None and reason in found)


def test_no_decode_kernels_without_triton(model, monkeypatch):
    monkeypatch.setattr(plain_path.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("OMNIMAMBA_KERNELS", "1")
    plain_path.missing_for_kernels.cache_clear()
    assert missing_for_decoding(model) == "Triton is not installed"
    plain_path.missing_for_kernels.cache_clear()
