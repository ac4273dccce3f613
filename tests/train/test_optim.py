"""The schedule at known steps, what weight decay spares, and the moving average."""

import math

import pytest
import torch
from torch import nn

from omnimamba.config import preset
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.train.config import Train
from omnimamba.train.optim import (
    MovingAverage,
    adamw,
    learned_state,
    learning_rate,
    optimizer_tensors,
    prepare_optimizer,
    trainable,
)


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (35, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))), (60, 0.55), (110, 0.1), (500, 0.1)],
)
def test_schedule(step, share):
    assert learning_rate(step, Train(steps=110, lr=2.0, warmup=10, min_lr_ratio=0.1)) == pytest.approx(2 * share)


def test_schedule_without_warmup():
    train = Train(steps=100, lr=1.0)
    assert learning_rate(0, train) == 1 and learning_rate(100, train) == pytest.approx(0.01)
    assert learning_rate(5, Train(steps=1, lr=1.0, warmup=10)) == pytest.approx(0.6)  # steps end within the warm-up


def test_weight_decay_spares_vectors_and_scalars():
    model = OmniMambaModel(preset("tiny"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = adamw(trainable(model).values(), Train(lr=1.0, weight_decay=0.1, beta1=0.8, beta2=0.7)).param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0 and decayed["betas"] == (0.8, 0.7)
    decayed, spared = ({names[id(parameter)] for parameter in group["params"]} for group in (decayed, spared))
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert {"text_embedding.weight", "positions.t2i", "backbone.layers.0.mixer.conv1d.weight"} <= decayed
    spared_kinds = {name.rsplit(".", 1)[-1] for name in spared if name.startswith("backbone.layers")}
    assert {"A_log", "D", "dt_bias"} <= spared_kinds and "backbone.norm_f.weight" in spared and "projector.0.bias" in spared


def test_only_what_learns_is_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert set(trainable(model)) == {"1.weight", "1.bias"} == set(learned_state(model))


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    network[2].requires_grad_(False)
    return network.train()


def test_moving_average_follows_parameters_and_statistics(network):
    average = MovingAverage(network, 0.9)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert list(average.averages) == names  # no frozen parameters, no counter
    expected = {name: network.state_dict()[name].clone() for name in names}
    for step in range(30):
        network(torch.randn(8, 3))
        with torch.no_grad():
            network[0].weight.add_(0.1)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name in names:
            expected[name] = decay * expected[name] + (1 - decay) * network.state_dict()[name]
    torch.testing.assert_close(average.averages, expected)
    assert not torch.allclose(expected["1.running_mean"], network[1].running_mean)


def test_swap_and_back(network):
    average = MovingAverage(network, 0.9)
    network(torch.randn(8, 3))
    with torch.no_grad():
        network[0].weight.add_(1)
    average.update(3)
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in average.averages.items()}
    average.swap()
    state = network.state_dict()
    assert all(torch.equal(state[name], averages[name]) for name in averages)
    assert all(torch.equal(average.averages[name], tensors[name]) for name in averages)
    average.swap()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
    assert all(torch.equal(average.averages[name], averages[name]) for name in averages)


def test_training_goes_on_after_a_swap_and_back():
    """As if there had been none: the optimizer still changes the parameters that the module uses."""

    def train(swaps):
        torch.manual_seed(0)
        network = nn.Linear(2, 1)
        optimizer, average = adamw(network.parameters(), Train(lr=0.1)), MovingAverage(network, 0.9)
        for step in range(5):
            network(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(step)
            for _ in range(2 * swaps):
                average.swap()
        return [*network.state_dict().values(), *average.averages.values()]

    assert all(map(torch.equal, train(False), train(True)))


def test_optimizer_from_its_tensors():
    """A new optimizer with the tensors of another makes the same updates."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(1, 1))

    def step(network, optimizer, x):
        network[:2](x).sum().backward()  # the last layer has no update
        optimizer.step()
        optimizer.zero_grad()

    one = network()
    optimizer = adamw(one.parameters(), Train(lr=0.1))
    for x in (torch.ones(1, 2), torch.tensor([[0.5, -2.0]])):
        step(one, optimizer, x)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(one, optimizer).items()}
    assert tensors.keys() == {
        f"{i}.{part}/{kind}" for i in (0, 1) for part in ("weight", "bias") for kind in ("step", "exp_avg", "exp_avg_sq")
    }

    other = network()
    other.load_state_dict(one.state_dict())
    resumed = adamw(other.parameters(), Train(lr=0.1))
    prepare_optimizer(other, resumed, tensors)
    for name, tensor in optimizer_tensors(other, resumed).items():
        tensor.copy_(tensors[name])
    for x in (torch.tensor([[3.0, 1.0]]), torch.ones(1, 2)):
        step(one, optimizer, x)
        step(other, resumed, x)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
