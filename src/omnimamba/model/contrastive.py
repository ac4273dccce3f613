"""An image encoder and a text encoder with one embedding space, trained on image-text pairs (CLIP, arXiv:2103.00020).

The image side becomes the frozen understanding tower of a small model; both sides together judge generated images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_SCALE_INIT = 10.0
MAX_TEXT_TOKENS = 64
HEAD_WIDTH = 32


class TextEncoder(nn.Module):
    """Mean over the outputs of one transformer layer over token embeddings."""

    def __init__(self, vocab_size: int, width: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(MAX_TEXT_TOKENS, width) * 0.02)
        self.layer = nn.TransformerEncoderLayer(
            width, nhead=width // HEAD_WIDTH, dim_feedforward=4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.projection = nn.Linear(width, dim)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Unit vectors [b, dim]. ids: [b, l] right-padded, at most MAX_TEXT_TOKENS; lengths: [b]."""
        padding = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
        x = self.layer(self.embedding(ids) + self.positions[: ids.shape[1]], src_key_padding_mask=padding)
        x = x.masked_fill(padding[..., None], 0).sum(1) / lengths[:, None]
        return F.normalize(self.projection(x).float(), dim=-1)


class ContrastiveHeads(nn.Module):
    """What stands on top of a tower: the projection of its mean feature, and the text encoder."""

    def __init__(self, vision_dim: int, vocab_size: int, *, dim: int, text_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_dim)
        self.image_projection = nn.Linear(vision_dim, dim)
        self.text = TextEncoder(vocab_size, text_width, dim)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_INIT).log())

    def embed_features(self, features: Tensor) -> Tensor:
        """Unit vectors [b, dim] of tower features [b, k, vision_dim]."""
        return F.normalize(self.image_projection(self.norm(features.mean(1))).float(), dim=-1)

    def scores(self, image: Tensor, text: Tensor) -> Tensor:
        """Scaled cosines [b, t] of image embeddings [b, dim] and text embeddings [t, dim]."""
        return self.logit_scale.exp() * image @ text.T
