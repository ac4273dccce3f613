"""Recipes: TOML files with one section per concern, checked before anything is built.

`kind` says what is trained: `tokenizer` (text), `vq` (image tokenizer), `tower` (understanding encoder, contrastively) or `omnimamba`
(a stage of the language model).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnimamba.config import PRESETS, OmniMambaConfig, build, nearest_name
from omnimamba.data.augment import Augmentation
from omnimamba.data.huggingface import COLUMN
from omnimamba.model.contrastive import HEAD_WIDTH
from omnimamba.train.stages import LORA_STAGES, PRESETS_WITHOUT_PRETRAINED_BACKBONE, STAGES

IMAGE_SOURCES = ("parquet", "folder", "datasets")
KINDS = ("tokenizer", "vq", "tower", "omnimamba")
PARALLEL_MODES = ("ddp", "fsdp")
TRACKERS = ("trackio", "wandb")


def at_least(section: str, values: Any, low: float, *names: str, at_most: float = math.inf) -> None:
    """ValueError for a value of the section that is below `low` or above `at_most`, is infinite or is not a number."""
    for name in names:
        value = getattr(values, name)
        if not low <= value <= at_most or value == math.inf:
            limits = f"{low:g} or more" if at_most == math.inf else f"{low:g} to {at_most:g}"
            raise ValueError(f"{section}.{name}={value}; pass {limits}")


@dataclasses.dataclass(frozen=True)
class Init:
    """Where the weights before the first step come from; empty means random (for towers and VQ: not needed by this recipe)."""

    model: str = ""
    """A model (`nano`, a folder, a Hub id; for a tower: the folder of a finished tower): the result of one earlier stage. Its tokenizer
    and encoders are used where those below are not named."""
    encoders: str = ""
    """A model whose tokenizer and encoders are used where those below are not named; for one that starts without weights of a model."""
    adapter: str = ""
    """An adapter folder to put into it."""
    mmu: str = ""
    t2i: str = ""
    """Two model folders, the results of both stage 1 runs, merged (see `stages.merge_stage1`)."""
    shared: str = ""
    """Which of the two gives what both hold, if they differ: `mmu` or `t2i`."""
    backbone: str = ""
    """A Mamba-2 language model in mamba_ssm's format (file, folder or Hub id), e.g. `state-spaces/mamba2-1.3b`."""
    vision: str = ""
    """`vision.safetensors` of the frozen towers."""
    vq: str = ""
    """`vq.safetensors` of the frozen image tokenizer; for kind vq, the weights to start from."""
    tokenizer: str = ""
    """`tokenizer.json` of the base text tokenizer."""

    def __post_init__(self) -> None:
        if bool(self.mmu) != bool(self.t2i):
            raise ValueError("init.mmu and init.t2i belong together: name both stage 1 results")
        if self.adapter and not self.model:
            raise ValueError("init.adapter goes into a finished model: name init.model")
        if len(starts := [name for name in ("model", "mmu", "backbone") if getattr(self, name)]) > 1:
            raise ValueError(f"init.{' and init.'.join(starts)} all say where the model starts; name one")


@dataclasses.dataclass(frozen=True)
class Data:
    folder: str = ""
    """Root of all relative names below."""
    images: str = "parquet"
    """`parquet`: files `{split}-*.parquet` with columns id and image; `folder`: image files by relative path; `datasets`: what Hugging
    Face's `datasets` reads, data.folder being a folder or a Hub id."""
    image_column: str = "image"
    """Of a data set of kind `datasets`; `jpg` or `png` in WebDataset shards."""
    streaming: bool = False
    """Read a data set of kind `datasets` row by row, without storing it; the validation split is read as a whole."""
    stream_buffer: int = 1000
    """Rows that a stream is shuffled in."""
    max_broken: int = 0
    """Missing and unreadable images that are left out, each with a warning; one more is an error."""
    captions: str = ""
    """Caption file, `{split}` is replaced; or `column:NAME` of a data set of kind `datasets`."""
    conversations: str = ""
    """Conversation file in LLaVA's format, `{split}` is replaced; or `column:NAME` of a data set of kind `datasets`."""
    kinds: tuple[str, ...] = ()
    """Use only conversations whose `type` is one of these; empty: all."""
    repeat: dict[str, int] = dataclasses.field(default_factory=dict)
    """How often conversations of a `type` come in an epoch of training, as in { name = 3 }; 1 for types that are not named."""
    joined: float = 0.0
    """Share of images that get one sample more, of all that is asked about them: practice in longer conversations."""
    alignment: bool = False
    """Use only the first answer of a conversation, without its question (LLaVA's alignment stage)."""
    tokens: str = ""
    """Parquet of VQ ids made by `omnimamba tokenize`, `{split}` is replaced; empty: the images are tokenised by init.vq at the start."""
    versions: int = 1
    """Painted images are read as themselves and as versions - 1 copies with the changes of [augment_painting], one drawn each time."""
    train_split: str = "train"
    val_split: str = ""
    """Empty: no validation."""
    in_memory: bool = False
    num_threads: int = 8

    def __post_init__(self) -> None:
        if self.images not in IMAGE_SOURCES:
            raise ValueError(f"data.images={self.images!r}; {nearest_name(self.images, IMAGE_SOURCES)}")
        at_least("data", self, 1, "num_threads", "stream_buffer", "versions")
        at_least("data", self, 0, "joined", at_most=1)
        at_least("data", self, 0, "max_broken")
        if not isinstance(self.repeat, dict) or not all(isinstance(times, int) and times > 0 for times in self.repeat.values()):
            raise ValueError(f"data.repeat={self.repeat}; pass a number of 1 or more for each type, as in {{ name = 3 }}")
        if self.versions > 1 and (self.tokens or self.streaming):
            raise ValueError(f"data.versions={self.versions} are made of the images at the start; leave out data.tokens and data.streaming")
        if self.streaming and (self.images != "datasets" or self.tokens or self.joined or self.kinds or self.repeat or self.in_memory):
            raise ValueError("data.streaming is for data.images='datasets', without tokens, joined, kinds, repeat and in_memory")
        for name in ("captions", "conversations"):
            if self.streaming and getattr(self, name) and not getattr(self, name).startswith(COLUMN):
                raise ValueError(f"data.{name}={getattr(self, name)}: of a stream name a column, as in column:{name}")
            if getattr(self, name).startswith(COLUMN) and self.images != "datasets":
                raise ValueError(f"data.{name}={getattr(self, name)} names a column, which only data.images='datasets' has")


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 0
    lr: float = 0.0
    stage: str = ""
    """For kind omnimamba: a row of `stages.STAGES`."""
    mmu_batch: int = 0
    t2i_batch: int = 0
    batch: int = 0
    """For kinds vq and tower."""
    warmup: int = 0
    min_lr_ratio: float = 0.01
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    precision: str = "bf16"
    """Autocast type: `bf16` or `fp32`; weights and optimizer stay fp32."""
    accumulate: int = 1
    """Parts that each process computes its share of a step in, one after the other: less memory, the same step. See `parts_of_tasks`."""
    recompute: bool = False
    """Keep little of each block for the backward pass and compute the rest again (activation checkpointing)."""
    loss_chunk: int = 0
    """Positions whose scores over the vocabulary exist at once; 0: all of a step's."""
    graphs: bool = False
    """Record the steps of kind omnimamba as CUDA graphs (see `graphs.py`): for models that wait for Python; takes more memory."""
    parallel: str = "ddp"
    """With several processes: `ddp`, or `fsdp`, which spreads weights and optimizer over them."""
    train_backbone: bool = False
    """In a stage 1, train backbone and text embedding too: for models without a pretrained language model."""
    standardise_features: bool = False
    """Start the projector so that it sees standardised tower features (see `omnimamba.standardise_features`)."""
    caption_dropout: float = 0.0
    """Share of captions replaced by the null prompt, which makes classifier-free guidance possible."""
    image_token_noise: float = 0.0
    """Share of the image tokens read that are replaced by random ones: practice in going on from an image that is not perfect."""
    mean_by_sample: bool = False
    """Each understanding sample counts the same, however long its answers; else each token does, as in the authors' code."""
    max_text_tokens: int = 449
    """Longest question-and-answer text of an understanding sample (449 in the authors' code)."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is sampled, validated and exported; 0 is off."""
    keep_start: float = 0.0
    """Share of the weights of init.model in the finished tower or language model, the rest being those learned since: such an average
    keeps much of what training on gains and of what it loses (Wortsman et al. 2022, arXiv:2109.01903)."""
    seed: int = 0
    tracker: str = ""
    """`wandb` or `trackio`: where the figures go too; empty: log.jsonl and TensorBoard only."""
    log_every: int = 10
    val_every: int = 0
    sample_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    """The newest so many are kept, and the best."""
    best: str = ""
    """A figure of the validation, e.g. `mmu`: the checkpoint where it is best is kept, and exported to `best/`; empty: none."""
    best_is: str = "lowest"
    """Whether the best figure is the `lowest` or the `highest`."""

    def parts_of_tasks(self, num_processes: int) -> dict[str, int]:
        """How many parts the batch of each task is computed in, by the key that has its size.

        On one process a part has samples of one task, for small batches run badly: parts are dealt out in proportion to the batches.
        Several processes exchange gradients in the last part, so that there each part has samples of all tasks.
        """
        batches = {name: size for name in ("mmu_batch", "t2i_batch") if (size := getattr(self, name))}
        if num_processes > 1 or self.accumulate == 1 or len(batches) < 2:
            return dict.fromkeys(batches, self.accumulate)
        mmu = round(self.accumulate * self.mmu_batch / sum(batches.values()))
        mmu = min(max(mmu, 1), self.accumulate - 1)
        return {"mmu_batch": mmu, "t2i_batch": self.accumulate - mmu}

    def __post_init__(self) -> None:
        at_least("train", self, 1, "log_every", "keep_checkpoints", "max_text_tokens", "accumulate")
        at_least("train", self, 0, "steps", "lr", "mmu_batch", "t2i_batch", "batch", "warmup", "weight_decay", "grad_clip", "seed")
        at_least("train", self, 0, "val_every", "sample_every", "save_every", "loss_chunk")
        at_least("train", self, 0, "caption_dropout", "image_token_noise", "ema", "keep_start", "min_lr_ratio", "beta1", "beta2", at_most=1)
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"train.precision={self.precision!r}; valid: bf16, fp32")
        if self.tracker and self.tracker not in TRACKERS:
            raise ValueError(f"train.tracker={self.tracker!r}; {nearest_name(self.tracker, TRACKERS)}")
        if self.parallel not in PARALLEL_MODES:
            raise ValueError(f"train.parallel={self.parallel!r}; {nearest_name(self.parallel, PARALLEL_MODES)}")
        if self.best_is not in ("lowest", "highest"):
            raise ValueError(f"train.best_is={self.best_is!r}; valid: lowest, highest")
        if self.best and not self.val_every:
            raise ValueError(f"train.best={self.best!r} is a figure of the validation; set train.val_every")


@dataclasses.dataclass(frozen=True)
class VQTraining:
    """Loss weights of the image tokenizer (names as in LlamaGen, arXiv:2406.06525, section 2.1)."""

    decoder_only: bool = False
    """Freeze encoder and codebook: images are painted better, and the ids that a model has learned stay what they are."""
    l1: float = 1.0
    l2: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0
    discriminator: float = 0.0
    discriminator_start: int = 0
    perceptual: float = 0.0
    """Weight of the distance in the features of the tower named by init.vision."""

    def __post_init__(self) -> None:
        at_least("vq", self, 0, "l1", "l2", "codebook", "commitment", "entropy", "discriminator", "discriminator_start", "perceptual")


@dataclasses.dataclass(frozen=True)
class TowerTraining:
    """Contrastive training against all texts of each label column (see `tower.py`)."""

    labels: dict[str, float] = dataclasses.field(default_factory=lambda: {"caption": 1.0})
    """Text columns of the Parquet files and the weights of their losses."""
    plain_share: float = 0.0
    """Share of each batch that gets the changes of [augment_plain] instead of [augment], and no mixup."""
    collage_share: float = 0.0
    """Share of each batch whose images are turned, become collages of images with the same `collage_labels`, and teach these alone."""
    collage_labels: tuple[str, ...] = ()
    """Columns that say how an image is drawn, not what it shows. Learned on collages and plain images: changes of colour destroy
    them, and from whole drawings alone a network learns by heart who drew what."""
    label_smoothing: float = 0.1
    mixup: float = 0.0
    """Parameter of the Beta distribution that images are blended by (Zhang et al. 2018, arXiv:1710.09412); 0 is off."""
    embedding_dim: int = 192
    text_width: int = 96

    def __post_init__(self) -> None:
        at_least("tower", self, 0, "plain_share", "collage_share", "label_smoothing", at_most=1)
        at_least("tower", self, 0, "mixup")
        at_least("tower", self, 1, "embedding_dim")
        if self.text_width < 1 or self.text_width % HEAD_WIDTH:
            raise ValueError(f"tower.text_width={self.text_width} is not a multiple of {HEAD_WIDTH}, the width of an attention head")
        weights = self.labels.values() if isinstance(self.labels, dict) else ()
        if not weights or not all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in weights):
            raise ValueError(f"tower.labels={self.labels!r}; pass a weight of 0 or more for each text column, as in {{ caption = 1.0 }}")
        if self.plain_share + self.collage_share > 1:
            raise ValueError(f"tower.plain_share + tower.collage_share = {self.plain_share + self.collage_share} exceeds 1")
        if stray := set(self.collage_labels) - set(self.labels):
            raise ValueError(f"tower.collage_labels names {', '.join(sorted(stray))}, not in tower.labels; valid: {', '.join(self.labels)}")
        if bool(self.collage_labels) != bool(self.collage_share):
            raise ValueError("tower.collage_labels and tower.collage_share belong together: set both")


@dataclasses.dataclass(frozen=True)
class LookalikeTraining:
    """Questions come with images that the tower takes for theirs (see `lookalikes.py`)."""

    versions: int = 0
    """Copies of each image, with the changes of [augment], that the tower looks at before the first step; 0: off."""
    blend: float = 0.5
    """Share of them that are blended with another image."""
    plain: float = 0.0
    """Share of the copies that are neither changed nor blended."""
    temperature: float = 1.0
    """Of the tower's probabilities: below 1, what it thinks most probable is drawn more often."""
    least_weight: float = 0.0
    """Of the other image in a blend; the most is a half."""
    soft: bool = False
    """Answers that are a text of a column are learned with what the tower gives the other texts: each token with the probabilities of all
    that may follow the ones before it."""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """For a kind of question the text column of the Parquet files that it depends on, as in { name = "caption" }. Questions of other
    kinds come with a version of their own image."""

    def __post_init__(self) -> None:
        at_least("lookalikes", self, 0, "versions")
        at_least("lookalikes", self, 0, "blend", "plain", at_most=1)
        at_least("lookalikes", self, 0, "least_weight", at_most=0.5)
        at_least("lookalikes", self, 0.01, "temperature")
        if not isinstance(self.labels, dict) or not all(isinstance(column, str) for column in self.labels.values()):
            raise ValueError(f'lookalikes.labels={self.labels}; pass a column for each kind of question, as in {{ name = "caption" }}')
        if bool(self.versions) != bool(self.labels):
            raise ValueError("lookalikes.versions and lookalikes.labels belong together: set both")


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is painted and described during training, with the settings of inference."""

    prompts: tuple[str, ...] = ()
    num_images: int = 8
    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if wrong := [prompt for prompt in self.prompts if not isinstance(prompt, str)]:
            raise ValueError(f"samples.prompts holds {wrong[0]!r}; pass texts")


@dataclasses.dataclass(frozen=True)
class Recipe:
    kind: str
    preset: str
    train: Train = Train()
    init: Init = Init()
    data: Data = Data()
    augment: Augmentation = Augmentation()
    augment_painting: Augmentation = Augmentation()
    """For the versions of painted images."""
    augment_plain: Augmentation = Augmentation()
    """For the plain images of tower training."""
    vq: VQTraining = VQTraining()
    tower: TowerTraining = TowerTraining()
    lookalikes: LookalikeTraining = LookalikeTraining()
    samples: Samples = Samples()
    out: str = ""
    """Run folder; by default runs/ and the recipe's name."""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Changes to the preset, by the names of a model's config.json: `model.lora.rank = 4`, `model.backbone.n_layer = 6`."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; {nearest_name(self.kind, KINDS)}")
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; {nearest_name(self.preset, PRESETS)}")
        if not isinstance(self.model, dict):
            raise ValueError(f"model={self.model!r} must be a section, [model]")
        _ = self.config  # raises for changes that make no model
        if self.kind == "tokenizer":
            if self.train != Train():
                raise ValueError("a tokenizer is counted, not trained in steps: leave [train] out of its recipe")
            return
        for name in ("steps", "lr"):
            if getattr(self.train, name) == 0:
                raise ValueError(f"train.{name} is missing; name it, above 0")
        if self.train.keep_start and not self.init.model:
            raise ValueError(f"train.keep_start={self.train.keep_start} keeps weights of a finished model: name init.model")
        if self.kind == "omnimamba":
            self._check_stage()
            return
        if self.train.graphs:
            raise ValueError(f"train.graphs=true is for omnimamba recipes; leave it out of a {self.kind} recipe")
        if self.data.max_broken:
            raise ValueError(f"data.max_broken={self.data.max_broken} is for omnimamba recipes; a {self.kind} needs all of its images")
        if self.train.batch < 1:
            raise ValueError(f"train.batch={self.train.batch}: a {self.kind} recipe needs a batch of at least 1")
        if self.kind == "tower" and not self.init.tokenizer:
            raise ValueError("a tower recipe reads text: name init.tokenizer")
        if self.train.keep_start and self.kind != "tower":
            raise ValueError(f"train.keep_start={self.train.keep_start} is for omnimamba and tower recipes; a {self.kind} keeps nothing")

    @functools.cached_property
    def config(self) -> OmniMambaConfig:
        """The preset with the changes of [model]."""
        return OmniMambaConfig.from_dict(merged(PRESETS[self.preset].to_dict(), self.model, "model"))

    def _check_stage(self) -> None:
        train = self.train
        if train.stage not in STAGES:
            raise ValueError(f"unknown train.stage {train.stage!r}; {nearest_name(train.stage, STAGES)}")
        stage = STAGES[train.stage]
        for task, batch in (("mmu", train.mmu_batch), ("t2i", train.t2i_batch)):
            if (task in stage.tasks) != (batch > 0):
                raise ValueError(f"train.{task}_batch={batch}, but {train.stage} trains {' and '.join(stage.tasks)}")
        if self.lookalikes.versions and not (self.data.images == "parquet" and self.data.in_memory and "mmu" in stage.tasks):
            raise ValueError("lookalikes.versions needs a stage of understanding, data.images='parquet' and data.in_memory=true")
        if train.train_backbone and self.preset not in PRESETS_WITHOUT_PRETRAINED_BACKBONE:
            raise ValueError(f"train.train_backbone=true is for presets without a pretrained backbone, not for {self.preset}")
        if train.stage in LORA_STAGES and not (self.init.model and self.config.lora.rank):
            raise ValueError(f"{train.stage} trains the LoRA of a finished model: name init.model, of a lora.rank above 0")
        starts_here = train.stage == "stage1_mmu" or (train.stage == "stage2" and not (self.init.model or self.init.mmu))
        if train.standardise_features and not starts_here:
            raise ValueError(
                "train.standardise_features is for a projector that has not learned yet: for stage1_mmu, or a stage2 that starts from "
                f"no model, not for this {train.stage}"
            )
        if train.standardise_features and train.keep_start:
            raise ValueError("train.standardise_features changes the projector that train.keep_start is to keep; leave one out")
        if "t2i" in stage.tasks and not self.data.captions:
            raise ValueError(f"{train.stage} paints: name data.captions")
        if "t2i" in stage.tasks and not (self.data.tokens or self.init.vq or self.init.model or self.init.encoders):
            raise ValueError(f"{train.stage} paints: name data.tokens (made by `omnimamba tokenize`), or init.vq to tokenise at the start")
        if "mmu" in stage.tasks and not self.data.conversations:
            raise ValueError(f"{train.stage} reads images: name data.conversations")


def merged(values: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    """The values with the changes, part by part."""
    result = dict(values)
    for key, change in changes.items():
        if isinstance(result.get(key), dict):
            if not isinstance(change, dict):
                raise ValueError(f"{where}.{key}={change!r} is not a section")
            change = merged(result[key], change, f"{where}.{key}")
        result[key] = change
    return result


SECTIONS: dict[str, type] = {
    "train": Train,
    "init": Init,
    "data": Data,
    "augment": Augmentation,
    "augment_painting": Augmentation,
    "augment_plain": Augmentation,
    "vq": VQTraining,
    "tower": TowerTraining,
    "lookalikes": LookalikeTraining,
    "samples": Samples,
}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a TOML file with `section.key=value` overrides. ValueError for anything that is not a valid recipe."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML recipe ({error})") from None
    for override in overrides:
        apply_override(values, override)
    for section, cls in SECTIONS.items():
        if section in values:
            if not isinstance(values[section], dict):
                raise ValueError(f"{path}: {section} must be a section, [{section}]")
            values[section] = build(cls, values[section], f"[{section}]")
    if missing := [key for key in ("kind", "preset") if key not in values]:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    values.setdefault("out", f"runs/{path.parent.name}/{path.stem}")
    return build(Recipe, values, str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets `section.key=value` in place; the value is read as TOML, else as a string."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ValueError(f"override {override!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = name.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {section} is not a section")
    values[key] = value
