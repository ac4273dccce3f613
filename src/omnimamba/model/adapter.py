"""Task LoRA by itself, in the adapter format of PEFT (https://github.com/huggingface/peft): a few MB beside a model that stays as it is.

`adapter_config.json` has rank, alpha and the module `in_proj`; `adapter_model.safetensors` has a pair A [r, d], B [d_out, r] for each layer
under the names that PEFT gives them in transformers' Mamba2ForCausalLM. The task is in the file's metadata, where PEFT does not look.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from omnimamba.config import Task, nearest_name
from omnimamba.model.files import TensorFile, read_json, save_tensors, whole_folder
from omnimamba.model.omnimamba import OmniMambaModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_OURS = re.compile(r"backbone\.layers\.(\d+)\.mixer\.in_proj\.lora_([AB])\.(\w+)")
_PEFT = "base_model.model.backbone.layers.{layer}.mixer.in_proj.lora_{matrix}.weight"


def save_adapter(model: OmniMambaModel, task: Task, folder: str | Path, *, base: str = "") -> None:
    """Writes the LoRA of a task. base: the model that it belongs to, a name for people and for PEFT."""
    lora = model.config.lora
    if not lora.rank:
        raise ValueError("this model has no task LoRA (lora.rank=0), so there is no adapter to save")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": ["in_proj"],
        "bias": "none",
        "inference_mode": True,
    }
    with whole_folder(Path(folder), (CONFIG_FILE, WEIGHTS_FILE), last=CONFIG_FILE) as partial:
        tensors = {peft: model.get_parameter(ours) for ours, peft in _names(model, task).items()}
        save_tensors(tensors, partial / WEIGHTS_FILE, {"format": "pt", "task": str(task)})
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapter(model: OmniMambaModel, folder: str | Path, task: Task | None = None) -> Task:
    """Puts an adapter in the place of the model's own LoRA of a task, in place; returns the task.

    task: only for an adapter that does not say its own, as PEFT writes them. ValueError if the adapter does not fit. Another alpha than the
    model's is taken into B.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}, so it is no adapter in PEFT's format")
    config, tensors = read_json(folder / CONFIG_FILE), TensorFile(folder / WEIGHTS_FILE)
    others = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or others:
        raise ValueError(f"{folder}: not plain LoRA without biases, alike in all layers; no other adapter has a place in this model")
    if lost := [name for name in ("r", "lora_alpha") if not isinstance(config.get(name), int | float)]:
        raise ValueError(f"{folder / CONFIG_FILE}: no number {' and '.join(lost)}; save the adapter again")
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        said = (file.metadata() or {}).get("task", "")
    if said and said not in list(Task):
        raise ValueError(f"{folder}: its task {said!r} is unknown; {nearest_name(said, Task)}")
    if task is not None and said not in ("", task):
        raise ValueError(f"{folder}: an adapter of the task {said}, not of {task}")
    if not (said or task):
        raise ValueError(f"{folder}: does not say its task; pass task, one of {', '.join(Task)}")
    task = Task(said or task)
    rank, expected = int(config["r"]), _names(model, task)
    if rank != model.config.lora.rank:
        raise ValueError(f"{folder}: rank {rank}, but the model's task LoRA has rank {model.config.lora.rank}")
    if different := tensors.keys() ^ set(expected.values()):
        raise ValueError(f"{folder}: {len(different)} tensors are missing or have no place in the model, e.g. {sorted(different)[0]}")
    scale = float(config["lora_alpha"]) / rank / model.config.lora.scaling
    for ours, peft in expected.items():
        parameter, value = model.get_parameter(ours), tensors[peft]
        if parameter.shape != value.shape:
            raise ValueError(f"{folder}: {peft} has shape {list(value.shape)}, the model needs {list(parameter.shape)}")
        parameter.copy_(_scaled(value, scale) if ".lora_B." in ours else value)
    return task


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor.float() * scale


def _names(model: OmniMambaModel, task: Task) -> dict[str, str]:
    """PEFT's names of a task's LoRA by ours."""
    found = ((name, _OURS.fullmatch(name)) for name, _ in model.named_parameters())
    return {name: _PEFT.format(layer=match[1], matrix=match[2]) for name, match in found if match and match[3] == task}
