"""The engine with fused kernels against the plain engine: the same tokens. In Triton's interpreter, see tests/ops/conftest.py."""

import dataclasses
import os
import random

import pytest
import torch

pytest.importorskip("triton")

from omnimamba.config import BackboneConfig, Task
from omnimamba.engine.decoder import DecodeOptions, FusedDecoder
from omnimamba.engine.engine import Engine
from omnimamba.engine.prefill import PrefillGraphs
from omnimamba.engine.request import Event, FinishReason, Request, SamplingParams
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.processor import prompt

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/ops/test_triton_interpreter.py runs these")
T2I, MMU = Task.T2I, Task.MMU


@pytest.fixture(scope="module")
def small_model(config, liven) -> OmniMambaModel:
    """One block: the interpreter is slow."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OmniMambaModel(dataclasses.replace(config, backbone=BackboneConfig(d_model=32, n_layer=1, d_state=16, headdim=32)))
        liven(model)
    return model.eval()


@pytest.fixture
def engines(small_model, tokenizer):
    """The plain engine, and the same with fused kernels."""

    def engines(num_slots: int, **options) -> tuple[Engine, Engine]:
        options = {"suppressed_ids": tokenizer.suppressed_ids, "num_slots": num_slots, **options}
        plain, fused = Engine(small_model, **options), Engine(small_model, **options)
        runner = fused.runner
        runner.decoder = FusedDecoder(
            small_model,
            runner.state,
            runner.image_table,
            stop_ids=tuple(fused.stop_ids),
            suppressed_ids=tokenizer.suppressed_ids,
            options=DecodeOptions(max_steps=4),
        )
        runner.prefill_graphs = PrefillGraphs(small_model, runner.state, use_graphs=False)
        return plain, fused

    return engines


@pytest.fixture(scope="module")
def requests(tokenizer) -> list[Request]:
    """Guided and filtered images, two samples of one prompt, short and long texts: more than four slots hold."""
    question = [*prompt.mmu_before_image(tokenizer), *prompt.mmu_after_image(tokenizer), *prompt.chat_ids(tokenizer, [("user", "hello")])]

    def params(num: int, **options) -> SamplingParams:
        return SamplingParams(seed=num, max_new_tokens=num, **options)

    def image(caption: str, sampling: SamplingParams, **options) -> Request:
        null_ids = tuple(prompt.t2i_null_prompt(tokenizer)) if sampling.is_guided else None
        ids = tuple(prompt.t2i_prompt(tokenizer, caption))
        return Request(T2I, ids, null_ids=null_ids, sampling=sampling, **options)

    return [
        image("a zoo", params(6, guidance_scale=3.0)),
        Request(MMU, tuple(question), sampling=params(7), keep_state=True),
        image("red apple", params(3, top_k=5, top_p=0.9), num_samples=2),
        Request(MMU, tuple(question), sampling=params(5, temperature=0)),
    ]


def test_the_same_tokens_and_states(engines, requests):
    plain, fused = engines(num_slots=4)
    expected, found = plain.run(requests), fused.run(requests)
    assert [[s.tokens for s in samples] for samples in found] == [[s.tokens for s in samples] for samples in expected]
    assert [[s.finish_reason for s in samples] for samples in found] == [[s.finish_reason for s in samples] for samples in expected]
    state, expected_state = found[1][0].state, expected[1][0].state
    assert state is not None and expected_state is not None
    assert torch.equal(state.position, expected_state.position)
    torch.testing.assert_close(state.ssm, expected_state.ssm)
    torch.testing.assert_close(state.conv, expected_state.conv)
    assert not fused.has_work and len(fused.scheduler.free) == 4


def test_a_stop_id_ends_a_text_within_a_block(engines, requests):
    plain, _ = engines(num_slots=1)
    tokens = plain.run(requests[1:2])[0][0].tokens
    stop = next(token for i, token in enumerate(tokens) if i >= 2 and token not in tokens[:i])
    _, fused = engines(num_slots=1, stop_ids=[stop])
    sample = fused.run(requests[1:2])[0][0]
    assert sample.tokens == tokens[: tokens.index(stop) + 1] and sample.finish_reason is FinishReason.STOP
    assert sample.state is not None and sample.state.position.item() == len(requests[1].ids) + 16 + len(sample.tokens) - 1


def longer(request: Request, num_tokens: int) -> Request:
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, max_new_tokens=num_tokens))


def test_blocks_are_single_steps_while_prompts_come_in(engines, requests):
    """A block of four where nobody waits, and the next one is under way; one step while a prompt is read; what is drawn comes in the order
    of steps."""
    _, fused = engines(num_slots=4, max_prefill_tokens=16)
    events: list[Event] = []
    image = longer(requests[0], 12)
    first = fused.submit(image, events.append)
    while not events:
        fused.step()
    assert len(fused.step()) == 4
    fused.submit(requests[3])
    num = [len([e for e in fused.step() if e.request_id == first]) for _ in range(2)]
    assert num == [4, 1], "the block that was under way, then a step"
    while fused.has_work:
        fused.step()
    assert [event.token for event in events] == fused.run([image])[0][0].tokens


def test_what_happens_while_a_block_is_under_way(engines, requests):
    """A request is cancelled and another one gets its slots; the others' tokens stay what they are."""
    plain, fused = engines(num_slots=4)
    long = longer(requests[1], 14)
    alone = [plain.run([request])[0][0].tokens for request in (long, requests[3])]
    events: dict[str, list[Event]] = {"cancelled": [], "long": [], "late": []}
    cancelled = fused.submit(longer(requests[0], 12), events["cancelled"].append)
    fused.submit(long, events["long"].append)
    while len(events["long"]) < 2:
        fused.step()
    assert fused._under_way is not None
    fused.cancel(cancelled)
    fused.submit(requests[3], events["late"].append)
    while fused.has_work:
        fused.step()
    assert events["cancelled"][-1].finish_reason is FinishReason.CANCELLED
    assert [[event.token for event in events[name]] for name in ("long", "late")] == alone
    assert fused.step() == [] and fused._under_way is None and len(fused.scheduler.free) == 4


@pytest.mark.parametrize("seed", range(3))
def test_any_order(engines, requests, seed):
    """Requests come, wait and are cancelled, wholly or a sample, while blocks are under way: what is drawn is what is drawn alone."""
    plain, fused = engines(num_slots=4, max_prefill_tokens=16 if seed % 2 else 512)
    pool = [longer(request, num) for request in requests for num in (3, 9, 14)]
    chance, chosen, events = random.Random(seed), {}, {}
    for _ in range(60):
        action = chance.choice(("submit", "submit", "step", "step", "step", "cancel", "cancel a sample"))
        if action == "submit" and len(chosen) < 12:
            request, own = chance.choice(pool), []
            request_id = fused.submit(request, own.append)
            chosen[request_id], events[request_id] = request, own
        elif action == "step":
            fused.step()
        elif action.startswith("cancel") and chosen:
            request_id = chance.choice(list(chosen))
            fused.cancel(request_id) if action == "cancel" else fused.cancel_sample(request_id, 0)
    while fused.has_work:
        fused.step()
    assert fused.step() == [] and fused._under_way is None and len(fused.scheduler.free) == 4
    for request_id, request in chosen.items():
        for i, alone in enumerate(plain.run([request])[0]):
            own = [event for event in events[request_id] if event.sample_idx == i]
            tokens = [event.token for event in own if event.token is not None]
            is_whole = own[-1].finish_reason is not FinishReason.CANCELLED
            assert tokens == (alone.tokens if is_whole else alone.tokens[: len(tokens)]), (request_id, i)


@pytest.mark.parametrize("name", ["start", "go_on", "tokens"])
def test_a_block_that_fails(engines, requests, monkeypatch, caplog, name):
    """Ends what was in it, whether or not the next one is under way already, and nothing else."""
    caplog.set_level("CRITICAL", logger="omnimamba")
    plain, fused = engines(num_slots=4)
    decoder, events = fused.runner.decoder, []
    fused.submit(longer(requests[0], 12), events.append)
    while not events:
        fused.step()
    method = getattr(decoder, name)

    def failing(*args, **options):
        monkeypatch.setattr(decoder, name, method)
        raise RuntimeError(f"{name} broke")

    monkeypatch.setattr(decoder, name, failing)
    fused.step()
    assert events[-1].finish_reason is FinishReason.ERROR and str(events[-1].error) == f"{name} broke" and not fused.has_work
    assert fused.run(requests[1:2])[0][0].tokens == plain.run(requests[1:2])[0][0].tokens
    assert len(fused.scheduler.free) == 4


def test_steps_are_recorded_for_all_slots(engines, monkeypatch):
    plain, fused = engines(num_slots=3)
    recorded = []
    monkeypatch.setattr(fused.runner.decoder, "capture_all", recorded.append)
    for engine in (plain, fused):
        engine.capture_steps()
    assert recorded == [3]
