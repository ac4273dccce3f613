"""Streams: the same rows in every run, shares that make up the step, rows that cannot be used, and a run to the bit."""

import dataclasses
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from omnimamba.config import Task
from omnimamba.data.huggingface import RowStream, open_dataset
from omnimamba.train import loop
from omnimamba.train.parallel import Processes
from omnimamba.train.run import make_objective

CPU = torch.device("cpu")


def png(i):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty rows in two shards. Row 3 has no image, the answer of row 4 is too long."""
    folder = tmp_path_factory.mktemp("stream")
    rows = []
    for i in range(20):
        answer = "word " * 99 if i == 4 else f"answer {i}"
        talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]
        image = {"bytes": b"" if i == 3 else png(i), "path": None}
        rows.append({"id": str(i), "image": image, "caption": [f"caption {i}"], "talk": talk})
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(rows[10 * part : 10 * part + 10]), folder / f"train-{part}.parquet")
    return folder


@pytest.fixture
def stage2(recipe, change, folder):
    columns = {"captions": "column:caption", "conversations": "column:talk"}
    r = change(recipe("stage2", mmu_batch=6, t2i_batch=4, caption_dropout=0.0), "data", folder=str(folder), images="datasets", **columns)
    return change(r, "data", val_split="", streaming=True, stream_buffer=5, max_broken=1)


def test_rows(folder):
    def names(rows):
        return [row["id"] for row in rows]

    stream = RowStream(open_dataset(str(folder), "train", "image", streaming=True), seed=0, buffer_size=5)
    all_rows = names(stream.read(0, 45))
    epochs = all_rows[:20], all_rows[20:40]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(str, range(20))) and epochs[0] != epochs[1]
    other = RowStream(open_dataset(str(folder), "train", "image", streaming=True), seed=0, buffer_size=5)
    assert names(other.read(30, 5)) == all_rows[30:35] and names(other.read(35, 3)) == all_rows[35:38]
    assert names(other.read(2, 2)) == all_rows[2:4]


def test_batches(stage2, caplog):
    objective = make_objective(stage2, CPU)
    tok, seen = objective.mmu.tok, set()
    for step in range(10):
        batch = objective.batch(step)
        mmu, t2i = batch[Task.MMU], batch[Task.T2I]
        rows = mmu.places // (mmu.ids.shape[1] - 4)
        answers = [tok.decode(mmu.labels[(rows == row) & (mmu.shares > 0)].tolist()) for row in range(6)]
        assert [f"answer {int(pixels[0, 0, 0]) // 10}" for pixels in mmu.pixels] == answers and len(mmu.ids) == 6
        assert mmu.num_labels > 0 and t2i.image_ids.shape == (4, objective.config.num_image_tokens)
        seen |= set(answers)
    assert seen == {f"answer {i}" for i in range(20) if i not in (3, 4)}
    assert "image '3' is left out, 1 of at most 1" in caplog.text


def test_shares(stage2):
    whole, parts = make_objective(stage2, CPU), [make_objective(stage2, CPU) for _ in range(2)]
    for rank, part in enumerate(parts):
        part.processes = Processes(rank, 2)
    for step in (1, 5):
        expected = whole.batch(step)
        for rank, part in enumerate(parts):
            share = part.batch(step)
            assert torch.equal(share[Task.T2I].image_ids, expected[Task.T2I].image_ids[rank::2])
            assert torch.equal(share[Task.T2I].caption_ids, expected[Task.T2I].caption_ids[rank::2])
            assert torch.equal(share[Task.MMU].pixels, expected[Task.MMU].pixels[rank::2])
            assert share[Task.MMU].num_labels == expected[Task.MMU].num_labels


def test_a_run_that_goes_on(stage2, change, tmp_path, folder_tensors):
    options = {"steps": 5, "save_every": 3}
    whole = change(stage2, "train", **options)
    loop.run(make_objective(whole, CPU), whole, CPU)
    parts = dataclasses.replace(whole, out=str(tmp_path / "parts"))
    objective = make_objective(parts, CPU)
    batch, objective.batch = objective.batch, lambda step: batch(step) if step < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        loop.run(objective, parts, CPU)
    loop.run(make_objective(parts, CPU), parts, CPU)
    one, other = (folder_tensors(tmp_path / run / "model") for run in ("run", "parts"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": "folder"}, "data.streaming is for data.images='datasets'"),
        ({"captions": "captions.jsonl"}, "data.captions=captions.jsonl: of a stream name a column, as in column:captions"),
        ({"stream_buffer": 0}, "data.stream_buffer=0; pass 1 or more"),
    ],
)
def test_what_cannot_run(stage2, change, values, message):
    with pytest.raises(ValueError, match=message):
        change(stage2, "data", **values)
