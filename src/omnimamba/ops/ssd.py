"""State space duality: the Mamba-2 recurrence as a chunked scan and as a single step (arXiv:2405.21060, sections 6 and 7).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t

`dt` is positive (after softplus), `A` negative, one scalar per head. A position with dt = 0 leaves the state as it is; that
is how padding is skipped (its x, B and C must be finite: zero times NaN is NaN). States and decays are fp32; matrix products run
in x's dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimamba.ops.cpu import LANES
from omnimamba.ops.plain_path import announce_plain_path, runs_compiled, runs_kernel

CPU_CHUNK = 64
"""Largest chunk on a CPU, where the (q, q) matrices of 256 positions are 4 times as slow as those of 64 (1.3B shape)."""


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y for a whole sequence and the state after its last position.

    x: [b, l, h, p]; dt: [b, l, h] fp32; A, D: [h]; B, C: [b, l, g, n]; initial_state: [b, h, p, n], not changed.
    Returns y [b, l, h, p] in x's dtype and the final state [b, h, p, n] in fp32.

    Inside a chunk of q positions the recurrence is a masked (q, q) matrix product; between chunks only states travel. `chunk_size` changes
    the rounding and nothing else; the kernel takes its chunks from its launch table, and a CPU none above CPU_CHUNK. Where no gradient is
    asked for, a CPU goes through the positions one by one.
    """
    if runs_kernel(x):
        if fits_kernel(x.shape[3], B.shape[3]):
            from omnimamba.ops.triton import ssd as kernel  # Triton need not be installed

            return kernel.ssd_chunk_scan(x, dt, A, B, C, D=D, initial_state=initial_state)
        announce_plain_path(x.device, f"there is no kernel for headdim={x.shape[3]}, d_state={B.shape[3]}; 128 and 256 are the largest")
    if x.device.type == "cpu":
        if x.shape[3] % LANES == B.shape[3] % 2 == 0 and runs_compiled(x, dt, A, B, C, D, initial_state):
            from omnimamba.ops.cpu import scan  # Numba takes a moment to load

            return scan.ssd_chunk_scan(x, dt, A, B, C, D=D, initial_state=initial_state)
        chunk_size = min(chunk_size, CPU_CHUNK)
    return plain_ssd_chunk_scan(x, dt, A, B, C, D=D, chunk_size=chunk_size, initial_state=initial_state)


def A_of(A_log: Tensor) -> Tensor:
    """A [h] of the parameter A_log [h], which keeps it negative."""
    return -torch.exp(A_log.float())  # fp32: in fp16 exp(A_log) overflows


def split_scan_inputs(xBC: Tensor, num_heads: int, num_groups: int, d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., h, p], B and C [..., g, n] of the convolution's output [..., c], or of its gradient: views."""
    size = num_groups * d_state
    x, B, C = xBC.split((xBC.shape[-1] - 2 * size, size, size), -1)
    return x.unflatten(-1, (num_heads, -1)), B.unflatten(-1, (num_groups, -1)), C.unflatten(-1, (num_groups, -1))


def fits_kernel(headdim: int, d_state: int) -> bool:
    """Larger tiles than these have never been compiled."""
    return headdim <= 128 and d_state <= 256


def plain_ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `ssd_chunk_scan`."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    state = x.new_zeros(b, h, p, n, dtype=torch.float32) if initial_state is None else initial_state.float()
    if l == 0:
        return x, state
    with torch.autocast(x.device.type, enabled=False):
        q = min(chunk_size, l)
        tail = -l % q
        xdt = x.float() * dt[..., None]
        decay = dt.float() * A.float()  # log of the decay of each step
        if tail:
            xdt, decay = F.pad(xdt, (0, 0, 0, 0, 0, tail)), F.pad(decay, (0, 0, 0, tail))
            B, C = F.pad(B, (0, 0, 0, 0, 0, tail)), F.pad(C, (0, 0, 0, 0, 0, tail))
        # r heads share one of the g groups of B and C
        xdt = xdt.unflatten(1, (-1, q)).unflatten(3, (g, -1)).permute(0, 1, 3, 4, 2, 5)  # [b, c, g, r, q, p]
        B, C = (m.unflatten(1, (-1, q)).transpose(2, 3) for m in (B, C))  # [b, c, g, q, n]
        decay = decay.unflatten(1, (-1, q)).unflatten(3, (g, -1)).permute(0, 1, 3, 4, 2)  # [b, c, g, r, q]
        from_start = decay.cumsum(-1)
        between = segment_sums(decay)

        scores = (C @ B.mT)[:, :, :, None].float() * between.exp()  # [b, c, g, r, q, q]
        y = (scores.to(x.dtype) @ xdt.to(x.dtype)).float()

        to_end = between[..., -1, :].exp()
        added = (xdt * to_end[..., None]).to(x.dtype).mT @ B[:, :, :, None]  # [b, c, g, r, p, n]
        added = added.flatten(2, 3).float()
        chunk_decay = from_start[..., -1, None, None].flatten(2, 3).exp()
        entering = []
        for c in range(added.shape[1]):
            entering.append(state)
            state = state * chunk_decay[:, c] + added[:, c]
        before = torch.stack(entering, 1).unflatten(2, (g, -1)).mT
        y = y + (C[:, :, :, None] @ before.to(x.dtype)).float() * from_start.exp()[..., None]
        y = y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :l]  # undo chunking: [b, l, h, p]
        y = y + x.float() * D.float()[:, None]
    return y.to(x.dtype), state


def segment_sums(decay: Tensor) -> Tensor:
    """sums[..., t, s] = decay[s+1] + ... + decay[t] and -inf for s > t, [..., q, q] for decay [..., q].

    Each segment is summed by itself: as differences of one cumulative sum they, and the gradient of A even more, would lose up to
    four digits by cancellation.
    """
    q = decay.shape[-1]
    lower = torch.ones(q, q, dtype=torch.bool, device=decay.device).tril()
    sums = decay[..., None].expand(*decay.shape, q).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~lower, -torch.inf)


def ssd_step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor) -> Tensor:
    """y for one position; `state` [b, h, p, n] is updated in place.

    x: [b, h, p]; dt: [b, h] fp32; A, D: [h]; B, C: [b, g, n]. Returns y [b, h, p] in x's dtype.
    """
    b, h, p, n = state.shape
    g = B.shape[1]
    xf = x.float()
    new = state.float()  # the state itself if it is fp32; three passes over it are most of the time on a CPU
    new.mul_((dt * A).exp()[..., None, None])
    new.view(b, g, h // g, p, n).addcmul_((xf * dt[..., None]).view(b, g, h // g, p, 1), B.float()[:, :, None, None, :])
    if new is not state:
        state.copy_(new)
    y = C.float()[:, :, None] @ new.view(b, g, h // g * p, n).mT  # this way round a row does not depend on b, to the last bit
    return (y.view(b, h, p) + xf * D.float()[:, None]).to(x.dtype)
