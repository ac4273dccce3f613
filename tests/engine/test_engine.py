"""The engine law: alone == batched == chunked == step by step == continued, token for token in float32."""

import dataclasses

import pytest
import torch

from omnimamba.config import Task
from omnimamba.engine import engine as engine_module
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import FinishReason, Request, SamplingParams, UnreadImage
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.state import MambaState
from omnimamba.processor import prompt

GREEDY = SamplingParams(temperature=0, max_new_tokens=24)


@pytest.fixture
def engine_of(model, tokenizer):
    def engine_of(**options):
        return Engine(model, **{"suppressed_ids": tokenizer.suppressed_ids, "num_slots": 16, **options})

    return engine_of


@pytest.fixture(scope="module")
def mmu(tokenizer, config):
    """An MMU request; each question has image features of its own."""

    def mmu(question, *, image=True, sampling=GREEDY, **options):
        ids = [*prompt.mmu_before_image(tokenizer), *prompt.mmu_after_image(tokenizer), *prompt.chat_ids(tokenizer, [("user", question)])]
        generator = torch.Generator().manual_seed(len(question))
        features = torch.randn(config.num_vision_tokens, config.vision_dim, generator=generator) if image else None
        return Request(Task.MMU, tuple(ids), features, sampling=sampling, **options)

    return mmu


@pytest.fixture(scope="module")
def t2i(tokenizer):
    null_ids = tuple(prompt.t2i_null_prompt(tokenizer))

    def t2i(caption, *, sampling=GREEDY, **options):
        return Request(Task.T2I, tuple(prompt.t2i_prompt(tokenizer, caption)), None, null_ids, sampling, **options)

    return t2i


def with_sampling(request, **changes):
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **changes))


@pytest.fixture(scope="module")
def mixed(mmu, t2i):
    """Both tasks, unequal lengths, with and without image, guided and not."""
    return [
        mmu("what is this?"),
        t2i("a red apple", sampling=dataclasses.replace(GREEDY, guidance_scale=3.0)),
        mmu("is there a table in the image, and what is on it?"),
        t2i("a zoo"),
        mmu("hello", image=False),
        t2i("an image of a table", sampling=dataclasses.replace(GREEDY, guidance_scale=0.5)),
    ]


@pytest.fixture(scope="module")
def sampled(mixed):
    """The same with seeds, temperature, filters and several samples."""
    changes = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 9, "top_p": 0.9},
        {"temperature": 0.0},
        {"temperature": 1.0},
    ]
    requests = [with_sampling(request, seed=7 + i, **change) for i, (request, change) in enumerate(zip(mixed, changes, strict=True))]
    return [dataclasses.replace(request, num_samples=num) for request, num in zip(requests, [1, 2, 3, 1, 2, 1], strict=True)]


def tokens_of(samples):
    return [[sample.tokens for sample in of_request] for of_request in samples]


def alone(engine_of, requests):
    return [tokens_of(engine_of().run([request]))[0] for request in requests]


def recomputed(model, tokenizer, request):
    """Greedy tokens without engine, state or cache: the whole sequence again for every token."""
    ids = torch.tensor([request.ids, request.null_ids] if request.sampling.is_guided else [request.ids])
    if request.task is Task.T2I:
        x = model.embed_caption(ids)
    else:
        x = model.embed_mmu(ids, model.no_image(1) if request.features is None else model.project_features(request.features[None]))
    tokens = []
    for _ in range(request.sampling.max_new_tokens):
        logits = model.logits(model(model.add_positions(x, request.task), request.task)[:, -1], request.task)
        scores = logits[0] if len(logits) == 1 else logits[1] + request.sampling.guidance_scale * (logits[0] - logits[1])
        if request.task is Task.MMU:
            scores[list(tokenizer.suppressed_ids)] = -torch.inf
        tokens.append(int(scores.argmax()))
        token = torch.tensor([[tokens[-1]]]).expand(len(ids), 1)
        x = torch.cat([x, model.embed_image_tokens(token) if request.task is Task.T2I else model.text_embedding(token)], dim=1)
    return tokens


@torch.no_grad()
def test_alone_is_whole_recomputation(engine_of, model, tokenizer, mixed):
    found = alone(engine_of, mixed)
    assert found == [[recomputed(model, tokenizer, request)] for request in mixed]
    print(*found, sep="\n")
    assert all(len(set(samples[0])) > 6 for samples in found), "greedy decoding is degenerate; the other tests would prove nothing"


@pytest.mark.parametrize(
    "options", [{}, {"max_prefill_tokens": 1}, {"max_prefill_tokens": 7}, {"max_prefill_tokens": 50}, {"num_slots": 2}]
)
def test_batched_and_chunked_equal_alone(engine_of, mixed, options):
    engine = engine_of(**options)
    assert tokens_of(engine.run(mixed)) == alone(engine_of, mixed)
    assert engine.scheduler.free == list(range(engine.scheduler.num_slots)) and not engine.has_work


def test_slots_are_clean_after_reuse(engine_of, mixed):
    engine = engine_of(num_slots=3)
    first = tokens_of(engine.run(mixed))
    assert tokens_of(engine.run(mixed[::-1])) == first[::-1]
    engine.runner.state.conv.fill_(float("nan"))
    engine.runner.state.ssm.fill_(float("nan"))
    assert tokens_of(engine.run(mixed)) == first


def test_one_slot_makes_progress(engine_of, mixed):
    unguided = [request for request in mixed if not request.sampling.is_guided]
    assert tokens_of(engine_of(num_slots=1).run(unguided)) == alone(engine_of, unguided)


def test_seeds_do_not_depend_on_the_batch(engine_of, sampled):
    expected = alone(engine_of, sampled)
    assert tokens_of(engine_of(num_slots=32).run(sampled)) == expected
    assert tokens_of(engine_of(num_slots=4).run(sampled[::-1])) == expected[::-1]
    assert tokens_of(engine_of(num_slots=5, max_prefill_tokens=11).run(sampled)) == expected
    assert len({tuple(tokens) for tokens in expected[2]}) == 3, "samples of one request share a stream"


def test_requests_join_between_steps(engine_of, sampled):
    engine, found = engine_of(num_slots=32), {}
    for request_idx, request in enumerate(sampled):
        on_event = lambda event, i=request_idx: found.setdefault((i, event.sample_idx), []).append(event.token)  # noqa: E731
        engine.submit(request, on_event)
        for _ in range(3):
            engine.step()
    while engine.has_work:
        engine.step()
    assert [[found[i, j] for j in range(request.num_samples)] for i, request in enumerate(sampled)] == alone(engine_of, sampled)


def test_other_seed_other_tokens(engine_of, t2i):
    requests = [t2i("a zoo", sampling=SamplingParams(seed=seed)) for seed in (0, 1, 0)]
    first, second, third = tokens_of(engine_of().run(requests))
    assert first == third != second


def test_samples_are_forks(engine_of, t2i, mmu):
    """n samples of one request are n requests, each with one of its streams."""
    for request in (
        t2i("a zoo", sampling=SamplingParams(seed=3, guidance_scale=2.0), num_samples=4),
        mmu("what is this?", sampling=SamplingParams(seed=3, max_new_tokens=12), num_samples=4),
    ):
        separate = [dataclasses.replace(request, num_samples=1, first_sample=i) for i in range(4)]
        forked = tokens_of(engine_of().run([request]))[0]
        assert forked == [samples[0] for samples in tokens_of(engine_of().run(separate))]
        assert len({tuple(tokens) for tokens in forked}) == 4


def test_prompt_of_several_samples_is_read_once(engine_of, mmu, monkeypatch):
    engine, rows = engine_of(), []
    prefill = engine.runner.prefill
    monkeypatch.setattr(engine.runner, "prefill", lambda slots, chunks, task: rows.append(len(slots)) or prefill(slots, chunks, task))
    engine.run([mmu("what is this?", num_samples=5)])
    assert rows == [1]


def test_images_of_requests_that_start_together_are_encoded_together(engine_of, mmu, monkeypatch):
    """An image that several are about only once, and none whose request still waits."""
    questions, passes = ["what is this?", "is it a zoo?", "is it a large zoo?"], []

    def encode(images):
        passes.append(len(images))
        return torch.stack(images)

    def unread(question):
        request = mmu(question)
        return dataclasses.replace(request, features=UnreadImage(lambda: request.features, encode), prefix_key=question)

    expected = alone(engine_of, [mmu(questions[i]) for i in (0, 0, 1, 2)])
    requests = [unread(questions[i]) for i in (0, 0, 1, 2)]
    assert tokens_of(engine_of(num_slots=3).run(requests)) == expected and passes == [2, 1]
    monkeypatch.setattr(engine_module, "IMAGES_PER_PASS", 2)
    assert tokens_of(engine_of().run(requests)) == expected and passes == [2, 1, 2, 1]


@pytest.mark.parametrize("bound", [1, 7, 20, 64])
def test_prefill_pass_is_bounded(engine_of, mixed, bound, monkeypatch):
    engine, sizes = engine_of(max_prefill_tokens=bound), []
    prefill = engine.runner.prefill

    def counted(slots, chunks, task):
        sizes.append(len(chunks) * max(len(chunk) for chunk in chunks))
        return prefill(slots, chunks, task)

    monkeypatch.setattr(engine.runner, "prefill", counted)
    engine.run(mixed)
    assert max(sizes) <= max(bound, 2)  # a guided pair reads at least one position each


def test_long_prompt_does_not_hold_up_decoding(engine_of, t2i, mmu):
    engine = engine_of(max_prefill_tokens=16)
    painting = engine.submit(t2i("a zoo"))
    engine.step()
    reading = engine.submit(mmu("is there a table in the image, and what is on it?"))
    events = engine.step()
    assert [event.request_id for event in events] == [painting]
    for _ in range(8):
        events = engine.step()
        assert painting in {event.request_id for event in events}
    assert reading in {event.request_id for event in events}


@pytest.mark.parametrize("task", Task)
def test_continued_from_a_saved_state(engine_of, model, mixed, tmp_path, task):
    request = next(request for request in mixed if request.task is task and not request.sampling.is_guided)
    expected = alone(engine_of, [request])[0][0]
    cut = dataclasses.replace(with_sampling(request, max_new_tokens=9), keep_state=True)
    begun = engine_of().run([cut])[0][0]
    assert begun.tokens == expected[:9]
    begun.state.save(tmp_path / "state.safetensors", fingerprint="x")
    state, _ = MambaState.load(tmp_path / "state.safetensors", model.config.backbone, fingerprint="x")
    rest = Request(task, (begun.tokens[-1],), sampling=dataclasses.replace(GREEDY, max_new_tokens=24 - 9), state=state)
    before = state.clone()
    for options in ({}, {"num_slots": 1}):
        assert tokens_of(engine_of(**options).run([rest])) == [[expected[9:]]]
        assert tokens_of(engine_of(num_slots=8).run([*mixed, rest]))[-1] == [expected[9:]]
    assert torch.equal(state.ssm, before.ssm) and torch.equal(state.position, before.position)


def test_next_turn_reads_only_its_own_ids(engine_of, tokenizer, mmu):
    """A second turn from the state of the first equals both turns read as one prompt."""
    first = engine_of().run([mmu("what is this?", keep_state=True)])[0][0]
    turn = (first.tokens[-1], tokenizer.eos_id, *prompt.next_turn_ids(tokenizer, "and this?"))
    asked = mmu("what is this?")
    whole = dataclasses.replace(asked, ids=(*asked.ids, *first.tokens[:-1], *turn))
    short = Request(Task.MMU, turn, sampling=GREEDY, state=first.state)
    assert tokens_of(engine_of().run([short])) == tokens_of(engine_of().run([whole]))
    assert tokens_of(engine_of(max_prefill_tokens=3).run([short])) == tokens_of(engine_of().run([whole]))


def test_cancelling_leaves_others_unchanged(engine_of, sampled):
    expected = alone(engine_of, sampled)
    engine, found = engine_of(num_slots=32), {}
    ids = [
        engine.submit(request, lambda event: found.setdefault((event.request_id, event.sample_idx), []).append(event))
        for request in sampled
    ]
    for _ in range(5):
        engine.step()
    free = len(engine.scheduler.free)
    events = engine.cancel(ids[1])
    assert [(event.sample_idx, event.finish_reason, event.token) for event in events] == [
        (i, FinishReason.CANCELLED, None) for i in range(2)
    ]
    assert len(engine.scheduler.free) == free + 4  # two guided samples
    assert engine.cancel(ids[1]) == []
    while engine.has_work:
        engine.step()
    for i, request in enumerate(sampled):
        for j in range(request.num_samples):
            tokens = [event.token for event in found[ids[i], j] if event.token is not None]
            assert tokens == (expected[i][j][: len(tokens)] if i == 1 else expected[i][j])
    assert engine.scheduler.free == list(range(32))


def test_cancelling_while_waiting_and_while_reading(engine_of, mmu, t2i):
    engine = engine_of(num_slots=1, max_prefill_tokens=4)
    reading, waiting = engine.submit(mmu("what is this?")), engine.submit(t2i("a zoo"))
    assert engine.step() == []
    assert [event.finish_reason for event in engine.cancel(waiting)] == [FinishReason.CANCELLED]
    assert [event.finish_reason for event in engine.cancel(reading)] == [FinishReason.CANCELLED]
    assert engine.scheduler.free == [0] and not engine.has_work and engine.step() == []
    assert tokens_of(engine.run([t2i("a zoo")])) == alone(engine_of, [t2i("a zoo")])


def test_cancelling_from_a_callback(engine_of, mixed):
    engine, seen = engine_of(), []

    def on_event(event):
        seen.append(event)
        if len(seen) == 3:
            engine.cancel(event.request_id)

    engine.submit(mixed[0], on_event)
    others = engine.run(mixed[1:])
    assert [event.finish_reason for event in seen] == [None, None, None, FinishReason.CANCELLED]
    assert tokens_of(others) == alone(engine_of, mixed[1:])


def test_closing_a_stream_cancels_it(engine_of, mixed):
    engine = engine_of()
    stream = engine.stream(mixed)
    next(stream)
    assert engine.has_work
    stream.close()
    assert not engine.has_work and len(engine.scheduler.free) == 16


def test_closing_a_stream_that_nobody_read(engine_of, mixed):
    engine = engine_of()
    stream = engine.stream(mixed)
    assert engine.has_work
    stream.close()
    assert not engine.has_work


def test_streams_interleave(engine_of, mixed):
    engine = engine_of()
    streams = [engine.stream([request]) for request in mixed]
    found = [[] for _ in mixed]
    for _ in range(24):
        for tokens, stream in zip(found, streams, strict=True):
            tokens.append(next(stream)[1].token)
    assert [[tokens] for tokens in found] == alone(engine_of, mixed)


def test_text_stops_at_a_stop_id(engine_of, mmu):
    tokens = alone(engine_of, [mmu("what is this?")])[0][0]
    stop = next(token for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    samples = engine_of(stop_ids=[stop]).run([mmu("what is this?"), mmu("hello", image=False)])
    assert samples[0][0].tokens == tokens[: tokens.index(stop) + 1]
    assert samples[0][0].finish_reason is FinishReason.STOP
    assert samples[1][0].finish_reason is FinishReason.LENGTH or samples[1][0].tokens[-1] == stop


def test_stop_ids_do_not_stop_images(engine_of, t2i):
    tokens = alone(engine_of, [t2i("a zoo")])[0][0]
    assert tokens_of(engine_of(stop_ids=tokens, suppressed_ids=tokens).run([t2i("a zoo")])) == [[tokens]]


def test_suppressed_ids_never_come(engine_of, mmu):
    tokens = alone(engine_of, [mmu("what is this?")])[0][0]
    allowed = engine_of(suppressed_ids=sorted(set(tokens))).run([mmu("what is this?")])[0][0].tokens
    assert not set(allowed) & set(tokens)


def test_images_have_all_their_tokens(engine_of, t2i, config):
    sample = engine_of().run([t2i("a zoo", sampling=SamplingParams(seed=0))])[0][0]
    assert len(sample.tokens) == config.num_image_tokens and sample.finish_reason is FinishReason.LENGTH


def test_text_without_a_limit_fills_the_table(engine_of, mmu, config):
    request = mmu("what is this?", sampling=SamplingParams(temperature=0))
    sample = engine_of().run([request])[0][0]
    assert len(sample.tokens) == config.mmu_positions - config.num_vision_tokens - len(request.ids) + 1


def test_past_the_last_position(engine_of, model, mmu, t2i, config):
    request = mmu("what is this?")
    room = config.mmu_positions - config.num_vision_tokens - len(request.ids) + 1
    assert len(engine_of().run([with_sampling(request, max_new_tokens=room)])[0][0].tokens) == room
    with pytest.raises(ValueError, match=rf"max_new_tokens={room + 1} exceeds the {room} positions left .* pass at most {room}"):
        engine_of().submit(with_sampling(request, max_new_tokens=room + 1))
    with pytest.raises(ValueError, match="exceeds the"):
        engine_of().submit(with_sampling(t2i("a zoo"), max_new_tokens=config.num_image_tokens + 3))
    long = with_sampling(request, max_new_tokens=room + 30, past_last_position="clamp")
    tokens = engine_of().run([long])[0][0].tokens
    assert tokens[:room] == engine_of().run([with_sampling(request, max_new_tokens=room)])[0][0].tokens and len(tokens) == room + 30


def test_clamping_repeats_the_last_row(engine_of, model, config, tokenizer, mmu):
    """90 tokens in a short table are those of a table that goes on with its last row."""
    request = with_sampling(mmu("what is this?"), max_new_tokens=90, past_last_position="clamp")
    longer = OmniMambaModel(dataclasses.replace(config, mmu_positions=config.mmu_positions + 90)).eval()
    weights = model.state_dict()
    table = weights["positions.mmu"]
    longer.load_state_dict({**weights, "positions.mmu": torch.cat([table, table[-1:].expand(90, -1)])})
    with torch.no_grad():
        assert recomputed(longer, tokenizer, request) == engine_of().run([request])[0][0].tokens


def test_requests_that_can_never_run(engine_of, model, config, mmu, t2i):
    engine = engine_of(num_slots=4)
    guided = t2i("a zoo", sampling=SamplingParams(guidance_scale=2.0), num_samples=3)
    state = MambaState.zeros(config.backbone, 2)
    for request, message in (
        (guided, "needs 6 slots .* has 4"),
        (dataclasses.replace(guided, num_samples=1, null_ids=None), "needs null_ids as long as ids"),
        (with_sampling(mmu("hello"), guidance_scale=2.0), "needs a T2I prompt"),
        (dataclasses.replace(mmu("hello"), ids=()), "prompt is empty"),
        (dataclasses.replace(mmu("hello"), ids=(1, 2)), "lacks its markers"),
        (dataclasses.replace(mmu("hello"), ids=(1, 2, 3, config.text_vocab_size)), "outside the vocabulary"),
        (dataclasses.replace(mmu("hello"), features=torch.zeros(3, 4)), "do not fit this model"),
        (dataclasses.replace(t2i("a zoo"), features=torch.zeros(3, 4)), "belong to an MMU prompt"),
        (dataclasses.replace(t2i("a zoo"), ids=(config.image_vocab_size,), state=state.slots([0])), "outside the vocabulary"),
        (dataclasses.replace(mmu("hello", image=False), state=state), "one sequence of this model"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            engine.submit(request)
        assert "\n" not in str(error.value)
    assert not engine.has_work
    with pytest.raises(ValueError, match="needs 6 slots"):
        engine.run([t2i("a zoo"), guided])
    assert not engine.has_work and engine.step() == []


def test_engine_refuses_a_model_in_training(model):
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            Engine(model)
    finally:
        model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_states(model, mixed, dtype):
    """A bf16 pool runs; its logits stay near, so the first tokens are those of fp32."""
    engine = Engine(model, num_slots=8, ssm_dtype=dtype)
    assert engine.runner.state.ssm.dtype is dtype
    found = engine.run(mixed)
    assert all(len(samples[0].tokens) == 24 for samples in found)
    assert [samples[0].tokens[0] for samples in found] == [samples[0].tokens[0] for samples in Engine(model).run(mixed)]


def test_running_states_have_no_gaps_between_them(engine_of, mixed, monkeypatch):
    """Short answers end between long ones; what is left is decoded in place, and says the same."""
    requests = [with_sampling(request, max_new_tokens=5 + 9 * (i % 3)) for i, request in enumerate(mixed * 2)]
    expected, engine, seen = alone(engine_of, requests), engine_of(num_slots=16), []
    decode = engine.runner.decode
    monkeypatch.setattr(engine.runner, "decode", lambda slots, *args: seen.append(slots) or decode(slots, *args))
    assert tokens_of(engine.run(requests)) == expected
    assert all(slots == list(range(len(slots))) for slots in seen[-14:]) and len(seen[-1]) < len(seen[0])
