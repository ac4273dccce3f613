"""Weights on disk: official key names <-> ours, safetensors folders, strict loading.

A model folder holds `config.json`, `tokenizer.json` and one safetensors file per component: `model` (language model and
projector), `vision` (understanding towers), `vq` (image tokenizer).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from omnimamba.config import OmniMambaConfig

COMPONENTS = ("model", "vision", "vq")
"""Each is one safetensors file of a model folder."""

_MAMBA = "llm_backbone.mamba."
_OFFICIAL_PATTERNS: tuple[tuple[str, str, str], ...] = (
    # (official name, component, our name)
    (_MAMBA + "backbone.embedding.weight", "model", "text_embedding.weight"),
    (_MAMBA + "backbone.img_embeddings.word_embeddings.weight", "model", "image_embedding.weight"),
    (_MAMBA + "backbone.img_embeddings.project_in.projector.{rest}", "model", "image_mlp.{rest}"),
    (_MAMBA + "backbone.caption_embed.cap_proj.{rest}", "model", "caption_mlp.{rest}"),
    (_MAMBA + "backbone.pos_embed", "model", "positions.t2i"),
    (_MAMBA + "backbone.mmu_pos_embed", "model", "positions.mmu"),
    (_MAMBA + "backbone.layers.{n}.mixer.in_proj.{task}_lora_A0.weight", "model", "backbone.layers.{n}.mixer.in_proj.lora_A.{task}"),
    (_MAMBA + "backbone.layers.{n}.mixer.in_proj.{task}_lora_B0.weight", "model", "backbone.layers.{n}.mixer.in_proj.lora_B.{task}"),
    (_MAMBA + "backbone.layers.{n}.{rest}", "model", "backbone.layers.{n}.{rest}"),
    (_MAMBA + "backbone.norm_f.weight", "model", "backbone.norm_f.weight"),
    ("projector.projector.{rest}", "model", "projector.{rest}"),
    ("vision_backbone.{tower}_featurizer.{rest}", "vision", "towers.{tower}.{rest}"),
    ("llm_backbone.vqvae.{rest}", "vq", "{rest}"),
)
_WILDCARDS = {"n": r"\d+", "task": r"t2i|mmu", "tower": r"[a-z]+", "rest": r".+"}
TIED = {  # stored twice in an official checkpoint
    _MAMBA + "lm_head.weight": _MAMBA + "backbone.embedding.weight",
    _MAMBA + "img_head.weight": _MAMBA + "backbone.img_embeddings.word_embeddings.weight",
}
CODEBOOK_USED = "llm_backbone.vqvae.quantize.codebook_used"
"""65536 zeros: a statistics buffer of the published VQ module, meaningless for a trained model."""
CODEBOOK_USED_SIZE = 65536
_UNSQUEEZED = ("positions.t2i", "positions.mmu")  # [1, rows, d] in official files


def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    return re.compile("".join(f"(?P<{part}>{_WILDCARDS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


_FROM_OFFICIAL = [(_compile(official), component, ours) for official, component, ours in _OFFICIAL_PATTERNS]
_TO_OFFICIAL = [(component, _compile(ours), official) for official, component, ours in _OFFICIAL_PATTERNS]


def our_name(official: str) -> tuple[str, str] | None:
    """(component, name) of an official key; None if it is no key of the published model."""
    for pattern, component, ours in _FROM_OFFICIAL:
        if match := pattern.fullmatch(official):
            return component, ours.format(**match.groupdict())
    return None


def official_name(component: str, ours: str) -> str:
    """The official key of one of our tensors."""
    for owner, pattern, official in _TO_OFFICIAL:
        if owner == component and (match := pattern.fullmatch(ours)):
            return official.format(**match.groupdict())
    raise ValueError(f"{component}.{ours} has no official name")


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Our state dicts by component. ValueError lists keys that are not the published model's, and tied copies that differ."""
    components: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name == CODEBOOK_USED:
            continue
        if name in TIED:
            twin = tensors.get(TIED[name])
            if twin is not None and twin.data_ptr() != tensor.data_ptr() and not torch.equal(twin, tensor):
                raise ValueError(f"{name} differs from {TIED[name]}, with which it is tied")
            continue
        place = our_name(name)
        if place is None:
            unknown.append(name)
            continue
        component, ours = place
        components.setdefault(component, {})[ours] = tensor[0] if ours in _UNSQUEEZED else tensor
    if unknown:
        raise ValueError(f"{len(unknown)} unexpected tensors: {_some(unknown)}")
    return components


def to_official(components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One official state dict, tied copies and the VQ statistics buffer included (they share memory)."""
    official = {}
    for component, tensors in components.items():
        for ours, tensor in tensors.items():
            official[official_name(component, ours)] = tensor[None] if ours in _UNSQUEEZED else tensor
    for copy, original in TIED.items():
        if original in official:
            official[copy] = official[original]
    if "vq" in components:
        official[CODEBOOK_USED] = torch.zeros(CODEBOOK_USED_SIZE)
    return official


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_names_and_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """ValueError that lists every missing, unexpected and wrongly shaped tensor of `found`."""
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if unexpected := found.keys() - expected.keys():
        problems.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} wrongly shaped: {_some(shapes)}")
    if problems:
        raise ValueError(f"{where}: tensors do not fit the config: " + "; ".join(problems))
