"""The benchmark of long sequences: its sums and ratios, the peers' steps, and all of it at tiny shapes."""

import long_decode
import pytest
import torch
from long_decode import AIM_TOKENS, DYNAMIC, FAR, SHOW_O, STATIC, WHOLE, Ratio, at_lengths, measured, ratios, seconds_for, total_seconds


def points(ms_by_length):
    return {length: {"ms": ms} for length, ms in ms_by_length.items()}


def test_total_of_a_linear_cost():
    """Token l costs 2 + 3 l ms; below the first measured length the cost stays what it is there."""
    linear = points({length: 2 + 3 * length for length in (1, 7, 50, 64)})
    assert total_seconds(linear, 60) == pytest.approx(sum(2 + 3 * length for length in range(1, 61)) / 1e3)
    assert total_seconds(points({10: 5, 20: 5}), 12) == pytest.approx(12 * 5 / 1e3)


def test_total_of_a_quadratic_cost_is_hardly_too_large():
    """As the docstring says of nine lengths up to the end."""
    quadratic = points({length: 15 + 5e-3 * length + 2e-7 * length**2 for length in (256, *range(2048, 16385, 2048))})
    exact = sum(15 + 5e-3 * max(length, 256) + 2e-7 * max(length, 256) ** 2 for length in range(1, 16385)) / 1e3
    assert 1 < total_seconds(quadratic, 16384) / exact < 1.005


def test_no_total_beyond_the_last_length():
    with pytest.raises(ValueError, match="65 tokens end beyond the last measured length, 64"):
        total_seconds(points({1: 1, 64: 1}), 65)
    with pytest.raises(ValueError, match="None"):
        total_seconds({64: {"error": "out of memory"}}, 1)


def test_seconds_for_each_kind_of_growth():
    costs = {**points({10: 10, 20: 30}), 40: {"error": "out of memory"}}
    assert seconds_for(costs, (10, 20, 40), "size") == {10: 0.1, 20: 0.6}
    assert seconds_for(costs, (10, 20, 40), "none") == {10: 0.1, 20: 0.2, 40: 0.4}
    by_position = seconds_for(costs, (10, 20, 40), "position")
    assert by_position == {10: pytest.approx(0.1), 20: pytest.approx(0.1 + sum(10 + 2 * i for i in range(1, 11)) / 1e3)}
    for growth in ("size", "none", "position"):
        assert seconds_for({10: {"error": "out of memory"}}, (10,), growth) == {}


def test_lengths_end_where_memory_does():
    def measure(length):
        if length > 2:
            raise torch.OutOfMemoryError("too much")
        return {"ms": length}

    assert at_lengths((1, 2, 3, 4), measure) == {1: {"ms": 1}, 2: {"ms": 2}, 3: {"error": "out of memory"}}


def test_a_length_that_fails_costs_none_before_it(capsys):
    points = at_lengths((2, 1, 0, 3), lambda length: {"ms": 1 / length})
    assert points == {2: {"ms": 0.5}, 1: {"ms": 1.0}, 0: {"error": "ZeroDivisionError('division by zero')"}}
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_system_that_fails_is_named(capsys):
    def failing(error):
        def system(settings):
            raise error

        return system

    assert measured(failing(ModuleNotFoundError("no", name="mamba_ssm")), None) == {"error": "not installed: mamba_ssm"}
    assert measured(failing(torch.OutOfMemoryError()), None) == {"error": "out of memory"}
    assert measured(failing(RuntimeError("odd")), None) == {"error": "RuntimeError('odd')"}
    assert "odd" in capsys.readouterr().err


def test_ratios():
    ours = {"request": {"s": 10.0, "GB": 3.0}, "by length": {4096: {"GB": 2.0}, FAR: {"GB": 2.02}, 131_072: {"GB": 2.01}, 1: {"GB": 9.0}}}
    cases = {
        "omnimamba, bf16": ours,
        "omnimamba, int8": {"error": "out of memory"},
        SHOW_O: {"seconds for": {AIM_TOKENS: 1000.0}},
        DYNAMIC: {"seconds for": {}, "by length": {FAR: {"GB": 20.0}}},
        STATIC: {"by length": {FAR: {"error": "out of memory"}}},
        WHOLE: {"GB": 4.5},
    }
    assert list(ratios(cases, AIM_TOKENS)) == [
        Ratio(f"{AIM_TOKENS} tokens: {SHOW_O} / omnimamba, bf16", 100.0, 95.0),
        Ratio(f"memory at {FAR} positions: omnimamba, bf16 less than {DYNAMIC}", pytest.approx(0.85), 0.8),
        Ratio("memory from 4096 to 131072 positions, largest over smallest: omnimamba, bf16", pytest.approx(1.01), 1.01),
        Ratio("whole model, GB", 4.5, 4.8),
    ]
    assert [ratio.aim for ratio in ratios({"omnimamba, bf16": ours, SHOW_O: {"seconds for": {5: 1.0}}}, 5)][0] is None


@pytest.fixture(scope="module")
def peers():
    pytest.importorskip("transformers")
    return pytest.importorskip("_peers")


def model_of(peers, shape):
    """With weights so large that the past decides the next token."""
    model = peers.causal_model(shape | peers.TINY, "cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def test_caches_of_both_kinds_give_the_same_tokens(peers):
    model = model_of(peers, peers.JANUSFLOW)
    others = [peers.dynamic_decoding(model, 15) for _ in range(4)]
    torch.manual_seed(0)
    growing = peers.dynamic_decoding(model, 15)
    torch.manual_seed(0)
    static, rewind = peers.static_decoding(model, 16)
    for decoding in (growing, *others):
        decoding.step()
    assert any(not torch.equal(other.token, growing.token) for other in others)  # another past, another token
    for _ in range(2):
        static.token.fill_(peers.TOKEN_ID)
        static.step()
        assert torch.equal(static.token, growing.token)
        rewind()


def test_a_pass_over_all_positions_is_the_published_one(peers):
    model = model_of(peers, peers.SHOW_O)
    tokens = [peers.full_pass(model, 12, is_published=is_published)() for is_published in (False, True)]
    assert torch.equal(*tokens)


@pytest.mark.slow
def test_tiny_shapes_end_to_end(run_benchmark):
    cases = [case for case in long_decode.SYSTEMS if case not in (long_decode.COMPILED, "omnimamba, fp8")]
    sizes = ["--lengths", "32", "64", "120", "--tokens", "120", "--repeats", "1"]
    report = run_benchmark("long_decode.py", "--preset", "tiny", "--device", "cpu", *sizes, "--cases", *cases)
    assert list(report["cases"]) == cases
    for case, figures in report["cases"].items():
        if case == "mamba_ssm":
            assert "error" in figures  # it runs on a GPU only
        elif case != WHOLE:
            assert {"32", "64", "120"} <= figures["seconds for"].keys() or case.startswith(SHOW_O), case
            assert 0 < figures["seconds for"]["120"] < 60, case
    assert report["cases"]["omnimamba, int8"]["request"]["tokens"] == 120
    assert report["cases"]["omnimamba, int8"]["MB per step"] < report["cases"]["omnimamba, bf16"]["MB per step"]
    assert any(ratio["name"].startswith("120 tokens: Show-o") and ratio["value"] > 0 for ratio in report["ratios"])
