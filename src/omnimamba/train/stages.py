"""What trains when: the decoupled two stages of the paper (arXiv 2503.08686, section 3.4 and figure 4) as one table.

The authors' code differs in places (it unfreezes both tasks' LoRA and the text embedding in stage 1, and leaves the understanding
positions at their random start); docs/differences.md says where and why these stages follow the paper.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from omnimamba.config import Task

GROUPS: dict[str, str] = {
    # group: pattern of the parameter names that belong to it; every parameter belongs to exactly one
    "text_embedding": r"text_embedding\..*",
    "image_embedding": r"(image_embedding|image_mlp)\..*",
    "caption_mlp": r"caption_mlp\..*",
    "t2i_positions": r"positions\.t2i",
    "mmu_positions": r"positions\.mmu",
    "projector": r"projector\..*",
    "t2i_lora": r"backbone\..*\.lora_[AB]\.t2i",
    "mmu_lora": r"backbone\..*\.lora_[AB]\.mmu",
    "backbone": r"backbone\.(?!.*lora_).*",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    tasks: tuple[str, ...]
    trains: tuple[str, ...]
    """Groups that train; all others are frozen."""


STAGES: dict[str, Stage] = {
    "stage1_mmu": Stage(("mmu",), ("projector", "mmu_lora", "mmu_positions")),
    "stage1_t2i": Stage(("t2i",), ("image_embedding", "caption_mlp", "t2i_lora", "t2i_positions")),
    "stage2": Stage(("mmu", "t2i"), tuple(GROUPS)),
    "lora_mmu": Stage(("mmu",), ("mmu_lora",)),
    "lora_t2i": Stage(("t2i",), ("t2i_lora",)),
}
LORA_STAGES = {"lora_mmu": Task.MMU, "lora_t2i": Task.T2I}
"""Not the paper's: own data for a finished model, of which only a task's LoRA changes. The result is also an adapter."""

BACKBONE_GROUPS = ("backbone", "text_embedding")
"""Pretrained in the paper (state-spaces/mamba2-1.3b). A preset without pretrained weights trains them in stage 1 too."""
PRESETS_WITHOUT_PRETRAINED_BACKBONE = ("nano", "tiny")


def group_of(name: str) -> str:
    """The group of a parameter of `OmniMambaModel`."""
    groups = [group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)]
    assert len(groups) == 1, (name, groups)
    return groups[0]


def set_trainable(model: nn.Module, stage: str, *, train_backbone: bool) -> list[nn.Parameter]:
    """The parameters that train in a stage; sets requires_grad of all parameters in place."""
    trains = {*STAGES[stage].trains, *(BACKBONE_GROUPS if train_backbone else ())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in trains)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge_stage1(mmu: Mapping[str, Tensor], t2i: Mapping[str, Tensor], *, shared: str = "") -> dict[str, Tensor]:
    """The start of stage 2: from each stage 1 result what only that stage trains, and what both hold.

    Frozen weights are equal in both. Where they differ (a backbone that trained), `shared` names the result that gives them;
    without it that is a ValueError, because no choice is right by itself.
    """
    if mmu.keys() != t2i.keys():
        raise ValueError(f"the two stage 1 results have different tensors: {', '.join(sorted(mmu.keys() ^ t2i.keys())[:4])}")
    if shared not in ("", "mmu", "t2i"):
        raise ValueError(f"init.shared={shared!r}; valid: mmu, t2i")
    merged, differing = {}, []
    for name in mmu:
        group = group_of(name)
        if group in STAGES["stage1_mmu"].trains:
            merged[name] = mmu[name]
        elif group in STAGES["stage1_t2i"].trains:
            merged[name] = t2i[name]
        else:
            merged[name] = (mmu if shared == "mmu" else t2i)[name]
            if not torch.equal(mmu[name], t2i[name]):
                differing.append(name)
    if differing and not shared:
        raise ValueError(f"{len(differing)} shared tensors differ (e.g. {differing[0]}): name the one to keep, init.shared=mmu or t2i")
    return merged
