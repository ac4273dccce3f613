"""Decode on a CPU: a step of all rows as one compiled function that a few threads run together (`ops/cpu/decode.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from omnimamba.config import Task
from omnimamba.model.mamba2 import Mamba2Block
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.state import MambaState
from omnimamba.ops.cpu import LANES
from omnimamba.ops.cpu import decode as kernels
from omnimamba.ops.quant import QuantizedWeight

FORMATS = {
    torch.float32: kernels.F32,
    torch.bfloat16: kernels.BF16,
    torch.int8: kernels.INT8,
    torch.float8_e4m3fn: kernels.FP8,
    torch.uint8: kernels.INT4,
}
TASKS = (Task.T2I, Task.MMU)
"""The order of a step's rows."""
NUMBERS_PER_THREAD = 2**16
"""Of in_proj, the largest matrix of a block: with fewer, threads wait for each other longer than they work."""
NEVER = 2**62
"""A count of arrivals that no step reaches."""


class CPUDecoder:
    """Decodes on the slots of `state`. The model's weights must not change while it lives; it reads them where they are."""

    def __init__(self, model: OmniMambaModel, state: MambaState) -> None:
        backbone, lora = model.config.backbone, model.config.lora
        self.state = state
        self._kept: list[Tensor] = []
        self.shape = kernels.Shape(
            n_layer=backbone.n_layer,
            d_model=backbone.d_model,
            d_inner=backbone.d_inner,
            nheads=backbone.nheads,
            headdim=backbone.headdim,
            d_state=backbone.d_state,
            ngroups=backbone.ngroups,
            d_conv=backbone.d_conv,
            rank=-(-lora.rank // LANES) * LANES,
            image_vocab_size=model.config.image_vocab_size,
            text_vocab_size=model.config.text_vocab_size,
            eps=backbone.norm_eps,
            weights=FORMATS[values_of(model.text_embedding.weight).dtype],
            conv=FORMATS[state.conv.dtype],
            ssm=FORMATS[state.ssm.dtype],
        )
        self.layers = np.array([self._layer(block, state.conv[i], state.ssm[i]) for i, block in enumerate(model.backbone.layers)])
        self.heads = kernels.Heads(
            self._address(model.backbone.norm_f.weight.float()),
            *self._matrix(model.image_embedding.weight),
            *self._matrix(model.text_embedding.weight),
        )
        self.num_threads = max(1, min(torch.get_num_threads(), kernels.width_of(self.shape) * backbone.d_model // NUMBERS_PER_THREAD))
        self._threads = ThreadPoolExecutor(self.num_threads - 1, "decode") if self.num_threads > 1 else None
        self._counter = torch.zeros(1, dtype=torch.int64)

    @torch.no_grad()
    def step(self, x: Tensor, slots: Sequence[int], tasks: Sequence[Task]) -> dict[Task, Tensor]:
        """Per task, the logits [r, v] of its rows in order, after each slot has read one position; slots are updated in place.

        x: [b, d] embeddings with positions.
        """
        b, shape = len(slots), self.shape
        order = sorted(range(b), key=lambda row: TASKS.index(tasks[row]))
        num_t2i = sum(task is Task.T2I for task in tasks)
        residual = x.float().index_select(0, torch.tensor(order))
        projected, gated = torch.empty(b, kernels.width_of(shape)), torch.empty(b, shape.d_inner)
        logits = {Task.T2I: torch.empty(num_t2i, shape.image_vocab_size), Task.MMU: torch.empty(b - num_t2i, shape.text_vocab_size)}
        rows = kernels.Rows(
            b,
            num_t2i,
            np.array([slots[row] for row in order]),
            *(tensor.data_ptr() for tensor in (residual, projected, gated, logits[Task.T2I], logits[Task.MMU])),
        )
        scratch = torch.empty(self.num_threads, kernels.scratch_size(shape, b))
        self._counter.zero_()

        def part(number: int) -> None:
            thread = kernels.Thread(number, self.num_threads, self._counter.data_ptr(), scratch[number].data_ptr())
            kernels.run(self.layers, self.heads, shape, rows, thread)

        others: list[Future[None]] = []
        try:
            if self._threads is not None:
                others += [self._threads.submit(part, number) for number in range(1, self.num_threads)]
            part(0)
        except BaseException:
            self._counter.fill_(NEVER)  # nobody goes on waiting for this thread
            raise
        finally:
            for other in others:  # none may still be at work when the next step counts from 0
                other.result()
        self.state.position[torch.tensor(slots)] += 1
        return {task: scores for task, scores in logits.items() if len(scores)}

    # ---- tensors

    def _address(self, tensor: Tensor) -> int:
        """Where the numbers of a tensor are as long as this decoder lives."""
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, weight: Tensor | QuantizedWeight) -> tuple[int, int]:
        """The addresses of a matrix and its scales (0 without)."""
        if not isinstance(weight, QuantizedWeight):
            return self._address(weight), 0
        return self._address(weight.values), self._address(scale_of(weight))

    def _layer(self, block: torch.nn.Module, conv: Tensor, ssm: Tensor) -> kernels.Layer:
        assert isinstance(block, Mamba2Block)
        mixer, rank = block.mixer, self.shape.rank
        in_proj = mixer.in_proj
        lora_A = lora_B = torch.zeros(0)
        if rank:
            pairs = [(in_proj.lora_A[task].float(), in_proj.lora_B[task].float()) for task in map(str, (Task.MMU, Task.T2I))]
            lora_A = torch.stack([F.pad(A, (0, 0, 0, rank - len(A))) for A, _ in pairs])
            lora_B = torch.stack([F.pad(B * in_proj.scaling, (0, rank - B.shape[1])) for _, B in pairs])
            if isinstance(in_proj.weight, QuantizedWeight) and self.shape.weights != kernels.INT4:
                lora_B = lora_B / scale_of(in_proj.weight)[:, None]
        return kernels.Layer(
            self._address(block.norm.weight.float()),
            *self._matrix(in_proj.weight),
            self._address(lora_A),
            self._address(lora_B),
            self._address(mixer.conv1d.weight[:, 0].float()),
            self._address(mixer.bias.float()),
            self._address(mixer.dt_bias.float()),
            self._address(mixer.A),
            self._address(mixer.D.float()),
            self._address(mixer.norm.weight.float()),
            *self._matrix(mixer.out_proj.weight),
            conv.data_ptr(),
            ssm.data_ptr(),
        )


def values_of(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.values if isinstance(weight, QuantizedWeight) else weight


def scale_of(weight: QuantizedWeight) -> Tensor:
    """The scales of a matrix as the kernels want them: they read float8 as a 256th of what it stands for, and what a LoRA pair adds to a
    row is divided by its scale, which must not be next to nothing because the row is zero."""
    if weight.scheme == "int4":
        return weight.scale.bfloat16()  # exact: that is what they are
    return weight.scale.clamp_min(1e-30) * (256 if weight.scheme == "fp8" else 1)
