"""The model's side of inference: prompts to embeddings, prefill and decode on a pool of state slots.

The image embedding and its MLP depend on the id alone, so they are folded into one lookup table here. A GPU has fused kernels for decoding
(`decoder.py`) and CUDA graphs for prefill (`prefill.py`), a CPU a compiled decode step (`cpu_decoder.py`); elsewhere, and for models
without kernels, both are plain PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omnimamba.config import Task
from omnimamba.engine.prefill import PrefillGraphs, position_rows, read
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.state import MambaState
from omnimamba.ops.cpu import LANES
from omnimamba.ops.plain_path import announce_plain_path, missing_for_kernels
from omnimamba.ops.quant import QuantizedWeight

if TYPE_CHECKING:
    from omnimamba.engine.cpu_decoder import CPUDecoder
    from omnimamba.engine.decoder import FusedDecoder

IMAGE_TABLE_PART = 1024
"""Image tokens whose embeddings are computed at once."""


@dataclasses.dataclass(frozen=True)
class DecodeSample:
    """A sample that goes on: its slot, and that of its null prompt (the same one without guidance)."""

    slots: tuple[int, int]
    task: Task
    token: int
    """The last token, not yet read."""
    params: SamplingParams
    key: int
    step: int
    """Index of the token to draw next."""
    remaining: int
    """Tokens still to come."""


def missing_for_decoding(model: OmniMambaModel) -> str | None:
    """Why the fused kernels cannot decode this model where it is; None if they can."""
    weight, num_groups = model.text_embedding.weight, model.config.backbone.ngroups
    scheme = weight.scheme if isinstance(weight, QuantizedWeight) else None
    reason = missing_for_kernels()
    if reason is not None:
        return reason
    if num_groups > 1:
        return f"decoding has no kernel for ngroups={num_groups}"
    if scheme == "int4":
        return "decoding has no kernel for int4 weights; int8 and fp8 have"
    needed = (8, 9) if scheme == "fp8" else (8, 0)
    found = torch.cuda.get_device_capability(model.device)
    if found < needed:
        return f"decoding kernels need compute capability {needed[0]}.{needed[1]}, this GPU has {found[0]}.{found[1]}"
    return None


def missing_for_cpu_decoding(model: OmniMambaModel, ssm_dtype: torch.dtype) -> str | None:
    """Why the compiled step cannot decode this model on a CPU; None if it can."""
    backbone = model.config.backbone
    reason = missing_for_kernels("numba")
    if reason is not None:
        return reason
    sizes = {"d_model": backbone.d_model, "d_inner / ngroups": backbone.d_inner // backbone.ngroups}
    sizes |= {"headdim": backbone.headdim, "d_state": backbone.d_state}
    for name, size in sizes.items():
        if size % LANES:
            return f"decoding has no kernel for {name}={size}, which is no multiple of {LANES}"
    for dtype in (model.dtype, ssm_dtype):
        if dtype not in (torch.float32, torch.bfloat16):
            return f"decoding has no kernel for {str(dtype).removeprefix('torch.')}; float32 and bfloat16 have"
    return None


class Runner:
    """Owns the state pool; the weights of `model` must not change while it lives.

    stop_ids end a text and suppressed_ids are never sampled in one where the fused kernels decode, which sample too.
    """

    def __init__(
        self,
        model: OmniMambaModel,
        num_slots: int,
        *,
        ssm_dtype: torch.dtype = torch.float32,
        stop_ids: Sequence[int] = (),
        suppressed_ids: Sequence[int] = (),
    ) -> None:
        if model.training:
            raise ValueError("the model is in training mode, where LoRA dropout is on; call model.eval() first")
        self.model = model
        self.state = MambaState.zeros(model.config.backbone, num_slots, device=model.device, conv_dtype=model.dtype, ssm_dtype=ssm_dtype)
        self._image_table: Tensor | None = None
        self.decoder: FusedDecoder | None = None
        """Draws blocks of tokens; None where `decode` reads one token at a time."""
        self.cpu_decoder: CPUDecoder | None = None
        """Computes the steps of `decode`; None where plain PyTorch does."""
        self.prefill_graphs: PrefillGraphs | None = None
        if model.device.type == "cuda":
            self.prefill_graphs = PrefillGraphs(model, self.state)
            reason = missing_for_decoding(model)
            if reason is None:
                from omnimamba.engine.decoder import FusedDecoder  # Triton need not be installed

                self.decoder = FusedDecoder(model, self.state, self.image_table, stop_ids=stop_ids, suppressed_ids=suppressed_ids)
            else:
                announce_plain_path(model.device, reason, "decoding runs")
        elif model.device.type == "cpu":
            reason = missing_for_cpu_decoding(model, ssm_dtype)
            if reason is None:
                from omnimamba.engine.cpu_decoder import CPUDecoder  # Numba takes a moment to load

                self.cpu_decoder = CPUDecoder(model, self.state)
            else:
                announce_plain_path(model.device, reason, "decoding runs")

    @property
    def image_table(self) -> Tensor:
        """Embeddings of all image tokens [v, d], computed on first use, a few at a time: their MLP is four times as wide."""
        if self._image_table is None:
            ids = torch.arange(self.model.config.image_vocab_size, device=self.model.device)
            with torch.no_grad():
                self._image_table = torch.cat([self.model.embed_image_tokens(part) for part in ids.split(IMAGE_TABLE_PART)])
        return self._image_table

    # ---- slots

    def reset(self, slots: list[int]) -> None:
        self.state.reset(slots)

    def load(self, slot: int, state: MambaState) -> None:
        """Copies a state of one sequence into `slot`."""
        device = self.model.device
        self.state.store([slot], MambaState(state.conv.to(device), state.ssm.to(device), state.position.to(device)))

    def snapshot(self, slot: int) -> MambaState:
        """A copy of one slot."""
        return self.state.slots([slot]).clone()

    def fork(self, source: int, targets: list[int]) -> None:
        self.state.copy_slot(source, targets)

    # ---- embeddings

    @torch.no_grad()
    def embed_prompt(self, request: Request) -> Tensor:
        """Embeddings [g, l, d] of a request's prompt without positions; g = 2 with guidance, the second row the null prompt."""
        model = self.model
        prompts = [request.ids] if not request.sampling.is_guided or request.null_ids is None else [request.ids, request.null_ids]
        ids = torch.tensor(prompts, device=model.device)
        if request.state is not None:
            return self.embed_tokens(ids, request.task)
        if request.task is Task.T2I:
            return model.embed_caption(ids)
        if request.features is None:
            return model.embed_mmu(ids, model.no_image(1))
        assert isinstance(request.features, Tensor)  # the engine has computed those that were not given
        return model.embed_mmu(ids, model.project_features(request.features[None].to(model.device, model.dtype)))

    def embed_tokens(self, ids: Tensor, task: Task) -> Tensor:
        """Embeddings [..., d] of generated tokens without positions. ids: [...]."""
        return F.embedding(ids, self.image_table) if task is Task.T2I else self.model.embed_text(ids)

    # ---- forward passes

    @torch.no_grad()
    def prefill(self, slots: list[int], chunks: Sequence[Tensor], task: Task) -> Tensor:
        """Logits [b, v] after each slot has read its chunk; the slots go on from where they are and are updated in place.

        chunks: per slot [l_i, d] embeddings without positions, of unequal lengths.
        """
        lengths = [len(chunk) for chunk in chunks]
        if self.prefill_graphs is not None and self.prefill_graphs.covers(len(slots), max(lengths)):
            return self.prefill_graphs.run(slots, chunks, task)
        x = pad_sequence(list(chunks), batch_first=True)
        padded = None if len(set(lengths)) == 1 else torch.tensor(lengths, device=x.device)
        return read(self.model, x, task, self.state, torch.tensor(slots, device=x.device), padded)

    @torch.no_grad()
    def decode(self, slots: list[int], tasks: Sequence[Task], tokens: Sequence[int]) -> dict[Task, Tensor]:
        """Per task, the logits [r, v] of its rows in order, after each slot has read one token; slots are updated in place."""
        model = self.model
        # F.embedding, index_select and index_copy_: x[index] would start OpenMP's threads, which then spin on the cores of the CPU's step
        ids = torch.tensor(tokens, device=model.device)
        rows = {task: torch.tensor([i for i, t in enumerate(tasks) if t is task], device=model.device) for task in Task if task in tasks}
        position = self.state.position[torch.tensor(slots, device=model.device)]
        x = torch.empty(len(slots), model.config.backbone.d_model, device=model.device, dtype=model.dtype)
        for task, index in rows.items():
            positions = position_rows(model, position.index_select(0, index), task)
            x.index_copy_(0, index, self.embed_tokens(ids.index_select(0, index), task) + positions.to(x.dtype))
        if self.cpu_decoder is not None:
            return self.cpu_decoder.step(x, slots, tasks)
        state = self.state.slots(slots)
        is_t2i = torch.tensor([task is Task.T2I for task in tasks], device=model.device)
        hidden = model.backbone.step(x, tasks[0] if len(rows) == 1 else is_t2i, state)
        self.state.store(slots, state)
        return {task: model.logits(hidden[index], task) for task, index in rows.items()}
