"""The stages of the language model: understanding, painting, or both in one step (arXiv 2503.08686, section 3.4)."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omnimamba.config import OmniMambaConfig, Task, preset
from omnimamba.data.augment import augment, normalise, unit_range
from omnimamba.data.collate import pad_right
from omnimamba.data.images import Images, InMemoryImages, LazyImages, open_folder_images, open_parquet_images
from omnimamba.data.mixture import EpochSampler, step_rng
from omnimamba.data.prepare import image_ids, read_image_ids
from omnimamba.data.text import Conversation, read_captions, read_conversations
from omnimamba.engine.omnimamba import GenerationDefaults, OmniMamba
from omnimamba.engine.request import require_int
from omnimamba.model import hub, weights
from omnimamba.model.files import TensorFile
from omnimamba.model.omnimamba import IGNORE_INDEX, OmniMambaModel
from omnimamba.model.vision import VisionTowers
from omnimamba.model.vq import VQModel
from omnimamba.processor import prompt as layout
from omnimamba.processor.image import to_pil
from omnimamba.processor.tokenizer import TextTokenizer
from omnimamba.train.config import Recipe
from omnimamba.train.frozen import load_frozen
from omnimamba.train.samples import image_grid
from omnimamba.train.stages import BACKBONE_GROUPS, STAGES, group_of, merge_stage1, set_trainable

logger = logging.getLogger("omnimamba.train")
LENGTH_MULTIPLE = 16
"""Text of an understanding batch is padded to a multiple of this, so that few shapes occur."""
NUM_VALIDATION_BATCHES = 8
NUM_DESCRIBED = 16
BACKBONE_FILES = ("pytorch_model.bin", "model.safetensors")
ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass
class MMUBatch:
    ids: Tensor
    """[b, 4 + t] markers and text, right-padded."""
    labels: Tensor
    """[b, t]"""
    pixels: Tensor | None
    """uint8 [i, 3, s, s] of the rows that have an image."""
    image_rows: Tensor
    """[i]"""


@dataclasses.dataclass
class T2IBatch:
    caption_ids: Tensor
    """[b, prompt + 1]"""
    image_ids: Tensor
    """[b, k]"""


class UnderstandingData:
    """Conversations of a split as ids and labels, and the images they are about."""

    def __init__(self, recipe: Recipe, split: str, tok: TextTokenizer, config: OmniMambaConfig, device: torch.device) -> None:
        data, limit = recipe.data, recipe.train.max_text_tokens
        room = config.mmu_positions - config.num_vision_tokens - 4
        if limit > room:
            raise ValueError(f"train.max_text_tokens={limit} exceeds the {room} positions left after the image; lower it")
        self.samples: list[tuple[list[int], list[int], str | None]] = []
        num_too_long = 0
        conversations = read_conversations(Path(data.folder) / data.conversations.replace("{split}", split))
        for conversation in (*conversations, *joined(conversations, data.joined, recipe.train.seed)):
            turns = [(ROLES[speaker], text) for speaker, text in conversation.turns]
            try:
                if data.alignment:
                    ids, labels = layout.caption_sample(tok, turns[1][1], limit)
                else:
                    ids, labels = layout.conversation_sample(tok, turns, limit)
            except ValueError:
                num_too_long += 1
                continue
            self.samples.append((ids, labels, conversation.image))
        if not self.samples:
            raise ValueError(f"data.conversations: no sample has an answer within train.max_text_tokens={limit}; raise it")
        if num_too_long:
            logger.warning(
                "%d of %d conversations left out: no answer within train.max_text_tokens=%d",
                num_too_long,
                num_too_long + len(self.samples),
                limit,
            )
        self.tok = tok
        self.markers = [*layout.mmu_before_image(tok), *layout.mmu_after_image(tok)]
        sizes = {tower.image_size for tower in config.towers.values()}
        if len(sizes) != 1:
            raise ValueError(f"towers of unequal image sizes {sorted(sizes)} cannot be trained together")
        names = list(dict.fromkeys(image for _, _, image in self.samples if image is not None))
        self.images = open_images(recipe, split, names, sizes.pop(), "naive", device)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(ids) for ids, _, _ in self.samples)

    def batch(self, idx: list[int]) -> MMUBatch:
        samples = [self.samples[i] for i in idx]
        ids = pad_right([[*self.markers, *ids] for ids, _, _ in samples], self.tok.pad_id, LENGTH_MULTIPLE)
        labels = torch.full((len(idx), ids.shape[1] - len(self.markers)), IGNORE_INDEX)
        for row, (_, row_labels, _) in enumerate(samples):
            labels[row, : len(row_labels)] = torch.tensor(row_labels)
        image_rows = [row for row, (_, _, image) in enumerate(samples) if image is not None]
        images = [image for _, _, image in samples if image is not None]
        pixels = self.images.get([self.images.position[image] for image in images]) if images else None
        return MMUBatch(ids, labels, pixels, torch.tensor(image_rows))


def joined(conversations: list[Conversation], share: float, seed: int) -> list[Conversation]:
    """For a share of the images, one conversation more: all that is asked about the image, in random order."""
    by_image: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        if conversation.image is not None:
            by_image.setdefault(conversation.image, []).append(conversation)
    rng, more = np.random.default_rng((seed, *b"joined")), []
    for image, rows in by_image.items():
        if rng.random() < share:
            turns = [turn for i in rng.permutation(len(rows)) for turn in rows[i].turns]
            more.append(Conversation(image, tuple(turns)))
    return more


class PaintingData:
    """Captions of a split, and their images as VQ ids."""

    def __init__(
        self, recipe: Recipe, split: str, tok: TextTokenizer, config: OmniMambaConfig, vq: VQModel | None, device: torch.device
    ) -> None:
        data = recipe.data
        captions = read_captions(Path(data.folder) / data.captions.replace("{split}", split))
        if data.tokens:
            file = Path(data.folder) / data.tokens.replace("{split}", split)
            by_image = read_image_ids(file, config.num_image_tokens, config.image_vocab_size)
        else:
            assert vq is not None
            images = open_images(recipe, split, [row.image for row in captions], config.vq.image_size, "crop", torch.device("cpu"))
            by_image = dict(zip(images.names, image_ids(vq, images), strict=True))
        if missing := [row.image for row in captions if row.image not in by_image]:
            raise ValueError(f"{len(missing)} captioned images have no VQ ids, e.g. {missing[0]}; tokenize them")
        self.tok, self.captions = tok, [row.captions for row in captions]
        self.image_ids = torch.stack([by_image[row.image] for row in captions])
        self.null_ids = layout.t2i_training_ids(tok, None)

    def batch(self, idx: list[int], rng: Any, dropout: float) -> T2IBatch:
        """One caption at random for each image, some of them dropped."""
        rows = []
        for i in idx:
            is_dropped, choice = rng.random() < dropout, rng.integers(len(self.captions[i]))
            rows.append(self.null_ids if is_dropped else layout.t2i_training_ids(self.tok, self.captions[i][choice]))
        return T2IBatch(torch.tensor(rows), self.image_ids[idx].long())


def open_images(recipe: Recipe, split: str, names: list[str], size: int, resize: str, device: torch.device) -> Images:
    """The named images of a split, decoded beforehand if the recipe says so."""
    data = recipe.data
    if data.images == "parquet":
        images: LazyImages = open_parquet_images(data.folder, split, size, resize=resize, num_threads=data.num_threads)
        if missing := [name for name in names if name not in images.position]:
            raise ValueError(f"{data.folder}: {len(missing)} images are not in the {split} split, e.g. {missing[0]}")
    else:
        images = open_folder_images(data.folder, names, size, resize=resize, num_threads=data.num_threads)
    return InMemoryImages(images, device) if data.in_memory else images


class OmniMambaObjective:
    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        train, init = recipe.train, recipe.init
        self.config = preset(recipe.preset)
        self.stage = STAGES[train.stage]
        if not init.tokenizer:
            raise ValueError(f"{train.stage} reads text: name init.tokenizer")
        tok = TextTokenizer.from_file(init.tokenizer, self.config)
        self.defaults = sampling_settings(recipe, tok)
        torch.manual_seed(train.seed)
        self.model = OmniMambaModel(self.config)
        initialise(self.model, recipe)
        self.model.to(device)
        self.num_trainable = sum(p.numel() for p in set_trainable(self.model, train.stage, train_backbone=train.train_backbone))
        self.players: dict[str, nn.Module] = {"model": self.model}
        self.vision = load_frozen(VisionTowers(self.config.towers), init.vision, device)
        self.vq = load_frozen(VQModel(self.config.vq), init.vq, device)
        self.mmu = self.t2i = self.val_mmu = self.val_t2i = None
        if "mmu" in self.stage.tasks:
            if self.vision is None:
                raise ValueError(f"{train.stage} reads images: name init.vision")
            self.mmu = UnderstandingData(recipe, recipe.data.train_split, tok, self.config, device)
            self.mmu_sampler = EpochSampler(len(self.mmu.samples), train.mmu_batch, train.seed, self.mmu.lengths)
            if recipe.data.val_split:
                self.val_mmu = UnderstandingData(recipe, recipe.data.val_split, tok, self.config, device)
            if train.standardise_features:
                standardise_features(self.model, self.features(self.mmu.batch(self.mmu_sampler.indices(0)), None))
        if "t2i" in self.stage.tasks:
            self.t2i = PaintingData(recipe, recipe.data.train_split, tok, self.config, self.vq, device)
            self.t2i_sampler = EpochSampler(len(self.t2i.captions), train.t2i_batch, train.seed)
            if recipe.data.val_split:
                self.val_t2i = PaintingData(recipe, recipe.data.val_split, tok, self.config, self.vq, device)

    def summary(self) -> str:
        num = sum(p.numel() for p in self.model.parameters())
        return f"{self.recipe.train.stage}: {self.num_trainable:,} of {num:,} parameters train"

    # ---- batches

    def batch(self, step: int) -> dict[Task, Any]:
        batches: dict[Task, Any] = {}
        if self.mmu is not None:
            batches[Task.MMU] = self.mmu.batch(self.mmu_sampler.indices(step))
        if self.t2i is not None:
            rng = step_rng(self.recipe.train.seed, step, "captions")
            batches[Task.T2I] = self.t2i.batch(self.t2i_sampler.indices(step), rng, self.recipe.train.caption_dropout)
        return batches

    def num_tokens(self, batch: Any) -> int:
        """Positions that the backbone reads, padding included."""
        num = 0
        if Task.MMU in batch:
            b, l = batch[Task.MMU].ids.shape
            num += b * (l + self.config.num_vision_tokens)
        if Task.T2I in batch:
            num += batch[Task.T2I].caption_ids.numel() + batch[Task.T2I].image_ids.numel()
        return num

    # ---- losses

    def loss(self, player: str, batch: Any, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The sum of the tasks' mean losses, as in the authors' trainer, and each of them."""
        self.model.train()
        losses = {}
        if Task.MMU in batch:
            losses["mmu"] = self.mmu_loss(batch[Task.MMU], generator)
        if Task.T2I in batch:
            losses["t2i"] = self.t2i_loss(batch[Task.T2I])
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def t2i_loss(self, batch: T2IBatch) -> Tensor:
        return self.model.t2i_loss(batch.caption_ids.to(self.device), batch.image_ids.to(self.device))

    def mmu_loss(self, batch: MMUBatch, generator: torch.Generator | None) -> Tensor:
        """Without a generator, images are not augmented."""
        ids, labels, rows = (tensor.to(self.device, non_blocking=True) for tensor in (batch.ids, batch.labels, batch.image_rows))
        return self.model.mmu_loss(ids, labels, self.features(batch, generator), rows)

    @torch.no_grad()
    def features(self, batch: MMUBatch, generator: torch.Generator | None) -> Tensor | None:
        """Tower features [i, k, vision_dim] of the rows that have an image; None if none has."""
        if batch.pixels is None:
            return None
        images = unit_range(batch.pixels.to(self.device))
        if generator is not None:
            images = augment(images, self.recipe.augment, generator)
        assert self.vision is not None
        return self.vision({name: normalise(images, tower.mean, tower.std) for name, tower in self.config.towers.items()})

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss per task over batches of the validation split."""
        self.model.eval()
        train, figures = self.recipe.train, {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            if self.val_mmu is not None:
                batches = _validation_batches(len(self.val_mmu.samples), train.mmu_batch)
                figures["mmu"] = torch.stack([self.mmu_loss(self.val_mmu.batch(idx), None) for idx in batches]).mean().item()
            if self.val_t2i is not None:
                batches = _validation_batches(len(self.val_t2i.captions), train.t2i_batch)
                rng = step_rng(train.seed, 0, "validation")
                figures["t2i"] = torch.stack([self.t2i_loss(self.val_t2i.batch(idx, rng, 0.0)) for idx in batches]).mean().item()
        return figures

    # ---- results

    def bundle(self) -> weights.Bundle:
        init = self.recipe.init
        judge = Path(init.vision).with_name(weights.JUDGE_FILE) if init.vision else None
        judge_file = judge if judge is not None and judge.is_file() else None
        return weights.Bundle(self.config, self.model.eval(), self.vision, self.vq, Path(init.tokenizer), judge_file)

    def inference(self) -> OmniMamba:
        """The model as users get it, with the recipe's sampling settings."""
        return OmniMamba(self.bundle(), defaults=self.defaults)

    @torch.no_grad()
    def sample(self, folder: Path) -> None:
        """`painted.png`, a row of images for each prompt, and `described.txt`, answers about validation images."""
        model, settings = self.inference(), self.recipe.samples
        folder.mkdir(parents=True, exist_ok=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16"):
            if self.t2i is not None and self.vq is not None and settings.prompts:
                painted = model.generate_image(settings.prompts, num_images=settings.num_images, seed=self.recipe.train.seed)
                image_grid(painted, columns=settings.num_images).save(folder / "painted.png")
            if self.mmu is not None:
                data = self.val_mmu or self.mmu
                names = data.images.names[:NUM_DESCRIBED]
                answers = model.describe([to_pil(unit_range(data.images.get([i])) * 2 - 1)[0] for i in range(len(names))])
                lines = [f"{name}\t{answer}" for name, answer in zip(names, answers, strict=True)]
                (folder / "described.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def export(self, folder: Path) -> None:
        """A model folder that `OmniMamba.from_pretrained` reads."""
        self.inference().save_pretrained(folder)


def sampling_settings(recipe: Recipe, tok: TextTokenizer) -> GenerationDefaults:
    """The settings of [samples]. ValueError if they or its prompts are impossible: before the run, not when it has ended."""
    settings = recipe.samples
    require_int("samples.num_images", settings.num_images, 1)
    for caption in settings.prompts:
        layout.t2i_prompt(tok, caption)
    return GenerationDefaults(settings.guidance_scale, settings.temperature, settings.top_k, settings.top_p)


def _validation_batches(num: int, batch: int) -> list[list[int]]:
    starts = range(0, num, batch)[:NUM_VALIDATION_BATCHES]
    return [list(range(start, min(start + batch, num))) for start in starts]


@torch.no_grad()
def standardise_features(model: OmniMambaModel, features: Tensor | None) -> None:
    """Has the projector's first layer see features of mean 0 and deviation 1 per channel, in place, by a change of its weights.

    Raw features have a common part several times larger than what tells images apart, and the norm of the first block keeps the
    larger part. features: [i, k, vision_dim] of some training images.
    """
    assert model.projector is not None and features is not None
    rows = features.flatten(0, 1).float()
    mean, deviation = rows.mean(0), rows.std(0)
    first = model.projector[0]
    assert isinstance(first, nn.Linear)
    first.weight.div_(deviation.clamp_min(0.1 * deviation.mean()))
    first.bias.sub_(first.weight @ mean)


def initialise(model: OmniMambaModel, recipe: Recipe) -> None:
    """Loads what [init] names into the model, in place."""
    init = recipe.init
    if init.model:
        where, tensors = f"init.model={init.model}", _model_tensors(init.model)
    elif init.mmu:
        where = f"init.mmu={init.mmu}, init.t2i={init.t2i}"
        tensors = merge_stage1(_model_tensors(init.mmu), _model_tensors(init.t2i), shared=init.shared)
    else:
        return load_backbone(model, init.backbone) if init.backbone else None
    weights.check_names_and_shapes(model.state_dict(), tensors, where)
    model.load_state_dict(tensors)


def _model_tensors(folder: str) -> dict[str, Tensor]:
    return weights.load(folder, device="cpu", dtype=torch.float32).model.state_dict()


def load_backbone(model: OmniMambaModel, source: str) -> None:
    """Loads a Mamba-2 language model in mamba_ssm's format into backbone and text embedding, in place.

    source: a `pytorch_model.bin` or safetensors file, a folder with one, or a Hub id such as `state-spaces/mamba2-1.3b`.
    """
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in BACKBONE_FILES if (path / name).is_file()), path)
    elif not path.exists() and hub.is_repo_id(source):
        path = hub.fetch_file(source, BACKBONE_FILES[0])
    if not path.is_file():
        raise ValueError(f"init.backbone={source}: no {' or '.join(BACKBONE_FILES)} there")
    tensors = TensorFile(path)
    try:
        ours = weights.from_official({f"llm_backbone.mamba.{name}": tensor for name, tensor in tensors.items()}).get("model", {})
    except ValueError as error:
        raise ValueError(f"init.backbone={source}: not a Mamba-2 model in mamba_ssm's format ({error})") from None
    expected = {name: p for name, p in model.state_dict().items() if group_of(name) in BACKBONE_GROUPS}
    weights.check_names_and_shapes(expected, ours, f"init.backbone={source}")
    model.load_state_dict(dict(ours), strict=False)
