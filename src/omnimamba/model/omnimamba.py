"""The unified language model (arXiv 2503.08686): two vocabularies, two heads, two tasks, one Mamba-2 backbone.

It knows embeddings, positions, heads and the loss of each task. It does not know images, text or prompts: those are ids and
features by the time they come here. The image encoders live beside it (`vision.py`, `vq.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimamba.config import IGNORE_INDEX, OmniMambaConfig, Task
from omnimamba.model.lora import Tasks
from omnimamba.model.mamba2 import Mamba2Backbone
from omnimamba.model.quantize import quantize_model
from omnimamba.model.state import MambaState
from omnimamba.ops.block import EVERYTHING_KEPT, Saving
from omnimamba.ops.cross_entropy import linear_cross_entropy
from omnimamba.ops.quant import linear

EMBEDDING_INIT_STD = 0.02
FP32_PARAMETERS = ("A_log", "D", "dt_bias")  # decays lose whole heads in bf16


class CaptionMLP(nn.Module):
    """Two bias-free linears around a tanh GELU; adapts text embeddings to the T2I task."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, d, bias=False)
        self.fc2 = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def fused_mlp(d_in: int, d_out: int) -> nn.Sequential:
    """Three linears with erf GELUs, hidden width 4 * d_in: the `fused-gelu-mlp` projector of Prismatic/Cobra."""
    return nn.Sequential(nn.Linear(d_in, 4 * d_in), nn.GELU(), nn.Linear(4 * d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out))


class OmniMambaModel(nn.Module):
    def __init__(self, config: OmniMambaConfig) -> None:
        super().__init__()
        self.config = config
        d = config.backbone.d_model
        self.text_embedding = nn.Embedding(config.text_vocab_size, d)  # also the text head
        self.image_embedding = nn.Embedding(config.image_vocab_size, d)  # also the image head
        self.image_mlp = None if config.unified_vocabulary else fused_mlp(d, d)
        self.caption_mlp = CaptionMLP(d)
        self.positions = nn.ParameterDict(
            {
                str(Task.T2I): torch.empty(config.t2i_positions, d),
                str(Task.MMU): torch.empty(config.mmu_positions, d),
            }
        )
        self.backbone = Mamba2Backbone(config.backbone, config.lora)
        self.projector = fused_mlp(config.vision_dim, d) if config.towers else None
        for table in (self.text_embedding.weight, self.image_embedding.weight, *self.positions.values()):
            nn.init.normal_(table, std=EMBEDDING_INIT_STD)
        if config.quantization is not None:
            quantize_model(self, config.quantization)

    @property
    def device(self) -> torch.device:
        return self.text_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.norm_f.weight.dtype  # the embeddings may be quantised

    # ---- embeddings

    def embed_text(self, ids: Tensor) -> Tensor:
        """ids: [...]; returns [..., d] without positions."""
        return self.text_embedding(ids).to(self.dtype)

    def embed_caption(self, ids: Tensor) -> Tensor:
        """Embeddings of a T2I prompt, specials and pads included, without positions. ids: [b, l]; returns [b, l, d]."""
        return self.caption_mlp(self.embed_text(ids))

    def embed_image_tokens(self, ids: Tensor) -> Tensor:
        """ids: [...] VQ codes; returns [..., d] without positions."""
        x = self.image_embedding(ids).to(self.dtype)
        return x if self.image_mlp is None else self.image_mlp(x)

    def project_features(self, features: Tensor) -> Tensor:
        """Vision features [b, k, vision_dim] as image embeddings [b, k, d]."""
        if self.projector is None:
            raise ValueError("this model has no vision towers in its config; it cannot read images")
        return self.projector(features)

    def embed_mmu(self, ids: Tensor, image_embeddings: Tensor) -> Tensor:
        """[mmu][soi] image [eoi][sot] text without positions.

        ids: [b, 4 + t], the four markers and the text; image_embeddings: [b, k, d]. Returns [b, 4 + k + t, d].
        """
        text = self.embed_text(ids)
        return torch.cat([text[:, :2], image_embeddings.to(text.dtype), text[:, 2:]], dim=1)

    def no_image(self, b: int, num_vision_tokens: int | None = None) -> Tensor:
        """The zero image embeddings [b, k, d] that stand for the image in a text-only row (authors' training layout)."""
        k = self.config.num_vision_tokens if num_vision_tokens is None else num_vision_tokens
        return torch.zeros(b, k, self.config.backbone.d_model, device=self.device, dtype=self.dtype)

    def add_positions(self, x: Tensor, task: Task, start: int = 0) -> Tensor:
        """x [b, l, d] plus rows start..start+l of the task's position table. ValueError past the last row."""
        table = self.positions[task]
        stop, num_rows = start + x.shape[1], table.shape[0]
        if stop > num_rows:
            raise ValueError(f"{task} sequence needs {stop} positions, but its table has {num_rows}; shorten it by {stop - num_rows}")
        return x + table[start:stop].to(x.dtype)

    # ---- heads and losses

    def logits(self, hidden: Tensor, task: Task) -> Tensor:
        """Scores over the task's vocabulary. hidden: [..., d]; returns [..., v]."""
        head = self.image_embedding if task is Task.T2I else self.text_embedding
        return linear(hidden, head.weight)

    def forward(
        self,
        x: Tensor,
        task: Tasks,
        *,
        state: MambaState | None = None,
        lengths: Tensor | None = None,
        saving: Saving = EVERYTHING_KEPT,
    ) -> Tensor:
        """Hidden states [b, l, d] for embeddings x [b, l, d] that have their positions; see `Mamba2Backbone.forward`."""
        return self.backbone(x, task, state=state, lengths=lengths, saving=saving)

    def t2i_embeddings(self, caption_ids: Tensor, image_ids: Tensor) -> Tensor:
        """The T2I training sequence with positions: prompt, image tokens, [eoi].

        caption_ids: [b, prompt + 1], the prompt and [eoi]; image_ids: [b, t]. Returns [b, prompt + t + 1, d].
        """
        caption = self.embed_caption(caption_ids)
        x = torch.cat([caption[:, :-1], self.embed_image_tokens(image_ids), caption[:, -1:]], dim=1)
        return self.add_positions(x, Task.T2I)

    def t2i_loss(self, caption_ids: Tensor, image_ids: Tensor) -> Tensor:
        """Mean cross entropy of the image tokens given caption and earlier tokens; arguments as `t2i_embeddings`."""
        return self.t2i_loss_sum(caption_ids, image_ids) / image_ids.numel()

    def t2i_loss_sum(
        self,
        caption_ids: Tensor,
        image_ids: Tensor,
        read_ids: Tensor | None = None,
        *,
        chunk: int = 0,
        saving: Saving = EVERYTHING_KEPT,
    ) -> Tensor:
        """The summed cross entropy of the image tokens. read_ids: [b, t], what the model reads in their place (None: themselves);
        `chunk` as in `linear_cross_entropy`, `saving` as in the backbone."""
        hidden = self(self.t2i_embeddings(caption_ids, image_ids if read_ids is None else read_ids), Task.T2I, saving=saving)
        before = caption_ids.shape[1] - 2  # position of [soi], which predicts the first image token
        hidden = hidden[:, before : before + image_ids.shape[1]]
        return self.loss_sum(hidden.flatten(0, 1), image_ids.flatten(), Task.T2I, chunk)

    def mmu_embeddings(self, ids: Tensor, features: Tensor | None, image_rows: Tensor | None = None) -> Tensor:
        """The understanding sequence with positions.

        ids: [b, 4 + t] (see `embed_mmu`); features: [i, k, vision_dim] of the rows that have an image, None for none;
        image_rows: [i] their indices (None: all rows); features of row b, which is past the last, go nowhere. The other rows get zero
        image embeddings.
        """
        b = ids.shape[0]
        if features is None:
            image = self.no_image(b)
        else:
            image = self.project_features(features)
            if image_rows is not None:
                image = image.new_zeros(b + 1, *image.shape[1:]).index_copy(0, image_rows, image)[:b]
        return self.add_positions(self.embed_mmu(ids, image), Task.MMU)

    def mmu_hidden(
        self,
        ids: Tensor,
        places: Tensor,
        features: Tensor | None,
        image_rows: Tensor | None = None,
        *,
        saving: Saving = EVERYTHING_KEPT,
    ) -> Tensor:
        """Hidden states [n, d] before the tokens at `places` [n] of the flattened text [b * t] after the markers.

        The other arguments as `mmu_embeddings`.
        """
        hidden = self(self.mmu_embeddings(ids, features, image_rows), Task.MMU, saving=saving)
        return hidden[:, -ids.shape[1] + 3 : -1].flatten(0, 1).index_select(0, places)

    def mmu_logits(self, ids: Tensor, places: Tensor, features: Tensor | None, image_rows: Tensor | None = None) -> Tensor:
        """Scores [n, v] in fp32 for the tokens at `places`; arguments as `mmu_hidden`."""
        return self.logits(self.mmu_hidden(ids, places, features, image_rows), Task.MMU).float()

    def mmu_loss(self, ids: Tensor, labels: Tensor, features: Tensor | None, image_rows: Tensor | None = None) -> Tensor:
        """Mean cross entropy over the labels [b, t] of the text that are not IGNORE_INDEX; the other arguments as `mmu_embeddings`."""
        labels = labels.flatten()
        (places,) = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
        return self.mmu_loss_sum(ids, places, labels[places], None, features, image_rows) / len(places)

    def mmu_loss_sum(
        self,
        ids: Tensor,
        places: Tensor,
        labels: Tensor,
        shares: Tensor | None,
        features: Tensor | None,
        image_rows: Tensor | None = None,
        *,
        chunk: int = 0,
        saving: Saving = EVERYTHING_KEPT,
    ) -> Tensor:
        """The summed cross entropy of the labels, [n] or probabilities [n, v], at `places` [n]; nothing here waits to know how many
        there are.

        shares: [n] fp32, what each counts (None: one each); the other arguments as `mmu_hidden` and `t2i_loss_sum`.
        """
        return self.loss_sum(self.mmu_hidden(ids, places, features, image_rows, saving=saving), labels, Task.MMU, chunk, shares)

    def loss_sum(self, hidden: Tensor, labels: Tensor, task: Task, chunk: int, shares: Tensor | None = None) -> Tensor:
        """The summed cross entropy of labels of a task's vocabulary. hidden: [n, d]; labels and shares as in `linear_cross_entropy`."""
        text, image = self.text_embedding.weight, self.image_embedding.weight
        if self.config.unified_vocabulary:
            head, (before, after) = torch.cat([text, image]), (len(text), 0) if task is Task.T2I else (0, len(image))
            labels = labels + before if labels.ndim == 1 else F.pad(labels, (before, after))
        else:
            head = image if task is Task.T2I else text
        return linear_cross_entropy(hidden, head, labels, shares=shares, chunk=chunk)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its floating-point parameters in `dtype`, in place; FP32_PARAMETERS stay fp32."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            keep = name.rsplit(".", 1)[-1] in FP32_PARAMETERS
            parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    return model
