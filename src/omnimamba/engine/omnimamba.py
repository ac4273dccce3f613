"""`OmniMamba`: paint an image from a caption, describe one, talk about one.

Files and text go in, images and text come out; in between are the processor's prompts and the engine's continuous batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from omnimamba.config import OmniMambaConfig, Task, build
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import Event, FinishReason, Request, Sample, SamplingParams, random_seed, require_int, require_sampling
from omnimamba.engine.text import AnswerText
from omnimamba.model import hub, weights
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.omnimamba import cast as cast_weights
from omnimamba.model.state import MambaState
from omnimamba.model.vision import VisionTowers
from omnimamba.model.vq import VQModel
from omnimamba.processor import prompt as layout
from omnimamba.processor.image import ImageSource, load_image, to_pil, tower_pixels, vq_pixels
from omnimamba.processor.tokenizer import TextTokenizer

DEFAULT_QUESTION = "What is shown in the image?"
ENCODER_BATCH = 16
"""Images that pass a tower or the VQ decoder at once."""
NOT_PAINTED = (128, 128, 128)

PaintCallback = Callable[[int, Image.Image, float], None]
"""(image index, the image so far, the fraction that is painted)"""


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """How a model paints best: `generation.json` of its folder. Without that file, the plain distribution of the model."""

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_sampling(self.temperature, self.top_k, self.top_p, self.guidance_scale)

    @classmethod
    def read(cls, folder: Path) -> GenerationDefaults:
        path = folder / weights.GENERATION_FILE
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected an object such as {json.dumps(dataclasses.asdict(cls()))}")
        return build(cls, values, str(path))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. ValueError for a device that is not there."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(kind for kind, is_there in has.items() if is_there))
    there = ", ".join(kind for kind, is_there in has.items() if is_there)
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; this computer has {there}") from None
    if not has.get(resolved.type, False) or (resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {device!r} is not on this computer; it has {there}")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = weights.DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in weights.DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}; pass auto, {', '.join(weights.DTYPES)}")
    return resolved


class OmniMamba:
    """A model with its image encoders, tokenizer and engine. One thread at a time.

    num_slots: sequences that run at once (104 MB of state each for the released model); more requests than that wait.
    """

    def __init__(self, bundle: weights.Bundle, *, defaults: GenerationDefaults | None = None, num_slots: int = 16) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.defaults = defaults or GenerationDefaults()
        self.num_slots = num_slots
        self._tokenizer = TextTokenizer.from_file(bundle.tokenizer_file, bundle.config) if bundle.tokenizer_file else None
        self._engine: Engine | None = None

    # ---- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantize: str | None = None,
        num_slots: int = 16,
    ) -> OmniMamba:
        """The model `source`: `nano` (shipped), a folder, a Hub id, or an official `.pth`.

        quantize: int8, fp8 or int4 weights, made while loading; a folder saved from such a model needs it no more.
        """
        device = resolve_device(device)
        bundle = weights.load(source, device=device, dtype=resolve_dtype(dtype, device), quantize=quantize)
        defaults = GenerationDefaults.read(Path(bundle.tokenizer_file).parent) if bundle.tokenizer_file else None
        return cls(bundle, defaults=defaults, num_slots=num_slots)

    @classmethod
    def from_config(
        cls,
        config: OmniMambaConfig,
        *,
        tokenizer_file: str | Path | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        num_slots: int = 16,
    ) -> OmniMamba:
        """A model of random weights, for tests and benchmarks."""
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model, vision, vq = OmniMambaModel(config), VisionTowers(config.towers) if config.towers else None, VQModel(config.vq)
        for part in filter(None, (model, vision, vq)):
            cast_weights(part.eval(), dtype).to(device)
        tokenizer_file = Path(tokenizer_file) if tokenizer_file else None
        return cls(weights.Bundle(config, model, vision, vq, tokenizer_file), num_slots=num_slots)

    def save_pretrained(self, folder: str | Path, *, dtype: str | None = None) -> None:
        """Writes config, tokenizer, weights and generation defaults, all or nothing; `from_pretrained(folder)` reads them.

        dtype: type of the stored weights, as they are in memory unless given: float32, bfloat16, float16 or int8.
        """
        weights.save(self.bundle, folder, dtype=weights.stored_dtype(dtype), texts={weights.GENERATION_FILE: self.defaults.to_json()})

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, dtype: str | None = None) -> str:
        """Saves the model to the Hub repository `repo_id` (owner/name), which is made if needed. Returns its address.

        Needs a token: `hf auth login` or HF_TOKEN. private: visibility of a new repository. dtype: as in `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, dtype=dtype)
            (folder / hub.CARD_FILE).write_text(hub.model_card(self.config, repo_id), encoding="utf-8")
            return hub.push(folder, repo_id, private=private)

    # ---- parts

    @property
    def device(self) -> torch.device:
        return self.bundle.model.device

    @property
    def tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            raise ValueError("this model has no tokenizer.json, so it reads no text; add one with `omnimamba convert`")
        return self._tokenizer

    @property
    def vision(self) -> VisionTowers:
        if self.bundle.vision is None:
            raise ValueError("this model was saved without its vision towers, so it sees no image; add them with `omnimamba convert`")
        return self.bundle.vision

    @property
    def vq(self) -> VQModel:
        if self.bundle.vq is None:
            raise ValueError("this model was saved without its VQ tokenizer, so it paints no image; add it with `omnimamba convert`")
        return self.bundle.vq

    @functools.cached_property
    def fingerprint(self) -> str:
        """The bundle's, computed once: on a CPU that reads all weights of the released model for seconds, and the engine takes for
        granted, too, that they do not change."""
        return self.bundle.fingerprint

    @property
    def engine(self) -> Engine:
        """Made on first use."""
        if self._engine is None:
            self._engine = self.new_engine()
        return self._engine

    def new_engine(self, *, max_waiting: int | None = None, prefix_cache_bytes: int = 0) -> Engine:
        """An engine of its own, with `num_slots` slots and the bounds of a server."""
        tok = self.tokenizer
        return Engine(
            self.bundle.model,
            stop_ids=tok.stop_ids,
            suppressed_ids=tok.suppressed_ids,
            num_slots=self.num_slots,
            max_waiting=max_waiting,
            prefix_cache_bytes=prefix_cache_bytes,
        )

    # ---- text to image

    def generate_image(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        callback: PaintCallback | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """`num_images` images of each prompt, prompt by prompt; `image.info["seed"]` says the seed.

        Sampling values of None are the model's defaults. seed: one for all prompts, or one for each. Image i of a prompt depends
        on the prompt, the seed and i, not on what is painted beside it. After each row of image tokens of each image `callback` is
        called, and `on_progress` with the number of tokens drawn and of all; only the former costs a pass of the VQ decoder.
        """
        vq, engine = self.vq, self.engine
        require_int("num_images", num_images, 1)
        given = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings = dataclasses.replace(self.defaults, **{name: value for name, value in given.items() if value is not None})
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = list(seed) if isinstance(seed, Sequence) else [random_seed() if seed is None else seed for _ in prompts]
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; pass one seed, or one for each prompt")
        requests: list[Request] = []
        image_idxs: list[int] = []
        for prompt_idx, caption in enumerate(prompts):
            sampling = SamplingParams(**dataclasses.asdict(settings), seed=seeds[prompt_idx])
            of_prompt = self.split_samples(self.paint_request(caption, sampling, num_images))
            requests += of_prompt
            image_idxs += [prompt_idx * num_images + request.first_sample for request in of_prompt]
        tokens: list[list[int]] = [[] for _ in range(len(seeds) * num_images)]
        num_tokens = len(tokens) * self.config.num_image_tokens
        for num_drawn, (request_idx, event) in enumerate(engine.stream(requests), 1):
            image_idx = image_idxs[request_idx] + event.sample_idx
            assert event.token is not None
            tokens[image_idx].append(event.token)
            if len(tokens[image_idx]) % vq.config.grid_size:
                continue
            if on_progress is not None:
                on_progress(num_drawn, num_tokens)
            if callback is not None:
                callback(image_idx, self.paint_so_far(tokens[image_idx]), len(tokens[image_idx]) / self.config.num_image_tokens)
        images = self.paint(tokens)
        for image_idx, image in enumerate(images):
            image.info["seed"] = seeds[image_idx // num_images]
        return images

    def paint_request(self, caption: str, sampling: SamplingParams, num_images: int) -> Request:
        tok = self.tokenizer
        ids, null_ids = tuple(layout.t2i_prompt(tok, caption)), tuple(layout.t2i_null_prompt(tok))
        return Request(Task.T2I, ids, null_ids=null_ids, sampling=sampling, num_samples=num_images)

    def split_samples(self, request: Request) -> list[Request]:
        """Requests for the same samples that each fit the slots."""
        at_once = max(1, self.num_slots // request.slots_per_sample)
        firsts = range(0, request.num_samples, at_once)
        nums = [min(at_once, request.num_samples - first) for first in firsts]
        return [dataclasses.replace(request, num_samples=num, first_sample=first) for num, first in zip(nums, firsts, strict=True)]

    @torch.no_grad()
    def paint(self, image_ids: Sequence[Sequence[int]]) -> list[Image.Image]:
        """Images of complete sequences of image tokens."""
        batches = torch.tensor(image_ids, device=self.device).split(ENCODER_BATCH) if image_ids else ()
        return [image for batch in batches for image in to_pil(self.vq.decode_ids(batch))]

    def paint_so_far(self, image_ids: Sequence[int]) -> Image.Image:
        """The image of whole rows of tokens, grey where none are yet. The last row is repeated there, to give it a neighbour."""
        vq = self.vq.config
        num_rows = len(image_ids) // vq.grid_size
        image = self.paint([[*image_ids, *list(image_ids[-vq.grid_size :]) * (vq.grid_size - num_rows)]])[0]
        image.paste(NOT_PAINTED, (0, num_rows * vq.downsample, image.width, image.height))
        return image

    # ---- image to text

    def describe(
        self,
        image: ImageSource | Sequence[ImageSource],
        question: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        past_last_position: str = "error",
        stream: bool = False,
    ) -> str | list[str] | Iterator[str]:
        """The answer about one image; a list of answers for a list of images; with `stream` an iterator of an answer's pieces.

        question: one for all images, or one for each. Greedy unless a temperature is given.
        """
        is_batch = isinstance(image, list | tuple)
        images = cast(Sequence[ImageSource], image if is_batch else [image])
        question = DEFAULT_QUESTION if question is None else question
        questions = [question] * len(images) if isinstance(question, str) else list(question)
        if len(questions) != len(images):
            raise ValueError(f"{len(questions)} questions for {len(images)} images; pass one question, or one for each image")
        if stream and is_batch:
            raise ValueError(f"stream=True answers about one image, not a list of {len(images)}; call describe for each")
        sampling = SamplingParams(temperature, top_k, top_p, seed, max_new_tokens, past_last_position=past_last_position)
        prompts = [self.first_turns([("user", text)]) for text in questions]
        features = self.encode_image(images)
        requests = [Request(Task.MMU, ids, row, sampling=sampling) for ids, row in zip(prompts, features, strict=True)]
        if stream:
            return text_pieces(self.engine.stream(requests), Sample(), self.tokenizer)
        texts = [self.tokenizer.decode(samples[0].tokens).strip() for samples in self.engine.run(requests)]
        return texts if is_batch else texts[0]

    def answer(
        self, features: Tensor, questions: Sequence[Sequence[str]], *, max_new_tokens: int = 64, past_last_position: str = "error"
    ) -> list[list[str]]:
        """Greedy answers to several questions about each image of `features` [b, k, vision_dim], as `describe` gives them.

        Each image is read once; its questions continue from copies of that state.
        """
        tok = self.tokenizer
        if len(questions) != len(features):
            raise ValueError(f"{len(questions)} lists of questions for {len(features)} images; pass one list for each image")
        opening = (*layout.mmu_before_image(tok), *layout.mmu_after_image(tok))
        first, greedy = (
            SamplingParams(temperature=0, seed=0, max_new_tokens=num, past_last_position=past_last_position) for num in (1, max_new_tokens)
        )
        read = self.engine.run([Request(Task.MMU, opening, row, sampling=first, keep_state=True) for row in features])
        requests = [
            Request(Task.MMU, tuple(layout.chat_ids(tok, [("user", text)])), sampling=greedy, state=samples[0].state)
            for samples, texts in zip(read, questions, strict=True)
            for text in texts
        ]
        answers = iter(tok.decode(samples[0].tokens).strip() for samples in self.engine.run(requests))
        return [[next(answers) for _ in texts] for texts in questions]

    def first_turns(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Ids of a conversation from its start: ("user" | "assistant", text) in turn, the last one the user's."""
        tok = self.tokenizer
        return (*layout.mmu_before_image(tok), *layout.mmu_after_image(tok), *layout.chat_ids(tok, messages))

    def chat(self, image: ImageSource | None = None) -> Conversation:
        """A conversation about an image, or about none."""
        return Conversation(self, None if image is None else self.encode_image([image])[0])

    def load_conversation(self, path: str | Path) -> Conversation:
        """A conversation that `Conversation.save` wrote. ValueError if the file is no such thing or another model's."""
        state, metadata = MambaState.load(path, self.config.backbone, fingerprint=self.fingerprint, device=self.device)
        if not {"messages", "unread_ids"} <= metadata.keys():
            raise ValueError(f"{path}: holds a state but no conversation; pass a file written by Conversation.save")
        try:
            messages = [(str(role), str(text)) for role, text in json.loads(metadata["messages"])]
            unread_ids = [int(token_id) for token_id in json.loads(metadata["unread_ids"])]
        except (ValueError, TypeError, OverflowError) as error:  # the last for an id of Infinity
            raise ValueError(f"{path}: its messages or unread_ids are not those of a conversation ({error})") from None
        conversation = Conversation(self, None)
        conversation.state, conversation.messages, conversation.unread_ids = state, messages, unread_ids
        return conversation

    # ---- encoders

    @torch.no_grad()
    def encode_image(self, images: Sequence[ImageSource]) -> Tensor:
        """Features [b, k, vision_dim] of the understanding towers."""
        rows = []
        for start in range(0, len(images), ENCODER_BATCH):
            rows.append(self.encode_pixels(self.tower_inputs(images[start : start + ENCODER_BATCH])))
        return torch.cat(rows) if rows else torch.empty(0, self.config.num_vision_tokens, self.config.vision_dim, device=self.device)

    def tower_inputs(self, images: Sequence[ImageSource]) -> dict[str, Tensor]:
        """Pixels [b, 3, s, s] for each tower, on the CPU."""
        loaded = [load_image(image) for image in images]
        return {name: torch.stack([tower_pixels(image, tower) for image in loaded]) for name, tower in self.config.towers.items()}

    @torch.no_grad()
    def encode_pixels(self, pixels: dict[str, Tensor]) -> Tensor:
        """Features [b, k, vision_dim] of `tower_inputs`."""
        return self.vision({name: tensor.to(self.device) for name, tensor in pixels.items()})

    @torch.no_grad()
    def reconstruct(self, image: ImageSource) -> Image.Image:
        """The image's central square through the VQ tokenizer and back: the best that the model could paint."""
        codes = self.vq.encode(vq_pixels(load_image(image), self.config.vq.image_size)[None].to(self.device))
        return self.paint(codes.ids.flatten(1).tolist())[0]


class Conversation:
    """Questions and answers in turn. The state of all past turns is kept, so a turn reads its own text only.

    A turn counts once its answer is complete: a stream that is closed early leaves the conversation as it was.
    """

    def __init__(self, model: OmniMamba, features: Tensor | None) -> None:
        self.model = model
        self.features = features
        self.messages: list[tuple[str, str]] = []
        """("user" | "assistant", text) in turn."""
        self.state: MambaState | None = None
        self.unread_ids: list[int] = []
        """Ids of the last answer that the state has not read: its end."""

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        past_last_position: str = "error",
        stream: bool = False,
    ) -> str | Iterator[str]:
        """The answer, or with `stream` an iterator of its pieces. ValueError if the conversation has no room for it."""
        sampling = SamplingParams(temperature, top_k, top_p, seed, max_new_tokens, past_last_position=past_last_position)
        if self.state is None:
            request = Request(Task.MMU, self.model.first_turns([("user", question)]), self.features, sampling=sampling, keep_state=True)
        else:
            ids = (*self.unread_ids, *layout.next_turn_ids(self.model.tokenizer, question))
            request = Request(Task.MMU, ids, sampling=sampling, state=self.state, keep_state=True)
        pieces = self._answer(question, self.model.engine.stream([request]))
        return pieces if stream else "".join(pieces)

    def _answer(self, question: str, events: Generator[tuple[int, Event], None, None]) -> Iterator[str]:
        tok, sample = self.model.tokenizer, Sample()
        yield from text_pieces(events, sample, tok)
        self.state, self.unread_ids = sample.state, unread_ids(sample, tok)
        self.messages += [("user", question), ("assistant", tok.decode(sample.tokens).strip())]

    def save(self, path: str | Path) -> None:
        """Writes the conversation with its state, a file of one slot's size; `OmniMamba.load_conversation` goes on from it."""
        if self.state is None:
            raise ValueError("the conversation is empty; ask a question before saving it")
        metadata = {"messages": json.dumps(self.messages), "unread_ids": json.dumps(self.unread_ids)}
        self.state.save(path, fingerprint=self.model.fingerprint, metadata=metadata)


def text_pieces(events: Generator[tuple[int, Event], None, None], sample: Sample, tok: TextTokenizer) -> Iterator[str]:
    """Pieces of one answer as its tokens come, added to `sample`; joined they are its whole text without outer white space."""
    text = AnswerText(tok)
    with contextlib.closing(events):
        while sample.finish_reason is None:
            _, event = next(events)
            sample.add(event)
            piece = text.push(event.token, is_last=event.finish_reason is not None)
            if piece:
                yield piece


def unread_ids(sample: Sample, tok: TextTokenizer) -> list[int]:
    """Ids of a finished answer that its state has not read. One that was cut off is ended here, as the next turn's layout wants it."""
    cut = sample.tokens[-1:] if sample.finish_reason is FinishReason.LENGTH else []
    return [*cut, tok.eos_id]
