"""The stages of the language model: understanding, painting, or both in one step (arXiv 2503.08686, section 3.4)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimamba.config import Task
from omnimamba.data.augment import augment, normalise, unit_range
from omnimamba.data.images import BrokenImages
from omnimamba.data.kept import Kept
from omnimamba.data.mixture import EpochSampler, step_rng
from omnimamba.engine.omnimamba import GenerationDefaults, OmniMamba
from omnimamba.engine.request import require_int
from omnimamba.model import hub, weights
from omnimamba.model.adapter import load_adapter, save_adapter
from omnimamba.model.files import TensorFile
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.vision import VisionTowers
from omnimamba.model.vq import VQModel
from omnimamba.ops.block import ReadyWeights, Saving
from omnimamba.processor import prompt as layout
from omnimamba.processor.image import to_pil
from omnimamba.processor.tokenizer import TextTokenizer
from omnimamba.train.config import Init, Recipe, Train
from omnimamba.train.frozen import load_frozen
from omnimamba.train.graphs import mapped
from omnimamba.train.loop import Objective
from omnimamba.train.parallel import ALONE, Processes, distribute, gradients_stay_here, is_sharded, whole_state
from omnimamba.train.samples import image_grid
from omnimamba.train.stages import BACKBONE_GROUPS, LORA_STAGES, STAGES, group_of, merge_stage1, set_trainable
from omnimamba.train.streams import PaintingStream, SequentialSampler, UnderstandingStream
from omnimamba.train.task_data import NUM_MARKERS, MMUBatch, PaintingData, T2IBatch, UnderstandingData

logger = logging.getLogger("omnimamba.train")
NUM_VALIDATION_BATCHES = 8
NUM_DESCRIBED = 16
BACKBONE_FILES = ("pytorch_model.bin", "model.safetensors")


class TaskLosses(nn.Module):
    """The summed cross entropies of a step's tasks in one forward pass, as DDP and FSDP want it."""

    def __init__(self, model: OmniMambaModel, train: Train, ready: ReadyWeights | None = None) -> None:
        super().__init__()
        self.model = model
        self.options = {"chunk": train.loss_chunk, "saving": Saving(train.recompute, ready)}

    def forward(self, inputs: dict[Task, tuple[Tensor, ...]]) -> dict[Task, Tensor]:
        """inputs: the arguments of `OmniMambaModel.mmu_loss_sum` and `t2i_loss_sum`."""
        loss_sums = {Task.MMU: self.model.mmu_loss_sum, Task.T2I: self.model.t2i_loss_sum}
        return {task: loss_sums[task](*tensors, **self.options) for task, tensors in inputs.items()}


class OmniMambaObjective(Objective):
    def __init__(self, recipe: Recipe, device: torch.device, processes: Processes = ALONE, kept: Kept | None = None) -> None:
        """kept: data that runs of this process share; without it the tasks of this one do."""
        kept = Kept() if kept is None else kept
        init = with_encoders(recipe.init)
        self.recipe = recipe = dataclasses.replace(recipe, init=init)
        self.device, self.processes, train = device, processes, recipe.train
        self.config = recipe.config
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
        broken = BrokenImages(recipe.data.max_broken)
        if "mmu" in self.stage.tasks:
            if self.vision is None:
                raise ValueError(f"{train.stage} reads images: name init.vision")
            if recipe.data.streaming:
                self.mmu, self.mmu_sampler = UnderstandingStream(recipe, tok, self.config, broken), SequentialSampler(train.mmu_batch)
            else:
                self.mmu = UnderstandingData(recipe, recipe.data.train_split, tok, self.config, device, broken, kept)
                self.mmu_sampler = EpochSampler(len(self.mmu.samples), train.mmu_batch, train.seed, self.mmu.lengths)
            if recipe.data.val_split:
                self.val_mmu = UnderstandingData(recipe, recipe.data.val_split, tok, self.config, device, broken, kept)
            if train.standardise_features:
                if isinstance(self.mmu, UnderstandingData) and not len(self.mmu.images):
                    raise ValueError("train.standardise_features looks at training images, and no conversation is about one")
                batches = (self.mmu.batch(self.mmu_sampler.indices(step), self.rng(step, "images")) for step in itertools.count())
                batch = next(batch for batch in batches if batch.pixels is not None)
                standardise_features(self.model, self.features(batch, None)[batch.image_rows < len(batch.ids)])
        if "t2i" in self.stage.tasks:
            if recipe.data.streaming:
                self.t2i, self.t2i_sampler = PaintingStream(recipe, tok, self.vq, broken), SequentialSampler(train.t2i_batch)
            else:
                self.t2i = PaintingData(recipe, recipe.data.train_split, tok, self.config, self.vq, device, broken, kept)
                self.t2i_sampler = EpochSampler(len(self.t2i.captions), train.t2i_batch, train.seed)
            if recipe.data.val_split:
                self.val_t2i = PaintingData(recipe, recipe.data.val_split, tok, self.config, self.vq, device, broken, kept)
        self.batch_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.batch_stream is not None:
            self.batch_stream.wait_stream(torch.cuda.current_stream(device))
        # The second and later parts of a step find the weights ready; but FSDP gathers them for each anew.
        self.ready = ReadyWeights() if train.accumulate > 1 and train.parallel != "fsdp" else None
        self.losses = distribute(TaskLosses(self.model, train, self.ready), self.model.backbone.layers, train.parallel, processes, device)

    def summary(self) -> str:
        train, groups = self.recipe.train, Counter[str]()
        for name, parameter in self.model.named_parameters():
            groups[group_of(name)] += parameter.numel() * parameter.requires_grad
        trains = ", ".join(f"{group} {num:,}" for group, num in groups.items() if num)
        num = sum(p.numel() for p in self.model.parameters())
        lines = [f"{train.stage}: {self.num_trainable:,} of {num:,} parameters train: {trains}"]
        step = []
        if self.mmu is not None:
            num = f"{len(self.mmu.samples):,}" if isinstance(self.mmu, UnderstandingData) else "a stream of"
            step.append(f"{train.mmu_batch} of {num} conversations")
        if self.t2i is not None:
            num = f"{len(self.t2i.captions):,}" if isinstance(self.t2i, PaintingData) else "a stream of"
            step.append(f"{train.t2i_batch} of {num} captioned images")
        size = self.processes.size
        spread = f", spread over {size} processes ({train.parallel})" if size > 1 else ""
        lines.append(f"a step: {' and '.join(step)}{spread}, {train.precision}")
        return "\n".join(lines)

    # ---- batches

    def parts(self, step: int) -> list[dict[Task, Any]]:
        """What is not on the GPU lies in page-locked memory, from which it is copied without waiting. What has to wait for the GPU does so
        on a stream of its own, not behind the steps that are under way."""
        if self.batch_stream is None:
            return self.split(self.batch(step))
        with torch.cuda.stream(self.batch_stream):
            parts = self.split(self.batch(step))
        self.batch_stream.synchronize()
        steps_stream = torch.cuda.default_stream(self.device)

        def ready(tensor: Tensor) -> Tensor:
            if not tensor.is_cuda:
                return tensor.pin_memory()
            tensor.record_stream(steps_stream)  # its memory is not written again before a step has read it
            return tensor

        return [mapped(part, ready) for part in parts]

    def batch(self, step: int) -> dict[Task, Any]:
        """The batch of each task."""
        batches: dict[Task, Any] = {}
        if self.mmu is not None:
            batches[Task.MMU] = self.mmu.batch(self.mmu_sampler.indices(step), self.rng(step, "images"), self.processes)
        if self.t2i is not None:
            dropout = self.recipe.train.caption_dropout
            batches[Task.T2I] = self.t2i.batch(self.t2i_sampler.indices(step), self.rng(step, "captions"), dropout, self.processes)
        return batches

    def rng(self, step: int, stream: str) -> np.random.Generator:
        return step_rng(self.recipe.train.seed, step, stream)

    def split(self, batch: dict[Task, Any]) -> list[dict[Task, Any]]:
        train, size = self.recipe.train, self.processes.size
        if train.accumulate == 1:
            return [batch]
        num = train.parts_of_tasks(size)
        parts = {task: tensors.split(num[f"{task}_batch"]) for task, tensors in batch.items()}
        if size == 1:
            return [{task: part} for task in parts for part in parts[task]]
        return [dict(zip(parts, of_tasks, strict=True)) for of_tasks in zip(*parts.values(), strict=True)]

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

    def collecting(self, yes: bool) -> contextlib.AbstractContextManager[None]:
        return gradients_stay_here(self.losses, yes)

    def updated(self) -> None:
        if self.ready is not None:
            self.ready.clear()

    def loss(self, player: str, batch: Any, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The sum of the tasks' mean losses, as in the authors' trainer, and each of them.

        Means over the whole step: each process has its part of the sum times their number, because gradients are averaged.
        """
        self.model.train()
        inputs: dict[Task, tuple[Tensor, ...]] = {}
        if Task.MMU in batch:
            inputs[Task.MMU] = self.mmu_inputs(batch[Task.MMU], generator)
        if Task.T2I in batch:
            inputs[Task.T2I] = self.t2i_inputs(batch[Task.T2I], generator)
        sums = self.losses(inputs)
        losses = {str(task): sums[task] * self.processes.size / self.here(batch[task].num_labels) for task in inputs}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def t2i_inputs(self, batch: T2IBatch, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Caption ids, image ids, and image ids as they are read. Without a generator, these have no noise."""
        caption_ids, ids = self.here(batch.caption_ids), self.here(batch.image_ids)
        noise = self.recipe.train.image_token_noise
        if generator is None or not noise:
            return caption_ids, ids, ids
        is_noise = torch.rand(ids.shape, generator=generator, device=self.device) < noise
        random_ids = torch.randint(self.config.image_vocab_size, ids.shape, generator=generator, device=self.device)
        return caption_ids, ids, torch.where(is_noise, random_ids, ids)

    def mmu_inputs(self, batch: MMUBatch, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """The arguments of `OmniMambaModel.mmu_loss_sum`. Without a generator, images are not augmented."""
        labels = (self.here(tensor) for tensor in (batch.ids, batch.places, batch.labels, batch.shares))
        return *labels, self.features(batch, generator), self.here(batch.image_rows)

    def here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    @torch.no_grad()
    def features(self, batch: MMUBatch, generator: torch.Generator | None) -> Tensor:
        """Tower features [i, k, vision_dim] of the batch's images."""
        if batch.pixels is None:
            return torch.zeros(0, self.config.num_vision_tokens, self.config.vision_dim, device=self.device)
        if batch.pixels.dtype != torch.uint8:
            return self.here(batch.pixels).float()
        images = unit_range(self.here(batch.pixels))
        if generator is not None:
            images = augment(images, self.recipe.augment, generator)
        assert self.vision is not None
        return self.vision({name: normalise(images, tower.mean, tower.std) for name, tower in self.config.towers.items()})

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss per task over batches of the validation split; for understanding also the share of answers that are word for word
        what greedy decoding would say, in all (`mmu_exact`) and per kind of question."""
        self.model.eval()
        train, figures = self.recipe.train, {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            if self.val_mmu is not None:
                figures |= self.validate_mmu(self.val_mmu)
            if self.val_t2i is not None:
                batches = _validation_batches(len(self.val_t2i.captions), train.t2i_batch)
                rng = step_rng(train.seed, 0, "validation")
                figures["t2i"] = torch.stack([self.t2i_loss(self.val_t2i.batch(idx, rng, 0.0)) for idx in batches]).mean().item()
        return figures

    def t2i_loss(self, batch: T2IBatch) -> Tensor:
        return self.model.t2i_loss_sum(*self.t2i_inputs(batch, None), chunk=self.recipe.train.loss_chunk) / self.here(batch.num_labels)

    def validate_mmu(self, data: UnderstandingData) -> dict[str, float]:
        losses, is_exact = [], defaultdict[str, list[bool]](list)
        for idx in _validation_batches(len(data.samples), self.recipe.train.mmu_batch):
            batch = data.batch(idx, self.rng(0, "validation"))
            ids, places, labels, shares, features, image_rows = self.mmu_inputs(batch, None)
            is_label = shares > 0
            logits, labels = self.model.mmu_logits(ids, places, features, image_rows)[is_label], labels[is_label]
            losses.append(F.cross_entropy(logits, labels))
            rows = places[is_label] // (ids.shape[1] - NUM_MARKERS)
            num_wrong = torch.zeros(len(idx), device=self.device).index_add_(0, rows, (logits.argmax(-1) != labels).float())
            for i, wrong in zip(idx, num_wrong.tolist(), strict=True):
                for name in {"mmu_exact", f"mmu_exact_{data.samples[i].kind}".rstrip("_")}:
                    is_exact[name].append(wrong == 0)
        return {"mmu": torch.stack(losses).mean().item()} | {name: sum(hits) / len(hits) for name, hits in is_exact.items()}

    # ---- results

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within, `model` is a whole copy on the main process if it is sharded."""
        if not is_sharded(self.model):
            yield
            return
        shards, state = self.model, whole_state(self.model)
        if self.processes.is_main:
            self.model = OmniMambaModel(self.config)
            self.model.load_state_dict(state)
            self.model.to(self.device)
        try:
            yield
        finally:
            self.model = shards

    def bundle(self, model: OmniMambaModel) -> weights.Bundle:
        """The model with its encoders."""
        init = self.recipe.init
        judge = Path(init.vision).with_name(weights.JUDGE_FILE) if init.vision else None
        judge_file = judge if judge is not None and judge.is_file() else None
        return weights.Bundle(self.config, model.eval(), self.vision, self.vq, Path(init.tokenizer), judge_file)

    def inference(self) -> OmniMamba:
        """The model as users get it, with the recipe's sampling settings. A decoder may move the weights it is given, and recorded steps
        read theirs where they lay: with train.graphs it is a copy."""
        model = copy.deepcopy(self.model) if self.recipe.train.graphs else self.model
        return OmniMamba(self.bundle(model), defaults=self.defaults)

    @torch.no_grad()
    def sample(self, folder: Path) -> None:
        """`painted.png`, a row of images for each prompt, and `described.txt`, answers about validation images."""
        model, settings = self.inference(), self.recipe.samples
        folder.mkdir(parents=True, exist_ok=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16"):
            if self.t2i is not None and self.vq is not None and settings.prompts:
                painted = model.generate_image(settings.prompts, num_images=settings.num_images, seed=self.recipe.train.seed)
                image_grid(painted, columns=settings.num_images).save(folder / "painted.png")
            if isinstance(data := self.val_mmu or self.mmu, UnderstandingData):
                names = data.images.names[:NUM_DESCRIBED]
                found = zip(names, data.images.find(range(len(names))), strict=True)
                shown = {name: to_pil(unit_range(image[None]) * 2 - 1)[0] for name, image in found if image is not None}
                lines = [f"{name}\t{answer}" for name, answer in zip(shown, model.describe(list(shown.values())), strict=True)]
                (folder / "described.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def export(self, folder: Path) -> None:
        """A model folder that `OmniMamba.from_pretrained` reads."""
        model = self.averaged() if self.recipe.train.keep_start else self.model
        weights.save(self.bundle(model), folder, texts={weights.GENERATION_FILE: self.defaults.to_json()})
        if (task := LORA_STAGES.get(self.recipe.train.stage)) is not None:
            save_adapter(model, task, folder / "adapter", base=self.recipe.init.model)

    @torch.no_grad()
    def averaged(self) -> OmniMambaModel:
        """The model with `keep_start` of the weights that training started from."""
        model, start = copy.deepcopy(self.model), OmniMambaModel(self.config)
        initialise(start, self.recipe)
        for parameter, started in zip(model.parameters(), start.parameters(), strict=True):
            parameter.lerp_(started.to(parameter.device), self.recipe.train.keep_start)
        return model


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
def standardise_features(model: OmniMambaModel, features: Tensor) -> None:
    """Has the projector's first layer see features of mean 0 and deviation 1 per channel, in place, by a change of its weights.

    Raw features have a common part several times larger than what tells images apart, and the norm of the first block keeps the
    larger part. features: [i, k, vision_dim] of some training images.
    """
    assert model.projector is not None and len(features)
    rows = features.flatten(0, 1).float()
    mean, deviation = rows.mean(0), rows.std(0)
    first = model.projector[0]
    assert isinstance(first, nn.Linear)
    first.weight.div_(deviation.clamp_min(0.1 * deviation.mean()))
    first.bias.sub_(first.weight @ mean)


ENCODER_FILES = {"tokenizer": weights.TOKENIZER_FILE, "vision": "vision.safetensors", "vq": "vq.safetensors"}


def with_encoders(init: Init) -> Init:
    """[init] with the tokenizer and the encoders of init.encoders, or else of init.model, where it names none of its own."""
    if not (source := init.encoders or init.model):
        return init
    folder = weights.locate(source)
    files = {name: folder / file for name, file in ENCODER_FILES.items() if not getattr(init, name)}
    return dataclasses.replace(init, **{name: str(file) for name, file in files.items() if file.is_file()})


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
    if init.adapter:
        load_adapter(model, init.adapter)


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
