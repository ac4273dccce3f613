"""CLIP score (Hessel et al. 2021, arXiv:2104.08718): 100 max(0, cosine) of an image and its caption.

As most papers on text to image report it, without the paper's factor 2.5. The model matters; `openai/clip-vit-base-patch32` is the
usual one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

DEFAULT_MODEL = "openai/clip-vit-base-patch32"


class ClipScorer:
    """source: a folder or Hub id of a CLIP model of transformers."""

    def __init__(self, source: str = DEFAULT_MODEL, *, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self.model: Any = CLIPModel.from_pretrained(source).eval()
            self.processor: Any = CLIPProcessor.from_pretrained(source)
        except OSError:
            raise ValueError(
                f"{source}: no CLIP model; pass a folder with one, or the Hub id {DEFAULT_MODEL} where the Hub can be reached"
            ) from None
        self.model.to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> np.ndarray:
        """Scores [b] of RGB images and their captions, which lose what exceeds the model's text length."""
        inputs = self.processor(text=list(captions), images=list(images), return_tensors="pt", padding=True, truncation=True)
        output = self.model(**inputs.to(self.device))
        cosines = (output.image_embeds * output.text_embeds).sum(-1)
        return (100 * cosines.clamp(min=0)).double().cpu().numpy()
