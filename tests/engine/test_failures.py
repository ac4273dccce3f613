"""A pass that fails ends the requests that were in it; the engine goes on, and the others never notice."""

import dataclasses
import logging

import pytest
import torch

from omnimamba.config import Task
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import FinishReason, Request, SamplingParams, UnreadImage
from omnimamba.engine.scheduler import QueueFull
from omnimamba.processor import prompt

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, suppressed_ids=tokenizer.suppressed_ids, num_slots=4, max_waiting=3)


@pytest.fixture
def t2i(tokenizer):
    return lambda caption, **options: Request(Task.T2I, tuple(prompt.t2i_prompt(tokenizer, caption)), sampling=GREEDY, **options)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="omnimamba")


def fail_once(monkeypatch, owner, name):
    """The next call of a method raises; those after it work again."""
    method = getattr(owner, name)

    def failing(*args, **options):
        monkeypatch.setattr(owner, name, method)
        raise RuntimeError(f"{name} broke")

    monkeypatch.setattr(owner, name, failing)


def submit_all(engine, requests):
    events = {}
    for request in requests:
        request_id = engine.submit(request, lambda event: events[event.request_id].append(event))
        events[request_id] = []
    return events


def drain(engine):
    for _ in range(100):
        if not engine.has_work:
            assert engine.scheduler.free == list(range(engine.scheduler.num_slots))
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("name", ["prefill", "embed_prompt", "reset"])
def test_before_the_first_token(engine, t2i, monkeypatch, name):
    expected = engine.run([t2i("a zoo")])[0][0].tokens
    events = submit_all(engine, [t2i("a zoo")])
    fail_once(monkeypatch, engine.runner, name)
    events |= submit_all(engine, [t2i("a red apple")]) if name == "prefill" else {}
    engine.step()
    for of_request in events.values():
        assert [(event.token, event.finish_reason, str(event.error)) for event in of_request] == [
            (None, FinishReason.ERROR, f"{name} broke")
        ]
    drain(engine)
    assert engine.run([t2i("a zoo")])[0][0].tokens == expected


@pytest.mark.parametrize("where", ["pixels", "encode"])
def test_one_request_fails_to_start_and_the_others_run(where, engine, t2i, model, tokenizer, config):
    def broken(pixels=None):
        raise RuntimeError("tower broke")

    ids = (*prompt.mmu_before_image(tokenizer), *prompt.mmu_after_image(tokenizer), 5)
    image = UnreadImage(broken, torch.stack) if where == "pixels" else UnreadImage(lambda: torch.zeros(1), broken)
    expected = engine.run([t2i("a zoo")])[0][0].tokens
    events = submit_all(engine, [t2i("a zoo"), Request(Task.MMU, ids, image, sampling=GREEDY, num_samples=2), t2i("a zoo")])
    drain(engine)
    first, failed, last = events.values()
    assert [event.token for event in first] == [event.token for event in last] == expected
    assert [(event.sample_idx, event.finish_reason, str(event.error)) for event in failed] == [
        (i, FinishReason.ERROR, "tower broke") for i in range(2)
    ]


@pytest.mark.parametrize("name", ["decode", "snapshot"])
def test_while_decoding(engine, t2i, monkeypatch, name):
    """All that run are in the pass; those that wait start afterwards in clean slots."""
    expected = engine.run([t2i("a zoo")])[0][0].tokens
    running = submit_all(engine, [t2i("a zoo", num_samples=2, keep_state=True), t2i("a red apple", num_samples=2, keep_state=True)])
    waiting = submit_all(engine, [t2i("a zoo")])
    engine.step()
    fail_once(monkeypatch, engine.runner, name)
    drain(engine)
    for of_request in running.values():
        last = [event for event in of_request if event.finish_reason]
        assert sorted(event.sample_idx for event in last) == [0, 1] and {str(event.error) for event in last} == {f"{name} broke"}
    assert [event.token for (of_request,) in [waiting.values()] for event in of_request] == expected


def test_a_failed_pass_raises_from_run(engine, t2i, monkeypatch):
    fail_once(monkeypatch, engine.runner, "decode")
    with pytest.raises(RuntimeError, match="decode broke"):
        engine.run([t2i("a zoo"), t2i("a red apple")])
    drain(engine)


def test_a_lost_device_is_the_callers_problem(engine, t2i, monkeypatch):
    fail_once(monkeypatch, engine.runner, "decode")
    engine.submit(t2i("a zoo"))
    engine.step()

    def lost(*args, **options):
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lost)
        with pytest.raises(RuntimeError, match="device lost"):
            engine.step()


def test_a_full_queue(engine, t2i):
    """4 find a slot at the next step, 3 wait."""
    events = submit_all(engine, [t2i("a zoo")] * (4 + 3))
    with pytest.raises(QueueFull):
        engine.submit(t2i("a zoo"))
    with pytest.raises(QueueFull):
        engine.stream([t2i("a zoo")])
    drain(engine)
    assert all(len(of_request) == 8 for of_request in events.values())


def test_one_sample_of_several_is_cancelled(engine, t2i):
    request = dataclasses.replace(t2i("a zoo", num_samples=3), sampling=dataclasses.replace(GREEDY, temperature=1.0, seed=1))
    expected = [sample.tokens for sample in engine.run([request])[0]]
    events = submit_all(engine, [request])
    ((request_id, of_request),) = events.items()
    assert engine.cancel_sample(request_id, 1) == [], "it has no token yet"
    engine.step()
    engine.step()
    assert [event.finish_reason for event in engine.cancel_sample(request_id, 1)] == [FinishReason.CANCELLED]
    assert len(engine.scheduler.free) == 2 and engine.cancel_sample(request_id, 1) == []
    drain(engine)
    tokens = [[event.token for event in of_request if event.sample_idx == i and event.token is not None] for i in range(3)]
    assert tokens == [expected[0], expected[1][:2], expected[2]]
