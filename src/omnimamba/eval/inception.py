"""The Inception network of FID: that of TensorFlow of 2015, as torch-fidelity ported it.

Images become 299 x 299 in one of two ways, which FIDs must share to be comparable (Parmar et al. 2022, arXiv:2104.11222):
`tensorflow`, the bilinear resize without smoothing of the original inside the network, or `clean`, clean-fid's bicubic one of Pillow
on float values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from omnimamba.model.files import TensorFile

SIDE = 299
RESIZES = ("tensorflow", "clean")
WEIGHTS_FROM = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


def default_weights() -> Path:
    """Where torch-fidelity keeps its download."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FROM.rpartition("/")[2]


class Inception:
    def __init__(self, weights: Path | None = None, *, resize: str = "tensorflow", device: torch.device | str = "cpu") -> None:
        """weights: torch-fidelity's file. ValueError if it is not there."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if resize not in RESIZES:
            raise ValueError(f"unknown resize {resize!r}; pass one of {', '.join(RESIZES)}")
        path = Path(weights) if weights else default_weights()
        if not path.is_file():
            raise ValueError(f"{path}: no Inception weights; download {WEIGHTS_FROM} to that place, or name the file with --inception")
        TensorFile(path)  # refuses a file that holds more than tensors, which torch-fidelity would run
        self.resize = resize
        self.device = torch.device(device)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).to(device)

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Pool features [b, 2048] of RGB images of one size."""
        if self.resize == "tensorflow":
            pixels = np.stack([np.asarray(image) for image in images])
            (features,) = self.network(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device))
            return features.cpu().numpy()
        pixels = torch.from_numpy(np.stack([clean_resize(image) for image in images])).permute(0, 3, 1, 2)
        return self._features_of_floats(pixels.to(self.device)).cpu().numpy()

    def _features_of_floats(self, pixels: Tensor) -> Tensor:
        """Features of float pixels [b, 3, 299, 299] in 0 .. 255. The network takes bytes only, so they enter at its first layer."""
        scaled = (pixels - 128) / 128

        def replace_input(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (scaled,)

        hook = self.network.Conv2d_1a_3x3.register_forward_pre_hook(replace_input)
        try:
            (features,) = self.network(torch.zeros(pixels.shape, dtype=torch.uint8, device=self.device))
        finally:
            hook.remove()
        return features


def clean_resize(image: Image.Image) -> np.ndarray:
    """float32 values 0 .. 255 [299, 299, 3] of an RGB image."""
    channels = [Image.fromarray(np.asarray(channel, dtype=np.float32)) for channel in image.split()]
    resized = [np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=-1).clip(0, 255)
