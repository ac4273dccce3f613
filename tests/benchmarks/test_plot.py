"""What the plots show, from small reports, and that all results in the repository can be drawn."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")
import plot

STEP = {"rows": 1, "images/s": 3.0, "share": 0.8}
DECODE = {
    "device": "a GPU",
    "read GB/s": 3000.0,
    "cases": {
        "T2I x64": STEP | {"rows": 64, "images/s": 40.0},
        "T2I": STEP,
        "T2I, bf16 state": STEP | {"images/s": 4.0},
        "T2I, guided": STEP | {"rows": 2},
        "T2I, int8": STEP | {"share": 0.5},
        "T2I x256": {"error": "OutOfMemoryError()"},
        "text x64": STEP | {"rows": 64, "images/s": 0.0},
    },
}
LONG = {
    "device": "a GPU",
    "cases": {
        "omnimamba, bf16": {
            "growth": "position",
            "by length": {"1024": {"ms": 1.0, "GB": 3.0}, "131072": {"ms": 1.0, "GB": 3.0}},
            "seconds for": {"1024": 1.0, "131072": 131.0},
        },
        "JanusFlow shape, growing cache": {
            "growth": "position",
            "by length": {"1024": {"ms": 20.0, "GB": 4.0}, "131072": {"error": "out of memory"}},
            "seconds for": {"1024": 20.0},
        },
        "transformers' Mamba-2": {"growth": "none", "by length": {"16": {"ms": 30.0, "GB": 3.0}}, "seconds for": {"1024": 30.0}},
        "mamba_ssm": {"error": "not installed: mamba_ssm"},
        "whole model": {"GB": 4.5},
    },
}


def drawn(path):
    """Whether a PNG file shows more than its white background."""
    pixels = np.asarray(Image.open(path).convert("L"))
    return pixels.shape[1] > 500 and (pixels < 128).mean() > 0.005 and (pixels == 255).mean() > 0.5


def test_images_by_batch():
    assert plot.images_by_batch(DECODE) == {"fp32": [(1, 3.0), (64, 40.0)], "bf16": [(1, 4.0)]}


def test_shares_by_system():
    rows = plot.shares(DECODE)
    assert ("painting, int8", 0.5, "omnimamba, int8") in rows and ("text x64", 0.8, "omnimamba, bf16") in rows
    assert "painting x256" not in [name for name, _, _ in rows]


def test_points_by_length():
    assert plot.by_length(LONG, "GB") == {"omnimamba, bf16": [(1024, 3.0), (131072, 3.0)], "JanusFlow shape, growing cache": [(1024, 4.0)]}
    assert plot.by_length(LONG, "seconds for")["transformers' Mamba-2"] == [(1024, 30.0)]
    assert "mamba_ssm" not in plot.by_length(LONG, "seconds for")


def test_memory_that_was_not_measured():
    """On a CPU there is none."""
    report = {"device": "x", "cases": {"omnimamba, bf16": {"growth": "position", "by length": {"1024": {"ms": 1.0, "GB": None}}}}}
    assert plot.by_length(report, "GB") == {} and plot.draw_memory(report) is None


def test_rates_on_a_cpu():
    report = {"cases": {"bfloat16": {"x": 5.0}, "int4": {"x": 9.0}, "transformers": {"y": 4.0}, "another": {"x": 1.0}}}
    assert plot.cpu_rates(report, "x") == [("omnimamba, bf16", 5.0), ("omnimamba, int4", 9.0), ("another", 1.0)]
    assert plot.colour("another") == plot.GREY


def test_operators_without_a_pair_are_left_out():
    def case(path, figures):
        return {"shape": "s", "op": "ssd_chunk_scan", "path": path, "figures": figures}

    kernel = case("kernel", {"forward+backward share": 0.2})
    assert plot.op_times({"cases": [case("plain", "out of memory"), kernel]}, "share") == []
    pair = [case("plain", {"forward+backward share": 0.1}), kernel]
    assert plot.op_times({"cases": pair}, "share") == [("s: ssd_chunk_scan", 0.1, 0.2)]


def test_labels_of_lengths():
    assert [plot.thousands(length) for length in (512, 1024, 100_000, 131_072)] == ["512", "1K", "100K", "128K"]
    lengths = (1024, 4096, 16384, 65536, 100_000, 131_072)
    assert plot.spaced(lengths, True) == [1024, 4096, 16384, 65536, 131_072]
    assert plot.spaced(lengths, False) == [4096, 16384, 65536, 100_000, 131_072]


def test_every_plot_and_what_is_skipped(tmp_path, capsys):
    results, images = tmp_path / "results", tmp_path / "images"
    results.mkdir()
    (results / "decode-a.json").write_text(json.dumps(DECODE))
    (results / "long-decode-b.json").write_text(json.dumps(LONG))
    (results / "prefill-c.json").write_text(json.dumps({"device": "x", "cases": {}}))
    assert plot.main(["--results", str(results), "--images", str(images)]) == 0
    assert sorted(path.name for path in images.iterdir()) == ["batch-a.png", "memory-b.png", "roofline-a.png", "time-b.png"]
    assert all(drawn(path) for path in images.iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("skipped")] == ["skipped prefill", "skipped ops", "skipped cpu-decode"]
    assert any("nothing to draw in prefill-c.json" in line for line in lines)


def test_all_results_of_the_repository(tmp_path):
    written, _ = plot.draw_all(plot.RESULTS, tmp_path)
    reports = {path.name for path in plot.RESULTS.glob("*.json")}
    shown = {f"{benchmark}-{out.stem.removeprefix(f'{name}-')}.json" for out in written for name, (benchmark, _) in plot.PLOTS.items()}
    assert written and all(drawn(path) for path in written)
    assert {name for name in reports if name.rsplit("-", 1)[0] in {benchmark for benchmark, _ in plot.PLOTS.values()}} <= shown
    assert {path.name for path in written} <= {path.name for path in plot.IMAGES.iterdir()}, "run `make plots`"
