"""Plug-in for lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), found by it through the entry point `lmms_eval.models`:

    python -m lmms_eval --model omnimamba --model_args pretrained=FOLDER --batch_size 16 --tasks pope,mme,gqa
    python -m lmms_eval --model omnimamba --model_args pretrained=FOLDER,mode=generate,out=images --tasks WISE

`mode=understanding` answers questions about the first image of a request, or about none; `mode=generate` paints the request's text
and answers `{"text": "", "images": [file]}`, as lmms-eval's image generation tasks read it. `--batch_size` is the number of answers or
images in the making at once; longer lists of requests wait their turn in the engine.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from PIL import Image
from tqdm import tqdm

from omnimamba.config import Task
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.eval.paint import Job, PaintSettings, fitted_caption, paint_missing
from omnimamba.processor import prompt as layout

MODES = ("understanding", "generate")
MAX_NEW_TOKENS = 128
"""Where the task does not say."""
REQUESTS_PER_SLOT = 4
"""Requests that the engine gets at once, so that a slot that is done finds another."""

log = logging.getLogger("omnimamba")


def manifest() -> ModelManifest:
    """What the entry point gives to lmms-eval."""
    return ModelManifest("omnimamba", simple_class_path=f"{__name__}.OmniMambaLmms")


class OmniMambaLmms(lmms):
    is_simple = True

    def __init__(
        self,
        pretrained: str = "nano",
        mode: str = "understanding",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        out: str = "runs/eval/lmms",
        guidance_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        """pretrained: as `OmniMamba.from_pretrained`. device: automatic unless given; with several processes, that of each one's rank.

        out, guidance_scale, seed: where and how `mode=generate` paints; image i of a task has the seed `seed + i`.
        """
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; pass one of {', '.join(MODES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}: pass the number of sequences that run at once, for example 16")
        if device is None:
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "auto"
        self.model = OmniMamba.from_pretrained(pretrained, device=device, dtype=dtype, num_slots=int(batch_size))
        self.mode, self.out, self.seed = mode, Path(out), int(seed)
        self.settings = PaintSettings(None if guidance_scale is None else float(guidance_scale)).of(self.model)
        if mode == "generate" and self.settings.guidance_scale != 1:
            self.model.num_slots *= 2  # so that batch_size images are painted at once; a guided one is two sequences

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        return self._paint(requests) if self.mode == "generate" else self._answer(requests)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood tasks: lmms-eval's interface asks for a log probability, its own models return a loss")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("multi-round tasks: omnimamba answers single questions here")

    # ---- understanding

    def _answer(self, requests: Sequence[Instance]) -> list[str]:
        answers: list[str] = []
        num_further_images = 0
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="omnimamba")
        size = REQUESTS_PER_SLOT * self.model.num_slots
        for start in range(0, len(requests), size):
            asked = [request.args for request in requests[start : start + size]]
            images = [self._images(args) for args in asked]
            num_further_images += sum(len(some) > 1 for some in images)
            features = iter(self.model.encode_image([some[0] for some in images if some]))
            batch = [self._request(args[0], next(features) if some else None, args[1]) for args, some in zip(asked, images, strict=True)]
            for (context, settings, *_), (sample,) in zip(asked, self.model.engine.run(batch), strict=True):
                answer = self.model.tokenizer.decode(sample.tokens)
                for end in ends(settings):
                    answer = answer.split(end)[0]
                answers.append(answer.strip())
                self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
                bar.update(1)
        bar.close()
        if num_further_images:
            log.warning("%d of %d requests have several images; the model saw the first of each", num_further_images, len(requests))
        return answers

    def _images(self, args: tuple) -> list[Image.Image | str]:
        _, _, doc_to_visual, doc_id, task, split = args
        return list(doc_to_visual(self.task_dict[task][split][doc_id]) or ())

    def _request(self, text: str, features: torch.Tensor | None, settings: dict[str, Any]) -> Request:
        tok = self.model.tokenizer
        ids = (*layout.mmu_before_image(tok), *layout.mmu_after_image(tok), *layout.chat_ids(tok, [("user", text)]))
        return Request(Task.MMU, ids, features, sampling=sampling_of(settings))

    # ---- painting

    def _paint(self, requests: Sequence[Instance]) -> list[str]:
        """Paints what is not there yet. A file's name tells task and document, so that ranks and later runs do not collide."""
        tok, jobs = self.model.tokenizer, []
        for request in requests:
            text, _, _, doc_id, task, split = request.args
            file = self.out / str(task) / str(split) / f"{int(doc_id):05}.png"
            jobs.append(Job(fitted_caption(tok, text), self.seed + int(doc_id), file))
        bar = tqdm(total=len(jobs), disable=self.rank != 0, desc="omnimamba")

        def show(stage: str, done: int, total: int) -> None:
            bar.update(done - bar.n)

        paint_missing(self.model, jobs, self.settings, show)
        bar.close()
        return [json.dumps({"text": "", "images": [str(job.file)]}) for job in jobs]


def sampling_of(settings: dict[str, Any]) -> SamplingParams:
    """A task's `generation_kwargs`. ValueError for beam search, which this engine does not have."""
    if int(settings.get("num_beams") or 1) != 1:
        raise ValueError(f"num_beams={settings['num_beams']}: there is no beam search here; pass --gen_kwargs num_beams=1")
    is_sampled = bool(settings.get("do_sample", True)) and float(settings.get("temperature") or 0) > 0
    return SamplingParams(
        temperature=float(settings["temperature"]) if is_sampled else 0.0,
        top_p=float(settings.get("top_p") or 1.0) if is_sampled else 1.0,
        seed=0,
        max_new_tokens=int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
        past_last_position="clamp",
    )


def ends(settings: dict[str, Any]) -> list[str]:
    """The texts at which a task wants an answer cut."""
    until = settings.get("until") or []
    return [end for end in ([until] if isinstance(until, str) else until) if end]
