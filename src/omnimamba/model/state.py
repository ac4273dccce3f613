"""The whole past of N sequences in fixed-size slots.

A slot holds, per layer, the last d_conv inputs of the convolution and the SSM state (1.3B: 104 MB in fp32), plus the number of
positions consumed. Fork, guidance pair, prefix reuse and resume from a file are all copies of slots.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omnimamba.config import BackboneConfig
from omnimamba.model.files import save_tensors, whole_file


@dataclasses.dataclass
class MambaState:
    """conv: [n_layer, slots, conv_dim, d_conv]; ssm: [n_layer, slots, h, p, n]; position: [slots] int64."""

    conv: Tensor
    ssm: Tensor
    position: Tensor

    @classmethod
    def zeros(
        cls,
        config: BackboneConfig,
        num_slots: int,
        *,
        device: torch.device | str = "cpu",
        conv_dtype: torch.dtype = torch.float32,
        ssm_dtype: torch.dtype = torch.float32,
    ) -> MambaState:
        """The state of `num_slots` sequences that have seen nothing."""
        conv_shape = (config.n_layer, num_slots, config.conv_dim, config.d_conv)
        ssm_shape = (config.n_layer, num_slots, config.nheads, config.headdim, config.d_state)
        return cls(
            torch.zeros(conv_shape, device=device, dtype=conv_dtype),
            torch.zeros(ssm_shape, device=device, dtype=ssm_dtype),
            torch.zeros(num_slots, device=device, dtype=torch.int64),
        )

    @property
    def num_slots(self) -> int:
        return self.position.shape[0]

    @property
    def bytes_per_slot(self) -> int:
        return (self.conv.nbytes + self.ssm.nbytes + self.position.nbytes) // max(self.num_slots, 1)

    def slots(self, slot_idx: list[int]) -> MambaState:
        """The named slots: a view sharing memory where they are consecutive, else a copy (write back with `store`)."""
        assert all(0 <= i < self.num_slots for i in slot_idx), (slot_idx, self.num_slots)
        first, num = (slot_idx[0] if slot_idx else 0), len(slot_idx)
        if slot_idx == list(range(first, first + num)):
            return MambaState(self.conv[:, first : first + num], self.ssm[:, first : first + num], self.position[first : first + num])
        index = torch.tensor(slot_idx, device=self.position.device)
        return MambaState(self.conv[:, index], self.ssm[:, index], self.position[index])

    def store(self, slot_idx: list[int], source: MambaState) -> None:
        """Writes `source` into the named slots in place; nothing moves when it is a view of exactly these slots."""
        view = self.slots(slot_idx)
        if view.ssm.data_ptr() == source.ssm.data_ptr():
            return
        index = torch.tensor(slot_idx, device=self.position.device)
        self.conv[:, index] = source.conv.to(self.conv.dtype)
        self.ssm[:, index] = source.ssm.to(self.ssm.dtype)
        self.position[index] = source.position.to(self.position.device)

    def copy_slot(self, source: int, targets: list[int]) -> None:
        """Forks slot `source` into `targets` in place."""
        for target in targets:
            self.conv[:, target] = self.conv[:, source]
            self.ssm[:, target] = self.ssm[:, source]
            self.position[target] = self.position[source]

    def reset(self, slot_idx: list[int]) -> None:
        """Makes the named slots those of sequences that have seen nothing, in place."""
        index = torch.tensor(slot_idx, device=self.position.device, dtype=torch.int64)
        for tensor, dim in ((self.conv, 1), (self.ssm, 1), (self.position, 0)):
            tensor.index_fill_(dim, index, 0)

    def clone(self) -> MambaState:
        return MambaState(self.conv.clone(), self.ssm.clone(), self.position.clone())

    def save(self, path: str | Path, *, fingerprint: str, metadata: dict[str, str] | None = None) -> None:
        """Writes a snapshot, whole or not at all; `fingerprint` names the model that can continue it (see `weights.Bundle.fingerprint`)."""
        tensors = {"conv": self.conv, "ssm": self.ssm, "position": self.position}
        with whole_file(Path(path)) as partial:
            save_tensors(tensors, partial, {"fingerprint": fingerprint, "metadata": json.dumps(metadata or {})})

    @classmethod
    def load(
        cls, path: str | Path, config: BackboneConfig, *, fingerprint: str, device: torch.device | str = "cpu"
    ) -> tuple[MambaState, dict[str, str]]:
        """The saved state and its metadata. ValueError if the file is broken or belongs to another model."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such state file")
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("conv", "ssm", "position")}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a state file ({error})") from None
        state = cls(**tensors)
        has_floats = state.conv.is_floating_point() and state.ssm.is_floating_point()
        is_state = has_floats and state.position.dim() == 1 and state.position.dtype is torch.int64
        try:
            metadata = json.loads(header.get("metadata", ""))
        except ValueError:
            metadata = None
        if not is_state or not isinstance(metadata, dict) or "fingerprint" not in header:
            raise ValueError(f"{path}: not a state file (its header or tensors are not those of a state)")
        if header["fingerprint"] != fingerprint:
            raise ValueError(f"{path}: saved by another model (fingerprint {header['fingerprint']}, this model has {fingerprint})")
        expected = cls.zeros(config, state.num_slots, device="meta")
        if state.conv.shape != expected.conv.shape or state.ssm.shape != expected.ssm.shape:
            raise ValueError(f"{path}: state of shape {tuple(state.ssm.shape)}, this model needs {tuple(expected.ssm.shape)}")
        return state, metadata
