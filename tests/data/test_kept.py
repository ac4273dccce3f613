"""What runs share: made once, the least used forgotten, and told apart by every weight."""

import torch
from torch import nn

from omnimamba.data.kept import Kept, weights_digest


def test_a_value_is_made_once_and_the_one_longest_unasked_for_forgotten():
    kept, made = Kept(most=2), []

    def get(key):
        return kept.get(key, lambda: made.append(key) or [key])

    assert get("a") is get("a") and made == ["a"]
    get("b"), get("a"), get("c")  # and b is one too many
    assert kept.find("b") is None and kept.find("a") == ["a"] and made == ["a", "b", "c"]


def test_the_digest_tells_weights_apart():
    layers = [nn.Linear(2, 2) for _ in range(2)]
    assert weights_digest(layers[0]) != weights_digest(layers[1])
    layers[1].load_state_dict(layers[0].state_dict())
    assert weights_digest(layers[0]) == weights_digest(layers[1])
    with torch.no_grad():
        layers[1].bias[1] += 1e-6 * layers[1].bias[1]  # less than bf16 holds
    assert weights_digest(layers[0]) != weights_digest(layers[1])
    assert weights_digest(nn.Linear(2, 2).bfloat16())
