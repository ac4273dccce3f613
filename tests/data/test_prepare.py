"""What is made once before training: a tokenizer, and the VQ ids of images."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from omnimamba.config import EOS_TOKEN, preset
from omnimamba.data import prepare
from omnimamba.data.images import InMemoryImages, open_parquet_images
from omnimamba.data.prepare import image_ids, read_image_ids, tokenize_images, train_text_tokenizer
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
    seen = []
    ids = image_ids(vq, images, batch=5, on_progress=lambda *progress: seen.append(progress))
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert ids.shape == (12, NUM_TOKENS) and ids.dtype == torch.int32
    with torch.no_grad():
        for name in images.names[::5]:
            pixels = vq_pixels(load_image(images.read(name)), vq.config.image_size)
            assert torch.equal(vq.encode(pixels[None]).ids.flatten().int(), ids[images.position[name]])
    assert torch.equal(image_ids(vq, InMemoryImages(images)), ids)


def test_round_trip(vq, data_folder, tmp_path):
    out = tmp_path / "new" / "tokens.parquet"
    assert tokenize_images(data_folder, "train", out, vq=vq) == 12
    assert list(out.parent.iterdir()) == [out]
    read = read_image_ids(out, NUM_TOKENS, NUM_CODES)
    images = open_parquet_images(data_folder, "train", vq.config.image_size)
    assert list(read) == images.names
    assert torch.equal(torch.stack(list(read.values())), image_ids(vq, images))


def test_an_interrupted_run_leaves_the_old_file(vq, data_folder, tmp_path, monkeypatch):
    out = tmp_path / "tokens.parquet"
    tokenize_images(data_folder, "val", out, vq=vq)
    before = out.read_bytes()

    def write_half(table, path):
        path.write_bytes(before[:100])
        raise OSError("no space left")

    pyarrow = prepare.import_pyarrow()
    monkeypatch.setattr(pyarrow.parquet, "write_table", write_half)
    with pytest.raises(OSError, match="no space left"):
        tokenize_images(data_folder, "train", out, vq=vq)
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == before


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
