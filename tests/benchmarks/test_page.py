"""docs/performance.md shows the figures of benchmarks/results, and what has none says so."""

import json

import pytest

pytest.importorskip("matplotlib")
import page

LONG = {
    "device": "a GPU",
    "torch": "2.0",
    "triton": None,
    "command": "long_decode.py",
    "tokens": 16384,
    "read GB/s": 4000.0,
    "cases": {
        "omnimamba, bf16": {
            "growth": "position",
            "by length": {"1024": {"ms": 0.861, "GB": 3.04}, "100000": {"error": "out of memory"}},
            "seconds for": {"16384": 14.04},
        },
        "whole model": {"GB": 4.5},
        "mamba_ssm": {"error": "not installed: mamba_ssm"},
    },
    "ratios": [{"name": "whole model, GB", "value": 4.5, "aim": 4.8}, {"name": "another", "value": 123.456, "aim": None}],
}


def block(name):
    return f"before\n<!-- results: {name} -->\nold\n<!-- end of results -->\nafter\n"


def test_the_page_is_that_of_the_results():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.RESULTS, page.IMAGES) == text, "run `make plots`"
    assert {found[2] for found in page.BLOCK.finditer(text)} == page.TABLES.keys()


def test_what_is_not_measured(tmp_path):
    text = page.filled(block("decode"), tmp_path, tmp_path)
    assert "Not measured yet." in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert page.filled(text, tmp_path, tmp_path) == text


def test_a_report_with_a_plot(tmp_path):
    (tmp_path / "long-decode-x.json").write_text(json.dumps(LONG))
    (tmp_path / "memory-x.png").touch()
    text = page.filled(block("long-decode"), tmp_path, tmp_path)
    assert "**a GPU** (torch 2.0; `long_decode.py`;" in text and "Not measured" not in text
    assert "![memory-x](images/memory-x.png)" in text and "time-x.png" not in text
    lines = text.splitlines()
    assert "| omnimamba, bf16 | 0.86 |  |  | 3.0 |  |  | 14.0 |" in lines
    assert "| mamba_ssm | not installed: mamba_ssm |  |  |  |  |  |  |" in lines
    assert "| whole model, GB | 4.5 | 4.8 |" in lines and "| another | 123.5 |  |" in lines


def test_one_section_for_each_machine(tmp_path):
    for seconds in (5.0, 50.0):
        cases = {"empty cache": {"imported": 1.0, "first token": seconds}}
        report = {"device": f"GPU {seconds:g}", "command": "first_token.py", "cases": cases}
        (tmp_path / f"first-token-{seconds:g}.json").write_text(json.dumps(report))
    text = page.section("first-token", tmp_path, tmp_path)
    assert text.count("| kernels | imported, s | first token, s |") == 2
    assert text.index("GPU 5**") < text.index("| empty cache | 1.0 | 5.0 |") < text.index("GPU 50**")


def test_a_benchmark_without_a_table(tmp_path):
    with pytest.raises(ValueError, match="'speed'; there are tables of decode, prefill"):
        page.filled(block("speed"), tmp_path, tmp_path)
