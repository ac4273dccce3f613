"""Painting many captions into files."""

import pytest
from PIL import Image

from omnimamba.engine.omnimamba import GenerationDefaults, OmniMamba
from omnimamba.eval.ask import Shard
from omnimamba.eval.paint import Job, PaintSettings, fitted_caption, own_share, paint_in_batches, paint_missing


@pytest.fixture
def jobs(tmp_path):
    return [Job(f"apple {i}", 7 + i, tmp_path / "painted" / f"{i}.png") for i in range(5)]


def test_only_what_is_missing_is_painted(omni, jobs, monkeypatch):
    steps, painted = [], []
    original = OmniMamba.generate_image

    def generate_image(self, captions, **settings):
        painted.extend(captions)
        return original(self, captions, **settings)

    monkeypatch.setattr(OmniMamba, "generate_image", generate_image)
    settings = GenerationDefaults(top_k=4)
    paint_missing(omni, jobs, settings, lambda *step: steps.append(step))
    assert painted == [job.caption for job in jobs]
    assert steps[0] == ("painting", 0, 5) and steps[-1] == ("painting", 5, 5)
    first = {job.file: job.file.read_bytes() for job in jobs}
    for job in jobs[1:3]:
        job.file.unlink()
    painted.clear()
    paint_missing(omni, jobs, settings, lambda *step: steps.append(step))
    assert painted == ["apple 1", "apple 2"]
    assert {job.file: job.file.read_bytes() for job in jobs} == first


def test_batches_fit_the_slots(omni):
    few = OmniMamba(omni.bundle, num_slots=3)
    captions, seeds = ["red apple"] * 4, [0, 1, 2, 3]
    assert [len(images) for images in paint_in_batches(few, captions, seeds, GenerationDefaults())] == [3, 1]
    assert [len(images) for images in paint_in_batches(few, captions, seeds, GenerationDefaults(guidance_scale=2.0))] == [1, 1, 1, 1]
    assert list(paint_in_batches(few, [], [], GenerationDefaults())) == []


def test_an_image_does_not_depend_on_its_batch(omni, jobs):
    together = [image for some in paint_in_batches(omni, ["red apple", "hand"], [3, 4], GenerationDefaults()) for image in some]
    alone = next(paint_in_batches(omni, ["hand"], [4], GenerationDefaults()))[0]
    assert isinstance(alone, Image.Image) and alone.tobytes() == together[1].tobytes()


def test_shares(jobs):
    assert own_share(jobs, None) == jobs
    assert [*own_share(jobs, Shard(1, 2)), *own_share(jobs, Shard(2, 2))] == [jobs[0], jobs[2], jobs[4], jobs[1], jobs[3]]


def test_settings(omni):
    assert PaintSettings(guidance_scale=2.5).of(omni) == GenerationDefaults(guidance_scale=2.5)
    with pytest.raises(ValueError, match="top_p"):
        PaintSettings(top_p=0.0).of(omni)


def test_a_long_caption_loses_its_last_words(omni):
    tok = omni.tokenizer
    limit = tok.config.max_caption_tokens
    assert fitted_caption(tok, "red  apple\n") == "red apple"
    cut = fitted_caption(tok, "red apple " * 40)
    assert len(tok.encode(cut)) <= limit < len(tok.encode(f"{cut} red apple"))
    assert cut.split() == (["red", "apple"] * 40)[: len(cut.split())]
