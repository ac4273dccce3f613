"""Embeddings, positions and losses of the language model by themselves; their numbers are checked in test_golden_model.py."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from omnimamba.config import Task, preset
from omnimamba.model.omnimamba import FP32_PARAMETERS, IGNORE_INDEX, OmniMambaModel, cast

CONFIG = preset("tiny")
NUM_VISION, NUM_IMAGE = CONFIG.num_vision_tokens, CONFIG.num_image_tokens


@pytest.fixture(scope="module")
def model(redraw):
    return redraw(OmniMambaModel(CONFIG))


def draw(*shape, high=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) if high is None else torch.randint(high, shape, generator=generator)


@pytest.fixture
def t2i():
    """Caption ids with [eoi], and image ids."""
    return draw(3, CONFIG.t2i_prompt_length + 1, high=CONFIG.text_vocab_size), draw(3, NUM_IMAGE, high=CONFIG.image_vocab_size)


@pytest.fixture
def mmu():
    """Ids with the four markers, labels of the text, and features of every row."""
    ids, labels = draw(3, 4 + 9, high=CONFIG.text_vocab_size), draw(3, 9, high=CONFIG.text_vocab_size, seed=1)
    labels[0, :5] = labels[1, 7:] = IGNORE_INDEX
    return ids, labels, draw(3, NUM_VISION, CONFIG.vision_dim)


def shifted_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


@torch.no_grad()
def test_t2i_loss_is_the_shifted_cross_entropy_of_the_image_tokens(model, t2i):
    caption_ids, image_ids = t2i
    x = model.t2i_embeddings(caption_ids, image_ids)
    assert x.shape == (3, CONFIG.t2i_positions, CONFIG.backbone.d_model)
    labels = F.pad(image_ids, (CONFIG.t2i_prompt_length, 1), value=IGNORE_INDEX)
    expected = shifted_loss(model.logits(model(x, Task.T2I), Task.T2I), labels)
    torch.testing.assert_close(model.t2i_loss(caption_ids, image_ids), expected)


@torch.no_grad()
def test_mmu_loss_is_the_shifted_cross_entropy_of_the_labels(model, mmu):
    ids, labels, features = mmu
    x = model.mmu_embeddings(ids, features)
    assert x.shape == (3, ids.shape[1] + NUM_VISION, CONFIG.backbone.d_model)
    padded = F.pad(labels, (4 + NUM_VISION, 0), value=IGNORE_INDEX)
    expected = shifted_loss(model.logits(model(x, Task.MMU), Task.MMU), padded)
    torch.testing.assert_close(model.mmu_loss(ids, labels, features), expected)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [2], [1, 0], []])
@torch.no_grad()
def test_images_go_to_their_rows(model, mmu, rows):
    ids, _, features = mmu
    x = model.mmu_embeddings(ids, features[: len(rows)], torch.tensor(rows, dtype=torch.int64))
    text_only = model.mmu_embeddings(ids, None)
    for row in range(3):
        image = features[rows.index(row)][None] if row in rows else None
        torch.testing.assert_close(x[row], model.mmu_embeddings(ids[row : row + 1], image)[0])
        assert torch.equal(x[row], text_only[row]) == (row not in rows)


def test_model_without_towers_reads_text_only():
    model = OmniMambaModel(dataclasses.replace(CONFIG, towers={}))
    assert model.mmu_embeddings(torch.zeros(1, 6, dtype=torch.int64), None).shape[1] == 6
    with pytest.raises(ValueError, match="no vision towers"):
        model.project_features(torch.zeros(1, 2, 3))


@pytest.mark.parametrize(("task", "num_rows"), [(Task.T2I, CONFIG.t2i_positions), (Task.MMU, CONFIG.mmu_positions)])
@torch.no_grad()
def test_positions_end_with_their_table(model, task, num_rows):
    x = torch.zeros(1, 3, CONFIG.backbone.d_model)
    assert torch.equal(model.add_positions(x, task, num_rows - 3)[0], model.positions[task][-3:])
    with pytest.raises(ValueError, match=f"{task} sequence needs {num_rows + 2} positions, but its table has {num_rows}; shorten it by 2"):
        model.add_positions(x, task, num_rows - 1)


@torch.no_grad()
def test_each_task_has_its_own_head(model):
    hidden = draw(2, 5, CONFIG.backbone.d_model)
    torch.testing.assert_close(model.logits(hidden, Task.MMU), hidden @ model.text_embedding.weight.mT)
    torch.testing.assert_close(model.logits(hidden, Task.T2I), hidden @ model.image_embedding.weight.mT)


def test_a_task_trains_nothing_of_the_other(model, t2i, mmu):
    ids, labels, features = mmu
    only = {
        "t2i": ("lora_A.mmu", "lora_B.mmu", "positions.mmu", "projector"),
        "mmu": ("lora_A.t2i", "lora_B.t2i", "positions.t2i", "image_", "caption_"),
    }
    for task, loss in ((Task.T2I, model.t2i_loss(*t2i)), (Task.MMU, model.mmu_loss(ids, labels, features))):
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            is_foreign = any(part in name for part in only[task])
            assert (parameter.grad is None) == is_foreign, name
    model.zero_grad()


def test_cast_keeps_decays_in_fp32(redraw):
    model = cast(redraw(OmniMambaModel(CONFIG)), torch.bfloat16)
    kept = {name.rsplit(".", 1)[-1] for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert kept == set(FP32_PARAMETERS) and model.dtype == torch.bfloat16
    ids = torch.zeros(1, 6, dtype=torch.int64)
    with torch.no_grad():
        assert model(model.mmu_embeddings(ids, None), Task.MMU).dtype == torch.bfloat16
