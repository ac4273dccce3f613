"""What the benchmarks count and time is what runs."""

import dataclasses

import pytest
import torch
from _model import image_request, random_model, step_bytes, text_request, timed_request

from omnimamba.config import Task, preset
from omnimamba.engine.engine import Engine
from omnimamba.model.state import MambaState

TINY = preset("tiny")


def test_bytes_of_a_step():
    model = random_model(TINY, torch.bfloat16, "cpu")
    state = MambaState.zeros(TINY.backbone, 3, conv_dtype=torch.bfloat16)
    one = step_bytes(model, state, Task.T2I)
    heads = {Task.T2I: model.image_embedding.weight.nbytes, Task.MMU: model.text_embedding.weight.nbytes}
    lora = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    backbone = sum(parameter.nbytes for parameter in model.backbone.parameters())
    for task in Task:
        assert step_bytes(model, state, task) == backbone - lora // 2 + heads[task] + 2 * state.bytes_per_slot
    assert step_bytes(model, state, Task.T2I, 4) - one == 6 * state.bytes_per_slot
    assert step_bytes(random_model(TINY, torch.bfloat16, "cpu", "int8"), state, Task.T2I) < one


@pytest.mark.parametrize("request_of", [image_request, text_request])
def test_a_timed_request(request_of):
    request = request_of(TINY, 3)
    engine = Engine(random_model(TINY, torch.float32, "cpu"), num_slots=3)
    total, first, num_tokens = timed_request(engine, request, "cpu")
    assert 0 < first < total
    assert num_tokens == (3 * TINY.num_image_tokens if request.task is Task.T2I else 3)


def test_a_request_that_fails_is_not_timed(monkeypatch):
    engine = Engine(random_model(TINY, torch.float32, "cpu"), num_slots=1)

    def prefill(*arguments):
        raise RuntimeError("no prefill")

    monkeypatch.setattr(engine.runner, "prefill", prefill)
    with pytest.raises(RuntimeError, match="no prefill"):
        timed_request(engine, text_request(TINY, 2), "cpu")


def test_a_request_past_the_last_position_is_made_of_the_shared_one():
    """As long_decode.py makes it: the number of tokens that was asked for, whatever the table holds."""
    engine = Engine(random_model(TINY, torch.float32, "cpu"), num_slots=1)
    num_tokens = TINY.t2i_positions + 5
    sampling = dataclasses.replace(image_request(TINY, 1).sampling, max_new_tokens=num_tokens, past_last_position="clamp")
    request = dataclasses.replace(image_request(TINY, 1), sampling=sampling)
    assert timed_request(engine, request, "cpu")[2] == num_tokens
