"""The engine under any order of submitting, stepping, cancelling and failing: every finished answer is the one given alone."""

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omnimamba.config import Task
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import FinishReason, Request, SamplingParams
from omnimamba.engine.scheduler import QueueFull
from omnimamba.processor import prompt

ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 5)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("fail"), st.sampled_from(["prefill", "decode", "embed_prompt"])),
)


@pytest.fixture(scope="module")
def requests(tokenizer):
    """Both tasks, guided, several samples, with and without prefix snapshots, all of few tokens."""
    null_ids = tuple(prompt.t2i_null_prompt(tokenizer))
    markers = (*prompt.mmu_before_image(tokenizer), *prompt.mmu_after_image(tokenizer))

    def text(question, **options):
        ids = (*markers, *prompt.chat_ids(tokenizer, [("user", question)]))
        return Request(Task.MMU, ids, sampling=SamplingParams(0.8, seed=1, max_new_tokens=6), prefix_key="none", **options)

    def image(caption, scale, **options):
        sampling = SamplingParams(seed=2, max_new_tokens=9, guidance_scale=scale)
        return Request(Task.T2I, tuple(prompt.t2i_prompt(tokenizer, caption)), null_ids=null_ids, sampling=sampling, **options)

    return [
        text("hello"),
        text("what is this?", num_samples=3),
        text("a"),
        image("a zoo", 1),
        image("a zoo", 2),
        image("b", 3, num_samples=2),
    ]


@pytest.fixture(scope="module")
def alone(model, tokenizer, requests):
    return [[sample.tokens for sample in Engine(model, suppressed_ids=tokenizer.suppressed_ids).run([r])[0]] for r in requests]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, min_size=5, max_size=25))
def test_any_order(model, tokenizer, requests, alone, actions, caplog):
    caplog.set_level(logging.CRITICAL, logger="omnimamba")
    engine = Engine(
        model, suppressed_ids=tokenizer.suppressed_ids, num_slots=6, max_waiting=4, max_prefill_tokens=40, prefix_cache_bytes=10**7
    )
    events, kinds = {}, {}

    def fail_next(name):
        method = getattr(engine.runner, name)

        def failing(*args, **options):
            setattr(engine.runner, name, method)
            raise RuntimeError("broken")

        setattr(engine.runner, name, failing)

    for action, value in actions:
        if action == "submit":
            try:
                request_id = engine.submit(requests[value], lambda event: events[event.request_id].append(event))
            except QueueFull:
                assert engine.scheduler.num_held_back == 4
                continue
            events[request_id], kinds[request_id] = [], value
        elif action == "step":
            for _ in range(value):
                engine.step()
        elif action == "cancel":
            engine.cancel(value)
        else:
            fail_next(value)
    for _ in range(300):
        engine.step()
    assert not engine.has_work and engine.scheduler.free == list(range(6))
    for request_id, of_request in events.items():
        for sample_idx, expected in enumerate(alone[kinds[request_id]]):
            found = [event for event in of_request if event.sample_idx == sample_idx]
            tokens = [event.token for event in found if event.token is not None]
            assert sum(event.finish_reason is not None for event in found) == 1 and found[-1].finish_reason is not None
            if found[-1].finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR):
                assert tokens == expected[: len(tokens)]
            else:
                assert tokens == expected
