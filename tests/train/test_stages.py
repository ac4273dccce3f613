"""The stage table against the lists that the authors' code trains (golden/stages.json), and the merge of both stage 1 results."""

import re

import pytest
import torch

from omnimamba.config import preset
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.weights import our_name
from omnimamba.train.stages import BACKBONE_GROUPS, GROUPS, STAGES, group_of, merge_stage1, set_trainable

OFFICIAL_STAGES = {
    "stage1_mmu": "stage1_mmu (stage=align, mmu_task only)",
    "stage1_t2i": "stage1_t2i (stage=align, t2i_task only)",
    "stage2": "stage2 (stage=finetune, both tasks)",
}
ONLY_THE_AUTHORS_TRAIN = {
    "stage1_mmu": {"t2i_lora"},  # gets no gradient
    "stage1_t2i": {"text_embedding", "mmu_lora"},  # the LoRA gets no gradient
    "stage2": set(),
}
ONLY_WE_TRAIN = {"stage1_mmu": {"mmu_positions"}, "stage1_t2i": set(), "stage2": set()}
"""docs/differences.md gives the reasons. The authors leave the understanding positions at their random start."""


@pytest.fixture(scope="module")
def names():
    with torch.device("meta"):
        return [name for name, _ in OmniMambaModel(preset("tiny")).named_parameters()]


def groups(official_names):
    """Groups of official parameter names, in which `*` stands for every layer."""
    return {group_of(our_name(name.replace("*", "0"))[1]) for name in official_names}


def test_every_parameter_belongs_to_one_group(names):
    assert {group_of(name) for name in names} == set(GROUPS)
    for name in names:
        assert sum(bool(re.fullmatch(pattern, name)) for pattern in GROUPS.values()) == 1, name


@pytest.mark.parametrize("stage", OFFICIAL_STAGES)
def test_difference_to_the_authors_lists(recorded, stage):
    official = recorded.json("stages.json")[OFFICIAL_STAGES[stage]]
    trainable, frozen = groups(official["trainable"]), groups(official["frozen"])
    assert not trainable & frozen
    ours = set(STAGES[stage].trains)
    assert trainable - ours == ONLY_THE_AUTHORS_TRAIN[stage]
    assert ours - trainable == ONLY_WE_TRAIN[stage]
    assert groups(official["trainable_without_gradient"] or ()) == {group for group in ONLY_THE_AUTHORS_TRAIN[stage] if "lora" in group}
    assert not official["vqvae_trainable"]


@pytest.mark.parametrize("train_backbone", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_set_trainable(stage, train_backbone):
    with torch.device("meta"):
        model = OmniMambaModel(preset("tiny"))
    trained = set_trainable(model, stage, train_backbone=train_backbone)
    expected = {*STAGES[stage].trains, *(BACKBONE_GROUPS if train_backbone else ())}
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {group_of(name) for name in found} == expected and len(trained) == len(found)
    set_trainable(model, "stage2", train_backbone=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def results(names):
    """What both stage 1 runs leave: all tensors, those that trained changed."""

    def result(stage, value, train_backbone=False):
        trained = {*STAGES[stage].trains, *(BACKBONE_GROUPS if train_backbone else ())}
        return {name: torch.full((2,), value if group_of(name) in trained else 0.0) for name in names}

    return result


def test_merge_takes_from_each_run_what_it_trained(results, names):
    merged = merge_stage1(results("stage1_mmu", 1.0), results("stage1_t2i", 2.0))
    assert merged.keys() == set(names)
    for name, tensor in merged.items():
        stages = [stage for stage in ("stage1_mmu", "stage1_t2i") if group_of(name) in STAGES[stage].trains]
        assert len(stages) < 2
        assert tensor[0] == {(): 0, ("stage1_mmu",): 1, ("stage1_t2i",): 2}[tuple(stages)], name


def test_merge_of_two_trained_backbones_needs_a_choice(results):
    mmu, t2i = results("stage1_mmu", 1.0, train_backbone=True), results("stage1_t2i", 2.0, train_backbone=True)
    with pytest.raises(ValueError, match=r"shared tensors differ .* init.shared=mmu or t2i"):
        merge_stage1(mmu, t2i)
    for shared, value in (("mmu", 1), ("t2i", 2)):
        merged = merge_stage1(mmu, t2i, shared=shared)
        assert all(merged[name][0] == value for name in merged if group_of(name) in BACKBONE_GROUPS)
        assert merged["positions.mmu"][0] == 1 and merged["positions.t2i"][0] == 2
    with pytest.raises(ValueError, match="init.shared='both'; valid: mmu, t2i"):
        merge_stage1(mmu, t2i, shared="both")


def test_merge_of_different_models_is_an_error(results):
    mmu, t2i = results("stage1_mmu", 1.0), results("stage1_t2i", 2.0)
    del t2i["positions.mmu"]
    with pytest.raises(ValueError, match=r"different tensors: positions.mmu"):
        merge_stage1(mmu, t2i)
