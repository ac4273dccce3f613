"""Every launch choice of the kernels, in one table; nothing is tuned at run time.

Those of the decode kernels are the fastest that `benchmarks/decode.py --sweep` found on an H100, or on the card that `CARD_LAUNCHES` names,
those of the scan's backward pass the fastest on an H200; the others follow from register and shared-memory use as the compiler reports
them for compute capability 9.0.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs


class Launch(NamedTuple):
    rows: int  # sequence positions (or rows of a norm) that one tile holds
    columns: int  # channels of one tile; 0 where the tile holds a whole row
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread: more programs fit on a multiprocessor; None leaves it to the compiler


# Kernel: (largest width, choice), the first row that is wide enough counts. The width is what the caller of `launch` passes.
LAUNCHES: dict[str, tuple[tuple[float, Launch], ...]] = {
    # width: channels; 16 bytes of a row for each thread; backwards the rows are walked over one after the other
    "conv_forward": ((torch.inf, Launch(8, 512, num_warps=2, num_stages=1)),),
    "conv_backward": ((torch.inf, Launch(128, 128, num_warps=1, num_stages=1)),),
    "conv_backward_frozen": ((torch.inf, Launch(64, 128, num_warps=1, num_stages=1)),),  # where the weights do not learn
    # width: channels of one group; the rows are those of a tile of about 4096 numbers
    "norm_forward": (
        (256, Launch(16, 0, num_warps=4, num_stages=1)),
        (512, Launch(8, 0, num_warps=4, num_stages=1)),
        (1024, Launch(4, 0, num_warps=4, num_stages=1)),
        (2048, Launch(2, 0, num_warps=8, num_stages=1)),
        (torch.inf, Launch(1, 0, num_warps=8, num_stages=1)),
    ),
    "norm_backward": (
        (256, Launch(8, 0, num_warps=4, num_stages=1)),
        (512, Launch(4, 0, num_warps=4, num_stages=1)),
        (1024, Launch(2, 0, num_warps=4, num_stages=1)),
        (2048, Launch(1, 0, num_warps=8, num_stages=1)),
        (torch.inf, Launch(1, 0, num_warps=16, num_stages=1)),
    ),
    # width: d_state; the rows are the positions of a chunk. The bound is registers: all tiles of a chunk are alive at once.
    "ssd_forward": (
        (64, Launch(64, 0, num_warps=4, num_stages=2)),
        (torch.inf, Launch(64, 0, num_warps=4, num_stages=2)),
    ),
    "ssd_spans": ((torch.inf, Launch(0, 0, num_warps=4, num_stages=3)),),  # its rows are those of the forward kernel
    "ssd_decays": ((torch.inf, Launch(0, 16, num_warps=4, num_stages=1)),),  # width and columns: heads
    # backwards: the rows of the first are those of all three
    "ssd_backward": ((torch.inf, Launch(64, 0, num_warps=4, num_stages=1, max_registers=168)),),
    "ssd_backward_states": ((torch.inf, Launch(0, 0, num_warps=8, num_stages=3, max_registers=128)),),
    "ssd_backward_weights": ((torch.inf, Launch(0, 0, num_warps=8, num_stages=3)),),
    # width: channels of the wide tensor; rows and columns are those of its tile
    "lora_down": ((torch.inf, Launch(64, 128, num_warps=4, num_stages=3)),),
    "lora_up": ((torch.inf, Launch(64, 128, num_warps=4, num_stages=1)),),
    "lora_inner_gradient": ((torch.inf, Launch(64, 128, num_warps=4, num_stages=3)),),
    "lora_outer_gradients": ((torch.inf, Launch(128, 64, num_warps=4, num_stages=4)),),
    # width: channels; the rows are positions of step sizes, the columns channels of conv states
    "prefill_ends": ((torch.inf, Launch(32, 256, num_warps=4, num_stages=1)),),
    # width: channels of the residual stream
    "prefill_norm": ((1024, Launch(1, 0, num_warps=4, num_stages=1)), (torch.inf, Launch(1, 0, num_warps=8, num_stages=1))),
    # width: input channels; the rows are outputs of one program, the tile holds them whole
    "decode_project": (
        (1024, Launch(16, 0, num_warps=4, num_stages=1)),
        (2048, Launch(4, 0, num_warps=4, num_stages=1)),
        (torch.inf, Launch(8, 0, num_warps=8, num_stages=1)),
    ),
    # the same for weights of 8 bits
    "decode_project_8bit": (
        (1024, Launch(16, 0, num_warps=4, num_stages=1)),
        (2048, Launch(16, 0, num_warps=8, num_stages=1)),
        (torch.inf, Launch(8, 0, num_warps=8, num_stages=1)),
    ),
    # width: input channels; the rows are outputs, the columns inputs of a tile
    "decode_matrix": (
        (2048, Launch(64, 64, num_warps=4, num_stages=6)),
        (torch.inf, Launch(64, 128, num_warps=4, num_stages=4)),
    ),
    # width: rows of the batch; its rows are channels of a head; states in fp32, and in half precision
    "decode_mix": (
        (2, Launch(32, 0, num_warps=4, num_stages=1)),
        (8, Launch(16, 0, num_warps=4, num_stages=1)),
        (torch.inf, Launch(64, 0, num_warps=4, num_stages=1, max_registers=168)),
    ),
    "decode_mix_half": (
        (2, Launch(32, 0, num_warps=4, num_stages=1)),
        (8, Launch(16, 0, num_warps=4, num_stages=1)),
        (torch.inf, Launch(64, 0, num_warps=4, num_stages=1, max_registers=168)),
    ),
    "decode_norm": ((1024, Launch(1, 0, num_warps=4, num_stages=1)), (torch.inf, Launch(1, 0, num_warps=8, num_stages=1))),
    "decode_sample": ((torch.inf, Launch(1, 1024, num_warps=4, num_stages=1)),),  # width: vocabulary; columns: tokens of one program
    # fp32 products run on the FMA units, whose operands are in registers too
    "lora_down_fp32": ((torch.inf, Launch(32, 64, num_warps=4, num_stages=1)),),
    "lora_up_fp32": ((torch.inf, Launch(32, 64, num_warps=4, num_stages=1)),),
    "lora_inner_gradient_fp32": ((torch.inf, Launch(32, 64, num_warps=4, num_stages=1)),),
    "lora_outer_gradients_fp32": ((torch.inf, Launch(32, 64, num_warps=4, num_stages=1)),),
    "ssd_forward_fp32": ((torch.inf, Launch(16, 0, num_warps=8, num_stages=1)),),
    "ssd_spans_fp32": ((torch.inf, Launch(0, 0, num_warps=4, num_stages=1)),),
    "ssd_backward_fp32": ((torch.inf, Launch(16, 0, num_warps=8, num_stages=1)),),
    "ssd_backward_states_fp32": ((torch.inf, Launch(0, 0, num_warps=4, num_stages=1)),),
    "ssd_backward_weights_fp32": ((torch.inf, Launch(0, 0, num_warps=8, num_stages=1)),),
}

# Those of kernels that need more shared memory for a program than cards before Hopper, or not for servers, have (163 and 99 KB).
SMALL_LAUNCHES: dict[str, tuple[tuple[float, Launch], ...]] = {
    "ssd_backward_weights": ((torch.inf, Launch(0, 0, num_warps=8, num_stages=1)),),
    "decode_matrix": ((torch.inf, Launch(64, 64, num_warps=4, num_stages=3)),),
}
LARGE_SHARED_MEMORY = 200 * 1024

# The kernels for which other choices than those above are faster on a card, by the name that CUDA gives it.
CARD_LAUNCHES: dict[str, dict[str, tuple[tuple[float, Launch], ...]]] = {
    "NVIDIA H200": {
        "decode_project_8bit": (
            (2048, Launch(16, 0, num_warps=4, num_stages=1)),
            (torch.inf, Launch(8, 0, num_warps=8, num_stages=1)),
        ),
        "decode_mix": (
            (2, Launch(64, 0, num_warps=4, num_stages=1)),
            (8, Launch(16, 0, num_warps=4, num_stages=1)),
            (torch.inf, Launch(32, 0, num_warps=4, num_stages=1, max_registers=96)),
        ),
    },
}

# Enough programs to fill a GPU of so many multiprocessors: work is split further (headdim over programs, spans) below these.
MULTIPROCESSORS = 132
FULL_GRID = 2 * MULTIPROCESSORS
# What a partial sum of the gradients of B and C costs beside a head's work, where programs share the heads of a group.
SPLIT_COST = 0.03
# The fewest positions of a span, where the scan's forward pass over few rows is cut into spans that are walked at once.
SPAN_POSITIONS = 128
# Warps of the norm's backward that a multiprocessor holds at once; each program walks over many rows with one partial sum of the weight's
# gradient.
NORM_WARPS = 24


@functools.cache
def own_launches(device: torch.device) -> dict[str, tuple[tuple[float, Launch], ...]]:
    """The choices that a device does not share with others."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    is_small = torch.version.cuda is None or properties.shared_memory_per_block_optin < LARGE_SHARED_MEMORY  # others do not tell
    return (SMALL_LAUNCHES if is_small else {}) | CARD_LAUNCHES.get(properties.name, {})


def launch(kernel: str, width: int, device: torch.device | None = None) -> Launch:
    """The choice for a kernel at this width; without a device, that of `LAUNCHES`."""
    own = {} if device is None else own_launches(device)
    return next(choice for largest, choice in own.get(kernel, LAUNCHES[kernel]) if width <= largest)


def launch_for(x: Tensor, kernel: str, width: int) -> Launch:
    """The choice for a kernel that reads x, and has another choice in fp32."""
    return launch(f"{kernel}_fp32" if x.dtype == torch.float32 else kernel, width, x.device)


def tile(size: int) -> int:
    """The smallest tile edge that holds `size`: a power of two, at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(size))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of matrix operands: that of the input, but fp32 for bf16 in the interpreter, which multiplies bf16 bits as integers."""
    if dtype == torch.bfloat16:
        return tl.float32 if knobs.runtime.interpret else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32
