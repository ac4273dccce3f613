"""The Hugging Face Hub: fetch files into its cache, check what came, push a folder."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] # the HTTP library's base class, whichever library that is
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from omnimamba.config import OmniMambaConfig
from omnimamba.model.files import CHECKPOINT_SUFFIXES, SAFETENSORS, one_line

SHA256_NAME = re.compile(r"[0-9a-f]{64}")
"""Name of a large file in the cache: its ETag, which is the file's SHA-256."""
CARD_FILE = "README.md"
PAPER_URL = "https://arxiv.org/abs/2503.08686"


class NotCachedError(ValueError):
    """Files that are neither in the cache nor to be had, since the Hub cannot be reached; `missing` names them."""

    def __init__(self, missing: str, reason: str) -> None:
        super().__init__(
            f"not in the cache {constants.HF_HUB_CACHE}: {missing}; and {constants.ENDPOINT} cannot be reached ({reason}); "
            "connect once, or pass files that are on this computer"
        )
        self.missing, self.reason = missing, reason


def is_repo_id(source: str) -> bool:
    """Whether `source` has the form owner/name and does not look like a file."""
    is_file = source.endswith((*CHECKPOINT_SUFFIXES, SAFETENSORS))
    return not is_file and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None


def fetch(repo_id: str, patterns: Sequence[str], *, what: str | None = None) -> Path:
    """The cached folder of a repository with its files that match `patterns` (`what` in words), fetched where they are not up to date.

    Large files that came now are checked against the SHA-256 that the Hub names (the client checks sizes only, unless the transfer
    went through Xet). Where the Hub cannot be reached the cache serves. ValueError, one line, for whatever fails.
    """
    before = _blobs(repo_id)
    with _explained(repo_id, what or ", ".join(patterns)):
        folder = Path(snapshot_download(repo_id, allow_patterns=list(patterns)))
    folder.mkdir(parents=True, exist_ok=True)  # the client makes none for no files
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if path.is_file() and SHA256_NAME.fullmatch(blob.name) and blob.name not in before and (found := sha256(blob)) != blob.name:
            blob.unlink()
            path.unlink(missing_ok=True)
            raise ValueError(f"{repo_id}/{path.name}: SHA-256 {found} is not {blob.name}, which the Hub names; removed, try again")
    return folder


def fetch_file(repo_id: str, filename: str) -> Path:
    """The cached path of one file; see `fetch`."""
    path = fetch(repo_id, [filename]) / filename
    if not path.is_file():
        raise ValueError(f"{repo_id} on {constants.ENDPOINT} has no file {filename}")
    return path


def push(folder: Path, repo_id: str, *, private: bool | None = None) -> str:
    """The address of the repository `repo_id`, made if it is not there, to which the files of `folder` went in one commit."""
    if get_token() is None:
        raise ValueError(f"pushing to {constants.ENDPOINT}/{repo_id} needs a token; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with _explained(repo_id, "the repository"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload OmniMamba model")
    return f"{constants.ENDPOINT}/{repo_id}"


def model_card(config: OmniMambaConfig, repo_id: str) -> str:
    """README.md of a pushed model: what the config says, and how to load it."""
    backbone, towers = config.backbone, ", ".join(tower.timm_name for tower in config.towers.values()) or "none"
    image_size = config.vq.image_size
    return f"""---
library_name: omnimamba
pipeline_tag: any-to-any
tags:
- omnimamba
- mamba2
- text-to-image
- image-to-text
---

# OmniMamba ({config.name})

One Mamba-2 language model that answers questions about images and paints images from text ({PAPER_URL}).

| part | size |
|---|---|
| backbone | Mamba-2, {backbone.n_layer} layers, d_model {backbone.d_model}, d_state {backbone.d_state} |
| text vocabulary | {config.text_vocab_size} rows |
| image vocabulary | {config.image_vocab_size} codes, {config.num_image_tokens} per {image_size}x{image_size} image |
| understanding towers | {towers} |

```python
from omnimamba import OmniMamba

model = OmniMamba.from_pretrained("{repo_id}")
model.generate_image("red apple")[0].save("apple.png")
print(model.describe("apple.png"))
```
"""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blobs(repo_id: str) -> set[str]:
    """Names of the files in a repository's cache."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@contextlib.contextmanager
def _explained(repo_id: str, wanted: str) -> Iterator[None]:
    """Turns the client's errors into one line."""
    try:
        yield
    except GatedRepoError:
        raise ValueError(f"{repo_id} is gated; ask for access on {constants.ENDPOINT}/{repo_id}, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{constants.ENDPOINT} has no repository {repo_id!r} that you may read; check the name, or run `hf auth login` if it is private"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _not_cached(repo_id, wanted, error) from None
    except HfHubHTTPError as error:
        raise ValueError(f"{repo_id}: {constants.ENDPOINT} refused ({one_line(error)})") from None
    except HTTPError as error:
        raise _not_cached(repo_id, wanted, error) from None
    except OSError as error:
        raise ValueError(f"{repo_id}: {one_line(error)}") from None


def _not_cached(repo_id: str, wanted: str, error: Exception) -> NotCachedError:
    partial = re.search(r"missing \((.*)\)\. ", str(error))  # IncompleteSnapshotError
    cause = error.__cause__ or error
    reason = "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else one_line(cause)
    return NotCachedError(f"{repo_id} ({partial[1] if partial else wanted})", reason)
