"""What is made once before training: a tokenizer, and the VQ ids of images."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from omnimamba.config import EOS_TOKEN, preset
from omnimamba.data import prepare
from omnimamba.data.images import InMemoryImages, open_parquet_images
from omnimamba.data.prepare import ImageSet, image_ids, read_image_ids, tokenize_images, train_text_tokenizer, write_image_ids
from omnimamba.model.vq import VQModel
from omnimamba.processor.image import load_image, vq_pixels

NUM_TOKENS, NUM_CODES = preset("tiny").num_image_tokens, preset("tiny").image_vocab_size


@pytest.fixture(scope="module")
def vq():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQModel(preset("tiny").vq).eval()


def test_text_tokenizer(tmp_path):
    texts = ["a red apple", "a red rose", "naïve 🍎"]
    train_text_tokenizer(texts, 270).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 270 and tokenizer.token_to_id(EOS_TOKEN) == 0
    for text in (*texts, " spaces  kept\n", "never seen: 文字 \x00"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("a red").ids) < 5  # merges were learned


def test_text_tokenizer_is_the_same_every_time():
    texts = ["one two three four five", "six seven eight nine ten"]
    assert train_text_tokenizer(texts, 280).to_str() == train_text_tokenizer(texts, 280).to_str()


def test_too_few_texts():
    with pytest.raises(ValueError, match="the texts give 258 tokens, 1000 are wanted; add texts or lower the vocabulary"):
        train_text_tokenizer(["ab"], 1000)


def test_image_ids_are_the_models(vq, data_folder):
    images = open_parquet_images(data_folder, "train", vq.config.image_size)
    ids = image_ids(vq, images, batch=5)
    assert list(ids) == images.names and all(row.shape == (NUM_TOKENS,) and row.dtype == torch.int32 for row in ids.values())
    with torch.no_grad():
        for name in images.names[::5]:
            pixels = vq_pixels(load_image(images.read(name)), vq.config.image_size)
            assert torch.equal(vq.encode(pixels[None]).ids.flatten().int(), ids[name])
    assert all(torch.equal(row, ids[name]) for name, row in image_ids(vq, InMemoryImages(images)).items())


def tokenize(vq, folder, out, **options):
    images = ImageSet(str(folder), options.pop("kind", "parquet"), options.pop("split", "train"), options.pop("column", "image"))
    return tokenize_images(images, out, make_vq=lambda: vq, **options)


def test_round_trip(vq, data_folder, tmp_path):
    out = tmp_path / "new" / "tokens.parquet"
    seen = []
    assert tokenize(vq, data_folder, out, shard_size=5, on_progress=lambda *progress: seen.append(progress)) == 12
    assert seen == [(5, 12), (10, 12), (12, 12)] and list(out.parent.iterdir()) == [out]
    read = read_image_ids(out, NUM_TOKENS, NUM_CODES)
    images = open_parquet_images(data_folder, "train", vq.config.image_size)
    assert list(read) == images.names
    assert all(torch.equal(row, read[name]) for name, row in image_ids(vq, images).items())
    with pytest.raises(ValueError, match="tokens.parquet is there already; delete it to make it again, or name another file"):
        tokenize(vq, data_folder, out)


def test_a_second_call_goes_on(vq, data_folder, tmp_path, monkeypatch):
    out, shards = tmp_path / "tokens.parquet", []

    def stops(file, ids):
        if len(shards) == 2:
            file.write_bytes(b"half")
            raise OSError("no space left")
        shards.append(list(ids))
        write_image_ids(file, ids)

    monkeypatch.setattr(prepare, "write_image_ids", stops)
    with pytest.raises(OSError, match="no space left"):
        tokenize(vq, data_folder, out, shard_size=4)
    assert not out.exists()
    with pytest.raises(ValueError, match="tokens.parquet.parts: begun with another shard_size; delete the folder to start again"):
        tokenize(vq, data_folder, out, shard_size=5)
    monkeypatch.setattr(prepare, "write_image_ids", lambda file, ids: shards.append(list(ids)) or write_image_ids(file, ids))
    assert tokenize(vq, data_folder, out, shard_size=4) == 12
    assert [len(shard) for shard in shards] == [4, 4, 4] and len({name for shard in shards for name in shard}) == 12
    other = tmp_path / "other.parquet"
    tokenize(vq, data_folder, other)
    assert pq.read_table(other).equals(pq.read_table(out))


def test_image_files_and_broken_ones(vq, tmp_path, caplog):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.png", "sub/a.jpg"):
        Image.new("RGB", (30, 40), "red").save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    with pytest.raises(ValueError, match="image 'broken.png': "):
        tokenize(vq, folder, tmp_path / "out.parquet", kind="folder")
    assert tokenize(vq, folder, tmp_path / "other.parquet", kind="folder", max_broken=1) == 2
    assert "image 'broken.png' is left out, 1 of at most 1" in caplog.text
    assert list(read_image_ids(tmp_path / "other.parquet", NUM_TOKENS, NUM_CODES)) == ["b.png", "sub/a.jpg"]
    with pytest.raises(ValueError, match="unknown kind of images 'foldr'; did you mean 'folder'"):
        tokenize(vq, folder, tmp_path / "x.parquet", kind="foldr")
    with pytest.raises(ValueError, match="no image files"):
        tokenize(vq, tmp_path / "images" / "none", tmp_path / "x.parquet", kind="folder")


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([[1, 2, 3, 4], [1, 2, 3]], "b has 3 ids from 1 to 3"),
        ([[1, 2, 3, 4, 5]] * 2, "a has 5 ids from 1 to 5"),
        ([[1, 2, 3, 16], [0, 0, 0, 0]], "a has 4 ids from 1 to 16"),
        ([[1, -2, 3, 4], [0, 0, 0, 0]], "a has 4 ids from -2 to 4"),
        ([[], [1, 2, 3, 4]], "a has no ids"),
        ([None, [1, 2, 3, 4]], "a has no ids"),
    ],
)
def test_ids_of_another_model(tmp_path, tokens, found):
    file = tmp_path / "tokens.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "tokens": tokens}), file)
    message = f"{file}: {found}, but the model paints 4 ids below 16; tokenize the images with the VQ tokenizer of this model"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_image_ids(file, 4, 16)


def test_files_of_other_things(tmp_path):
    with pytest.raises(ValueError, match="tokens.parquet: no such file; make it with `omnimamba tokenize`"):
        read_image_ids(tmp_path / "tokens.parquet", 4, 16)
    (tmp_path / "tokens.parquet").write_text("text")
    with pytest.raises(ValueError, match="tokens.parquet: not a whole Parquet file"):
        read_image_ids(tmp_path / "tokens.parquet", 4, 16)
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "tokens.parquet")
    with pytest.raises(ValueError, match="tokens.parquet: no column tokens; it has id"):
        read_image_ids(tmp_path / "tokens.parquet", 4, 16)
