"""What the README and the pages of docs/ show is true: commands and code run, expected output is what comes out, links lead somewhere.

A block ```bash or ```python runs unless the line before it is `<!-- not run: why -->`. A block ```text right after one that runs is
its expected output. The blocks of a page run in one folder, one after the other.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from omnimamba.cli import app

ROOT = Path(__file__).parents[1]
NANO = ROOT / "src/omnimamba/assets/nano"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NANO_IS_THERE = (NANO / "model.safetensors").is_file()
has_nano = pytest.mark.skipif(not NANO_IS_THERE, reason="the shipped model is not there")


@dataclasses.dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    expected: str | None


def runnable_blocks(page: Path) -> list[Block]:
    """The blocks of a page that run, in order."""
    markdown = page.read_text(encoding="utf-8")
    fences, blocks = list(FENCE.finditer(markdown)), []
    for fence, following in zip(fences, [*fences, None][1:], strict=True):
        before = markdown[: fence.start()].rstrip().rsplit("\n", 1)[-1]
        if fence[1] not in ("bash", "python") or re.fullmatch(r"<!-- not run: .+ -->", before):
            continue
        is_answer = following is not None and following[1] == "text" and not markdown[fence.end() : following.start()].strip()
        line = markdown.count("\n", 0, fence.start()) + 1
        blocks.append(Block(page, line, fence[1], fence[2], following[2] if is_answer and following else None))
    return blocks


def run_block(block: Block, folder: Path) -> None:
    place = f"{block.page.relative_to(ROOT)}:{block.line}"
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([*command, block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, f"{place}: {result.stderr}"
    if block.expected is not None:
        assert result.stdout == block.expected, place


@has_nano
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_run(page, tmp_path):
    for block in runnable_blocks(page):
        run_block(block, tmp_path)


def test_blocks_are_found_and_judged(tmp_path):
    page = ROOT / "README.md"
    assert [block.language for block in runnable_blocks(page)].count("bash") >= 1
    assert [block.language for block in runnable_blocks(page)].count("python") >= 2
    echo = Block(page, 1, "bash", "echo one | cat\n", "one\n")
    run_block(echo, tmp_path)
    run_block(Block(page, 1, "python", "print('one')\n", "one\n"), tmp_path)
    for broken in (dataclasses.replace(echo, expected="two\n"), dataclasses.replace(echo, text="false | cat\n", expected=None)):
        with pytest.raises(AssertionError, match="README.md:1"):
            run_block(broken, tmp_path)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target.suffix == ".png" and not NANO_IS_THERE:
            continue  # pictures are made with it
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@has_nano
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_is_left_to_fill_in(page):
    assert "<!-- lead:" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page):
    """Commands, options and recipes of blocks that do not run are there all the same."""
    commands = get_command(app).commands
    shell = "".join(fence[2] for fence in FENCE.finditer(page.read_text(encoding="utf-8")) if fence[1] == "bash")
    for recipe in re.findall(r"recipes/\S+\.toml", shell):
        assert (ROOT / recipe).is_file(), recipe
    for line in re.findall(r"omnimamba ((?:eval )?[a-z0-9]+[^|\n]*)", shell):
        names, options = re.findall(r"[a-z0-9]+", line)[:2], re.findall(r"(?<!\S)--[a-z-]+", line)
        command = commands[names[0]]
        command = command.commands[names[1]] if hasattr(command, "commands") else command
        assert set(options) <= {name for parameter in command.params for name in parameter.opts} | {"--help"}, line
