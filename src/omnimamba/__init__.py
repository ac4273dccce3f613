"""OmniMamba (arXiv 2503.08686): one Mamba-2 language model that answers questions about images and paints images from text.

`import omnimamba` is cheap: torch is imported when `OmniMamba` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omnimamba.config import Task

if TYPE_CHECKING:
    from omnimamba.engine.omnimamba import OmniMamba

    __version__: str

__all__ = ["OmniMamba", "Task", "__version__"]


def __getattr__(name: str) -> Any:
    """The public names whose import costs time, resolved on first use (PEP 562)."""
    if name == "OmniMamba":
        from omnimamba.engine.omnimamba import OmniMamba

        return OmniMamba
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The installed version, or `0+unknown` with a warning where the source tree is used without being installed."""
    import warnings
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("omnimamba")
    except PackageNotFoundError:
        warnings.warn("omnimamba is not installed, so its version is unknown; run `pip install -e .`", RuntimeWarning, stacklevel=3)
        return "0+unknown"
