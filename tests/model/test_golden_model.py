"""The language model against tensors recorded from the authors' code (cases 1 to 6 of golden/README.md)."""

import pytest
import torch
import torch.nn.functional as F

from omnimamba.config import Task
from omnimamba.model.omnimamba import IGNORE_INDEX
from omnimamba.model.state import MambaState
from omnimamba.model.weights import our_name

MARKERS = ("mmu", "soi", "eoi", "sot")
"""Before the text of an understanding sequence; the image stands in their middle."""


def features(case):
    return torch.cat([case["vision_dino"].float(), case["vision_siglip"].float()], dim=-1)


def with_markers(ids, sizes):
    markers = torch.tensor([[sizes["special_ids"][f"<|{name}|>"] for name in MARKERS]])
    return torch.cat([markers.expand(ids.shape[0], -1), ids], dim=1)


def mmu_targets(case):
    """The target of every position but the last: none in front of the text, then the labels."""
    num_before = len(MARKERS) + case["vision_dino"].shape[1]
    return F.pad(case["labels"], (num_before - 1, 0), value=IGNORE_INDEX)


def check_loss(case, loss):
    case.check("loss", loss[None], "loss_abs")
    case.check("loss_fp64", loss[None], "loss_abs")


def check_blocks(case, model, x, task):
    for i, (residual, hidden) in enumerate(model.backbone.hidden_states(x, task)):
        case.check(f"blocks.{i}.residual.row0", residual[0])
        case.check(f"blocks.{i}.hidden.row0", hidden[0])


def t2i_loss(recorded):
    case = recorded.case("t2i_forward")
    return recorded.model.t2i_loss(case["caption_ids"], case["image_ids"])


def mmu_loss(recorded):
    case = recorded.case("mmu_forward")
    return recorded.model.mmu_loss(with_markers(case["input_ids"], recorded.sizes), case["labels"], features(case))


LOSSES = {Task.T2I: t2i_loss, Task.MMU: mmu_loss}


@torch.no_grad()
def test_t2i_forward(recorded):
    case, model = recorded.case("t2i_forward"), recorded.model
    x = model.t2i_embeddings(case["caption_ids"], case["image_ids"])
    case.check("input_embeddings", x)
    check_blocks(case, model, x, Task.T2I)
    hidden = model(x, Task.T2I)
    case.check("norm_f_out", hidden)
    case.check("logits", model.logits(hidden, Task.T2I), "logits_maxabs")
    check_loss(case, t2i_loss(recorded))
    num_before = case["caption_ids"].shape[1] - 1
    case.check("shifted_targets", F.pad(case["image_ids"], (num_before - 1, 1), value=IGNORE_INDEX), "exact")
    assert case.num_checked >= 3


@torch.no_grad()
def test_mmu_forward(recorded):
    case, model = recorded.case("mmu_forward"), recorded.model
    ids = with_markers(case["input_ids"], recorded.sizes)
    case.check("projected", model.project_features(features(case)))
    case.check("input_embeddings", model.embed_mmu(ids, model.project_features(features(case))))
    x = model.mmu_embeddings(ids, features(case))
    check_blocks(case, model, x, Task.MMU)
    hidden = model(x, Task.MMU)
    case.check("norm_f_out", hidden)
    case.check("logits", model.logits(hidden, Task.MMU), "logits_maxabs")
    case.check("logits_row0_fp64", model.logits(hidden, Task.MMU)[0], "logits_maxabs")
    check_loss(case, mmu_loss(recorded))
    case.check("shifted_targets", mmu_targets(case), "exact")
    assert case.num_checked >= 3


@torch.no_grad()
def test_mmu_rows_with_and_without_image(recorded):
    case, model = recorded.case("mmu_mixed_forward"), recorded.model
    ids, rows = with_markers(case["input_ids"], recorded.sizes), case["multimodal_indices"]
    x = model.mmu_embeddings(ids, features(case), rows)
    order = [*rows.tolist(), *sorted(set(range(len(ids))) - set(rows.tolist()))]
    logits, targets = model.logits(model(x, Task.MMU), Task.MMU)[order], mmu_targets(case)[order]
    tail = case["shifted_targets_tail"].shape[1]
    case.check("logits_tail", logits[:, -tail - 1 :], "logits_maxabs")
    case.check("shifted_targets_tail", targets[:, -tail:], "exact")
    check_loss(case, model.mmu_loss(ids, case["labels"], features(case), rows))
    assert case.num_checked >= 1


@pytest.fixture(params=Task)
def gradients(recorded, request):
    """A task and the gradient of its loss by parameter name; None where there is none."""
    recorded.model.zero_grad()
    LOSSES[request.param](recorded).backward()
    yield request.param, {name: parameter.grad for name, parameter in recorded.model.named_parameters()}
    recorded.model.zero_grad()


def test_gradients(recorded, gradients):
    task, grads = gradients
    case = recorded.case(f"{task}_grads")
    for official in case.tensors:
        place = our_name(official.split("[")[0])  # some names end in the slice that was recorded
        assert place is not None, official
        grad = grads[place[1]]
        case.check(official, grad[None] if grad.dim() < case[official].dim() else grad, "grad_maxabs_over_absmax")
    assert case.num_checked


def test_gradient_of_every_parameter(recorded, gradients):
    task, grads = gradients
    stats = {our_name(official): expected for official, expected in recorded.json("grad_stats.json")[task].items()}
    assert {name for component, name in stats if component == "model"} == grads.keys()
    for (_, name), expected in stats.items():
        grad = grads[name]
        if expected is None:
            assert grad is None or not grad.any(), name
            continue
        assert grad.norm().item() == pytest.approx(expected["norm"], rel=1e-4), name
        assert grad.abs().max().item() == pytest.approx(expected["absmax"], rel=1e-4), name
        assert grad.sum().item() == pytest.approx(expected["sum"], rel=1e-3, abs=1e-3 * expected["norm"]), name


def check_prefill_state(case, state):
    for name in case.tensors:
        for kind, tensor in (("conv", state.conv), ("ssm", state.ssm)):
            if name.startswith(f"prefill_{kind}_state."):
                case.check(name, tensor[int(name.rsplit(".", 1)[1])], "states_maxabs")


def check_greedy(case, model, task, x, embed):
    """Decodes as many tokens as the case recorded and checks logits and ids of each step."""
    state = MambaState.zeros(model.config.backbone, x.shape[0])
    logits = model.logits(model(x, task, state=state)[:, -1], task)
    check_prefill_state(case, state)
    all_logits, tokens = [logits], [logits.argmax(-1)]
    for t in range(case["tokens"].shape[1] - 1):
        x_t = model.add_positions(embed(tokens[-1])[:, None], task, x.shape[1] + t)[:, 0]
        all_logits.append(model.logits(model.backbone.step(x_t, task, state), task))
        tokens.append(all_logits[-1].argmax(-1))
    step_logits = torch.stack(all_logits)
    case.check("step_logits", step_logits, "logits_maxabs")
    best, second = step_logits.topk(2).values.unbind(-1)
    case.check("top2_margin", best - second, "logits_maxabs")
    case.check("tokens", torch.stack(tokens, 1), "exact")


@torch.no_grad()
def test_t2i_greedy_decode(recorded):
    case, model = recorded.case("t2i_generate"), recorded.model
    x = model.add_positions(model.embed_caption(case["text_ids"]), Task.T2I)
    case.check("prefill_embeddings", x)
    check_greedy(case, model, Task.T2I, x, model.embed_image_tokens)
    case.check("images", recorded.vq.decode_ids(case["tokens"], tuple(recorded.sizes["vq"]["grid"])), "vq_maxabs")
    assert case.num_checked >= 3


@torch.no_grad()
def test_mmu_greedy_decode(recorded):
    case, model = recorded.case("mmu_generate"), recorded.model
    x = model.embed_mmu(case["question_ids"], model.project_features(features(case)))
    case.check("prefill_embeddings", x)
    check_greedy(case, model, Task.MMU, model.add_positions(x, Task.MMU), model.text_embedding)
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
    assert {task for _, task, _ in runs} == {None, *Task}
    for run, task, length in runs:
        out, conv, ssm = mixer(case["x"][:, :length].float(), task)
        case.check(f"{run}.out", out, "mixer_out_maxabs")
        case.check(f"{run}.out_last32", out[:, -32:], "mixer_out_maxabs")
        case.check(f"{run}.conv_state", conv, "states_maxabs")
        case.check(f"{run}.ssm_state", ssm, "states_maxabs")
        conv, ssm = conv.clone(), ssm.clone()
        steps = [mixer.step(u, task, conv, ssm) for u in case["x_decode"].unbind(1)]
        case.check(f"{run}.decode_out", torch.stack(steps, 1), "mixer_out_maxabs")
        case.check(f"{run}.conv_state_after5", conv, "states_maxabs")
        case.check(f"{run}.ssm_state_after5", ssm, "states_maxabs")
    assert case.num_checked >= len(runs)
