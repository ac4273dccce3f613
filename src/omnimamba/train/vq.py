"""Image tokenizer, trained as LlamaGen's (arXiv:2406.06525, section 2.1): reconstruction, codebook, commitment, adversarial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnimamba.data.augment import augment, normalise, unit_range
from omnimamba.data.images import Images, InMemoryImages, open_parquet_images
from omnimamba.data.mixture import EpochSampler
from omnimamba.model.files import save_tensors
from omnimamba.model.vision import VisionTowers
from omnimamba.model.vq import VQModel
from omnimamba.processor.image import to_pil
from omnimamba.train.config import Recipe
from omnimamba.train.frozen import load_frozen, load_weights
from omnimamba.train.loop import Objective
from omnimamba.train.optim import trainable
from omnimamba.train.samples import image_grid
from omnimamba.train.vq_losses import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    perceptual_loss,
    reconstruction_loss,
)

NUM_SAMPLES = 8


class VQObjective(Objective):
    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.config = recipe.config
        torch.manual_seed(recipe.train.seed)
        self.vq = VQModel(self.config.vq)
        if recipe.init.vq:
            load_weights(self.vq, recipe.init.vq)
        self.vq.to(device).to(memory_format=torch.channels_last)
        if recipe.vq.decoder_only:
            for part in (self.vq.encoder, self.vq.quant_conv, self.vq.quantize):
                part.requires_grad_(False)
        self.train_images = self._open(recipe.data.train_split)
        self.val_images = self._open(recipe.data.val_split) if recipe.data.val_split else None
        self.sampler = EpochSampler(len(self.train_images), recipe.train.batch, recipe.train.seed)
        self.players: dict[str, nn.Module] = {"vq": self.vq}
        self.discriminator = None
        if recipe.vq.discriminator:
            self.discriminator = PatchDiscriminator().to(device).to(memory_format=torch.channels_last)
            self.players["discriminator"] = self.discriminator
        self.perceptual_towers = self._load_perceptual_towers() if recipe.vq.perceptual else None

    def _open(self, split: str) -> Images:
        images: Images = open_parquet_images(
            self.recipe.data.folder, split, self.config.vq.image_size, num_threads=self.recipe.data.num_threads
        )
        return InMemoryImages(images, self.device) if self.recipe.data.in_memory else images

    def _load_perceptual_towers(self) -> VisionTowers:
        if not self.recipe.init.vision:
            raise ValueError("vq.perceptual needs a tower: name init.vision")
        return load_frozen(VisionTowers(self.config.towers), self.recipe.init.vision, self.device)

    def summary(self) -> str:
        return f"{sum(p.numel() for p in trainable(self.vq).values()):,} parameters of the image tokenizer"

    def batch(self, step: int) -> Tensor:
        return self.train_images.get(self.sampler.indices(step))

    def num_tokens(self, batch: Any) -> int:
        return len(batch)

    def loss(self, player: str, batch: Any, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        weights = self.recipe.vq
        playing = self.discriminator is not None and step >= weights.discriminator_start
        if player == "discriminator":
            if not playing:
                return {}
            assert self.discriminator is not None
            return {"loss": discriminator_loss(self.discriminator(self.images), self.discriminator(self.reconstruction.detach()))}
        self.vq.train()
        self.images = augment(unit_range(batch.to(self.device)), self.recipe.augment, generator) * 2 - 1
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        out = self.vq(self.images)
        self.reconstruction = out.reconstruction
        reconstruction = reconstruction_loss(out.reconstruction.float(), self.images, l1_weight=weights.l1, l2_weight=weights.l2)
        if weights.perceptual:
            reconstruction = reconstruction + weights.perceptual * self.perceptual(out.reconstruction.float())
        loss = (
            reconstruction
            + weights.codebook * out.codebook_loss
            + weights.commitment * out.commitment_loss
            + weights.entropy * out.entropy_loss
        )
        figures = {"reconstruction": reconstruction, "commitment": out.commitment_loss, "usage": torch.as_tensor(out.codebook_usage)}
        if playing:
            assert self.discriminator is not None
            adversarial = generator_loss(self.discriminator(out.reconstruction))
            loss = loss + weights.discriminator * adaptive_weight(reconstruction, adversarial, self.vq.last_layer) * adversarial
            figures["adversarial"] = adversarial
        return {"loss": loss, **figures}

    def perceptual(self, reconstruction: Tensor) -> Tensor:
        assert self.perceptual_towers is not None
        maps = []
        for images in (reconstruction, self.images):
            pixels = {name: normalise((images + 1) / 2, tower.mean, tower.std) for name, tower in self.config.towers.items()}
            maps.append(self.perceptual_towers.feature_maps(pixels))
        return perceptual_loss(*maps)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in dB over the validation images (mean over images), and the share of codes in use."""
        if self.val_images is None:
            return {}
        self.vq.eval()
        psnr, used = [], set()
        for start in range(0, len(self.val_images), 64):
            images = unit_range(self.val_images.get(range(start, min(start + 64, len(self.val_images)))).to(self.device))
            codes = self.vq.encode(images * 2 - 1)
            used.update(codes.ids.flatten().tolist())
            mse = ((self.vq.decode(codes.quantised).clamp(-1, 1) + 1) / 2 - images).square().mean((1, 2, 3))
            psnr.append(-10 * mse.clamp_min(1e-10).log10())
        return {"psnr": torch.cat(psnr).mean().item(), "codes_used": len(used) / self.config.vq.codebook_size}

    @torch.no_grad()
    def sample(self, folder: Path) -> None:
        """A picture of validation images over their reconstructions."""
        images = self.val_images or self.train_images
        originals = unit_range(images.get(range(min(NUM_SAMPLES, len(images)))).to(self.device)) * 2 - 1
        self.vq.eval()
        shown = torch.cat([originals, self.vq.decode(self.vq.encode(originals).quantised).float()])
        folder.mkdir(parents=True, exist_ok=True)
        image_grid(to_pil(shown), columns=len(originals)).save(folder / "reconstructions.png")

    def export(self, folder: Path) -> None:
        """`vq.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.vq.state_dict(), folder / "vq.safetensors")
