"""The retrieval judge: says how well a picture fits a caption, with the contrastive pair that a small model's tower was trained in."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from omnimamba.config import OmniMambaConfig
from omnimamba.data.collate import pad_right
from omnimamba.model.contrastive import MAX_TEXT_TOKENS, ContrastiveHeads
from omnimamba.model.files import TensorFile, read_json
from omnimamba.model.vision import VisionTowers
from omnimamba.model.weights import check_names_and_shapes
from omnimamba.processor.image import tower_pixels
from omnimamba.processor.tokenizer import TextTokenizer

FILES = ("config.json", "tokenizer.json", "vision.safetensors", "judge.safetensors")
BATCH = 32
"""Images, or captions, that are embedded at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A vision tower with its contrastive heads, in fp32."""

    config: OmniMambaConfig
    tokenizer: TextTokenizer
    vision: VisionTowers
    heads: ContrastiveHeads
    fingerprint: str
    """Of its two weight files: the first 16 hex digits of their SHA-256."""

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Judge:
        """The judge of a model folder. ValueError if one of its FILES is not there or does not fit."""
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder}: no {', '.join(missing)}, so nothing can judge painted images; name a judge folder that has "
                f"{', '.join(FILES)} (tower training writes the weights), or skip generation with num_prompts=0"
            )
        config = OmniMambaConfig.from_dict(read_json(folder / "config.json"))
        towers, tensors = TensorFile(folder / "vision.safetensors"), TensorFile(folder / "judge.safetensors")
        try:
            dim, text_width = len(tensors["image_projection.weight"]), tensors["text.embedding.weight"].shape[1]
        except KeyError as error:
            raise ValueError(f"{tensors.path}: no tensor {error}; these are not contrastive heads") from None
        vision = VisionTowers(config.towers)
        heads = ContrastiveHeads(config.vision_dim, config.text_vocab_size, dim=dim, text_width=text_width).eval()
        digest = hashlib.sha256()
        for module, file in ((vision, towers), (heads, tensors)):
            check_names_and_shapes(module.state_dict(), file, str(file.path))
            module.load_state_dict(dict(file))
            digest.update(file.path.read_bytes())
        tokenizer = TextTokenizer.from_file(folder / "tokenizer.json", config)
        return cls(config, tokenizer, vision.to(device), heads.to(device), digest.hexdigest()[:16])

    @property
    def device(self) -> torch.device:
        return self.heads.logit_scale.device

    @torch.no_grad()
    def similarities(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Cosines [b, t] of RGB images and captions, on the CPU."""
        embedded = [self._embed_images(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        texts = [self.embed_texts(captions[start : start + BATCH]) for start in range(0, len(captions), BATCH)]
        return (torch.cat(embedded) @ torch.cat(texts).T).cpu()

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = {name: torch.stack([tower_pixels(image, tower) for image in images]) for name, tower in self.config.towers.items()}
        return self.heads.embed_features(self.vision({name: batch.to(self.device) for name, batch in pixels.items()}))

    @torch.no_grad()
    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors [t, dim]. ValueError for a text that is empty or too long."""
        rows = [self.tokenizer.encode(caption) for caption in captions]
        for caption, ids in zip(captions, rows, strict=True):
            if not 0 < len(ids) <= MAX_TEXT_TOKENS:
                raise ValueError(f"caption {caption!r} has {len(ids)} tokens; the judge reads 1 to {MAX_TEXT_TOKENS}")
        lengths = torch.tensor([len(ids) for ids in rows], device=self.device)
        return self.heads.text(pad_right(rows, self.tokenizer.pad_id).to(self.device), lengths)
