"""The config of an official checkpoint, read off the shapes of its tensors.

Shapes do not say everything: LoRA alpha and dropout, the chunk size, one group, the towers and the tokenizer's size are those of the
released model (the preset `1.3b`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from torch import Tensor

from omnimamba.config import PRESETS, OmniMambaConfig, VQConfig, preset

Tensors = Mapping[str, Tensor]


def infer_config(components: Mapping[str, Tensors]) -> OmniMambaConfig:
    """The preset of these shapes, or else the released model's config with these sizes. ValueError if they are not of its kind.

    components: tensors by our names; `vq` may be absent.
    """
    base = preset("1.3b")
    try:
        config = _config(base, components["model"], components.get("vq"))
    except KeyError as error:
        raise ValueError(f"tensor {error.args[0]!r} is missing, so the sizes of the model cannot be read off") from None
    return next((known for known in PRESETS.values() if dataclasses.replace(config, name=known.name) == known), config)


def _config(base: OmniMambaConfig, model: Tensors, vq: Tensors | None) -> OmniMambaConfig:
    text_vocab_size, d_model = model["text_embedding.weight"].shape
    mixer = "backbone.layers.0.mixer."
    d_inner = model[mixer + "out_proj.weight"].shape[1]
    conv_dim, _, d_conv = model[mixer + "conv1d.weight"].shape
    backbone = dataclasses.replace(
        base.backbone,
        d_model=d_model,
        n_layer=_count(model, "backbone.layers."),
        d_state=(conv_dim - d_inner) // 2,
        headdim=d_inner // model[mixer + "A_log"].shape[0],
        expand=d_inner // d_model,
        d_conv=d_conv,
    )
    vision_dim = model["projector.0.weight"].shape[1]
    if vision_dim != base.vision_dim:
        sizes = f"the projector reads {vision_dim} features, the published towers give {base.vision_dim}"
        raise ValueError(f"{sizes}; pass the model's config, as `omnimamba convert --config` does")
    num_image_tokens = model["positions.t2i"].shape[0] - base.t2i_prompt_length - 1
    if math.isqrt(max(num_image_tokens, 0)) ** 2 != num_image_tokens or not num_image_tokens:
        sizes = f"{num_image_tokens} image positions do not make a square image"
        raise ValueError(f"{sizes}; pass the model's config, as `omnimamba convert --config` does")
    vq_config = _vq_config(base.vq, vq) if vq else base.vq
    return dataclasses.replace(
        base,
        name="official",
        backbone=backbone,
        lora=dataclasses.replace(base.lora, rank=model[mixer + "in_proj.lora_A.t2i"].shape[0]),
        vq=dataclasses.replace(
            vq_config,
            codebook_size=model["image_embedding.weight"].shape[0],
            image_size=math.isqrt(num_image_tokens) * vq_config.downsample,
        ),
        text_vocab_size=text_vocab_size,
        mmu_positions=model["positions.mmu"].shape[0],
    )


def _vq_config(base: VQConfig, vq: Tensors) -> VQConfig:
    ch = vq["encoder.conv_in.weight"].shape[0]
    widths = [vq[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(_count(vq, "encoder.conv_blocks."))]
    return dataclasses.replace(
        base,
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        image_size=2 ** (len(widths) - 1),  # one token; the language model's positions say how many there are
        num_res_blocks=_count(vq, "encoder.conv_blocks.0.res."),
        z_channels=vq["encoder.conv_out.weight"].shape[0],
        codebook_dim=vq["quantize.embedding.weight"].shape[1],
    )


def _count(tensors: Tensors, prefix: str) -> int:
    """Modules of a list whose names are `prefix` and a number."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
