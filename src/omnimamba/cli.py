"""The command `omnimamba`. A handler reads options, calls the library and prints what comes back.

Results go to stdout; errors, logs and progress bars to stderr. Heavy imports are inside the handlers, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from omnimamba.train.interrupt import Interrupted

if TYPE_CHECKING:
    from omnimamba.engine.omnimamba import OmniMamba
    from omnimamba.eval.paint import PaintSettings
    from omnimamba.eval.report import Report

FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
"""Exit codes; the last two are those of a program that died of SIGINT and SIGPIPE."""
BAR_AFTER_SECONDS = 2.0
SPEED_SECONDS = 600.0
"""The time left is estimated from the progress of this time."""
SHOW_SECONDS = 0.1
"""News of what is under way counts this often: more of it would cost time and not be seen."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
QUALITY = 95
"""Of JPEG and WebP files; PNG files are lossless."""
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""The error of a command line that does not parse. Typer exports its subclass only."""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # importing rich would double the time of --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="OMNIMAMBA_DEBUG=1 in the environment shows the traceback of an error.",
)
benchmarks = typer.Typer(rich_markup_mode=None)
app.add_typer(benchmarks, name="eval")
bulk_work = typer.Typer(rich_markup_mode=None)
app.add_typer(bulk_work, name="batch")

ModelName = Annotated[str, typer.Option("--model", "-m", help="nano (shipped), a model folder, a Hub id, or an official .pth file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
NumSlots = Annotated[int, typer.Option(min=1, help="Sequences that run at once; a guided image is two.")]
Seed = Annotated[int | None, typer.Option(help="Makes the result reproducible; drawn when it is not given.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer.")]
PastLastPosition = Annotated[str, typer.Option(help="Text longer than the position table: error, or clamp (go on with its last row).")]
ShardSize = Annotated[int, typer.Option(min=1, help="Items that are computed or lost together when the work is interrupted.")]
MaxBroken = Annotated[int, typer.Option(min=0, help="Missing and unreadable images that are skipped with a warning; one more is an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", show_default=False)]
BootstrapSeed = Annotated[int, typer.Option("--seed", help="Of the intervals.")]

PaintSeed = Annotated[int, typer.Option("--seed", help="Of the paintings and of the intervals.")]
PaintShard = Annotated[str | None, typer.Option("--shard", help="I/N: paint part I of N only.", show_default=False)]
PaintOut = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the images; a second call goes on from them. Default: runs/eval/NAME.", show_default=False),
]


# ---- options that commands share


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model, and where and in which numbers it computes."""

    model: ModelName = "nano"
    device: Device = "auto"
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16.")] = "auto"
    quantize: Annotated[
        str | None, typer.Option(help="Compute with int8, fp8 or int4 weights. Default: as stored.", show_default=False)
    ] = None

    def load(self, *, num_slots: int = 16) -> OmniMamba:
        from omnimamba.engine.omnimamba import OmniMamba

        return OmniMamba.from_pretrained(self.model, device=self.device, dtype=self.dtype, quantize=self.quantize, num_slots=num_slots)


@dataclasses.dataclass(frozen=True)
class PaintOptions:
    """How images are drawn; None is the model's default."""

    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the prompt; 1 is off. Default: the model's.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 paints the most probable image. Default: the model's.")] = None
    top_k: Annotated[int | None, typer.Option(help="Only the k most probable tokens; 0 is off. Default: the model's.")] = None
    top_p: Annotated[float | None, typer.Option(help="Only the tokens that hold this share; 1 is off. Default: the model's.")] = None


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How answers are drawn, as `describe` and `ask` take it."""

    max_new_tokens: MaxNewTokens = 64
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token, 1 is the model's own distribution.")] = 0.0
    top_k: Annotated[int, typer.Option(help="Only the k most probable tokens; 0 is off.")] = 0
    top_p: Annotated[float, typer.Option(help="Only the most probable tokens that hold this share together; 1 is off.")] = 1.0
    seed: Seed = None
    past_last_position: PastLastPosition = "error"


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """Where the shards of bulk work are computed."""

    ray: Annotated[bool, typer.Option("--ray", help="Work on a Ray cluster (RAY_ADDRESS), whose machines see the same files.")] = False
    num_workers: Annotated[int, typer.Option(min=1, help="Of --ray.")] = 1
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="Of --ray; may be a fraction.")] = 0

    def runner(self) -> Callable[..., None]:
        from omnimamba import bulk

        return bulk.runner(self.ray, self.num_workers, self.gpus_per_worker)


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as Typer reads it: a parameter whose type is one of the dataclasses above becomes an option for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            of_fields = get_type_hints(groups[name], include_extras=True)
            options = [(field.name, of_fields[field.name], field.default) for field in dataclasses.fields(groups[name])]
        else:
            options = [(name, hints[name], parameter.default)]
        parameters += [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=a, default=d) for key, a, d in options]

    def spread(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return spread


QUESTION_BENCHMARKS = {
    "pope": "POPE: yes/no questions about objects that may not be there. Split: coco.",
    "mme": "MME: pairs of yes/no questions, perception and cognition. Split: test.",
    "gqa": "GQA: compositional questions. Splits: testdev_balanced, val_balanced.",
    "vqav2": "VQAv2: open questions. Splits: test-dev and test (a file for the evaluation server), val.",
    "textvqa": "TextVQA: questions that need reading. Splits: val (with the data's OCR words), val-plain.",
    "mmmu": "MMMU: college exams. Splits: validation, dev.",
}


@app.callback(invoke_without_command=True)
def root(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """OmniMamba: one Mamba-2 language model that answers questions about images and paints images from text."""
    if version:
        import omnimamba

        print(f"omnimamba {omnimamba.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@benchmarks.callback(invoke_without_command=True)
def evaluate(context: typer.Context) -> None:
    """Score a model on a benchmark."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@with_groups
def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG, JPEG or WebP file; existing files are overwritten.")] = Path("image.png"),
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="With several, NAME.png becomes NAME-0.png, NAME-1.png, ...")] = 1,
    grid: Annotated[bool, typer.Option("--grid", help="Write one contact sheet of all images instead.")] = False,
    *,
    painting: PaintOptions,
    seed: Seed = None,
    source: ModelOptions,
    as_json: Json = False,
) -> None:
    """Paint images from a text."""
    files = image_files(out, 1 if grid else num_images)
    with progress_bar(f"loading {source.model}") as show:
        omni = source.load()
        show("painting")
        started = time.perf_counter()
        images = omni.generate_image(
            prompt,
            num_images=num_images,
            seed=seed,
            on_progress=lambda done, total: show("painting", done, total, "tokens"),
            **dataclasses.asdict(painting),
        )
        seconds = time.perf_counter() - started
    seed = images[0].info["seed"]
    num_tokens = omni.config.num_image_tokens * num_images
    if grid:
        from omnimamba.train.samples import image_grid

        images = [image_grid(images, columns=math.ceil(num_images**0.5))]
    for image, file in zip(images, files, strict=True):
        image.save(file, quality=QUALITY)
    if as_json:
        figures = {"seconds": round(seconds, 3), "tokens_per_second": round(num_tokens / seconds, 1)}
        print_json({"prompt": prompt, "files": [str(file) for file in files], "seed": seed, **figures})
    else:
        print(*files, f"seed {seed}", sep="\n")


@app.command()
@with_groups
def describe(
    images: Annotated[list[str], typer.Argument(help="Image files; - reads one from stdin.", show_default=False)],
    question: Annotated[str | None, typer.Option("--question", "-q", help="Asked about every image. Default: what it shows.")] = None,
    *,
    sampling: AnswerOptions,
    source: ModelOptions,
    as_json: Json = False,
) -> None:
    """Answer a question about images."""
    sources = [sys.stdin.buffer.read() if image == "-" else image for image in images]
    is_stream = len(images) == 1 and not as_json
    with progress_bar(f"loading {source.model}") as show:
        omni = source.load()
        show("describing")
        answers = omni.describe(sources[0] if is_stream else sources, question, stream=is_stream, **dataclasses.asdict(sampling))
    if is_stream:
        print_pieces(answers)
    elif as_json:
        print_json([{"image": image, "answer": answer} for image, answer in zip(images, answers, strict=True)])
    else:
        for image, answer in zip(images, answers, strict=True):
            print(f"{image}: {answer}")


@app.command()
@with_groups
def chat(
    image: Annotated[str | None, typer.Option(help="Image file to talk about; without one, a conversation in text only.")] = None,
    load_state: Annotated[Path | None, typer.Option(help="Go on with a conversation that --save-state wrote.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Write the conversation to this file at the end.")] = None,
    *,
    sampling: AnswerOptions,
    source: ModelOptions,
) -> None:
    """Talk about an image.

    One question a line, typed or piped in, until the end of the input (Ctrl-D).
    """
    if load_state and image:
        raise ValueError(f"--load-state {load_state} brings its own image; drop --image {image}")
    if save_state:
        check_output(save_state)
    with progress_bar(f"loading {source.model}"):
        omni = source.load()
        conversation = omni.load_conversation(load_state) if load_state else omni.chat(image)
    try:
        for question in questions():
            try:
                print_pieces(conversation.ask(question, stream=True, **dataclasses.asdict(sampling)))
            except ValueError as error:
                if not sys.stdin.isatty():
                    raise
                print_error(error)  # a person may ask again
    finally:
        if save_state and conversation.messages:
            conversation.save(save_state)
    if save_state and not conversation.messages:
        raise ValueError(f"{save_state} is not written: no question was answered; ask one")


@app.command()
@with_groups
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 or :: lets other computers in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    num_slots: NumSlots = 32,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait for slots; more get status 429.")] = 64,
    prefix_cache_mib: Annotated[int, typer.Option(min=0, help="MiB of snapshots of images and conversations that were read.")] = 256,
    states_mib: Annotated[int, typer.Option(min=0, help="MiB of conversation states that clients may keep; 0 is off.")] = 0,
    api_key: Annotated[
        str | None, typer.Option(envvar="OMNIMAMBA_API_KEY", help="Required of clients. Better given by the variable OMNIMAMBA_API_KEY.")
    ] = None,
    fetch_remote: Annotated[bool, typer.Option("--fetch-remote", help="Fetch image_url addresses on the public internet.")] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Let the scripts of web pages from there call the API, https://example.org, or * for all.")
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the web page at /.")] = True,
    drain_seconds: Annotated[int, typer.Option(min=1, help="After SIGTERM, how long answers under way may take.")] = 60,
    *,
    source: ModelOptions,
) -> None:
    """Serve an OpenAI-compatible API and a web page."""
    from omnimamba.server.config import MIB, ServerConfig
    from omnimamba.server.listen import listen

    config = ServerConfig(
        api_key=api_key,
        max_waiting=max_waiting,
        prefix_cache_bytes=prefix_cache_mib * MIB,
        state_bytes=states_mib * MIB,
        fetch_remote=fetch_remote,
        cors_origins=tuple(cors_origin or ()),
    )
    bound = listen(host, port)
    from omnimamba.server.engine_thread import aside  # slow: a port that is taken is said at once
    from omnimamba.server.run import Server

    with progress_bar(f"loading {source.model}"):
        omni = aside(lambda: source.load(num_slots=num_slots))
    server = Server(omni, config, Path(source.model).name, with_page=page, drain_seconds=drain_seconds)
    if code := server.run_on(bound):
        sys.exit(code)


@app.command()
@with_groups
def info(
    preset: Annotated[str | None, typer.Option(help="Show a model shape (1.3b, L, nano, tiny) without any weights.")] = None,
    *,
    source: ModelOptions,
    as_json: Json = False,
) -> None:
    """Show the sizes of a model."""
    figures = shape_figures(preset) if preset else model_figures(source.load())
    if as_json:
        print_json(figures)
        return
    rows = [
        (name, label, value) for name, part in figures.items() for label, value in (part if isinstance(part, dict) else {"": part}).items()
    ]
    print_table([(f"{name} {label}".replace("_", " "), f"{value:,}" if isinstance(value, int) else value) for name, label, value in rows])


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Official .pth file, Hub id such as hustvl/OmniMamba, or model folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Model folder; with --to official a .pth file.", show_default=False)],
    to: Annotated[str, typer.Option(help="safetensors (a model folder) or official (the authors' .pth).")] = "safetensors",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, or int8 (folders only). Default: as stored.")] = None,
    quantize: Annotated[str | None, typer.Option(help="int8, fp8 or int4: weights to compute with (folders only).")] = None,
    config: Annotated[str | None, typer.Option(help="Preset or config.json of a .pth file of unusual sizes.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to put in.")] = None,
    vq: Annotated[Path | None, typer.Option(help="A VQ tokenizer to put in, as LlamaGen publishes them.")] = None,
    tower: Annotated[list[str] | None, typer.Option(help="NAME=FILE: a vision tower to put in, as timm publishes them.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="vision or vq: leave this part out.")] = None,
    gather: Annotated[
        bool | None,
        typer.Option(
            "--gather/--no-gather", help="Fetch missing parts of the released model. Default: if SOURCE is on the Hub.", show_default=False
        ),
    ] = None,
) -> None:
    """Convert a model between the authors' format and ours."""
    towers: dict[str, str] = {}
    for entry in tower or []:
        name, separator, file = entry.partition("=")
        if not separator:
            raise ValueError(f"--tower {entry}: expected NAME=FILE, for example siglip=siglip.safetensors")
        towers[name] = file
    with progress_bar(f"opening {source}") as show:
        from omnimamba.model.convert import convert as convert_model

        done = convert_model(
            source,
            out,
            to=to,
            dtype=dtype,
            quantize=quantize,
            config=config,
            tokenizer=tokenizer,
            vq=vq,
            towers=towers,
            without=without or (),
            gather=gather,
            progress=show,
        )
    print(done.path)
    if done.missing:
        print(f"not in it: {', '.join(done.missing)}")


@app.command()
@with_groups
def tokenize(
    folder: Annotated[str, typer.Argument(help="Folder of the images; for --images datasets also a Hub id.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Parquet file of the tokens.", show_default=False)],
    images: Annotated[
        str, typer.Option(help="parquet (SPLIT-*.parquet with columns id and image), folder (image files), or datasets (Hugging Face).")
    ] = "parquet",
    split: Annotated[str, typer.Option(help="Which of the folder's splits.")] = "train",
    column: Annotated[str, typer.Option(help="Image column, for --images datasets.")] = "image",
    vq_file: Annotated[
        Path | None, typer.Option("--vq", help="A vq.safetensors by itself, of the sizes of --preset.", show_default=False)
    ] = None,
    preset: Annotated[str, typer.Option(help="Sizes of the VQ tokenizer in --vq.")] = "nano",
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    shard_size: ShardSize = 4096,
    max_broken: MaxBroken = 0,
    *,
    where: RayOptions,
    model: ModelName = "nano",
    device: Device = "auto",
) -> None:
    """Turn the images of a data set into image tokens.

    Training to paint reads them. They belong to the VQ tokenizer that made them: that of --model, or the one in the file --vq. A call
    that was interrupted goes on when it is made again.
    """
    check_output(out)
    with progress_bar(f"loading {model}") as show:
        import functools

        from omnimamba import bulk
        from omnimamba.data.prepare import ImageSet, tokenize_images

        num_images = tokenize_images(
            ImageSet(folder, images, split, column),
            out,
            make_vq=functools.partial(bulk.load_vq, model, vq_file, preset, device),
            batch=batch,
            max_broken=max_broken,
            shard_size=shard_size,
            run=where.runner(),
            on_progress=lambda done, total: show("tokenizing", done, total, "images"),
        )
    print(out, f"{num_images} images", sep="\n")


@bulk_work.callback(invoke_without_command=True)
def batch(context: typer.Context) -> None:
    """Describe or paint many, from JSON lines to JSON lines.

    A call that was interrupted goes on when it is made again.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


@bulk_work.command("describe")
@with_groups
def batch_describe(
    jobs: Annotated[Path, typer.Argument(help='JSON lines {"image": file, "question": text}; other keys are kept.', show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The lines with their answers.", show_default=False)],
    images: Annotated[Path | None, typer.Option(help="Folder of the images. Default: that of the JSON lines.", show_default=False)] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="Of lines without one. Default: what it shows.")] = None,
    max_new_tokens: MaxNewTokens = 64,
    past_last_position: PastLastPosition = "error",
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    shard_size: ShardSize = 256,
    max_broken: MaxBroken = 0,
    *,
    where: RayOptions,
    source: ModelOptions,
) -> None:
    """Answer a question about each of many images."""
    check_output(out)
    with progress_bar(f"loading {source.model}") as show:
        from omnimamba import bulk

        num, num_broken = bulk.describe(
            jobs,
            out,
            bulk.ModelSource(**dataclasses.asdict(source)),
            images=images or jobs.parent,
            question=question,
            max_new_tokens=max_new_tokens,
            past_last_position=past_last_position,
            batch=batch,
            shard_size=shard_size,
            max_broken=max_broken,
            run=where.runner(),
            on_progress=lambda done, total: show("describing", done, total, "images"),
        )
    print(out, f"{num} lines" + (f", {num_broken} of them with an error instead of an answer" if num_broken else ""), sep="\n")


@bulk_work.command("generate")
@with_groups
def batch_generate(
    jobs: Annotated[Path, typer.Argument(help='JSON lines {"prompt": text, "seed": number}; other keys are kept.', show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The lines with their files.", show_default=False)],
    images: Annotated[
        Path | None, typer.Option(help="Folder for the PNG files. Default: OUT without its suffix.", show_default=False)
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Of each prompt.")] = 1,
    *,
    painting: PaintOptions,
    seed: Annotated[int, typer.Option(help="Line i without a seed of its own is painted with this plus i.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 32,
    shard_size: ShardSize = 256,
    where: RayOptions,
    source: ModelOptions,
) -> None:
    """Paint images of each of many prompts."""
    check_output(out)
    with progress_bar(f"loading {source.model}") as show:
        from omnimamba import bulk

        num = bulk.generate(
            jobs,
            out,
            bulk.ModelSource(**dataclasses.asdict(source)),
            images=images or out.with_suffix(""),
            num_images=num_images,
            sampling=dataclasses.asdict(painting),
            seed=seed,
            batch=batch,
            shard_size=shard_size,
            run=where.runner(),
            on_progress=lambda done, total: show("painting", done, total, "prompts"),
        )
    print(out, f"{num} lines", sep="\n")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, e.g. train.lr=2e-4", show_default=False)] = None,
    device: Device = "auto",
) -> None:
    """Train a model by a recipe; under torchrun on several devices.

    Prints the folder of the finished model. A run that was interrupted goes on when it is started again.
    """
    from omnimamba.train.run import train as run_recipe

    logging.getLogger("omnimamba").setLevel(logging.INFO)
    folder = run_recipe(recipe, overrides or [], device=device, show_progress=is_terminal())
    if os.environ.get("RANK", "0") == "0":  # torchrun numbers its processes
        print(folder)


@benchmarks.command()
@with_groups
def emoji(
    data: Annotated[Path, typer.Option(help="Folder of the emoji data set.", show_default=False)],
    split: Annotated[str, typer.Option(help="Which of its splits.")] = "val",
    limit: Annotated[int | None, typer.Option(help="Ask about the split's first drawings only.", show_default=False)] = None,
    num_prompts: Annotated[int, typer.Option(help="Captions to paint; 0 paints none.")] = 200,
    *,
    painting: PaintOptions,
    seed: PaintSeed = 0,
    judge: Annotated[Path | None, typer.Option(help="Folder of the judge of the paintings. Default: the model's own.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a report with pictures, the paintings and all answers.", show_default=False)
    ] = None,
    json_file: JsonFile = None,
    source: ModelOptions,
    num_slots: NumSlots = 16,
) -> None:
    """Names, groups, styles, yes/no questions and paintings of emoji."""
    for file in (json_file, out and out / "grid.png"):
        if file:
            check_output(file)
    with progress_bar(f"loading {source.model}") as show:
        from omnimamba.eval.emoji import evaluate

        report = evaluate(
            source.load(num_slots=num_slots),
            data,
            split=split,
            limit=limit,
            num_prompts=num_prompts,
            painting=paint_settings(painting),
            seed=seed,
            out=out,
            judge=judge,
            progress=show,
        )
    print_report(report, json_file)


@benchmarks.command()
@with_groups
def coco(
    data: Annotated[Path, typer.Option(help="Folder with annotations/captions_val2014.json and val2014/.", show_default=False)],
    num_captions: Annotated[int, typer.Option(help="Captions to paint, of different images.")] = 30_000,
    *,
    painting: PaintOptions,
    seed: PaintSeed = 0,
    shard: PaintShard = None,
    inception: Annotated[
        Path | None, typer.Option(help="Weights of FID's network, of torch-fidelity. Default: its own download.", show_default=False)
    ] = None,
    resize: Annotated[str, typer.Option(help="How images become 299 pixels: tensorflow, or clean (clean-fid).")] = "tensorflow",
    reference: Annotated[
        Path | None,
        typer.Option(
            help=".npz of the reference images' statistics, made of val2014 if it is not there. Default: in --out.", show_default=False
        ),
    ] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP model for the CLIP score: a folder or Hub id.", show_default=False)] = None,
    out: PaintOut = None,
    json_file: JsonFile = None,
    source: ModelOptions,
    num_slots: NumSlots = 16,
) -> None:
    """MS-COCO: FID-30K of images painted from captions, and their CLIP score."""
    out = out or Path("runs", "eval", "coco")
    check_results(out, json_file)
    with progress_bar(f"loading {source.model}") as show:
        from omnimamba.eval.ask import Shard
        from omnimamba.eval.coco import evaluate

        part = Shard.parse(shard) if shard else None
        report = evaluate(
            source.load(num_slots=num_slots),
            data,
            out,
            num_captions=num_captions,
            painting=paint_settings(painting),
            seed=seed,
            shard=part,
            inception=inception,
            resize=resize,
            reference=reference,
            clip=clip,
            progress=show,
        )
    if report is None:
        print(out, f"shard {part} is painted; when all are, call the same without --shard", sep="\n")
    else:
        print_report(report, json_file)


@benchmarks.command()
@with_groups
def geneval(
    data: Annotated[Path | None, typer.Option(help="Folder with evaluation_metadata.jsonl.", show_default=False)] = None,
    results: Annotated[
        Path | None, typer.Option(help="Paint nothing: score this results.jsonl of GenEval's own detector.", show_default=False)
    ] = None,
    num_images: Annotated[int, typer.Option(help="Images of each prompt.")] = 4,
    limit: Annotated[int | None, typer.Option(help="The first prompts only.", show_default=False)] = None,
    *,
    painting: PaintOptions,
    seed: PaintSeed = 0,
    shard: PaintShard = None,
    out: PaintOut = None,
    json_file: JsonFile = None,
    source: ModelOptions,
    num_slots: NumSlots = 16,
) -> None:
    """GenEval: paint its prompts in its folder layout; score the results of its detector."""
    if (data is None) == (results is None):
        raise ValueError("pass either --data to paint, or --results to score")
    if results:
        from omnimamba.eval.geneval import score

        if json_file:
            check_output(json_file)
        print_report(score(results, seed=seed), json_file)
        return
    assert data is not None
    out = out or Path("runs", "eval", "geneval")
    check_results(out, json_file)
    with progress_bar(f"loading {source.model}") as show:
        from omnimamba.eval.ask import Shard
        from omnimamba.eval.geneval import paint

        folder = paint(
            source.load(num_slots=num_slots),
            data,
            out,
            num_images=num_images,
            limit=limit,
            painting=paint_settings(painting),
            seed=seed,
            shard=Shard.parse(shard) if shard else None,
            progress=show,
        )
    print(folder)


def ask_benchmark(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="Folder of the benchmark's published files.", show_default=False)],
    split: Annotated[str | None, typer.Option(help="Default: the first one named above.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="The first questions only.", show_default=False)] = None,
    shard: Annotated[
        str | None, typer.Option(help="I/N: ask part I of N only; `omnimamba eval merge` scores all parts.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    seed: BootstrapSeed = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for all answers; a second call goes on from them. Default: runs/eval/NAME.", show_default=False),
    ] = None,
    json_file: JsonFile = None,
    *,
    source: ModelOptions,
    num_slots: NumSlots = 16,
) -> None:
    name = str(context.info_name)
    out = out or Path("runs", "eval", name)
    check_results(out, json_file)
    with progress_bar(f"reading {name}") as show:
        from omnimamba.eval.ask import Shard
        from omnimamba.eval.understanding import BENCHMARKS, evaluate

        part = Shard.parse(shard) if shard else None
        BENCHMARKS[name].questions(data, split, limit)  # what is wrong with the folder is said before a model is loaded
        show(f"loading {source.model}")
        report = evaluate(
            source.load(num_slots=num_slots),
            name,
            data,
            out,
            split=split,
            limit=limit,
            shard=part,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=show,
        )
    if report is None:
        print(out, f"shard {part} is asked; when all are: omnimamba eval merge {out} --data {data}", sep="\n")
    else:
        print_report(report, json_file)


for benchmark_name, help_text in QUESTION_BENCHMARKS.items():
    benchmarks.command(benchmark_name, help=help_text)(with_groups(ask_benchmark))


@benchmarks.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="The --out folders of the shards; one if they share it.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder that the questions came from.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder for the report. Default: the first of FOLDERS.", show_default=False)] = None,
    seed: BootstrapSeed = 0,
    json_file: JsonFile = None,
) -> None:
    """Score the answers of all shards of a benchmark."""
    out = out or folders[0]
    check_results(out, json_file)
    with progress_bar("scoring"):
        from omnimamba.eval.understanding import merge as merge_shards

        report = merge_shards(data, folders, out, seed=seed)
    print_report(report, json_file)


def check_results(out: Path, json_file: Path | None) -> None:
    """Makes the folders of results. ValueError if they cannot be written."""
    for file in (json_file, out / "report.json"):
        if file:
            check_output(file)


def print_report(report: Report, json_file: Path | None) -> None:
    """The table and the protocol of figures, which also go to `json_file` with every answer."""
    if json_file:
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    print_table(report.table())
    print()
    for key, value in report.protocol.items():
        print(f"{key}: {value}")


def paint_settings(painting: PaintOptions) -> PaintSettings:
    """As evaluations take them."""
    from omnimamba.eval.paint import PaintSettings

    return PaintSettings(**dataclasses.asdict(painting))


# ---- figures of a model


def model_figures(omni: OmniMamba) -> dict[str, Any]:
    """What `info` shows of a loaded model."""
    bundle = omni.bundle
    figures = figures_of(omni.config, bundle.model, bundle.vision, bundle.vq)
    return figures | {
        "device": str(omni.device),
        "dtype": str(bundle.model.dtype).removeprefix("torch."),
        "quantization": omni.config.quantization or "none",
    }


def shape_figures(name: str) -> dict[str, Any]:
    """What `info` shows of a preset; its model takes no memory."""
    from omnimamba.config import preset

    config = preset(name)  # before the slow import, for a quick answer to a wrong name
    from omnimamba.model import weights

    return figures_of(config, *(weights.outline(component, config) for component in weights.COMPONENTS))


def figures_of(config: Any, model: Any, vision: Any, vq: Any) -> dict[str, Any]:
    import platform

    import torch

    import omnimamba
    from omnimamba.model import quantize
    from omnimamba.model.state import MambaState

    parameters: dict[str, int] = {}
    weight_bytes = 0
    parts = {"model": model, "vision": vision, "vq": vq}
    for part, module in parts.items():
        for name, num, num_bytes in quantize.parameters(module) if module is not None else ():
            key = "task_lora" if ".lora_" in name else name.split(".")[0] if part == "model" else part
            parameters[key] = parameters.get(key, 0) + num
            weight_bytes += num_bytes
    return {
        "name": config.name,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "bytes": {
            "weights": weight_bytes,
            "state_per_sequence": MambaState.zeros(config.backbone, 1, device="meta").bytes_per_slot,
        },
        "positions": {"t2i": config.t2i_positions, "mmu": config.mmu_positions},
        "image_pixels": config.vq.image_size,
        "image_tokens": config.num_image_tokens,
        "vision_tokens": config.num_vision_tokens,
        "versions": {"omnimamba": omnimamba.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


# ---- files and terminals


def image_files(out: Path, num_images: int) -> list[Path]:
    """Where the images go, with their folders made. ValueError where an image could not be written, before any is painted."""
    if out.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{out} names no image format; end it in one of {', '.join(IMAGE_SUFFIXES)}")
    files = [out] if num_images == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(num_images)]
    for file in files:
        check_output(file)
    return files


def check_output(file: Path) -> None:
    """Makes the folder of an output file. ValueError if the file cannot be written."""
    if file.is_dir():
        raise ValueError(f"{file} is a directory; name a file in it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: folder {file.parent}: {error.strerror}; choose another place") from error
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written: no permission; choose another place")


def questions() -> Iterator[str]:
    """Lines of stdin that are not blank; with a prompt and line editing on a terminal."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines once it is imported)
    with contextlib.suppress(EOFError):
        while True:
            if question := input("> ").strip():
                yield question
    print()


def print_pieces(pieces: Any) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns side by side, the first one to the left and numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        print(first, *rest, sep="  ")


def print_error(error: object) -> None:
    """One line on stderr."""
    print("omnimamba:", *str(error).splitlines(), file=sys.stderr)


def is_terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """Gives `show(what, done, total, unit)`, which is told what is done now and, if that is known, how much of it.

    The bar is on stderr of a terminal, comes after BAR_AFTER_SECONDS and leaves no trace.
    """
    if not is_terminal():
        yield lambda what, done=0, total=None, unit="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[left]}"))
    progress = Progress(*columns, *times, console=Console(stderr=True), transient=True, speed_estimate_period=SPEED_SECONDS)
    bar = progress.add_task(what, total=None, count="", left="")
    shown_at = -math.inf

    def show(what: str, done: int = 0, total: int | None = None, unit: str = "") -> None:
        nonlocal shown_at
        now = time.monotonic()
        if what != progress.tasks[bar].description:
            progress.reset(bar)  # elapsed time and time left are those of what is done now
        elif now - shown_at < SHOW_SECONDS:
            return
        shown_at = now
        count, left = ("", "") if total is None else (f"{done:,} of {total:,} {unit}".rstrip(), "left")
        progress.update(bar, description=what, total=total, completed=done, count=count, left=left)

    timer = threading.Timer(BAR_AFTER_SECONDS, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield show
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


# ---- one command line


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line (default: sys.argv) and returns its exit code: 0, 2 after bad input, 1 if memory is short, 130 after Ctrl-C, 143
    after SIGTERM.
    """
    is_debug = os.environ.get("OMNIMAMBA_DEBUG", "0") not in ("", "0")
    # OpenMP threads that spin for long make a decode step 10 times slower where other programs use the cores too; threads that
    # never spin make it twice as slow where none do
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # weights in huge pages: reading them is the time of decoding on a CPU
    logging.basicConfig(level=logging.WARNING, format="omnimamba: %(message)s")
    command = typer.main.get_command(app)
    try:
        with contextlib.suppress(typer.Exit):  # --help
            with command.make_context("omnimamba", list(sys.argv[1:] if args is None else args)) as context:
                command.invoke(context)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # nobody reads any more; what is still buffered must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted")
        return INTERRUPTED
    except Interrupted as stop:
        print_error(stop)
        return stop.exit_code
    except (ValueError, OSError, ModuleNotFoundError, UsageError) as error:
        if is_debug:
            raise
        print_error(explanation(error))
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if is_debug or type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):  # the latter torch's, not imported for this
            raise
        print_error(f"out of memory ({str(error).split('. GPU')[0] or 'on the host'}); --dtype bfloat16 or --quantize int4 take less")
        return FAILED


def explanation(error: Exception) -> str:
    """What the user should know of an error."""
    if isinstance(error, UsageError):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "omnimamba"
        return f"{error.format_message().rstrip('.')}; see `{path} --help`"  # type: ignore[attr-defined]
    if isinstance(error, ModuleNotFoundError):
        return f"this command needs the package {error.name}; `pip install 'omnimamba[train,eval,serve]'` installs it"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
