"""The model's side of inference: prompts to embeddings, prefill and decode on a pool of state slots.

The image embedding and its MLP depend on the id alone, so they are folded into one lookup table here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omnimamba.config import Task
from omnimamba.engine.request import Request
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.state import MambaState


class Runner:
    """Owns the state pool; the weights of `model` must not change while it lives."""

    def __init__(self, model: OmniMambaModel, num_slots: int, *, ssm_dtype: torch.dtype = torch.float32) -> None:
        if model.training:
            raise ValueError("the model is in training mode, where LoRA dropout is on; call model.eval() first")
        self.model = model
        self.state = MambaState.zeros(model.config.backbone, num_slots, device=model.device, conv_dtype=model.dtype, ssm_dtype=ssm_dtype)
        self._image_table: Tensor | None = None

    @property
    def image_table(self) -> Tensor:
        """Embeddings of all image tokens [v, d], computed on first use."""
        if self._image_table is None:
            with torch.no_grad():
                self._image_table = self.model.embed_image_tokens(
                    torch.arange(self.model.config.image_vocab_size, device=self.model.device)
                )
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
        return model.embed_mmu(ids, model.project_features(request.features[None].to(model.device, model.dtype)))

    def embed_tokens(self, ids: Tensor, task: Task) -> Tensor:
        """Embeddings [..., d] of generated tokens without positions. ids: [...]."""
        return self.image_table[ids] if task is Task.T2I else self.model.text_embedding(ids)

    def positions(self, position: Tensor, task: Task) -> Tensor:
        """Rows of the task's table [..., d], the last one again past its end (requests that may not get there are refused)."""
        table = self.model.positions[task]
        return table[position.clamp(max=table.shape[0] - 1)]

    # ---- forward passes

    @torch.no_grad()
    def prefill(self, slots: list[int], chunks: Sequence[Tensor], task: Task) -> Tensor:
        """Logits [b, v] after each slot has read its chunk; the slots go on from where they are and are updated in place.

        chunks: per slot [l_i, d] embeddings without positions, of unequal lengths.
        """
        model = self.model
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=model.device)
        x = pad_sequence(list(chunks), batch_first=True)
        state = self.state.slots(slots)
        x = x + self.positions(state.position[:, None] + torch.arange(x.shape[1], device=x.device), task).to(x.dtype)
        hidden = model(x, task, state=state, lengths=None if len({len(chunk) for chunk in chunks}) == 1 else lengths)
        self.state.store(slots, state)
        last = hidden[torch.arange(len(slots), device=x.device), lengths - 1]
        return model.logits(last, task)

    @torch.no_grad()
    def decode(self, slots: list[int], tasks: Sequence[Task], tokens: Sequence[int]) -> dict[Task, Tensor]:
        """Per task, the logits [r, v] of its rows in order, after each slot has read one token; slots are updated in place."""
        model = self.model
        ids = torch.tensor(tokens, device=model.device)
        rows = {task: torch.tensor([i for i, t in enumerate(tasks) if t is task], device=model.device) for task in Task if task in tasks}
        state = self.state.slots(slots)
        x = model.text_embedding.weight.new_empty(len(slots), model.config.backbone.d_model)
        for task, index in rows.items():
            x[index] = self.embed_tokens(ids[index], task) + self.positions(state.position[index], task).to(x.dtype)
        is_t2i = torch.tensor([task is Task.T2I for task in tasks], device=model.device)
        hidden = model.backbone.step(x, tasks[0] if len(rows) == 1 else is_t2i, state)
        self.state.store(slots, state)
        return {task: model.logits(hidden[index], task) for task, index in rows.items()}
