"""Weights on disk: official key names <-> ours, safetensors folders, strict loading.

A model folder holds `config.json`, `tokenizer.json`, `generation.json` and one safetensors file per component: `model` (language
model and projector), `vision` (understanding towers), `vq` (image tokenizer). All but config and `model` may be absent. Values are
fp32, bf16 or fp16, whatever they are used in; those of a quantised model (`quantize.py`) are what is computed with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from omnimamba.config import PRESETS, OmniMambaConfig, nearest_name, quantization
from omnimamba.model import hub
from omnimamba.model.files import SAFETENSORS, TensorFile, read_json, read_safetensors, whole_folder, write_safetensors
from omnimamba.model.omnimamba import OmniMambaModel, cast
from omnimamba.model.packing import pack
from omnimamba.model.quantize import quantize_tensors
from omnimamba.model.shapes import infer_config
from omnimamba.model.vision import VisionTowers
from omnimamba.model.vq import VQModel

SHIPPED_MODEL = "nano"
COMPONENTS = ("model", "vision", "vq")
"""Each is one safetensors file of a model folder."""
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
GENERATION_FILE = "generation.json"
JUDGE_FILE = "judge.safetensors"
"""The contrastive heads that the tower of a small model was trained with; they judge painted images (`eval`)."""
MODEL_FILES = (
    CONFIG_FILE,
    TOKENIZER_FILE,
    GENERATION_FILE,
    JUDGE_FILE,
    *(
        f"{component}{suffix}"
        for component in COMPONENTS
        for suffix in (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.json")
    ),
)
"""Patterns of the files that make a model folder; whatever else lies in it is not read and not written."""

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
CODEBOOK_USED = "quantize.codebook_used"
"""65536 zeros in files of the published VQ module: a statistics buffer, meaningless for a trained model."""
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


class Renamed(Mapping[str, Tensor]):
    """Official tensors under our names, read from `source` when asked for. names: ours to official."""

    def __init__(self, source: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.source, self.names = source, names

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.source[self.names[name]]
        return tensor[0] if name in _UNSQUEEZED else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """Our tensors by component. ValueError lists keys that are not the published model's, and tied copies that differ."""
    names: dict[str, dict[str, str]] = {}
    unknown = []
    for official in tensors:
        if official in TIED:
            check_tied(tensors, official)
        elif place := our_name(official):
            component, ours = place
            names.setdefault(component, {})[ours] = official
        else:
            unknown.append(official)
    names.get("vq", {}).pop(CODEBOOK_USED, None)
    if unknown:
        raise ValueError(f"{len(unknown)} unexpected tensors: {_some(unknown)}")
    return {component: Renamed(tensors, names[component]) for component in COMPONENTS if component in names}


def check_tied(tensors: Mapping[str, Tensor], copy: str) -> None:
    """ValueError if a head is stored beside the embedding that it is tied with and differs from it."""
    original = TIED[copy]
    if original in tensors:
        first, second = tensors[original], tensors[copy]
        if first.data_ptr() != second.data_ptr() and not torch.equal(first, second):
            raise ValueError(f"{copy} differs from {original}, with which it is tied")


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
        official[official_name("vq", CODEBOOK_USED)] = torch.zeros(CODEBOOK_USED_SIZE)
    return official


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_names_and_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """ValueError that lists every missing, unexpected and wrongly shaped tensor of `found`, and quantised ones of another type."""
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
    types = [  # floats of 16 and 32 bits are converted, quantised values are not
        f"{name} {found[name].dtype} instead of {expected[name].dtype}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name].itemsize == 1 and found[name].dtype is not expected[name].dtype
    ]
    if types:
        problems.append(f"{len(types)} of the wrong type: {_some(types)}")
    if problems:
        raise ValueError(f"{where}: tensors do not fit the config: " + "; ".join(problems))


# ---- models on disk and in memory


@dataclasses.dataclass
class Stored:
    """A model as it lies on disk. components: tensors by our names, read when asked for; `name` is for error messages."""

    name: str
    config: OmniMambaConfig
    components: dict[str, Mapping[str, Tensor]]
    tokenizer_file: Path | None
    judge_file: Path | None = None


@dataclasses.dataclass
class Bundle:
    """A model with its image encoders; those that it was saved without are None."""

    config: OmniMambaConfig
    model: OmniMambaModel
    vision: VisionTowers | None
    vq: VQModel | None
    tokenizer_file: Path | None
    judge_file: Path | None = None
    """Travels with the model; nothing here reads it."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the language model's config and of all its weights, rounded to bf16.

        It names the model that can continue a saved state: the same after saving and loading, and in fp32 as in bf16. Weights
        stored in another type than they were trained in are another model if rounding moved them.
        """
        sizes = {key: value for key, value in self.config.to_dict().items() if key != "name"}
        weights = {name: checksum(tensor) for name, tensor in sorted(self.model.state_dict().items())}
        sums = dict(zip(weights, torch.stack(list(weights.values())).tolist(), strict=True))
        return hashlib.sha256(json.dumps([sizes, sums]).encode()).hexdigest()[:16]


CHECKSUM_CHUNK = 2**22
"""Values summed at once: 2^15 (bits) * 2^22 (position) * 2^22 (terms) fit in 63 bits."""


def checksum(tensor: Tensor) -> Tensor:
    """An int64 that depends on every value in bf16 and on its place; the same on every device, since it is integer arithmetic."""
    bits = tensor.detach().to(torch.bfloat16).flatten().view(torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(CHECKSUM_CHUNK):
        total = total * 31 + (chunk * torch.arange(1, len(chunk) + 1, device=tensor.device)).sum()
    return total


def load(
    source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, quantize: str | None = None
) -> Bundle:
    """The model `source` in `dtype` on `device`, in eval mode; see `open_model` for what a source is, `quantized` for quantize.

    Needs little more memory than the model itself: tensors are copied from the mapped files one by one. Quantising holds the new
    weights twice for a moment.
    """
    return build(quantized(open_model(source), quantize), device=device, dtype=dtype)


def quantized(stored: Stored, scheme: str | None) -> Stored:
    """The stored model in a quantization scheme; None leaves it as it is. ValueError if it is quantised in another one."""
    if scheme is None or quantization(scheme) is stored.config.quantization:
        return stored
    if stored.config.quantization is not None:
        raise ValueError(f"{stored.name} is quantised as {stored.config.quantization}; for {scheme} quantise the model it was made from")
    tensors, where = stored.components["model"], f"{stored.name}: model"
    check_names_and_shapes(outline("model", stored.config).state_dict(), tensors, where)
    try:
        components = {**stored.components, "model": quantize_tensors(tensors, scheme)}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return dataclasses.replace(stored, config=dataclasses.replace(stored.config, quantization=quantization(scheme)), components=components)


def build(stored: Stored, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Bundle:
    """The modules of a stored model. What no feature of a vision tower depends on stays on the CPU, to be saved again.

    ValueError lists missing, unexpected and wrongly shaped tensors.
    """
    modules: dict[str, nn.Module] = {}
    for component, tensors in stored.components.items():
        module = cast(outline(component, stored.config), dtype).eval()
        expected = module.state_dict()
        check_names_and_shapes(expected, tensors, f"{stored.name}: {component}")
        unread = module.unread() if isinstance(module, VisionTowers) else ()
        values = {name: converted(name, tensors[name], like.dtype, "cpu" if name in unread else device) for name, like in expected.items()}
        module.load_state_dict(values, assign=True)
        if stray := [name for name, tensor in module.named_buffers() if tensor.is_meta]:
            raise ValueError(f"{stored.name}: {component} computes tensors that are not saved ({_some(stray)}); choose another tower")
        modules[component] = module
    model, vision, vq = (modules.get(component) for component in COMPONENTS)
    return Bundle(stored.config, model, vision, vq, stored.tokenizer_file, stored.judge_file)  # type: ignore[arg-type]


def save(bundle: Bundle, folder: str | Path, *, dtype: torch.dtype | None = None, texts: Mapping[str, str] | None = None) -> None:
    """Writes a model folder, whole or not at all. See `write`."""
    modules = {"model": bundle.model, "vision": bundle.vision, "vq": bundle.vq}
    components = {name: module.state_dict() for name, module in modules.items() if module is not None}
    write(Stored("the model", bundle.config, components, bundle.tokenizer_file, bundle.judge_file), folder, dtype=dtype, texts=texts)


def write(stored: Stored, folder: str | Path, *, dtype: torch.dtype | None = None, texts: Mapping[str, str] | None = None) -> None:
    """Writes a model folder, whole or not at all; its other files stay, if it is there already.

    dtype: type of the stored values (None: as they are); FP32_PARAMETERS stay fp32. int8 packs matrices and keeps small tensors in
    fp32 (see `packing`). texts: further files by name.
    """
    with whole_folder(Path(folder), MODEL_FILES, last=CONFIG_FILE) as partial:
        for component, tensors in stored.components.items():
            write_safetensors(tensors if dtype is None else all_converted(component, stored, dtype), partial, component)
        if stored.tokenizer_file is not None:
            (partial / TOKENIZER_FILE).write_bytes(stored.tokenizer_file.read_bytes())
        if stored.judge_file is not None:
            judge = TensorFile(stored.judge_file)
            write_safetensors(pack(judge) if dtype is torch.int8 else judge, partial, JUDGE_FILE.removesuffix(SAFETENSORS))
        config = json.dumps(stored.config.to_dict(), indent=2) + "\n"
        for name, text in {**(texts or {}), CONFIG_FILE: config}.items():
            (partial / name).write_text(text, encoding="utf-8")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = DTYPES | {"int8": torch.int8}


def stored_dtype(name: str | None) -> torch.dtype | None:
    """The type that weights are written in, by name; None is as they are."""
    if name is not None and name not in STORED_DTYPES:
        raise ValueError(f"unknown dtype {name!r}; {nearest_name(name, STORED_DTYPES)}")
    return None if name is None else STORED_DTYPES[name]


def outline(component: str, config: OmniMambaConfig) -> nn.Module:
    """A component's module on the meta device: names, shapes and types without memory."""
    with torch.device("meta"):
        if component == "model":
            return OmniMambaModel(config)
        return VQModel(config.vq) if component == "vq" else VisionTowers(config.towers)


def converted(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A copy in `dtype` on `device`. ValueError if finite values overflow, as large ones do in fp16."""
    result = tensor.to(device, dtype, copy=True)
    if dtype is torch.float16 and tensor.dtype is not dtype and result.isinf().sum() != tensor.isinf().sum().to(device):
        raise ValueError(f"{name} has values up to {tensor.abs().max():.3g}, too large for {dtype}; use bfloat16 or float32")
    return result


def all_converted(component: str, stored: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
    """A component's tensors in `dtype`, as `cast` would have them, or packed for int8."""
    floats = torch.float32 if dtype is torch.int8 else dtype
    expected, tensors = cast(outline(component, stored.config), floats).state_dict(), stored.components[component]
    check_names_and_shapes(expected, tensors, f"{stored.name}: {component}")
    values = {name: converted(name, tensors[name], like.dtype) for name, like in expected.items()}
    return pack(values) if dtype is torch.int8 else values


# ---- sources


def open_model(source: str | Path) -> Stored:
    """The stored model `source`: `nano` (shipped), a folder, a Hub id owner/name, or an official checkpoint file."""
    path = locate(source)
    return open_folder(path) if path.is_dir() else open_official(path)


def locate(source: str | Path) -> Path:
    """The folder or file of a source, fetched from the Hub if it is a Hub id. ValueError if there is no such model."""
    if source == SHIPPED_MODEL:
        path = Path(str(importlib.resources.files("omnimamba"))) / "assets" / SHIPPED_MODEL
        if not path.is_dir():
            raise ValueError(f"the shipped model {SHIPPED_MODEL!r} is not in this installation ({path}); install omnimamba again")
        return path
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and hub.is_repo_id(source):
        return hub.fetch(source, (*MODEL_FILES, hub.CARD_FILE), what=f"{CONFIG_FILE}, model.safetensors and what else the model has")
    if source in PRESETS:
        raise ValueError(
            f"{source!r} is a preset, a shape without weights; pass {SHIPPED_MODEL!r}, a folder, a Hub id or a checkpoint file"
        )
    raise ValueError(
        f"there is no file or folder {str(source)!r}; pass {SHIPPED_MODEL!r}, a folder, a Hub id owner/name or a checkpoint file"
    )


def open_folder(folder: Path) -> Stored:
    """The model of a folder that `write` wrote."""
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_FILE}, so it is no model folder; official checkpoints become one by `omnimamba convert SOURCE FOLDER`"
        )
    try:
        config = OmniMambaConfig.from_dict(read_json(folder / CONFIG_FILE))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    found = {component: read_safetensors(folder, component) for component in COMPONENTS}
    components = {component: tensors for component, tensors in found.items() if tensors is not None}
    if "model" not in components:
        raise ValueError(f"{folder} has no model.safetensors; fetch or save the folder again")
    return Stored(str(folder), config, components, _file_in(folder, TOKENIZER_FILE), _file_in(folder, JUDGE_FILE))


def open_official(path: Path, config: OmniMambaConfig | None = None) -> Stored:
    """The model of a checkpoint with official names, and of the tokenizer.json beside it, if there is one.

    config: None reads the sizes off the tensors, which is possible for the released model's kind.
    """
    tensors = TensorFile(path)
    try:
        components = from_official(tensors)
        if "model" not in components:
            raise ValueError("holds no tensor of the language model")
        return Stored(str(path), config or infer_config(components), components, _file_in(path.parent, TOKENIZER_FILE))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _file_in(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.is_file() else None
