"""CLIP score with a tiny CLIP model of random weights."""

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from omnimamba.eval.clip_score import ClipScorer


def test_scores_are_cosines(clip_folder, noise):
    images = [noise(0), noise(1).resize((50, 40))]
    captions = ["a cat", "a much longer caption than the model can read in its twenty tokens"]
    scores = ClipScorer(str(clip_folder)).scores(images, captions)
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(text=captions, images=images, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    np.testing.assert_allclose(scores, 100 * expected.clamp(min=0).numpy(), rtol=1e-5, atol=1e-5)
    assert scores.shape == (2,) and (scores >= 0).all()


def test_no_model_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="nowhere: no CLIP model; pass a folder with one, or the Hub id openai/clip"):
        ClipScorer(str(tmp_path / "nowhere"))
