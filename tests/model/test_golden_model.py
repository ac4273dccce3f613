"""The language model against tensors recorded from the authors' code (cases 1 to 6 of golden/README.md)."""

import json

import pytest
import torch
from safetensors.torch import load_file

from omnimamba.config import BackboneConfig, LoraConfig, OmniMambaConfig, Task, TowerConfig, VQConfig
from omnimamba.model.omnimamba import IGNORE_INDEX, OmniMambaModel
from omnimamba.model.state import MambaState
from omnimamba.model.weights import from_official, our_name


def golden_config(sizes: dict) -> OmniMambaConfig:
    vq, text = sizes["vq"], sizes["text_vocab"]
    towers = {
        name: TowerConfig("recorded", dim=sizes["vision_dims"][name], image_size=1, num_tokens=sizes["n_vision_tokens"])
        for name in ("dino", "siglip")
    }
    return OmniMambaConfig(
        name="golden",
        backbone=BackboneConfig(
            **{key: sizes[key] for key in ("d_model", "n_layer", "d_state", "headdim", "expand", "d_conv", "ngroups", "chunk_size")},
            norm_eps=sizes["rmsnorm_eps"],
        ),
        lora=LoraConfig(sizes["lora"]["rank"], sizes["lora"]["alpha"], sizes["lora"]["dropout"]),
        vq=VQConfig(
            image_size=vq["grid"][0] * vq["downsample"],
            codebook_dim=vq["embed_dim"],
            ch_mult=tuple(vq["ch_mult"]),
            **{key: vq[key] for key in ("ch", "z_channels", "codebook_size", "num_res_blocks")},
        ),
        towers=towers,
        text_vocab_size=text["embedding_rows"],
        base_vocab_size=text["base_tokenizer_length"],
        eos_id=sizes["eos_id"],
        mmu_positions=sizes["mmu_pos_embed_rows"],
    )


class Golden:
    """A golden folder: sizes, the model with its weights, and the recorded tensors of a case."""

    def __init__(self, folder):
        self.folder = folder
        self.sizes = json.loads((folder / "config.json").read_text())
        self.tolerance = self.sizes["tolerances"]
        self.model = OmniMambaModel(golden_config(self.sizes)).eval()
        self.model.load_state_dict(from_official(load_file(folder / "weights.safetensors"))["model"])

    def case(self, name):
        return Case(load_file(self.folder / f"{name}.safetensors"), self.tolerance)


class Case:
    """Recorded tensors of one case. A folder may hold a subset; `check` compares what is there and counts it."""

    def __init__(self, tensors, tolerance):
        self.tensors, self.tolerance, self.num_checked = tensors, tolerance, 0

    def __getitem__(self, name):
        return self.tensors[name]

    def check(self, name, actual, tolerance="hidden_maxabs"):
        if name not in self.tensors:
            return
        expected = self.tensors[name]
        self.num_checked += 1
        assert actual.shape == expected.shape, name
        if tolerance == "exact":
            assert torch.equal(actual, expected), name
        else:
            error = (actual.double() - expected.double()).abs().max().item()
            assert error <= self.tolerance[tolerance], f"{name}: {error}"


@pytest.fixture(scope="module")
def recorded(golden):
    return Golden(golden)


def features(case):
    return torch.cat([case["vision_dino"].float(), case["vision_siglip"].float()], dim=-1)


def with_prefix(ids, sizes):
    prefix = torch.tensor([[sizes["special_ids"][f"<|{name}|>"] for name in ("mmu", "soi", "eoi", "sot")]])
    return torch.cat([prefix.expand(ids.shape[0], -1), ids], dim=1)


def check_blocks(case, model, x, task):
    for i, (residual, hidden) in enumerate(model.backbone.hidden_states(x, task)):
        case.check(f"blocks.{i}.residual.row0", residual[0])
        case.check(f"blocks.{i}.hidden.row0", hidden[0])


@torch.no_grad()
def test_t2i_forward(recorded):
    case, model = recorded.case("t2i_forward"), recorded.model
    x = model.t2i_embeddings(case["caption_ids"], case["image_ids"])
    case.check("input_embeddings", x)
    check_blocks(case, model, x, Task.T2I)
    hidden = model(x, Task.T2I)
    case.check("norm_f_out", hidden)
    case.check("logits", model.logits(hidden, Task.T2I), "logits_maxabs")
    case.check("loss", model.t2i_loss(case["caption_ids"], case["image_ids"])[None], "loss_abs")
    targets = torch.full((case["image_ids"].shape[0], x.shape[1] - 1), IGNORE_INDEX)
    before = case["caption_ids"].shape[1] - 2
    targets[:, before : before + case["image_ids"].shape[1]] = case["image_ids"]
    case.check("shifted_targets", targets, "exact")
    assert case.num_checked >= 3


@torch.no_grad()
def test_mmu_forward(recorded):
    case, model = recorded.case("mmu_forward"), recorded.model
    ids = with_prefix(case["input_ids"], recorded.sizes)
    case.check("projected", model.project_features(features(case)))
    case.check("input_embeddings", model.embed_mmu(ids, model.project_features(features(case))))
    x = model.mmu_embeddings(ids, features(case))
    check_blocks(case, model, x, Task.MMU)
    hidden = model(x, Task.MMU)
    case.check("norm_f_out", hidden)
    case.check("logits", model.logits(hidden, Task.MMU), "logits_maxabs")
    case.check("logits_row0_fp64", model.logits(hidden, Task.MMU)[0].double(), "logits_maxabs")
    case.check("loss", model.mmu_loss(ids, case["labels"], features(case))[None], "loss_abs")
    assert case.num_checked >= 3


@torch.no_grad()
def test_mmu_rows_with_and_without_image(recorded):
    case, model = recorded.case("mmu_mixed_forward"), recorded.model
    ids, rows = with_prefix(case["input_ids"], recorded.sizes), case["multimodal_indices"]
    x = model.mmu_embeddings(ids, features(case), rows)
    recorded_order = [*rows.tolist(), *sorted(set(range(len(ids))) - set(rows.tolist()))]
    logits = model.logits(model(x, Task.MMU), Task.MMU)[recorded_order]
    tail = case["shifted_targets_tail"].shape[1] + 1
    case.check("logits_tail", logits[:, -tail:], "logits_maxabs")
    case.check("loss", model.mmu_loss(ids, case["labels"], features(case), rows)[None], "loss_abs")
    assert case.num_checked >= 1


@pytest.mark.parametrize("task", Task)
def test_gradients(recorded, task):
    model = recorded.model
    model.zero_grad()
    if task is Task.T2I:
        case = recorded.case("t2i_forward")
        model.t2i_loss(case["caption_ids"], case["image_ids"]).backward()
    else:
        case = recorded.case("mmu_forward")
        model.mmu_loss(with_prefix(case["input_ids"], recorded.sizes), case["labels"], features(case)).backward()
    stats = json.loads((recorded.folder / "grad_stats.json").read_text())[str(task)]
    parameters = dict(model.named_parameters())
    tolerance = recorded.tolerance["grad_maxabs_over_absmax"]
    compared = 0
    for official, expected in stats.items():
        place = our_name(official)
        if place is None or place[0] != "model":
            continue
        grad = parameters[place[1]].grad
        compared += 1
        if expected is None:
            assert grad is None or not grad.any(), official
            continue
        assert grad is not None, official
        assert grad.norm().item() == pytest.approx(expected["norm"], rel=1e-4), official
        assert grad.abs().max().item() == pytest.approx(expected["absmax"], rel=1e-4), official
        assert grad.sum().item() == pytest.approx(expected["sum"], rel=1e-3, abs=1e-3 * expected["norm"]), official
    assert compared == len(parameters)
    path = recorded.folder / f"{task}_grads.safetensors"
    for official, expected in load_file(path).items() if path.is_file() else ():
        place = our_name(official.split("[")[0])
        assert place is not None, official
        grad = parameters[place[1]].grad
        assert grad is not None, official
        if "[" in official:
            grad, expected = grad[: expected.shape[1]], expected[0]
        grad = grad.view_as(expected)
        assert (grad - expected).abs().max() / expected.abs().max() <= tolerance, official


def check_prefill_state(case, state):
    for name in case.tensors:
        if name.startswith("prefill_conv_state."):
            case.check(name, state.conv[int(name.rsplit(".", 1)[1])], "states_maxabs")
        if name.startswith("prefill_ssm_state."):
            case.check(name, state.ssm[int(name.rsplit(".", 1)[1])], "states_maxabs")


def greedy(case, model, task, x, embed):
    """Decodes as many tokens as the case recorded and checks logits and ids of each step."""
    state = MambaState.zeros(model.config.backbone, x.shape[0])
    logits = model.logits(model(x, task, state=state)[:, -1], task)
    check_prefill_state(case, state)
    all_logits, tokens = [logits], [logits.argmax(-1)]
    for t in range(case["tokens"].shape[1] - 1):
        x_t = model.add_positions(embed(tokens[-1])[:, None], task, x.shape[1] + t)[:, 0]
        all_logits.append(model.logits(model.backbone.step(x_t, task, state), task))
        tokens.append(all_logits[-1].argmax(-1))
    case.check("step_logits", torch.stack(all_logits), "logits_maxabs")
    case.check("tokens", torch.stack(tokens, 1), "exact")


@torch.no_grad()
def test_t2i_greedy_decode(recorded):
    case, model = recorded.case("t2i_generate"), recorded.model
    x = model.add_positions(model.embed_caption(case["text_ids"]), Task.T2I)
    case.check("prefill_embeddings", x)
    greedy(case, model, Task.T2I, x, model.embed_image_tokens)
    assert case.num_checked >= 3


@torch.no_grad()
def test_mmu_greedy_decode(recorded):
    case, model = recorded.case("mmu_generate"), recorded.model
    x = model.embed_mmu(case["question_ids"], model.project_features(features(case)))
    case.check("prefill_embeddings", x)
    greedy(case, model, Task.MMU, model.add_positions(x, Task.MMU), model.text_embedding)
    assert case.num_checked >= 3


def mixer_runs(case):
    """(run, task, length) of every recorded run, e.g. `plain.L257`."""
    for run in sorted({".".join(name.split(".")[:2]) for name in case.tensors if ".L" in name}):
        task, length = run.split(".L")
        yield run, None if task == "plain" else Task(task), int(length)


@torch.no_grad()
def test_mixer(recorded):
    case = recorded.case("mixer")
    mixer = recorded.model.backbone.layers[recorded.sizes["mixer_layer"]].mixer
    runs = list(mixer_runs(case))
    assert {length for _, _, length in runs} >= {1, 255, 256, 257}
    for run, task, length in runs:
        out, conv, ssm = mixer(case["x"][:, :length].float(), task)
        case.check(f"{run}.out", out, "mixer_out_maxabs")
        case.check(f"{run}.out_last32", out[:, -32:], "mixer_out_maxabs")
        case.check(f"{run}.conv_state", conv, "states_maxabs")
        case.check(f"{run}.ssm_state", ssm, "states_maxabs")
        conv = conv.clone()
        steps = [mixer.step(u, task, conv, ssm) for u in case["x_decode"].unbind(1)]
        case.check(f"{run}.decode_out", torch.stack(steps, 1), "mixer_out_maxabs")
        case.check(f"{run}.conv_state_after5", conv, "states_maxabs")
        case.check(f"{run}.ssm_state_after5", ssm, "states_maxabs")
    assert case.num_checked >= len(runs)
