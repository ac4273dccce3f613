"""The package as installed: what `import omnimamba` costs and gives, and files that must agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import omnimamba

ROOT = Path(__file__).parents[1]


def run_python(*args: str) -> str:
    return subprocess.run([sys.executable, *args], check=True, capture_output=True, text=True).stdout.strip()


def test_import_leaves_torch_alone():
    assert run_python("-c", "import sys, omnimamba; print('torch' in sys.modules, omnimamba.Task.T2I)") == "False t2i"


def test_version_is_that_of_pyproject():
    assert omnimamba.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_version_without_installation_warns(tmp_path):
    (tmp_path / "omnimamba").symlink_to(ROOT / "src/omnimamba")
    # -I -S: no site-packages and no PYTHONPATH, so no installed metadata
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import omnimamba; print(omnimamba.__version__)"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "0+unknown\n"
    assert "RuntimeWarning: omnimamba is not installed" in result.stderr


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="OmniMumba"):
        omnimamba.OmniMumba  # noqa: B018
    assert {"OmniMamba", "Task", "__version__"} <= set(dir(omnimamba))


def test_every_folder_of_modules_is_a_package():
    """A folder without `__init__.py` is left out of the wheel and of the layering check."""
    folders = {path.parent for path in (ROOT / "src/omnimamba").rglob("*.py") if "assets" not in path.parts}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_lock_holds_names_and_versions_only():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert {"torch==2.14.1", "torchvision==0.29.1"} <= set(pinned)
    for line in pinned:
        assert re.fullmatch(r'[A-Za-z0-9._-]+==[A-Za-z0-9.]+(; sys_platform == "linux")?', line), line
    for line in pinned:
        assert line.endswith('"linux"') == line.startswith(("nvidia-", "cuda-", "triton==")), line


def test_citation_names_the_same_version():
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == omnimamba.__version__
