"""Mixer and backbone: against transformers' Mamba-2, and the same numbers whichever way a sequence is read."""

import pytest
import torch
from transformers import DynamicCache, Mamba2Config, Mamba2Model

from omnimamba.config import BackboneConfig, LoraConfig, Task
from omnimamba.model.mamba2 import A_INIT_RANGE, DT_INIT_RANGE, Mamba2Backbone
from omnimamba.model.state import MambaState

AROUND_A_CHUNK = (0, 1, 3, 4, 255, 256, 257)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def theirs_with_weights_of(ours, config):
    """transformers' Mamba-2 with our weights. LoRA has no place in it."""
    model = Mamba2Model(
        Mamba2Config(
            num_heads=config.nheads,
            head_dim=config.headdim,
            hidden_size=config.d_model,
            state_size=config.d_state,
            num_hidden_layers=config.n_layer,
            layer_norm_epsilon=config.norm_eps,
            expand=config.expand,
            conv_kernel=config.d_conv,
            n_groups=config.ngroups,
            chunk_size=config.chunk_size,
            vocab_size=1,
            pad_token_id=0,
        )
    )
    weights = {name: weight for name, weight in ours.state_dict().items() if ".lora_" not in name}
    model.load_state_dict({**weights, "embeddings.weight": model.embeddings.weight})
    return model.eval()


@pytest.mark.parametrize(
    "sizes",
    [
        {"d_state": 32, "headdim": 16},
        {"d_state": 8, "ngroups": 2, "headdim": 16, "chunk_size": 16},
        {"d_conv": 3, "expand": 3, "headdim": 8},
    ],
)
@torch.no_grad()
def test_agrees_with_transformers(redraw, sizes):
    config = BackboneConfig(d_model=32, n_layer=2, **sizes)
    ours = redraw(Mamba2Backbone(config, LoraConfig()))
    theirs = theirs_with_weights_of(ours, config)
    x = randn(2, 264, config.d_model)
    for l in (1, 2, 17, 255, 256, 257):
        u = x[:, :l]
        mixed, _, _ = ours.layers[1].mixer(u, None)
        torch.testing.assert_close(mixed, theirs.layers[1].mixer(u), rtol=1e-5, atol=5e-5)

        cache, state = DynamicCache(config=theirs.config), MambaState.zeros(config, 2)
        torch.testing.assert_close(ours(u, None, state=state), theirs(inputs_embeds=u, cache=cache).last_hidden_state, rtol=1e-5, atol=5e-5)
        for x_t in x[:, l : l + 5].unbind(1):
            expected = theirs(inputs_embeds=x_t[:, None], cache=cache).last_hidden_state[:, 0]
            torch.testing.assert_close(ours.step(x_t, None, state), expected, rtol=1e-5, atol=5e-5)
        for i in range(config.n_layer):
            torch.testing.assert_close(state.conv[i], cache.get_conv_state(i, state_idx=0), rtol=1e-5, atol=5e-5)
            torch.testing.assert_close(state.ssm[i], cache.get_recurrent_state(i, state_idx=0), rtol=1e-5, atol=5e-5)


def test_gradients_agree_with_transformers(redraw):
    config = BackboneConfig(d_model=32, n_layer=2, d_state=16, headdim=16, chunk_size=16)
    ours = redraw(Mamba2Backbone(config, LoraConfig()))
    theirs = theirs_with_weights_of(ours, config)
    x = randn(2, 40, config.d_model)
    ours(x, None).square().sum().backward()
    theirs(inputs_embeds=x, use_cache=False).last_hidden_state.square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if ".lora_" not in name:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-3 * parameter.grad.abs().max().item())


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)


def assert_same_state(found, expected):
    assert_same(found.conv, expected.conv)
    assert_same(found.ssm, expected.ssm)
    assert torch.equal(found.position, expected.position)


@pytest.fixture(scope="module")
def config(backbone):
    return backbone.layers[0].mixer.config


@pytest.fixture(scope="module")
def whole(backbone, config):
    """260 positions of two rows, their hidden states and the state after them."""
    x, state = randn(2, 260, config.d_model), MambaState.zeros(config, 2)
    with torch.no_grad():
        return x, backbone(x, Task.MMU, state=state), state


@torch.no_grad()
def test_a_state_does_not_change_the_output(backbone, whole):
    x, hidden, _ = whole
    assert_same(backbone(x, Task.MMU), hidden)


@pytest.mark.parametrize("cut", AROUND_A_CHUNK)
@torch.no_grad()
def test_prefill_in_pieces_equals_the_whole(backbone, config, whole, cut):
    x, hidden, expected = whole
    state = MambaState.zeros(config, 2)
    pieces = [backbone(piece, Task.MMU, state=state) for piece in x.tensor_split((cut, cut + 1), dim=1)]
    assert_same(torch.cat(pieces, 1), hidden)
    assert_same_state(state, expected)


@pytest.mark.parametrize("cut", AROUND_A_CHUNK)
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole(backbone, config, whole, cut):
    x, hidden, expected = whole
    state = MambaState.zeros(config, 2)
    prefilled = backbone(x[:, :cut], Task.MMU, state=state)
    stepped = [backbone.step(x_t, Task.MMU, state) for x_t in x[:, cut:].unbind(1)]
    assert_same(torch.cat([prefilled, torch.stack(stepped, 1)], 1), hidden)
    assert_same_state(state, expected)


@pytest.mark.parametrize("started", [False, True])
@torch.no_grad()
def test_rows_of_unequal_lengths_equal_rows_alone(backbone, config, started):
    lengths = [257, 0, 1, 3, 255, 256]
    x = randn(len(lengths), max(lengths), config.d_model)
    state = MambaState.zeros(config, len(lengths))
    if started:
        backbone(randn(len(lengths), 6, config.d_model, seed=1), Task.T2I, state=state)
    before = state.clone()
    for i, length in enumerate(lengths):
        x[i, length:] = torch.nan
    hidden = backbone(x, Task.T2I, state=state, lengths=torch.tensor(lengths))
    for i, length in enumerate(lengths):
        alone = before.slots([i]).clone()
        assert_same(hidden[i, :length], backbone(x[i : i + 1, :length], Task.T2I, state=alone)[0])
        assert_same_state(state.slots([i]), alone)


def test_padding_has_no_gradient(backbone, config):
    x = randn(2, 6, config.d_model)
    x[1, 4:] = torch.nan
    x.requires_grad_()
    backbone.zero_grad()
    hidden = backbone(x, Task.T2I, lengths=torch.tensor([6, 4]))
    (hidden[0].square().sum() + hidden[1, :4].square().sum()).backward()
    assert x.grad.isfinite().all() and not x.grad[1, 4:].any()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in backbone.parameters())


@torch.no_grad()
def test_residual_stream_is_fp32_in_bf16(redraw):
    config = BackboneConfig(d_model=32, n_layer=2, d_state=16, headdim=16)
    model = redraw(Mamba2Backbone(config, LoraConfig()))
    x = randn(2, 20, config.d_model)
    expected = model(x, Task.MMU)
    model.bfloat16()
    state = MambaState.zeros(config, 2, conv_dtype=torch.bfloat16)
    hidden = model(x.bfloat16(), Task.MMU, state=state)
    assert hidden.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32
    assert (hidden.float() - expected).abs().max() < 0.1
    assert all(residual.dtype == torch.float32 for residual, _ in model.hidden_states(x.bfloat16(), Task.MMU))


def test_initialisation():
    """Step sizes and decays start all over their ranges."""
    torch.manual_seed(0)
    mixer = Mamba2Backbone(BackboneConfig(d_model=512, n_layer=4, headdim=8), LoraConfig()).layers[0].mixer
    dt, decay = torch.nn.functional.softplus(mixer.dt_bias), -mixer.A
    for values, (low, high) in ((dt, DT_INIT_RANGE), (decay, A_INIT_RANGE)):
        assert 0.999 * low <= values.min() < 1.1 * low and 0.9 * high < values.max() <= 1.001 * high
    assert (mixer.D == 1).all()
