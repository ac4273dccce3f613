"""What quantised weights change: logit errors and the share of positions whose most probable token stays the same.

    PYTHONPATH=src python3 benchmarks/quantization.py --json out.json

Two models: one with trained weights (nano, or --model) on its own greedy paintings and answers, and the 1.3B shape with the random
weights of initialisation, made block by block, on random text. The unquantised model in fp32 is the reference; each scheme reads the
same tokens (teacher forcing), by the path that this device takes. Free running, one changed token changes all that follow: `same` is the
share of the model's greedy outputs that come out whole as they were. A model of 8-bit storage, as the shipped nano is, loses nothing to
int8, which rounds alike. The last line on stdout is JSON.
"""

import argparse
import copy
import dataclasses
from typing import Any

import torch
from _report import add_json_option, begin, finish
from torch import Tensor, nn

from omnimamba import OmniMamba
from omnimamba.config import Quantization, Task, preset
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.model import weights
from omnimamba.model.mamba2 import Mamba2Block, RMSNorm
from omnimamba.model.omnimamba import EMBEDDING_INIT_STD
from omnimamba.model.quantize import quantize_model
from omnimamba.ops.quant import linear, quantize
from omnimamba.processor import prompt as layout

CAPTIONS = (
    "red apple", "green apple", "grinning face", "red heart", "blue heart", "house", "cat face", "dog", "sun", "umbrella with rain drops",
    "flag: Japan", "woman astronaut", "slice of pizza", "sailboat", "guitar", "books",
)  # fmt: skip
QUESTIONS = ("What is this?", "What is shown in the image?", "Is this an animal?", "Which group does it belong to?")
RANDOM_SEQUENCES, RANDOM_LENGTH = 2, 64

Figures = dict[str, float]


def compared(found: Tensor, expected: Tensor) -> Figures:
    """logits: [..., v]. Errors are relative to the spread of the expected logits of a position."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    error = (found - expected).norm(dim=-1)
    divergence = (expected.log_softmax(-1).exp() * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
    return {
        "logit error": (error / spread).square().mean().sqrt().item(),
        "divergence": divergence.mean().item(),  # nats
        "top-1": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


# ---- a trained model


def greedy(omni: OmniMamba, image: Any) -> dict[Task, list[tuple[Request, list[int]]]]:
    """Paintings of CAPTIONS and answers to QUESTIONS about the image."""
    tok, sampling = omni.tokenizer, SamplingParams(temperature=0, seed=0)
    paintings = [Request(Task.T2I, tuple(layout.t2i_prompt(tok, caption)), sampling=sampling) for caption in CAPTIONS]
    features = omni.encode_image([image])[0]
    sampling = dataclasses.replace(sampling, max_new_tokens=32)
    answers = [Request(Task.MMU, omni.first_turns([("user", text)]), features, sampling=sampling) for text in QUESTIONS]
    requests = {Task.T2I: paintings, Task.MMU: answers}
    return {
        task: [(request, samples[0].tokens) for request, samples in zip(of_task, omni.engine.run(of_task), strict=True)]
        for task, of_task in requests.items()
    }


@torch.no_grad()
def forced_logits(omni: OmniMamba, request: Request, tokens: list[int]) -> Tensor:
    """Logits [t, v] before each of the tokens, which follow the request's prompt."""
    model, runner = omni.bundle.model, omni.engine.runner
    prompt, read = runner.embed_prompt(request), torch.tensor([tokens[:-1]], device=omni.device)
    x = torch.cat([prompt, runner.embed_tokens(read, request.task).to(prompt.dtype)], 1)
    hidden = model(model.add_positions(x, request.task), request.task)
    return model.logits(hidden[:, -len(tokens) :], request.task)[0].float()


def trained(source: str, device: str) -> dict[str, dict[str, Figures]]:
    """Figures by scheme and task."""
    whole = OmniMamba.from_pretrained(source, device=device, dtype="float32")
    image = weights.locate(source) / "example.png"
    outputs = greedy(whole, image)
    figures: dict[str, dict[str, Figures]] = {}
    for scheme in Quantization:
        omni = OmniMamba.from_pretrained(source, device=device, dtype="float32", quantize=scheme)
        again = greedy(omni, image)
        figures[scheme] = {}
        for task, of_task in outputs.items():
            found = torch.cat([forced_logits(omni, *output) for output in of_task])
            expected = torch.cat([forced_logits(whole, *output) for output in of_task])
            same = [tokens == other for (_, tokens), (_, other) in zip(of_task, again[task], strict=True)]
            figures[scheme][task] = compared(found, expected) | {"same": sum(same) / len(same)}
    return figures


# ---- a shape with random weights


@torch.no_grad()
def random_shape(name: str, device: str) -> dict[str, dict[str, Figures]]:
    """Figures by scheme of the text head over a backbone with the weights of initialisation, of which one block is in memory at a time."""
    torch.manual_seed(0)
    config = preset(name)
    table = torch.randn(config.text_vocab_size, config.backbone.d_model, device=device) * EMBEDDING_INIT_STD
    quantised = {scheme: quantize(table, scheme) for scheme in Quantization}
    ids = torch.randint(config.text_vocab_size, (RANDOM_SEQUENCES, RANDOM_LENGTH), device=device)
    residuals = {None: table[ids]} | {scheme: weight.rows(ids) for scheme, weight in quantised.items()}
    for _ in range(config.backbone.n_layer):
        block = Mamba2Block(config.backbone, config.lora).to(device).eval()
        for scheme, residual in residuals.items():
            residuals[scheme] = quantized_block(block, scheme)(residual, None)
    norm = RMSNorm(config.backbone.d_model, config.backbone.norm_eps).to(device)
    expected = linear(norm(residuals[None]), table)
    return {scheme: {Task.MMU: compared(linear(norm(residuals[scheme]), quantised[scheme]), expected)} for scheme in Quantization}


def quantized_block(block: Mamba2Block, scheme: str | None) -> nn.Module:
    if scheme is None:
        return block
    named = nn.ModuleDict({"backbone": nn.ModuleDict({"layers": nn.ModuleList([copy.deepcopy(block)])})})  # names as in a model
    quantize_model(named, scheme)
    return named.get_submodule("backbone.layers.0")


def main() -> None:
    parser = argparse.ArgumentParser(description="Logit errors and greedy agreement of int8, fp8 and int4 weights.")
    add_json_option(parser)
    parser.add_argument("--model", default="nano", help="trained model, with an example.png in its folder")
    parser.add_argument("--shape", default="1.3b", help="preset whose shape is tried with random weights")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    report = begin(arguments.device)
    report["models"] = {
        arguments.model: trained(arguments.model, arguments.device),
        f"{arguments.shape}, random weights": random_shape(arguments.shape, arguments.device),
    }
    for model, of_model in report["models"].items():
        print(model)
        for scheme, tasks in of_model.items():
            for task, figures in tasks.items():
                print(f"  {scheme:5} {task:4}", *(f"{name} {value:8.4f}" for name, value in figures.items()), sep="   ")
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
