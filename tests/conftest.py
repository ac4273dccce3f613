"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of tensors recorded from the authors' code; another one can be named by OMNIMAMBA_GOLDEN."""
    return Path(os.environ.get("OMNIMAMBA_GOLDEN", Path(__file__).parent / "golden"))
