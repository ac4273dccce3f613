"""The command `omnimamba`. A handler reads options, calls the library and prints what comes back.

Results go to stdout; errors, logs and progress bars to stderr. Heavy imports are inside the handlers, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from omnimamba.engine.omnimamba import OmniMamba
    from omnimamba.model.vq import VQModel

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
"""Exit codes; the last two are those of a program that died of SIGINT and SIGPIPE."""
BAR_AFTER_SECONDS = 2.0
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

Model = Annotated[str, typer.Option("--model", "-m", help="nano (shipped), a model folder, a Hub id, or an official .pth file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16.")]
Seed = Annotated[int | None, typer.Option(help="Makes the result reproducible; drawn when it is not given.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token, 1 is the model's own distribution.")]
TopK = Annotated[int, typer.Option(help="Only the k most probable tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Only the most probable tokens that hold this share together; 1 is off.")]
PastLastPosition = Annotated[str, typer.Option(help="Text longer than the position table: error, or clamp (go on with its last row).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
def generate(
    prompt: Annotated[str, typer.Argument(help="What to paint.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG, JPEG or WebP file; existing files are overwritten.")] = Path("image.png"),
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="With several, NAME.png becomes NAME-0.png, NAME-1.png, ...")] = 1,
    grid: Annotated[bool, typer.Option("--grid", help="Write one contact sheet of all images instead.")] = False,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the prompt; 1 is off. Default: the model's.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 paints the most probable image. Default: the model's.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k most probable tokens; 0 is off. Default: the model's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the tokens that hold this share; 1 is off. Default: the model's.")] = None,
    seed: Seed = None,
    model: Model = "nano",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Paint images from a text."""
    files = image_files(out, 1 if grid else num_images)
    with progress_bar(f"loading {model}") as show:
        omni = load(model, device, dtype)
        show("painting")
        started = time.perf_counter()
        images = omni.generate_image(
            prompt,
            num_images=num_images,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
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
def describe(
    images: Annotated[list[str], typer.Argument(help="Image files; - reads one from stdin.", show_default=False)],
    question: Annotated[str | None, typer.Option("--question", "-q", help="Asked about every image. Default: what it shows.")] = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    past_last_position: PastLastPosition = "error",
    model: Model = "nano",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer a question about images."""
    sources = [sys.stdin.buffer.read() if image == "-" else image for image in images]
    sampling = sampling_of(max_new_tokens, temperature, top_k, top_p, seed, past_last_position)
    is_stream = len(images) == 1 and not as_json
    with progress_bar(f"loading {model}") as show:
        omni = load(model, device, dtype)
        show("describing")
        answers = omni.describe(sources[0] if is_stream else sources, question, stream=is_stream, **sampling)
    if is_stream:
        print_pieces(answers)
    elif as_json:
        print_json([{"image": image, "answer": answer} for image, answer in zip(images, answers, strict=True)])
    else:
        for image, answer in zip(images, answers, strict=True):
            print(f"{image}: {answer}")


@app.command()
def chat(
    image: Annotated[str | None, typer.Option(help="Image file to talk about; without one, a conversation in text only.")] = None,
    load_state: Annotated[Path | None, typer.Option(help="Go on with a conversation that --save-state wrote.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Write the conversation to this file at the end.")] = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    past_last_position: PastLastPosition = "error",
    model: Model = "nano",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk about an image.

    One question a line, typed or piped in, until the end of the input (Ctrl-D).
    """
    if load_state and image:
        raise ValueError(f"--load-state {load_state} brings its own image; drop --image {image}")
    if save_state:
        check_output(save_state)
    sampling = sampling_of(max_new_tokens, temperature, top_k, top_p, seed, past_last_position)
    with progress_bar(f"loading {model}"):
        omni = load(model, device, dtype)
        conversation = omni.load_conversation(load_state) if load_state else omni.chat(image)
    try:
        for question in questions():
            try:
                print_pieces(conversation.ask(question, stream=True, **sampling))
            except ValueError as error:
                if not sys.stdin.isatty():
                    raise
                print_error(error)  # a person may ask again
    finally:
        if save_state and conversation.messages:
            conversation.save(save_state)


@app.command()
def info(
    model: Model = "nano",
    preset: Annotated[str | None, typer.Option(help="Show a model shape (1.3b, L, nano, tiny) without any weights.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Show the sizes of a model."""
    figures = shape_figures(preset) if preset else model_figures(load(model, device, dtype))
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
def tokenize(
    folder: Annotated[Path, typer.Argument(help="Folder of SPLIT-*.parquet files with columns id and image.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Parquet file of the tokens.", show_default=False)],
    split: Annotated[str, typer.Option(help="Which of the folder's splits.")] = "train",
    vq_file: Annotated[
        Path | None, typer.Option("--vq", help="A vq.safetensors by itself, of the sizes of --preset.", show_default=False)
    ] = None,
    preset: Annotated[str, typer.Option(help="Sizes of the VQ tokenizer in --vq.")] = "nano",
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    model: Model = "nano",
    device: Device = "auto",
) -> None:
    """Turn the images of a data set into image tokens.

    Training to paint reads them. They belong to the VQ tokenizer that made them: that of --model, or the one in the file --vq.
    """
    check_output(out)
    with progress_bar(f"loading {model}") as show:
        from omnimamba.data.prepare import tokenize_images

        vq = load_vq(vq_file, preset, device) if vq_file else load(model, device, "float32").vq
        num_images = tokenize_images(
            folder, split, out, vq=vq, batch=batch, on_progress=lambda done, total: show("tokenizing", done / total)
        )
    print(out, f"{num_images} images", sep="\n")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, e.g. train.lr=2e-4", show_default=False)] = None,
    device: Device = "auto",
) -> None:
    """Train a model by a recipe.

    Prints the folder of the finished model. A run that was interrupted goes on when it is started again.
    """
    from omnimamba.train.run import train as run_recipe

    logging.getLogger("omnimamba").setLevel(logging.INFO)
    print(run_recipe(recipe, overrides or [], device=device, show_progress=is_terminal()))


@benchmarks.command()
def emoji(
    data: Annotated[Path, typer.Option(help="Folder of the emoji data set.", show_default=False)],
    split: Annotated[str, typer.Option(help="Which of its splits.")] = "val",
    limit: Annotated[int | None, typer.Option(help="Ask about the split's first drawings only.", show_default=False)] = None,
    num_prompts: Annotated[int, typer.Option(help="Captions to paint; 0 paints none.")] = 200,
    guidance_scale: Annotated[float | None, typer.Option(help="Of the paintings. Default: the model's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the paintings and of the intervals.")] = 0,
    judge: Annotated[Path | None, typer.Option(help="Folder of the judge of the paintings. Default: the model's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the paintings, all answers and a picture.", show_default=False)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.", show_default=False)] = None,
    model: Model = "nano",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Names, groups, styles, yes/no questions and paintings of emoji."""
    for file in (json_file, out and out / "grid.png"):
        if file:
            check_output(file)
    with progress_bar(f"loading {model}") as show:
        from omnimamba.eval.emoji import evaluate

        report = evaluate(
            load(model, device, dtype),
            data,
            split=split,
            limit=limit,
            num_prompts=num_prompts,
            guidance_scale=guidance_scale,
            seed=seed,
            out=out,
            judge=judge,
            progress=lambda stage, done, total: show(stage, done / max(total, 1)),
        )
    if json_file:
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    print_table(report.table())


def load(model: str, device: str, dtype: str) -> OmniMamba:
    from omnimamba.engine.omnimamba import OmniMamba

    return OmniMamba.from_pretrained(model, device=device, dtype=dtype)


def sampling_of(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int | None, past_last_position: str
) -> dict[str, Any]:
    """The settings of an answer, as `describe` and `ask` take them."""
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "past_last_position": past_last_position,
    }


def load_vq(file: Path, preset_name: str, device: str) -> VQModel:
    """The VQ tokenizer of a preset with the weights of a file."""
    from omnimamba.config import preset
    from omnimamba.engine.omnimamba import resolve_device
    from omnimamba.model.vq import VQModel
    from omnimamba.train.omnimamba import load_frozen

    return load_frozen(VQModel(preset(preset_name).vq), str(file), resolve_device(device))


# ---- figures of a model


def model_figures(omni: OmniMamba) -> dict[str, Any]:
    """What `info` shows of a loaded model."""
    bundle = omni.bundle
    figures = figures_of(omni.config, bundle.model, bundle.vision, bundle.vq)
    return figures | {"device": str(omni.device), "dtype": str(bundle.model.dtype).removeprefix("torch.")}


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
    from omnimamba.model.state import MambaState

    parameters: dict[str, int] = {}
    parts = {"model": model, "vision": vision, "vq": vq}
    for part, module in parts.items():
        for name, parameter in module.named_parameters() if module is not None else ():
            key = "task_lora" if ".lora_" in name else name.split(".")[0] if part == "model" else part
            parameters[key] = parameters.get(key, 0) + parameter.numel()
    weights = [p for module in parts.values() if module is not None for p in module.parameters()]
    return {
        "name": config.name,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "bytes": {
            "weights": sum(p.nbytes for p in weights),
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
    """Gives a function that is told what is done now and, if that is known, the fraction that is done.

    The bar is on stderr of a terminal, comes after BAR_AFTER_SECONDS and leaves no trace.
    """
    if not is_terminal():
        yield lambda what, fraction=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    bar = progress.add_task(what, total=None)

    def show(what: str, fraction: float | None = None) -> None:
        progress.update(bar, description=what, total=None if fraction is None else 1, completed=fraction or 0)

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
    """Runs a command line (default: sys.argv) and returns its exit code: 0, 2 after bad input, 130 after Ctrl-C."""
    is_debug = os.environ.get("OMNIMAMBA_DEBUG", "0") not in ("", "0")
    # OpenMP threads that spin while they wait make a decode step 10 times slower where other programs use the cores too
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
    except (ValueError, OSError, ModuleNotFoundError, UsageError) as error:
        if is_debug:
            raise
        print_error(explanation(error))
        return BAD_INPUT


def explanation(error: Exception) -> str:
    """What the user should know of an error."""
    if isinstance(error, UsageError):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "omnimamba"
        return f"{error.format_message().rstrip('.')}; see `{path} --help`"  # type: ignore[attr-defined]
    if isinstance(error, ModuleNotFoundError):
        return f"this command needs the package {error.name}; `pip install 'omnimamba[train,eval]'` installs it"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
