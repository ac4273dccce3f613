import pytest


@pytest.mark.slow
def test_two_processes_paint(run_benchmark):
    report = run_benchmark("first_token.py", "--preset", "tiny", "--device", "cpu")
    assert list(report["cases"]) == ["empty cache", "filled cache"]
    for figures in report["cases"].values():
        assert 0 < figures["imported"] < figures["loaded"] < figures["first token"] < figures["image"]
