"""The cache alone, and prefixes that requests share: same answers, less to read."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimamba.config import Task
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import Request, SamplingParams, UnreadImage
from omnimamba.engine.state_cache import StateCache
from omnimamba.model.state import MambaState
from omnimamba.processor import prompt

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


def state_of(size: int) -> MambaState:
    return MambaState(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, size), torch.zeros(1, dtype=torch.int64))


BYTES = state_of(8).bytes_per_slot


def test_longest_prefix_that_leaves_something_to_read():
    cache, states = StateCache(100 * BYTES), [state_of(8) for _ in range(4)]
    for ids, state in zip([(1,), (1, 2), (1, 2, 3), (1, 9)], states, strict=True):
        cache.add("a", ids, state)
    assert cache.find("a", (1, 2, 3)) == (2, states[1])
    assert cache.find("a", (1, 2, 3, 4)) == (3, states[2])
    assert cache.find("a", (1, 7)) == (1, states[0])
    assert cache.find("a", (1,)) is None and cache.find("a", (2, 3)) is None
    assert cache.find("b", (1, 2)) is None, "another image"
    assert (cache.num_hits, cache.num_misses) == (3, 3)


def test_least_recently_used_goes_first():
    cache = StateCache(2 * BYTES)
    for name in "abc":
        cache.add(name, (1,), state_of(8))
        cache.find("a", (1, 2))
    assert cache.has("a", (1,)) and cache.has("c", (1,)) and not cache.has("b", (1,))


def test_budgets():
    cache = StateCache(BYTES)
    cache.add("a", (1,), state_of(8))
    cache.add("a", (1,), state_of(8))
    assert cache.num_bytes == BYTES
    cache.add("b", (1,), state_of(1000))
    assert cache.has("a", (1,)) and not cache.has("b", (1,)), "what never fits may not drive out others"
    StateCache(0).add("a", (1,), state_of(1))
    with pytest.raises(ValueError, match="max_bytes=-1"):
        StateCache(-1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=4), st.integers(0, 40))), st.integers(0, 400)
)
def test_bytes_are_counted(entries, max_bytes):
    cache = StateCache(max_bytes)
    for key, ids, size in entries:
        cache.add(key, tuple(ids), state_of(size))
        cache.find(key, (*ids, 2))
        assert cache.num_bytes == sum(state.bytes_per_slot for state in cache._states.values()) <= max_bytes


# ---- in the engine


@pytest.fixture(scope="module")
def images(config):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(config.num_vision_tokens, config.vision_dim, generator=generator) for name in "ab"}


@pytest.fixture(scope="module")
def request_of(tokenizer, images):
    """The request for an answer to (user, assistant, user, ...) messages about an image; `asked` counts the images computed."""

    def request_of(*messages, image="a", asked=None, sampling=GREEDY, **options):
        turns = list(zip(["user", "assistant"] * len(messages), messages, strict=False))
        ids = (*prompt.mmu_before_image(tokenizer), *prompt.mmu_after_image(tokenizer), *prompt.chat_ids(tokenizer, turns))

        def pixels():
            if asked is not None:
                asked.append(image)
            return images[image]

        return Request(Task.MMU, ids, UnreadImage(pixels, torch.stack), sampling=sampling, prefix_key=image, **options)

    return request_of


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, suppressed_ids=tokenizer.suppressed_ids, num_slots=8, prefix_cache_bytes=10**9)


@pytest.fixture
def answer(model, tokenizer):
    """Tokens of a request in an engine of its own that keeps no snapshot."""

    def answer(request):
        engine = Engine(model, suppressed_ids=tokenizer.suppressed_ids)
        return [sample.tokens for sample in engine.run([dataclasses.replace(request, prefix_key=None)])[0]]

    return answer


def run(engine, request):
    """(tokens, cached positions) of each sample."""
    found = [([], []) for _ in range(request.num_samples)]
    for _, event in engine.stream([request]):
        found[event.sample_idx][0].append(event.token)
        found[event.sample_idx][1].append(event.num_cached)
    assert all(len(set(cached)) == 1 for _, cached in found)
    return [tokens for tokens, _ in found], found[0][1][0]


def test_an_image_is_computed_once(engine, request_of, answer, config):
    asked = []
    for question, cached in (
        ("what is this?", 0),
        ("is it red?", 4 + config.num_vision_tokens),
        ("what is this?", 4 + config.num_vision_tokens),
    ):
        request = request_of(question, asked=asked)
        assert run(engine, request) == (answer(request_of(question)), cached)
    assert asked == ["a"]
    request = request_of("what is this?", image="b", asked=asked)
    assert run(engine, request) == (answer(request_of("what is this?", image="b")), 0)
    assert asked == ["a", "b"]


def test_the_next_turn_reads_only_what_is_new(engine, request_of, answer, config):
    first = request_of("what is this?")
    ((tokens,), _) = run(engine, first)
    ids = (*first.ids, *tokens, 0, *first.ids[4:])
    request = dataclasses.replace(first, ids=ids, sampling=GREEDY)
    assert run(engine, request) == (answer(request), len(first.ids) + len(tokens) - 1 + config.num_vision_tokens)


@pytest.mark.parametrize("max_prefill_tokens", [1, 7, 4096])
def test_batched_with_snapshots_equals_alone(model, tokenizer, request_of, answer, max_prefill_tokens):
    options = {"suppressed_ids": tokenizer.suppressed_ids, "num_slots": 6, "prefix_cache_bytes": 10**9}
    engine = Engine(model, max_prefill_tokens=max_prefill_tokens, **options)
    requests = [request_of(question, image=image) for question in ("what is this?", "is it red?", "and this: an apple?") for image in "ab"]
    requests += [request_of("hello", num_samples=3, sampling=dataclasses.replace(GREEDY, temperature=1.0, seed=i)) for i in range(3)]
    for _ in range(2):
        assert [[sample.tokens for sample in samples] for samples in engine.run(requests)] == [answer(request) for request in requests]
    assert engine.prefix_cache.num_hits >= len(requests)


def test_text_without_an_image_continues_too(engine, tokenizer, answer):
    ids = (*prompt.mmu_before_image(tokenizer), *prompt.mmu_after_image(tokenizer), *tokenizer.encode("In: hello"))
    first = Request(Task.MMU, ids, sampling=GREEDY, prefix_key="text")
    ((tokens,), cached) = run(engine, first)
    assert cached == 0 and tokens == answer(first)[0]
    again = dataclasses.replace(first, ids=(*ids, *tokens, *ids[4:]))
    assert run(engine, again)[0] == answer(again) and engine.prefix_cache.num_hits == 1


def test_a_small_budget_forgets_but_answers(model, tokenizer, request_of, answer):
    engine = Engine(model, suppressed_ids=tokenizer.suppressed_ids, prefix_cache_bytes=2 * Engine(model).runner.state.bytes_per_slot)
    for question in ("what is this?", "is it red?") * 2:
        for image in "ab":
            assert run(engine, request_of(question, image=image))[0] == answer(request_of(question, image=image))
            assert engine.prefix_cache.num_bytes <= engine.prefix_cache.max_bytes


def test_keys_belong_to_image_prompts(engine, tokenizer):
    ids = tuple(prompt.t2i_prompt(tokenizer, "a zoo"))
    with pytest.raises(ValueError, match="prefix_key belong to an MMU prompt"):
        engine.submit(Request(Task.T2I, ids, prefix_key="a"))
