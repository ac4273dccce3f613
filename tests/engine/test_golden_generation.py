"""The engine gives the tokens that the authors' code gives (cases 3 and 4 of golden/README.md), alone and in a batch."""

import pytest
import torch

from omnimamba.config import Task
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import FinishReason, Request, SamplingParams


def greedy(num_tokens):
    return SamplingParams(temperature=0, max_new_tokens=num_tokens)


@pytest.fixture(scope="module")
def t2i(recorded):
    """A request and the recorded tokens of every row."""
    case = recorded.case("t2i_generate")
    sampling = greedy(case["tokens"].shape[1])
    requests = [Request(Task.T2I, tuple(ids), sampling=sampling) for ids in case["text_ids"].tolist()]
    return requests, case["tokens"].tolist()


@pytest.fixture(scope="module")
def mmu(recorded):
    case = recorded.case("mmu_generate")
    features = torch.cat([case["vision_dino"], case["vision_siglip"]], dim=-1)
    sampling = greedy(case["tokens"].shape[1])
    rows = zip(case["question_ids"].tolist(), features, strict=True)
    requests = [Request(Task.MMU, tuple(ids), image, sampling=sampling) for ids, image in rows]
    return requests, case["tokens"].tolist()


def test_greedy_tokens(recorded, t2i, mmu):
    requests, expected = t2i[0] + mmu[0], t2i[1] + mmu[1]
    for max_prefill_tokens in (4096, 5):
        samples = Engine(recorded.model, max_prefill_tokens=max_prefill_tokens).run(requests)
        assert [of_request[0].tokens for of_request in samples] == expected
    for request, tokens in zip(requests, expected, strict=True):
        assert Engine(recorded.model).run([request])[0][0].tokens == tokens


def test_each_row_stops_at_its_own_stop_id(recorded, mmu):
    """The authors' batch goes on until all rows emit the stop id in one step (their defect 15); ours stops row by row."""
    requests, _ = mmu
    case = recorded.case("mmu_generate")
    stop = recorded.sizes["measured"]["mmu_generate"]["eos_test"]["eos_id"]
    prompt_length = case["question_ids"].shape[1]
    alone, batch = (case[f"eos_batch{b}_sequences"][:, prompt_length:].tolist() for b in (1, 2))

    def first(tokens):
        return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens

    samples = [of_request[0] for of_request in Engine(recorded.model, stop_ids=[stop]).run(requests)]
    assert samples[0].tokens == alone[0] and samples[0].finish_reason is FinishReason.STOP
    assert [sample.tokens for sample in samples] == [first(tokens) for tokens in batch]
