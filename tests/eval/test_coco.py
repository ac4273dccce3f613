"""MS-COCO FID from a folder in its format to the report."""

import json
import shutil

import numpy as np
import pytest

from omnimamba.cli import main
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.eval import coco as benchmark
from omnimamba.eval.ask import Shard
from omnimamba.eval.coco import draw_captions, evaluate, read_captions, square_image
from omnimamba.eval.fid import FeatureStatistics
from omnimamba.eval.paint import PaintSettings


class FewFeatures(benchmark.Inception):
    """The first 3 of the 2048 features; their eigenvalues take no time."""

    def features(self, images):
        return super().features(images)[:, :3]


@pytest.fixture
def settings(inception_weights, clip_folder, monkeypatch):
    monkeypatch.setattr(benchmark, "Inception", FewFeatures)
    return {"num_captions": 3, "inception": inception_weights, "clip": str(clip_folder), "painting": PaintSettings(top_k=4)}


def test_report(omni, coco, settings, tmp_path, monkeypatch):
    stages = []
    report = evaluate(omni, coco, tmp_path, **settings, progress=lambda *step: stages.append(step))
    assert {stage for stage, _, _ in stages} == {"painting", "reference", "inception", "clip"}
    assert stages[-1] == ("clip", 3, 3)
    figures = report.figures
    assert figures["fid"].value > 0 and figures["fid"].n == 3
    assert 0 <= figures["clip_score"].low <= figures["clip_score"].value <= 100
    assert report.protocol["num_reference_images"] == 4 and report.protocol["generation"]["top_k"] == 4
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 2] and lines[0]["file"] == "painted/00000.png"
    assert ("fid", f"{figures['fid'].value:.2f}", "", "3", "5.50") in report.table()

    monkeypatch.setattr(OmniMamba, "generate_image", None)  # nothing is painted again
    assert evaluate(omni, coco, tmp_path, **settings).to_dict() == report.to_dict()
    with pytest.raises(ValueError, match="another run .*num_captions 3 instead of 2"):
        evaluate(omni, coco, tmp_path, **settings | {"num_captions": 2})


def test_shards_paint_and_a_last_call_compares(omni, coco, settings, tmp_path):
    whole = evaluate(omni, coco, tmp_path / "whole", **settings)
    for i in (1, 2):
        assert evaluate(omni, coco, tmp_path / "parts", **settings | {"inception": None}, shard=Shard(i, 2)) is None
    assert len(list((tmp_path / "parts/painted").iterdir())) == 3
    assert evaluate(omni, coco, tmp_path / "parts", **settings).figures == whole.figures


def test_the_same_images_are_at_distance_zero(omni, coco, settings, tmp_path):
    """The images themselves in the place of paintings, with given reference statistics."""
    evaluate(omni, coco, tmp_path, **settings | {"num_captions": 4, "clip": None})
    for line in (tmp_path / "captions.jsonl").read_text().splitlines():
        record = json.loads(line)
        square_image(coco / "val2014" / record["image"]).save(tmp_path / record["file"])
    again = settings | {"num_captions": 4, "clip": None, "reference": tmp_path / "reference-tensorflow.npz"}
    assert evaluate(omni, coco, tmp_path, **again).figures["fid"].value == pytest.approx(0, abs=1e-6)
    assert FeatureStatistics.load(again["reference"]).num == 4


def test_captions_are_drawn_one_an_image(coco):
    names, captions = read_captions(coco)
    assert len(names) == 4 and len(captions) == 8 and captions[1].text == "Something red."
    drawn = draw_captions(captions, 4, 0)
    assert len({caption.image for caption in drawn}) == 4
    assert draw_captions(captions, 2, 0) == drawn[:2] == draw_captions(list(captions), 2, 0)
    texts = [draw_captions(captions, 4, seed)[0].text for seed in range(40)]
    assert set(texts) == {caption.text for caption in captions}
    with pytest.raises(ValueError, match="num_captions=5 exceeds the 4 images"):
        draw_captions(captions, 5, 0)


def test_images_are_compared_at_256_pixels(coco, noise, tmp_path):
    assert square_image(coco / "val2014/COCO_val2014_000000000000.jpg").size == (256, 256)
    image = noise(0).resize((256, 256))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(square_image(tmp_path / "a.png")), np.asarray(image))


def test_what_is_missing_is_named(omni, coco, settings, tmp_path):
    data = shutil.copytree(coco, tmp_path / "data")
    (data / "val2014/COCO_val2014_000000000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"MS-COCO lacks 1 of 4 images, e\.g\. val2014/COCO\S+ \(from http://images\.cocodataset"):
        evaluate(omni, data, tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="no Inception weights; download"):
        evaluate(omni, coco, tmp_path / "out", **settings | {"inception": tmp_path / "none.pth"})
    (data / "annotations/captions_val2014.json").unlink()
    with pytest.raises(ValueError, match=r"MS-COCO lacks annotations/captions_val2014\.json \(from http"):
        evaluate(omni, data, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()  # nothing was painted in vain


@pytest.mark.slow
def test_command_with_the_shipped_model(coco, settings, tmp_path, capsys):
    args = ["eval", "coco", "--data", str(coco), "--num-captions", "2", "--guidance-scale", "1", "--out", str(tmp_path / "out")]
    for part in ("1/2", "2/2"):
        assert main([*args, "--shard", part]) == 0
    assert "shard 2/2 is painted; when all are, call the same without --shard" in capsys.readouterr().out
    assert main([*args, "--inception", str(settings["inception"]), "--resize", "clean", "--json", str(tmp_path / "s.json")]) == 0
    out = capsys.readouterr().out
    assert "5.50" in out and "image_pixels: painted 128, compared 256" in out and "resize clean" in out
    assert json.loads((tmp_path / "s.json").read_text())["figures"]["fid"]["value"] > 0
