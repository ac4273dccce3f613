"""Mamba-2 mixer, block and backbone (Dao & Gu 2024, arXiv:2405.21060, section 7) with task LoRA on in_proj.

Two ways through the same weights: `forward` for a sequence (training, prefill, continuing from a state) and `step` for one
position (decode). The residual stream is fp32 whatever the compute dtype.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from omnimamba.config import BackboneConfig, LoraConfig, Task
from omnimamba.model.lora import TaskLoraLinear, Tasks
from omnimamba.model.state import MambaState
from omnimamba.ops import causal_conv1d, causal_conv1d_step, gated_rms_norm, rms_norm, ssd_chunk_scan, ssd_step
from omnimamba.ops.block import EVERYTHING_KEPT, BlockOptions, BlockWeights, Saving, can_learn_block, learn_block
from omnimamba.ops.norm import Squares, length_mask, softplus_dt
from omnimamba.ops.prefill import add_rms_norm, gated_scan, scan_inputs
from omnimamba.ops.ssd import A_of, split_scan_inputs

# Step sizes and decay rates (-A) at initialisation, both log-uniform: a head remembers 2 to 500 positions and takes a new one in
# at a third of its size. mamba_ssm's own ranges (1e-3 to 0.1, 1 to 16) weigh a position 10 positions back with 1 % of the present
# one, and a model that starts from them needs thousands of steps before it looks at an image or a caption (docs/LOG.md).
DT_INIT_RANGE = (0.1, 0.5)
A_INIT_RANGE = (0.02, 1.0)


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    def __init__(self, d: int, eps: float, num_groups: int) -> None:
        super().__init__(d, eps)
        self.num_groups = num_groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(y, z, self.weight, self.eps, num_groups=self.num_groups)


class Mamba2Mixer(nn.Module):
    def __init__(self, config: BackboneConfig, lora: LoraConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj = TaskLoraLinear(config.d_model, config.d_in_proj, lora)  # rows: z, x, B, C, dt
        self.conv1d = nn.Conv1d(config.conv_dim, config.conv_dim, config.d_conv, groups=config.conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(config.nheads))
        self.A_log = nn.Parameter(torch.empty(config.nheads))
        self.D = nn.Parameter(torch.ones(config.nheads))
        self.norm = GatedRMSNorm(config.d_inner, config.norm_eps, config.ngroups)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        dt = torch.empty(self.config.nheads).uniform_(*map(math.log, DT_INIT_RANGE)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.uniform_(*map(math.log, A_INIT_RANGE))
        self.out_proj.weight /= math.sqrt(self.config.n_layer)  # GPT-2's residual scaling, one residual per layer

    def forward(
        self,
        u: Tensor,
        task: Tasks,
        *,
        lengths: Tensor | None = None,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [b, l, d] and the conv and SSM states after each row's last valid position.

        u: [b, l, d]; lengths: [b] valid positions of right-padded rows, whose padding is finite; the states are those before u
        (None: nothing came before) and are not changed.
        """
        config = self.config
        z, xBC, dt = self.in_proj(u, task).split((config.d_inner, config.conv_dim, config.nheads), dim=-1)
        xBC, conv_state = causal_conv1d(xBC, self.conv1d.weight[:, 0], self.bias, initial_state=conv_state, lengths=lengths)
        x, B, C = self.split_xBC(xBC)
        dt = softplus_dt(dt, self.dt_bias)
        if lengths is not None:
            dt = dt * length_mask(lengths, u.shape[1])[..., None]
        y, ssm_state = ssd_chunk_scan(x, dt, self.A, B, C, D=self.D, chunk_size=config.chunk_size, initial_state=ssm_state)
        return self.out_proj(self.norm(y.flatten(-2), z)), conv_state, ssm_state

    def read(
        self, u: Tensor, task: Tasks, conv_state: Tensor, ssm_state: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Squares | None]:
        """`forward` without gradients, and the squares whose rms the output has yet to be divided by (see `add_rms_norm`); both states are
        updated in place."""
        config = self.config
        z, xBC, dt = self.in_proj.read(u, task).split((config.d_inner, config.conv_dim, config.nheads), dim=-1)
        xBC, dt = scan_inputs(
            xBC, dt, weight=self.conv1d.weight[:, 0], bias=self.bias, dt_bias=self.dt_bias, conv_state=conv_state, lengths=lengths
        )
        x, B, C = self.split_xBC(xBC)
        norm = self.norm
        y, squares, final = gated_scan(
            x, dt, self.A, B, C, D=self.D, z=z, norm_weight=norm.weight, eps=norm.eps, num_groups=norm.num_groups,
            chunk_size=config.chunk_size, initial_state=ssm_state,
        )  # fmt: skip
        ssm_state.copy_(final)
        return self.out_proj(y), squares

    def step(self, u: Tensor, task: Tasks, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Output [b, d] for one position u: [b, d]; both states are updated in place."""
        config = self.config
        z, xBC, dt = self.in_proj(u, task).split((config.d_inner, config.conv_dim, config.nheads), dim=-1)
        x, B, C = self.split_xBC(causal_conv1d_step(xBC, conv_state, self.conv1d.weight[:, 0], self.bias))
        y = ssd_step(ssm_state, x, softplus_dt(dt, self.dt_bias), self.A, B, C, D=self.D)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def block_weights(self, norm: Tensor, task: Task | None) -> BlockWeights:
        """Those of a whole block whose norm has the weight `norm`."""
        A, B = self.in_proj.pair(task)
        assert isinstance(self.in_proj.weight, Tensor)
        return BlockWeights(
            norm, self.in_proj.weight, A, B, self.conv1d.weight[:, 0], self.bias, self.dt_bias, self.A_log, self.D, self.norm.weight,
            self.out_proj.weight,
        )  # fmt: skip

    def block_options(self, recompute: bool) -> BlockOptions:
        config, in_proj = self.config, self.in_proj
        sizes = config.nheads, config.headdim, config.ngroups, config.d_state, config.d_conv
        return BlockOptions(*sizes, config.norm_eps, in_proj.scaling, in_proj.dropout, recompute)

    @property
    def A(self) -> Tensor:
        return A_of(self.A_log)

    @property
    def bias(self) -> Tensor:
        assert self.conv1d.bias is not None
        return self.conv1d.bias

    def split_xBC(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_scan_inputs(xBC, self.config.nheads, self.config.ngroups, self.config.d_state)


class Mamba2Block(nn.Module):
    def __init__(self, config: BackboneConfig, lora: LoraConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2Mixer(config, lora)

    def forward(
        self, residual: Tensor, hidden: Tensor | None, task: Tasks, lengths: Tensor | None = None, *, saving: Saving = EVERYTHING_KEPT
    ) -> tuple[Tensor, Tensor]:
        """The residual stream [b, l, d] that this block reads, with the output `hidden` of the block before it, and its own output, which
        has yet to be added."""
        options = self.mixer.block_options(saving.recompute)
        if self.training and not isinstance(task, Tensor) and can_learn_block(residual, options):
            weights = self.mixer.block_weights(self.norm.weight, task)
            return learn_block(residual, hidden, weights, options, lengths, saving.ready)
        if saving.recompute and torch.is_grad_enabled():
            return checkpoint(self.by_operators, residual, hidden, task, lengths, use_reentrant=False)
        return self.by_operators(residual, hidden, task, lengths)

    def by_operators(self, residual: Tensor, hidden: Tensor | None, task: Tasks, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = residual if hidden is None else residual + hidden
        return residual, self.mixer(self.norm(residual), task, lengths=lengths)[0]


class Mamba2Backbone(nn.Module):
    """Blocks x = x + mixer(norm(x)), then a final norm."""

    def __init__(self, config: BackboneConfig, lora: LoraConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mamba2Block(config, lora) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        task: Tasks,
        *,
        state: MambaState | None = None,
        lengths: Tensor | None = None,
        saving: Saving = EVERYTHING_KEPT,
    ) -> Tensor:
        """Final hidden states [b, l, d]; with `state` (b slots) the rows continue from it, and `read` updates it in place.

        x: [b, l, d] embeddings with positions added; lengths: [b] valid positions of right-padded rows. What stands in the padding,
        even NaN, reaches no valid position and no state.
        """
        if lengths is not None:
            x = x.masked_fill(~length_mask(lengths, x.shape[1])[..., None], 0)
        if state is not None:
            return self.read(x, task, state, lengths=lengths)
        residual, hidden = x.float(), None
        for block in self.layers:
            residual, hidden = block(residual, hidden, task, lengths, saving=saving)
        return self.norm_f(residual if hidden is None else residual + hidden)

    @torch.no_grad()
    def read(self, x: Tensor, task: Tasks, state: MambaState, *, slots: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """`forward` from a state, without gradients. x: [b, l, d], finite in the padding; slots: [b] those of the rows (None: all)."""
        residual = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        hidden, squares = None, None
        for i, block in enumerate(self.layers):
            assert isinstance(block, Mamba2Block)
            u = add_rms_norm(residual, hidden, block.norm.weight, block.norm.eps, squares)
            pools = state.conv[i], state.ssm[i]
            conv, ssm = pools if slots is None else (pool.index_select(0, slots) for pool in pools)  # a copy of one layer's, not of all
            hidden, squares = block.mixer.read(u, task, conv, ssm, lengths)
            if slots is not None:
                for pool, part in zip(pools, (conv, ssm), strict=True):
                    pool.index_copy_(0, slots, part)
        num_read = x.shape[1] if lengths is None else lengths
        if slots is None:
            state.position += num_read
        else:
            state.position.index_copy_(0, slots, state.position.index_select(0, slots) + num_read)  # slots may repeat
        return add_rms_norm(residual, hidden, self.norm_f.weight, self.norm_f.eps, squares)

    def step(self, x: Tensor, task: Tasks, state: MambaState) -> Tensor:
        """Final hidden states [b, d] for one position x: [b, d]; `state` (b slots) is updated in place."""
        residual = x.float()
        for i, block in enumerate(self.layers):
            assert isinstance(block, Mamba2Block)
            residual = residual + block.mixer.step(block.norm(residual), task, state.conv[i], state.ssm[i])
        state.position += 1
        return self.norm_f(residual)

    def hidden_states(self, x: Tensor, task: Tasks) -> list[tuple[Tensor, Tensor]]:
        """Per block, the residual stream it reads and the output of its mixer; for inspection."""
        residual, seen = x.float(), []
        for block in self.layers:
            assert isinstance(block, Mamba2Block)
            hidden, _, _ = block.mixer(block.norm(residual), task)
            seen.append((residual, hidden))
            residual = residual + hidden
        return seen
