"""Model shapes: one frozen dataclass per part, presets by name, validated on construction.

Nothing here imports torch, so that commands which only need a shape (`omnimamba --help`, recipe checks) start fast.
The released sizes are those of arXiv 2503.08686 and of the authors' published classes (hustvl/OmniMamba b372978).
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Iterable
from typing import Any, TypeVar

_Part = TypeVar("_Part")

SPECIAL_TOKENS = (
    "[PAD]",
    "<|soi|>",
    "<|eoi|>",
    "<|sot|>",
    "<|eot|>",
    "<|t2i|>",
    "<|mmu|>",
    "<|soc|>",
    "<|eoc|>",
    "<|lvg|>",
)
"""Added to a base tokenizer in this order, one id each, directly after its last id (authors' UniversalPrompting)."""

EOS_TOKEN = "<|endoftext|>"
IGNORE_INDEX = -100
"""Label of a position without a loss (PyTorch's default for cross entropy)."""


class Task(enum.StrEnum):
    """The two tasks of the paper. A task is an argument of a call, never a property of a module."""

    MMU = "mmu"
    """Multimodal understanding: image and text in, text out."""
    T2I = "t2i"
    """Text to image: caption in, image tokens out."""


class PromptStyle(enum.StrEnum):
    """How a question is put in words; see docs/differences.md for why there are two."""

    IN_OUT = "in_out"
    """`In: {question}\\nOut: `, the text that the authors' training data uses."""
    USER_ASSISTANT = "user_assistant"
    """`USER: {question} ASSISTANT:`, the text that the authors' inference script uses."""


class Quantization(enum.StrEnum):
    """Weights of fewer than 16 bits that a model computes with; see ops/quant.py."""

    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"


def require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:  # also true of NaN
            raise ValueError(f"{name}={value} is not positive")


def quantization(name: str) -> Quantization:
    """The scheme of a name. ValueError with the nearest name if there is none."""
    if name not in list(Quantization):
        raise ValueError(f"unknown quantization {name!r}; {nearest_name(str(name), Quantization)}")
    return Quantization(name)


MOST_NAMES = 60
"""Listed in an error message; all keys of a recipe's section, not all images of a folder."""


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """A hint for an error message: `did you mean 'x'?` if a valid name is near, else the list of valid names."""
    names = sorted(map(str, valid))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"valid: {', '.join(names[:MOST_NAMES])}{more}"


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Mamba-2 backbone (Dao & Gu 2024, arXiv:2405.21060): pre-norm blocks of one mixer each, no MLP."""

    d_model: int = 2048
    n_layer: int = 48
    d_state: int = 128
    headdim: int = 64
    expand: int = 2
    d_conv: int = 4
    ngroups: int = 1
    chunk_size: int = 256
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require_positive(**dataclasses.asdict(self))
        if self.d_inner % self.headdim:
            raise ValueError(f"expand*d_model={self.d_inner} is not a multiple of headdim={self.headdim}")
        if self.nheads % self.ngroups:
            raise ValueError(f"nheads={self.nheads} is not a multiple of ngroups={self.ngroups}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels that pass the causal convolution: x, B and C."""
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """Rows of in_proj: z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.nheads


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Task LoRA on in_proj (paper section 3.3; sizes from the authors' code)."""

    rank: int = 8
    """0: no task LoRA, the ablation of the paper's table 4."""
    alpha: float = 32.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        require_positive(alpha=self.alpha)
        if self.rank < 0:
            raise ValueError(f"lora rank={self.rank} is negative; pass 0 for none")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout={self.dropout} is outside [0, 1)")

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One frozen image encoder of the understanding path, built by `timm.create_model(timm_name, **timm_kwargs)`.

    Its tokens are the features after block `layer` (negative counts from the end; -2 is the second-to-last, as in
    Prismatic/Cobra), flattened to rows of `dim` numbers; `num_tokens` of them.
    """

    timm_name: str
    dim: int
    image_size: int
    num_tokens: int
    layer: int = -2
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    timm_kwargs: tuple[tuple[str, Any], ...] = ()
    mean_token: bool = False
    """The mean of the rows follows them as one more token, which `num_tokens` counts. Not in the paper."""

    def __post_init__(self) -> None:
        require_positive(dim=self.dim, image_size=self.image_size, num_tokens=self.num_tokens)
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ValueError(f"tower mean={self.mean}, std={self.std}: pass one number each for red, green and blue, std above 0")


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """LlamaGen VQ tokenizer (Sun et al. 2024, arXiv:2406.06525): CNN encoder, l2-normalised codebook, CNN decoder."""

    image_size: int = 256
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8

    def __post_init__(self) -> None:
        require_positive(
            image_size=self.image_size,
            ch=self.ch,
            num_res_blocks=self.num_res_blocks,
            z_channels=self.z_channels,
            codebook_size=self.codebook_size,
            codebook_dim=self.codebook_dim,
        )
        if not self.ch_mult or not all(isinstance(multiple, int) and multiple > 0 for multiple in self.ch_mult):
            raise ValueError(f"vq.ch_mult={self.ch_mult} must hold a positive whole number per resolution")
        if self.ch % 32:
            raise ValueError(f"vq.ch={self.ch} is not a multiple of 32, the number of normalisation groups")
        if self.image_size % self.downsample:
            raise ValueError(f"vq.image_size={self.image_size} is not a multiple of the {self.downsample}-fold downsampling")

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def grid_size(self) -> int:
        return self.image_size // self.downsample

    @property
    def num_image_tokens(self) -> int:
        return self.grid_size**2


@dataclasses.dataclass(frozen=True)
class OmniMambaConfig:
    """Everything that fixes the shape of a model and the layout of its prompts."""

    name: str = "1.3b"
    backbone: BackboneConfig = BackboneConfig()
    lora: LoraConfig = LoraConfig()
    vq: VQConfig = VQConfig()
    towers: dict[str, TowerConfig] = dataclasses.field(default_factory=dict)
    text_vocab_size: int = 50288
    """Rows of the text embedding: base tokenizer, special tokens, padding to a multiple of 16."""
    base_vocab_size: int = 50277
    """Ids of the base tokenizer; the special tokens follow."""
    eos_id: int = 0
    max_caption_tokens: int = 68
    mmu_positions: int = 1500
    prompt_style: PromptStyle = PromptStyle.USER_ASSISTANT
    quantization: Quantization | None = None
    """Of in_proj, out_proj and the embeddings; None: all weights are floating-point numbers."""
    unified_vocabulary: bool = False
    """One vocabulary of text tokens and image tokens, the ablation of the paper's table 4: a loss is over both, and an image token is
    embedded by its row alone, as a text token is. Sampling takes the tokens of its task."""

    def __post_init__(self) -> None:
        if self.prompt_style not in list(PromptStyle):
            raise ValueError(f"unknown prompt_style {self.prompt_style!r}; {nearest_name(str(self.prompt_style), PromptStyle)}")
        object.__setattr__(self, "prompt_style", PromptStyle(self.prompt_style))
        if self.quantization is not None:
            object.__setattr__(self, "quantization", quantization(self.quantization))
        require_positive(max_caption_tokens=self.max_caption_tokens, mmu_positions=self.mmu_positions)
        if self.text_vocab_size < self.base_vocab_size + len(SPECIAL_TOKENS):
            raise ValueError(
                f"text_vocab_size={self.text_vocab_size} has no room for base_vocab_size={self.base_vocab_size} "
                f"and {len(SPECIAL_TOKENS)} special tokens"
            )
        if not 0 <= self.eos_id < self.base_vocab_size:
            raise ValueError(f"eos_id={self.eos_id} is not among the base_vocab_size={self.base_vocab_size} ids of the base tokenizer")
        if len({tower.num_tokens for tower in self.towers.values()}) > 1:
            raise ValueError("vision towers differ in num_tokens; their features are concatenated token by token")
        if self.towers and self.mmu_positions < self.num_vision_tokens + 5:
            raise ValueError(f"mmu_positions={self.mmu_positions} leaves no room for text after {self.num_vision_tokens} image tokens")

    @property
    def num_vision_tokens(self) -> int:
        return next(iter(self.towers.values())).num_tokens if self.towers else 0

    @property
    def vision_dim(self) -> int:
        return sum(tower.dim for tower in self.towers.values())

    @property
    def image_vocab_size(self) -> int:
        return self.vq.codebook_size

    @property
    def num_image_tokens(self) -> int:
        return self.vq.num_image_tokens

    @property
    def t2i_prompt_length(self) -> int:
        """[t2i][sot] caption [eot][soi]: 72 in the released model."""
        return self.max_caption_tokens + 4

    @property
    def t2i_positions(self) -> int:
        """Rows of the T2I position table: prompt, image tokens, [eoi]; 73+256 in the released model."""
        return self.t2i_prompt_length + 1 + self.num_image_tokens

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `from_dict` reads back to an equal config."""
        values = dataclasses.asdict(self)
        if self.quantization is None:
            del values["quantization"]  # a saved state stays bound to the fingerprint that its model has had
        for tower in values["towers"].values():
            tower["timm_kwargs"] = dict(tower["timm_kwargs"])
            if not tower["mean_token"]:
                del tower["mean_token"]  # likewise
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OmniMambaConfig:
        """The config of `to_dict`, of JSON or of TOML; see `build` for what is refused."""
        values = dict(values)
        for key, part in (("backbone", BackboneConfig), ("lora", LoraConfig), ("vq", VQConfig)):
            if key in values:
                values[key] = build(part, values[key], key)
        if "towers" in values:
            if not isinstance(values["towers"], dict):
                raise ValueError(f"towers={values['towers']!r} is not a dict of towers by name")
            values["towers"] = {name: build(TowerConfig, tower, f"towers.{name}") for name, tower in values["towers"].items()}
        return build(cls, values, "config")


_CHECKED_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "tuple": (list, tuple, dict),
}


def build(cls: type[_Part], values: dict[str, Any], where: str) -> _Part:
    """A dataclass from a dict; lists become tuples, dicts of a tuple-typed field its items.

    Raises ValueError for an unknown key, naming the nearest valid one, for a missing key and for a value of a wrong type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}={values!r} is not a dict of values by name")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"unknown key {key!r} in {where}; {nearest_name(key, fields)}")
        name = str(fields[key].type).partition("[")[0]
        expected = _CHECKED_TYPES.get(name)
        if expected and (not isinstance(value, expected) or isinstance(value, bool) != (name == "bool")):
            raise ValueError(f"{key}={value!r} in {where} is not of type {fields[key].type}")
    required = [name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"missing in {where}: {', '.join(missing)}")
    return cls(**{key: freeze(value, str(fields[key].type)) for key, value in values.items()})


def freeze(value: Any, annotation: str) -> Any:
    if not annotation.startswith("tuple"):
        return value
    if isinstance(value, dict):
        return tuple((key, freeze(item, "tuple") if isinstance(item, list) else item) for key, item in value.items())
    return tuple(value)


DINO = TowerConfig(
    "vit_large_patch14_reg4_dinov2.lvd142m",
    dim=1024,
    image_size=384,
    num_tokens=729,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
SIGLIP = TowerConfig("vit_so400m_patch14_siglip_384", dim=1152, image_size=384, num_tokens=729)

_NANO = OmniMambaConfig(
    name="nano",
    backbone=BackboneConfig(d_model=256, n_layer=8, d_state=64, chunk_size=64),
    vq=VQConfig(image_size=128, ch=32, ch_mult=(1, 2, 2, 2), z_channels=64, codebook_size=2048),
    towers={
        "emoji": TowerConfig(
            "resnet34",
            dim=320,
            image_size=128,
            num_tokens=17,
            layer=-1,
            timm_kwargs=(("channels", (48, 96, 192, 320)),),
            mean_token=True,
        )
    },
    text_vocab_size=2048,
    base_vocab_size=2038,
    max_caption_tokens=32,
    mmu_positions=256,
    prompt_style=PromptStyle.IN_OUT,
)

PRESETS = {
    "1.3b": OmniMambaConfig(towers={"dino": DINO, "siglip": SIGLIP}),
    "L": OmniMambaConfig(name="L", backbone=BackboneConfig(d_model=1024), towers={"dino": DINO, "siglip": SIGLIP}),
    "nano": _NANO,
    "tiny": dataclasses.replace(
        _NANO,
        name="tiny",
        backbone=BackboneConfig(d_model=64, n_layer=2, d_state=16, headdim=32, chunk_size=16),
        vq=VQConfig(image_size=32, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=32, codebook_size=64),
        towers={
            "vit": TowerConfig(
                "vit_tiny_patch16_224",
                dim=32,
                image_size=32,
                num_tokens=16,
                timm_kwargs=(("patch_size", 8), ("embed_dim", 32), ("depth", 3), ("num_heads", 2)),
            )
        },
    ),
}


def preset(name: str) -> OmniMambaConfig:
    """The config of a named preset: `1.3b` (released), `L`, `nano` (shipped), `tiny` (tests)."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {nearest_name(name, PRESETS)}")
    return PRESETS[name]
