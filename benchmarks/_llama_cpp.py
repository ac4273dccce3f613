"""A Mamba-2 language model of random weights for llama.cpp (llama-cpp-python and gguf, which are not among our dependencies)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from omnimamba.config import BackboneConfig

STD = 0.02
TOKEN_ID = 7


def write_model(path: Path, config: BackboneConfig, vocab_size: int, kind: str) -> None:
    """A GGUF file whose matrices are quantised as `kind`, e.g. Q8_0 or Q4_0; every block has the same numbers."""
    import gguf  # pyright: ignore[reportMissingImports]

    writer = gguf.GGUFWriter(path, "mamba2")
    quantization = gguf.GGMLQuantizationType[kind]
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    writer.add_ssm_time_step_rank(config.nheads)
    writer.add_ssm_group_count(config.ngroups)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Any:
        return gguf.quants.quantize(rng.standard_normal((rows, columns), dtype=np.float32) * STD, quantization)

    def numbers(*shape: int) -> Any:
        return rng.random(shape, dtype=np.float32)

    d_in_proj = config.d_in_proj
    block = {
        "attn_norm.weight": numbers(config.d_model),
        "ssm_in.weight": matrix(d_in_proj, config.d_model),
        "ssm_conv1d.weight": numbers(config.conv_dim, config.d_conv) * STD,
        "ssm_conv1d.bias": numbers(config.conv_dim) * STD,
        "ssm_dt.bias": numbers(config.nheads),
        "ssm_a": -numbers(config.nheads, 1),
        "ssm_d": numbers(config.nheads, 1),
        "ssm_norm.weight": numbers(config.ngroups, config.d_inner // config.ngroups),
        "ssm_out.weight": matrix(config.d_model, config.d_inner),
    }
    quantised = {"ssm_in.weight", "ssm_out.weight"}
    writer.add_tensor("token_embd.weight", matrix(vocab_size, config.d_model), raw_dtype=quantization)
    writer.add_tensor("output_norm.weight", numbers(config.d_model))
    for i in range(config.n_layer):
        for name, tensor in block.items():
            writer.add_tensor(f"blk.{i}.{name}", tensor, raw_dtype=quantization if name in quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokens_per_second(path: Path, num_tokens: int, repeats: int, num_threads: int) -> float:
    """Of decoding: the best of `repeats` runs of num_tokens, after one that is not counted.

    Prompts are not timed: on a CPU with AMX, llama.cpp's kernels for them crashed with these files (llama-cpp-python 0.3).
    """
    import llama_cpp  # pyright: ignore[reportMissingImports]

    model = llama_cpp.Llama(
        str(path), n_ctx=(repeats + 1) * num_tokens + 1, n_threads=num_threads, n_threads_batch=num_threads, verbose=False
    )
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(num_tokens):
            model.eval([TOKEN_ID])
        times.append(time.perf_counter() - start)
    model.close()
    return num_tokens / min(times[1:])
