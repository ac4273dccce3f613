"""What the commands do with good input."""

import contextlib
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import omnimamba
from omnimamba import cli as module

COMMANDS = (
    "generate",
    "describe",
    "chat",
    "serve",
    "info",
    "convert",
    "tokenize",
    "train",
    "eval",
    "eval emoji",
    "eval pope",
    "eval vqav2",
    "eval merge",
    "eval coco",
    "eval geneval",
    "batch",
    "batch describe",
    "batch generate",
)


def run(*args: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "omnimamba.cli", *(str(arg) for arg in args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def pixels(path):
    with Image.open(path) as image:
        return image.size, image.convert("RGB").tobytes()


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli, command):
    result = cli(*command.split(), "--help")
    assert result.code == 0 and result.err == ""
    assert f"Usage: omnimamba {command}" in result.out and "-h, --help" in result.out


def test_help_lists_the_commands(cli):
    for args in ((), ("--help",), ("-h",)):
        result = cli(*args)
        assert result.code == 0 and result.err == ""
        listed = re.findall(r"^  ([a-z]+)  ", result.out, re.MULTILINE)
        assert listed == list(dict.fromkeys(command.split()[0] for command in COMMANDS))


def test_help_is_quick():
    """Less than 0.3 s, measured as processor time so that a busy machine does not matter; and without torch."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert run("--help").returncode == 0
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.3
    code = "import sys; from omnimamba.cli import main; code = main(['generate', '--help']); sys.exit('torch' in sys.modules or code)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_version(cli):
    assert cli("--version").out == f"omnimamba {omnimamba.__version__}\n"


# ---- generate


def test_one_image(cli, folder, omni, tmp_path):
    out = tmp_path / "new" / "folder" / "apple.png"
    result = cli("generate", "red apple", "-o", out, "--seed", "5", "--model", folder)
    assert (result.code, result.out, result.err) == (0, f"{out}\nseed 5\n", "")
    assert pixels(out)[1] == omni.generate_image("red apple", seed=5)[0].tobytes()
    first = pixels(out)
    assert cli("generate", "red apple", "-o", out, "--seed", "6", "--model", folder).code == 0
    assert pixels(out) != first  # overwritten


def test_several_images_and_options(cli, folder, omni, tmp_path):
    options = ("--guidance-scale", "2", "--temperature", "0.9", "--top-k", "20", "--top-p", "0.8")
    result = cli("generate", "a zoo", "-o", tmp_path / "zoo.png", "-n", "3", "--seed", "1", *options, "--model", folder, "--json")
    values = json.loads(result.out)
    assert values["files"] == [str(tmp_path / f"zoo-{i}.png") for i in range(3)] and values["seed"] == 1
    assert values["seconds"] > 0 and values["tokens_per_second"] > 0
    expected = omni.generate_image("a zoo", num_images=3, seed=1, guidance_scale=2, temperature=0.9, top_k=20, top_p=0.8)
    assert [pixels(file)[1] for file in values["files"]] == [image.tobytes() for image in expected]


def test_grid(cli, folder, omni, tmp_path):
    result = cli("generate", "a zoo", "-o", tmp_path / "zoo.png", "-n", "3", "--grid", "--seed", "1", "--model", folder)
    assert result.out.splitlines()[0] == str(tmp_path / "zoo.png")
    first = omni.generate_image("a zoo", seed=1)[0]
    with Image.open(tmp_path / "zoo.png") as sheet:
        assert sheet.width > 2 * first.width and sheet.height > 2 * first.height
        assert sheet.crop((0, 0, *first.size)).tobytes() == first.tobytes()


def test_a_drawn_seed_is_printed(cli, folder, tmp_path):
    first = cli("generate", "a zoo", "-o", tmp_path / "first.png", "--model", folder)
    seed = first.out.split()[-1]
    cli("generate", "a zoo", "-o", tmp_path / "again.png", "--seed", seed, "--model", folder)
    assert pixels(tmp_path / "first.png") == pixels(tmp_path / "again.png")


@pytest.mark.parametrize("suffix", module.IMAGE_SUFFIXES)
def test_formats(cli, folder, tmp_path, suffix):
    assert cli("generate", "a", "-o", tmp_path / f"image{suffix.upper()}", "--model", folder).code == 0
    with Image.open(tmp_path / f"image{suffix.upper()}") as image:
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG")


# ---- describe


def test_one_answer(cli, folder, omni, picture):
    options = ("--question", "what?", "--max-new-tokens", "20", "--temperature", "1", "--seed", "3")
    expected = omni.describe(picture, "what?", max_new_tokens=20, temperature=1.0, seed=3)
    result = cli("describe", picture, *options, "--model", folder)
    assert (result.code, result.out, result.err) == (0, f"{expected}\n", "")
    assert cli("describe", "-", *options, "--model", folder, stdin=picture.read_bytes()).out == f"{expected}\n"
    values = json.loads(cli("describe", picture, *options, "--model", folder, "--json").out)
    assert values == [{"image": str(picture), "answer": expected}]


def odd_images(folder):
    """Valid images of kinds that naive readers fail at, by name."""
    noise = Image.effect_noise((60, 40), 80)
    rgb = Image.merge("RGB", (noise, noise.rotate(90), noise.rotate(180)))
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = rgb.copy()
    transparent.putalpha(noise)
    kinds = {
        "pixel.png": (rgb.crop((0, 0, 1, 1)), {}),
        "20-megapixels.jpg": (rgb.resize((5000, 4000), Image.Resampling.NEAREST), {"quality": 50}),
        "wide.png": (rgb.resize((400, 40)), {}),
        "tall.png": (rgb.resize((4, 400)), {}),
        "grey.png": (noise, {}),
        "16-bit.png": (noise.convert("I").point(lambda value: value * 257).convert("I;16"), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "palette.gif": (rgb.quantize(16), {}),
        "alpha.png": (transparent, {}),
        "one-bit.png": (noise.convert("1"), {}),
        "rotated.jpg": (rgb, {"exif": exif}),
        "animated.gif": (rgb.quantize(16), {"save_all": True, "append_images": [rgb.rotate(90).quantize(16)]}),
        "animated.webp": (rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "lossless.webp": (transparent, {"lossless": True}),
        "image.avif": (rgb, {}),
        "image.bmp": (rgb, {}),
        "image.tiff": (rgb, {}),
        "noext": (rgb, {"format": "PNG"}),
        "größe 大.png": (rgb, {}),
    }
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    return [folder / name for name in kinds]


def test_odd_images(cli, folder, omni, tmp_path):
    files = odd_images(tmp_path)
    result = cli("describe", *files, "--question", "what?", "--max-new-tokens", "3", "--model", folder)
    assert result.code == 0 and result.err == ""
    answers = omni.describe(files, "what?", max_new_tokens=3)
    assert result.out == "".join(f"{file}: {answer}\n" for file, answer in zip(files, answers, strict=True))


# ---- chat


def test_piped_chat(cli, folder, omni, picture, tmp_path):
    state = tmp_path / "states" / "chat.safetensors"
    options = ("--max-new-tokens", "8", "--model", folder)
    result = cli("chat", "--image", picture, "--save-state", state, *options, stdin="what?\n\n  größe?  \n".encode())
    conversation = omni.chat(picture)
    expected = [conversation.ask(question, max_new_tokens=8) for question in ("what?", "größe?")]
    assert (result.code, result.out, result.err) == (0, "".join(f"{answer}\n" for answer in expected), "")
    result = cli("chat", "--load-state", state, *options, stdin=b"why?")
    assert result.code == 0 and result.out == conversation.ask("why?", max_new_tokens=8) + "\n"


def test_chat_without_an_image(cli, folder, omni):
    result = cli("chat", "--max-new-tokens", "4", "--model", folder, stdin=b"hello\n")
    assert result.out == omni.chat().ask("hello", max_new_tokens=4) + "\n"


def test_an_answer_without_room_ends_a_piped_chat_and_what_was_said_is_saved(cli, folder, omni, tmp_path):
    state = tmp_path / "chat.safetensors"
    options = ("--max-new-tokens", "80", "--model", folder, "--temperature", "1", "--seed", "0")
    result = cli("chat", "--save-state", state, *options, stdin=b"what?\n" * 9)
    assert result.code == 2 and "positions left" in result.err and result.err.count("\n") == 1
    assert len(omni.load_conversation(state).messages) >= 2
    assert cli("chat", *options, "--past-last-position", "clamp", stdin=b"what?\n" * 9).code == 0


def test_a_chat_without_a_question_says_that_nothing_is_saved(cli, folder, tmp_path):
    state = tmp_path / "chat.safetensors"
    result = cli("chat", "--save-state", state, "--model", folder, stdin=b"\n")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"omnimamba: {state} is not written: no question was answered; ask one\n" and not state.exists()


def test_a_person_may_ask_again(cli, folder, omni, monkeypatch):
    lines = iter(["hello " * 50, "", "hello"])

    def typed(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    result = cli("chat", "--max-new-tokens", "4", "--model", folder, typed=True)
    assert result.code == 0
    assert result.out == omni.chat().ask("hello", max_new_tokens=4) + "\n\n"
    assert "positions left" in result.err


# ---- info


def test_info_of_a_model(cli, folder, omni):
    result = cli("info", "--model", folder, "--json")
    values = json.loads(result.out)
    bundle = omni.bundle
    num_parameters = sum(p.numel() for part in (bundle.model, bundle.vision, bundle.vq) for p in part.parameters())
    assert values["parameters"]["total"] == num_parameters == sum(values["parameters"].values()) / 2
    assert values["bytes"]["weights"] == 4 * num_parameters
    assert values["bytes"]["state_per_sequence"] == omni.chat().model.engine.runner.state.bytes_per_slot
    assert values["positions"] == {"t2i": omni.config.t2i_positions, "mmu": omni.config.mmu_positions}
    assert values["device"] == "cpu" and values["dtype"] == "float32"
    assert f"{num_parameters:,}" in cli("info", "--model", folder).out


def test_info_of_a_preset(cli):
    values = json.loads(cli("info", "--preset", "tiny", "--json").out)
    assert values["name"] == "tiny" and values["parameters"]["task_lora"] > 0 and "device" not in values


# ---- convert


def test_convert_there_and_back(cli, folder, tmp_path):
    checkpoint, again = tmp_path / "tiny.pth", tmp_path / "again"
    result = cli("convert", folder, checkpoint, "--to", "official")
    assert (result.code, result.out, result.err) == (0, f"{checkpoint}\n", "")
    config, tokenizer = folder / "config.json", folder / "tokenizer.json"
    result = cli("convert", checkpoint, again, "--config", config, "--tokenizer", tokenizer)
    assert (result.code, result.out, result.err) == (0, f"{again}\n", "")
    for name in ("config.json", "model.safetensors", "vision.safetensors", "vq.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_convert_without_parts(cli, folder, picture, tmp_path):
    result = cli("convert", folder, tmp_path / "bare", "--without", "vision", "--without", "vq", "--dtype", "bfloat16")
    assert (result.code, result.out) == (0, f"{tmp_path / 'bare'}\nnot in it: vision, vq\n")
    result = cli("describe", picture, "--model", tmp_path / "bare")
    assert result.code == 2 and "without its vision towers" in result.err
    assert json.loads(cli("info", "--model", tmp_path / "bare", "--json").out)["parameters"].keys().isdisjoint({"vision", "vq"})


# ---- data, training, evaluation


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """A data set of three drawings in the format of the emoji data set."""
    folder = tmp_path_factory.mktemp("drawings")
    rows = []
    for i, color in enumerate(("red", "green", "blue")):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), color).save(buffer, "PNG")
        caption = f"{color} square"
        names = {"id": f"d{i}", "caption": caption, "base_caption": caption, "style": "plain", "group": "squares", "subgroup": color}
        rows.append({**names, "keywords": [color], "image": {"bytes": buffer.getvalue(), "path": None}})
    pq.write_table(pa.Table.from_pylist(rows), folder / "val-00000-of-00001.parquet")
    turns = [{"from": "human", "value": "<image>\nName this emoji."}, {"from": "gpt", "value": "red square"}]
    lines = [{"image": f"d{i}", "type": "name", "conversations": turns} for i in range(3)]
    (folder / "understanding-val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"image": f"d{i}", "captions": [rows[i]["caption"]]} for i in range(3)]
    (folder / "t2i-val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_tokenize(cli, folder, omni, drawings, tmp_path):
    from omnimamba.data.prepare import read_image_ids

    out = tmp_path / "new" / "tokens.parquet"
    result = cli("tokenize", drawings, "--split", "val", "--out", out, "--model", folder)
    assert (result.code, result.out, result.err) == (0, f"{out}\n3 images\n", "")
    ids = read_image_ids(out, omni.config.num_image_tokens, omni.config.image_vocab_size)
    assert sorted(ids) == ["d0", "d1", "d2"]
    alone = tmp_path / "alone.parquet"
    assert cli("tokenize", drawings, "--split", "val", "-o", alone, "--vq", folder / "vq.safetensors", "--preset", "tiny").code == 0
    again = read_image_ids(alone, omni.config.num_image_tokens, omni.config.image_vocab_size)
    assert all(again[name].equal(ids[name]) for name in ids)


def test_tokenize_names_a_missing_split(cli, folder, drawings, tmp_path):
    result = cli("tokenize", drawings, "--split", "test", "--out", tmp_path / "tokens.parquet", "--model", folder)
    assert result.code == 2 and "test-*.parquet" in result.err and result.err.count("\n") == 1


def test_emoji(cli, folder, drawings, tmp_path):
    args = ("eval", "emoji", "--data", drawings, "--num-prompts", "0", "--model", folder, "--json", tmp_path / "new" / "out.json")
    result = cli(*args)
    assert result.code == 0 and result.err == ""
    values = json.loads((tmp_path / "new" / "out.json").read_text())
    assert values["protocol"]["split"] == "val" and "vq_psnr" in values["figures"]
    table, protocol = result.out.split("\n\n")
    first, *rows = table.splitlines()
    assert protocol.startswith("benchmark: emoji\n") and "\nnum_drawings: " in protocol
    assert first.split() == ["figure", "value", "95", "%", "interval", "n"] and len(rows) == len(values["figures"])
    assert len({len(row) for row in rows}) == 1  # columns


def test_emoji_names_what_is_missing(cli, folder, tmp_path):
    result = cli("eval", "emoji", "--data", tmp_path, "--model", folder)
    assert result.code == 2 and "val-*.parquet" in result.err and result.err.count("\n") == 1


def test_train(cli, monkeypatch):
    calls = []

    def train(recipe_file, overrides=(), *, device="auto", show_progress=False):
        calls.append((recipe_file, overrides, device, show_progress))
        return Path("runs/model")

    monkeypatch.setattr("omnimamba.train.run.train", train)
    result = cli("train", "recipe.toml", "train.lr=2e-4", "train.steps=3", "--device", "cpu")
    assert (result.code, result.out) == (0, "runs/model\n")
    assert calls == [(Path("recipe.toml"), ["train.lr=2e-4", "train.steps=3"], "cpu", False)]
    assert cli("train", "recipe.toml").code == 0 and calls[1][1] == []


# ---- terminals and signals


def test_a_bar_on_terminals_only(monkeypatch, capsys):
    monkeypatch.setattr(module, "BAR_AFTER_SECONDS", 0.01)
    with module.progress_bar("working") as show:
        show("working", 1, 2, "images")
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(module, "BAR_AFTER_SECONDS", 2.0)
    monkeypatch.setattr(module, "is_terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stderr for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with module.progress_bar("quick work") as show:
        show("quick work", 1, 2)
    assert "quick work" not in capsys.readouterr().err
    monkeypatch.setattr(module, "BAR_AFTER_SECONDS", 0.01)
    with module.progress_bar("loading") as show:
        time.sleep(0.2)
        show("painting", 1024, 4096, "tokens")
        time.sleep(0.3)
    out, err = capsys.readouterr()
    err = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err)
    assert out == "" and "loading" in err and "painting" in err and "1,024 of 4,096 tokens" in err and "left" in err


@pytest.mark.parametrize("args", [(), ("-n", "3"), ("-n", "20", "--guidance-scale", "2")])
def test_painting_says_how_far_it_is(cli, folder, tmp_path, monkeypatch, args, omni):
    """Every row of tokens of every image is told, the last with all of them."""
    shown = []

    @contextlib.contextmanager
    def progress_bar(what):
        yield lambda *news: shown.append(news)

    monkeypatch.setattr(module, "progress_bar", progress_bar)
    assert cli("generate", "a zoo", "-o", tmp_path / "zoo.png", "--model", folder, *args).code == 0
    num_tokens = int(args[1] if args else 1) * omni.config.num_image_tokens
    rows = [news for news in shown if len(news) > 1]
    assert all((what, total, unit) == ("painting", num_tokens, "tokens") for what, _, total, unit in rows)
    done = [news[1] for news in rows]
    assert done == sorted(done) and done[-1] == num_tokens and len(done) == num_tokens // omni.vq.config.grid_size


def test_a_process(folder, tmp_path):
    result = run("generate", "red apple", "-o", "apple.png", "--num-images", "2", "--seed", "0", "--model", folder, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "apple-0.png\napple-1.png\nseed 0\n", "")


def test_ctrl_c(folder):
    command = [sys.executable, "-m", "omnimamba.cli", "chat", "--max-new-tokens", "4", "--model", str(folder)]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    with subprocess.Popen(command, **streams, text=True, preexec_fn=heeding) as process:
        process.stdin.write("hello\n")
        process.stdin.flush()
        process.stdout.readline()  # the answer: the chat waits for the next question now
        while process.poll() is None:  # as a user would: Python drops an interrupt that falls into a destructor
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
        assert process.returncode == 130
        assert process.stderr.read() == "omnimamba: interrupted\n"


def test_a_reader_that_has_gone(folder, picture):
    command = [sys.executable, "-m", "omnimamba.cli", "describe", str(picture), "--model", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == ""
