"""Image stores: the same pixels from Parquet or a folder, decoded on demand or beforehand."""

import io
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from omnimamba.data.images import InMemoryImages, LazyImages, open_folder_images, open_parquet_images, parquet_files, read_parquet_rows
from omnimamba.data.prepare import read_image_ids
from omnimamba.processor import image as processor


def png(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def encoded():
    return {f"folder/{i}.png": png(30 + 8 * i, 24, i) for i in range(5)}


@pytest.fixture
def parquet(tmp_path, encoded):
    """A folder with the images in two files of a split."""
    rows = [{"id": name, "image": {"bytes": content, "path": name}} for name, content in encoded.items()]
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(rows[part::2]), tmp_path / f"train-{part}.parquet")
    return tmp_path


@pytest.fixture
def folder(tmp_path, encoded):
    for name, content in encoded.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_parquet_and_folder_give_the_same(parquet, folder, encoded):
    one, other = open_parquet_images(parquet, "train", 16), open_folder_images(folder, list(encoded), 16)
    assert set(one.names) == set(other.names) == set(encoded) and len(one) == len(other) == 5
    pixels = one.get([one.position[name] for name in encoded])
    assert pixels.dtype == torch.uint8 and pixels.shape == (5, 3, 16, 16)
    assert torch.equal(pixels, other.get([other.position[name] for name in encoded]))


@pytest.mark.parametrize("resize", ["crop", "naive"])
def test_resize(folder, encoded, resize):
    images = open_folder_images(folder, list(encoded), 16, resize=resize)
    whole = processor.load_image(encoded["folder/4.png"])
    square = processor.center_square(whole, 16) if resize == "crop" else processor.resize_naive(whole, 16)
    assert torch.equal(images.get([4])[0], torch.from_numpy(np.array(square)).permute(2, 0, 1))


def test_in_memory_is_the_same(parquet):
    lazy = open_parquet_images(parquet, "train", 16, num_threads=2)
    memory = InMemoryImages(lazy)
    assert memory.names == lazy.names and memory.position == lazy.position and len(memory) == len(lazy)
    for idx in ([3, 0, 0], range(1, 4), [2]):
        assert torch.equal(memory.get(idx), lazy.get(idx))


def test_no_images():
    lazy = LazyImages([], lambda name: b"", 16)
    assert lazy.get([]).shape == (0, 3, 16, 16)
    assert InMemoryImages(lazy).get([]).shape == (0, 3, 16, 16)


def test_names_that_repeat_are_one_image(folder):
    assert open_folder_images(folder, ["folder/1.png", "folder/0.png", "folder/1.png"], 16).names == ["folder/1.png", "folder/0.png"]


def test_missing_images_are_named(folder):
    with pytest.raises(ValueError, match="2 of 3 images are missing, e.g. x.png, folder$"):
        open_folder_images(folder, ["folder/0.png", "x.png", "folder"], 16)


def test_broken_image_is_named(folder, encoded):
    (folder / "folder/1.png").write_bytes(encoded["folder/1.png"][:200])
    images = open_folder_images(folder, list(encoded), 16)
    assert images.get([0, 2]).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="^image 'folder/1.png': .* is damaged or cut off"):
        images.get([0, 1, 2])
    (folder / "folder/2.png").unlink()  # gone since
    with pytest.raises(ValueError, match="^image 'folder/2.png': no such file"):
        images.get([2])


def test_missing_split_and_column(parquet):
    assert [file.name for file in parquet_files(parquet, "train")] == ["train-0.parquet", "train-1.parquet"]
    with pytest.raises(ValueError, match=r"no val-\*.parquet files; give a folder with that split"):
        open_parquet_images(parquet, "val", 16)
    with pytest.raises(ValueError, match="train-0.parquet: no column caption, style; it has id, image"):
        read_parquet_rows(parquet, "train", ["style", "id", "caption"])
    assert read_parquet_rows(parquet, "train")[0].keys() == {"id", "image"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "image": b"png"}], "column image of train is not a struct with the `bytes` of each image"),
        ([{"id": "a", "image": {"path": "a.png"}}], "column image of train is not a struct"),
        ([{"id": "a", "image": None}, {"id": "b", "image": {"bytes": b""}}], "column image of train is not a struct"),
        ([{"id": "a", "image": {"bytes": b""}}] * 3, "2 rows of train repeat an id; make the ids unique"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, rows, message):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: {message}"):
        open_parquet_images(tmp_path, "train", 16)


def test_damaged_parquet_file(parquet):
    file = parquet / "train-1.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="train-1.parquet: not a whole Parquet file") as error:
        open_parquet_images(parquet, "train", 16)
    assert "\n" not in str(error.value)


def test_without_pyarrow(parquet, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for read in (lambda: open_parquet_images(parquet, "train", 16), lambda: read_image_ids(parquet / "train-0.parquet", 4, 4)):
        with pytest.raises(ValueError, match=re.escape("pip install 'omnimamba[train]'")):
            read()


def test_worker_threads_leave_the_warning_filters_alone(monkeypatch):
    """They belong to the process: restoring them in one thread would undo what another has set since."""
    seen, identified = [], processor._identified

    def spy(*args):
        seen.append(warnings.filters)
        return identified(*args)

    monkeypatch.setattr(processor, "_identified", spy)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(processor.load_image, [png(8, 8)] * 4))
    assert seen and all(filters is warnings.filters for filters in seen)
