"""GenEval: images in its layout, figures of its results."""

import json

import pytest
from PIL import Image

from omnimamba.cli import main
from omnimamba.eval.ask import Shard
from omnimamba.eval.geneval import paint, score


def test_layout(omni, geneval, tmp_path):
    folder = paint(omni, geneval, tmp_path, num_images=2)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files[:3] == ["00000/metadata.jsonl", "00000/samples/00000.png", "00000/samples/00001.png"]
    assert len(files) == 9
    assert json.loads((folder / "00002/metadata.jsonl").read_text())["prompt"] == "a photo of two cups"
    with Image.open(folder / "00000/samples/00000.png") as first, Image.open(folder / "00000/samples/00001.png") as second:
        assert first.size == (32, 32) and first.tobytes() != second.tobytes()  # seeds of their own


def test_shards_and_limit(omni, geneval, tmp_path):
    whole = paint(omni, geneval, tmp_path / "whole", num_images=2, limit=2)
    for i in (1, 2):
        parts = paint(omni, geneval, tmp_path / "parts", num_images=2, limit=2, shard=Shard(i, 2))
    images = [sorted(path.relative_to(folder) for path in folder.rglob("*.png")) for folder in (whole, parts)]
    assert images[0] == images[1] and len(images[0]) == 4
    assert all((whole / name).read_bytes() == (parts / name).read_bytes() for name in images[0])
    with pytest.raises(ValueError, match="another run .*num_images 2 instead of 3"):
        paint(omni, geneval, tmp_path / "whole", num_images=3)


def test_missing_prompts(omni, tmp_path):
    with pytest.raises(ValueError, match=r"GenEval lacks evaluation_metadata\.jsonl \(from https://github\.com/djghosh13/geneval"):
        paint(omni, tmp_path, tmp_path / "out")


def test_score_by_hand(tmp_path):
    """single_object: 3 of 4 images right; counting: 0 of 2. Prompts with a right image: 2 of 3."""
    rows = [("single_object", "a", True), ("single_object", "a", False), ("single_object", "b", True), ("single_object", "b", True)]
    rows += [("counting", "c", False), ("counting", "c", False)]
    lines = [{"tag": tag, "prompt": name, "correct": right, "metadata": json.dumps({"prompt": name})} for tag, name, right in rows]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = score(tmp_path / "results.jsonl")
    values = {key: figure.value for key, figure in report.figures.items()}
    assert values == pytest.approx({"overall": 0.375, "single_object": 0.75, "counting": 0, "images": 3 / 6, "prompts": 2 / 3})
    assert [row[0] for row in report.table()][-1] == "prompts with a right image"


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match=r"no such file; evaluation/evaluate_images\.py of \S+djghosh13/geneval writes it"):
        score(tmp_path / "results.jsonl")
    (tmp_path / "results.jsonl").write_text('{"tag": "counting"}\n')
    with pytest.raises(ValueError, match="line 1: no correct, metadata"):
        score(tmp_path / "results.jsonl")
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match="no results"):
        score(tmp_path / "results.jsonl")


def test_command(geneval, tmp_path, capsys):
    args = ["eval", "geneval", "--num-images", "1", "--limit", "1", "--guidance-scale", "1", "--out", str(tmp_path / "out")]
    assert main([*args, "--data", str(geneval)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'images'}\n"
    with Image.open(tmp_path / "out/images/00000/samples/00000.png") as image:
        assert image.size == (128, 128)
    (tmp_path / "results.jsonl").write_text('{"tag": "counting", "correct": true, "metadata": "a"}\n')
    assert main(["eval", "geneval", "--results", str(tmp_path / "results.jsonl"), "--json", str(tmp_path / "s.json")]) == 0
    assert "overall" in capsys.readouterr().out and json.loads((tmp_path / "s.json").read_text())["figures"]["overall"]["value"] == 1
    assert main(args) == 2
    assert "pass either --data to paint, or --results to score" in capsys.readouterr().err
