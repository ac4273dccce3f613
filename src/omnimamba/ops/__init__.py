"""Sequence operators: tensors in, tensors out. One file per operator, the plain PyTorch definition first."""

from omnimamba.ops.conv import causal_conv1d, causal_conv1d_step
from omnimamba.ops.norm import gated_rms_norm, rms_norm
from omnimamba.ops.ssd import ssd_chunk_scan, ssd_step

__all__ = ["causal_conv1d", "causal_conv1d_step", "gated_rms_norm", "rms_norm", "ssd_chunk_scan", "ssd_step"]
