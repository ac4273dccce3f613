"""The Python of docs/serving.md runs as it is written, but for address and model."""

import re
from pathlib import Path

from PIL import Image

from .conftest import MODEL

PAGE = Path(__file__).parents[2] / "docs/serving.md"


def test_the_python_of_the_page(served, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        block = block.replace("http://127.0.0.1:8000", served.url).replace('"nano"', f'"{MODEL}"')
        exec(compile(block, str(PAGE), "exec"), names)
    names["client"].close()
    assert len(blocks) == 2 and capsys.readouterr().out
    with Image.open("apple.png") as painted:
        assert painted.size == (32, 32)
    assert names["then"].choices[0].message.content
