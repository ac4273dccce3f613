"""Puts a server under load and checks every answer: many mixed requests at once, of which a part of the clients hangs up midway.

    python benchmarks/load.py --json out.json

Starts `omnimamba serve` as a process of its own (or, with --preset, a server of random weights of that shape) and talks to it over
loopback. Four parts, each printed and in the JSON on the last line:

- load: --requests at once, questions about images and captions, streamed and not, --hang-up of the clients leave midway. Every answer
  that was completed must be the one that the offline API gives alone (greedy), and slots and memory must return. On a GPU, or in another
  type than float32, batches of different sizes round differently: there, answers that differ are only counted.
- queue: more requests than may wait; those sent away must have status 429 and a Retry-After.
- throughput: --concurrency requests at once, as many as there are slots, half of them captions: tokens and images per second, of the
  server and of the offline engine on the same requests in turn.
- first token: of a question about a new image, and about one that was asked about before.

Exit code 1 if a check fails.
"""

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from _report import add_json_option, begin, finish
from PIL import Image, ImageDraw

from omnimamba.config import Task, preset
from omnimamba.data.prepare import train_text_tokenizer
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.server.config import MIB, ServerConfig

QUESTIONS = ("What is this?", "Is it red?", "Describe the drawing.", "What colour is it?")
CAPTIONS = ("red apple", "yellow star", "green frog", "smiling face with sunglasses", "blue fish", "black cat")
MAX_TOKENS = 24
MAX_GROWTH = 64 * MIB
"""Of the server's memory over the load, prefix snapshots apart: what an allocator may keep."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One request: a caption, or a question about a drawing."""

    caption: str | None
    image_idx: int
    question: str
    stream: bool = False
    guidance_scale: float = 2.0
    leave_after: float | None = None
    """When the client hangs up: after so many seconds, or of a stream after one to three events. None: it stays."""

    @property
    def key(self) -> tuple[str | None, int, str]:
        return self.caption, self.image_idx, self.question


# ---- the server


def random_model(name: str, folder: Path, num_slots: int, device: str, dtype: str) -> OmniMamba:
    """A model of a preset's shape with random weights, whose tokenizer has an id per byte."""
    train_text_tokenizer((), 257).save(str(folder / "tokenizer.json"))
    config = dataclasses.replace(preset(name), base_vocab_size=257, eos_id=0)
    return OmniMamba.from_config(config, tokenizer_file=folder / "tokenizer.json", num_slots=num_slots, device=device, dtype=dtype)


def load_model(arguments: argparse.Namespace, folder: Path) -> OmniMamba:
    num_slots, device, dtype = arguments.concurrency, arguments.device, arguments.dtype
    if arguments.preset:
        return random_model(arguments.preset, folder, num_slots, device, dtype)
    return OmniMamba.from_pretrained(arguments.model, num_slots=num_slots, device=device, dtype=dtype)


def serve(arguments: argparse.Namespace) -> int:
    """The other process: what `omnimamba serve --no-page --port 0` does, with the model of these arguments."""
    from omnimamba.server.engine_thread import aside
    from omnimamba.server.listen import listen
    from omnimamba.server.run import Server

    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(max_waiting=arguments.max_waiting)
        omni = aside(lambda: load_model(arguments, Path(folder)))
        return Server(omni, config, "load", with_page=False).run_on(listen("127.0.0.1", 0))


def start_server(arguments: list[str]) -> tuple[subprocess.Popen, str]:
    """The process and its URL."""
    process = subprocess.Popen([sys.executable, __file__, "--serve", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if "is served at" not in line:
        raise SystemExit("the server did not start")
    return process, line.split()[-1]


def resident_bytes(pid: int) -> int:
    """Linux only; 0 elsewhere."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def cpu_seconds(pid: int) -> float:
    """Linux only; 0 elsewhere."""
    stat = Path(f"/proc/{pid}/stat")
    fields = stat.read_text().rsplit(")", 1)[1].split() if stat.exists() else ["0"] * 13
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def metric(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))


# ---- requests


def drawing(image_idx: int) -> bytes:
    """A PNG file; each has other shapes."""
    generator = np.random.default_rng(image_idx)
    image = Image.new("RGB", (160, 160), "white")
    for _ in range(4):
        left, top = generator.integers(0, 110, 2).tolist()
        colour = tuple(generator.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((left, top, left + 50, top + 50), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def mixed_calls(num: int, share_of_hang_ups: float, seed: int) -> list[Call]:
    """Three questions to one caption; half of all streamed."""
    generator, calls = random.Random(seed), []
    for i in range(num):
        caption = generator.choice(CAPTIONS) if i % 4 == 0 else None
        leave_after = generator.random() if generator.random() < share_of_hang_ups else None
        image_idx = 0 if caption else generator.randrange(8)
        question = "" if caption else generator.choice(QUESTIONS)
        calls.append(Call(caption, image_idx, question, generator.random() < 0.5, leave_after=leave_after))
    return calls


def path_and_body(call: Call) -> tuple[str, dict[str, Any]]:
    if call.caption is not None:
        body = {"model": "load", "prompt": call.caption, "temperature": 0, "guidance_scale": call.guidance_scale, "stream": call.stream}
        return "/v1/images/generations", body | ({"partial_images": 1} if call.stream else {})
    url = f"data:image/png;base64,{base64.b64encode(drawing(call.image_idx)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": call.question}]
    body = {"model": "load", "messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, "stream": call.stream}
    return "/v1/chat/completions", body


async def send(client: httpx.AsyncClient, call: Call) -> tuple[str | None, float, float]:
    """(what was answered, seconds to the end, seconds to the first event); None for a client that hung up."""
    path, body = path_and_body(call)
    began = time.perf_counter()
    if not call.stream:
        try:
            async with asyncio.timeout(call.leave_after):
                response = await client.post(path, json=body)
        except TimeoutError:
            return None, 0.0, 0.0
        response.raise_for_status()
        seconds = time.perf_counter() - began
        found = response.json()
        answer = found["data"][0]["b64_json"] if call.caption is not None else found["choices"][0]["message"]["content"]
        return answer, seconds, seconds
    first, answer, num_events = 0.0, "", 0
    async with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            first = first or time.perf_counter() - began
            num_events += 1
            if call.leave_after is not None and (call.caption is not None or num_events > 3 * call.leave_after):
                return None, 0.0, 0.0
            answer = event["b64_json"] if call.caption is not None else answer + (event["choices"][0]["delta"].get("content") or "")
    return answer, time.perf_counter() - began, first


def offline_answer(omni: OmniMamba, call: Call) -> str | bytes:
    """What the offline API says to it alone: a text, or the pixels of an image."""
    if call.caption is not None:
        return omni.generate_image(call.caption, temperature=0, guidance_scale=2.0, top_p=1.0)[0].tobytes()
    answer = omni.describe(drawing(call.image_idx), call.question, max_new_tokens=MAX_TOKENS)
    assert isinstance(answer, str)
    return answer


def content(call: Call, answer: str) -> str | bytes:
    """Of a served answer, what `offline_answer` gives."""
    return answer if call.caption is None else Image.open(io.BytesIO(base64.b64decode(answer))).tobytes()


# ---- the parts


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 3) for p in (50, 99)}


async def under_load(client: httpx.AsyncClient, process: subprocess.Popen, omni: OmniMamba, calls: list[Call]) -> dict[str, Any]:
    await asyncio.gather(*(send(client, call) for call in calls))  # what an allocator takes for good
    await settled(client)
    before, cached = resident_bytes(process.pid), await metric(client, "omnimamba_prefix_cache_bytes")
    began = time.perf_counter()
    results = await asyncio.gather(*(send(client, call) for call in calls))
    seconds = time.perf_counter() - began
    await settled(client)
    growth = resident_bytes(process.pid) - before - (await metric(client, "omnimamba_prefix_cache_bytes") - cached)
    expected = {call.key: call for call in calls}
    answers = {key: offline_answer(omni, call) for key, call in expected.items()}
    finished = [(call, answer, *times) for call, (answer, *times) in zip(calls, results, strict=True) if answer is not None]
    is_exact = omni.device.type == "cpu" and omni.bundle.model.dtype == torch.float32
    wrong = [call for call, answer, *_ in finished if content(call, answer) != answers[call.key]]
    return {
        "requests": len(calls),
        "hung up": len(calls) - len(finished),
        "finished": len(finished),
        "wrong answers": len(wrong),
        "seconds": round(seconds, 1),
        "question seconds": percentiles([took for call, _, took, _ in finished if call.caption is None]),
        "image seconds": percentiles([took for call, _, took, _ in finished if call.caption is not None]),
        "first event seconds": percentiles([first for call, _, _, first in finished if call.stream]),
        "memory growth MiB": round(growth / MIB, 1),
        "ok": (not wrong or not is_exact) and (growth < MAX_GROWTH or omni.device.type != "cpu"),  # graphs recorded under load stay
    }


async def settled(client: httpx.AsyncClient) -> None:
    """Waits until no slot is taken and nobody waits. AssertionError if that does not come."""
    for _ in range(1200):
        figures = (await client.get("/health")).json()
        if figures["slots_in_use"] == figures["waiting_requests"] == 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"slots stay taken: {figures}")


async def overfull_queue(client: httpx.AsyncClient, num_allowed: int) -> dict[str, Any]:
    """Twice as many images at once as the server has slots and places in its queue."""
    num = 2 * num_allowed
    body = {"model": "load", "prompt": CAPTIONS[0], "guidance_scale": 1.0}
    responses = await asyncio.gather(*(client.post("/v1/images/generations", json=body) for _ in range(num)))
    refused = [response for response in responses if response.status_code == 429]
    await settled(client)
    is_clear = all(int(response.headers["retry-after"]) >= 1 and response.json()["error"]["code"] == "queue_full" for response in refused)
    answered = sum(response.status_code == 200 for response in responses)
    return {
        "requests": num,
        "answered": answered,
        "refused": len(refused),
        "ok": bool(refused) and is_clear and answered >= num_allowed and answered + len(refused) == num,
    }


async def throughput(
    client: httpx.AsyncClient, process: subprocess.Popen, omni: OmniMamba, concurrency: int, repeats: int
) -> dict[str, Any]:
    """Rates for as many requests at once as there are slots, half of them captions; of several rounds the one of most tokens per second.

    CPU milliseconds per token tell the server's own cost from what other programs take of a busy machine.
    """
    served, offline, served_ms, offline_ms = (0.0, 0.0), (0.0, 0.0), math.inf, math.inf
    for repeat in range(repeats):
        images = range(1000 + concurrency * repeat, 1000 + concurrency * (repeat + 1))  # all new: neither side finds a snapshot
        calls = [
            Call(CAPTIONS[i % 6], 0, "", guidance_scale=1.0) if i % 2 == 0 else Call(None, i, QUESTIONS[i % 4], stream=i % 4 == 1)
            for i in images
        ]
        num_images = sum(call.caption is not None for call in calls)
        before, began, cpu = await num_tokens(client), time.perf_counter(), cpu_seconds(process.pid)
        await asyncio.gather(*(send(client, call) for call in calls))
        num = await num_tokens(client) - before
        seconds = time.perf_counter() - began
        served = max(served, (num / seconds, num_images / seconds))
        served_ms = min(served_ms, 1000 * (cpu_seconds(process.pid) - cpu) / num)
        began, cpu = time.perf_counter(), time.process_time()
        num = run_offline(omni, calls)
        seconds = time.perf_counter() - began
        offline = max(offline, (num / seconds, num_images / seconds))
        offline_ms = min(offline_ms, 1000 * (time.process_time() - cpu) / num)
    return {
        "served tokens/s": round(served[0]),
        "offline tokens/s": round(offline[0]),
        "share": round(served[0] / offline[0], 3),
        "served images/s": round(served[1], 3),
        "offline images/s": round(offline[1], 3),
        "served CPU ms/token": round(served_ms, 2),
        "offline CPU ms/token": round(offline_ms, 2),
    }


async def num_tokens(client: httpx.AsyncClient) -> float:
    text = (await client.get("/metrics")).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("omnimamba_tokens_total{"))


def run_offline(omni: OmniMamba, calls: list[Call]) -> int:
    """The number of tokens of all answers, with images read and painted as the server does."""
    questions = [call for call in calls if call.caption is None]
    features = omni.encode_image([drawing(call.image_idx) for call in questions])
    greedy = SamplingParams(temperature=0, max_new_tokens=MAX_TOKENS)
    unguided = SamplingParams(temperature=0)
    ids = [omni.first_turns([("user", call.question)]) for call in questions]
    requests = [Request(Task.MMU, prompt, row, sampling=greedy) for prompt, row in zip(ids, features, strict=True)]
    requests += [omni.paint_request(call.caption, unguided, 1) for call in calls if call.caption is not None]
    tokens = [samples[0].tokens for samples in omni.engine.run(requests)]
    omni.paint(tokens[len(questions) :])
    return sum(map(len, tokens))


async def first_token(client: httpx.AsyncClient, repeats: int = 10) -> dict[str, Any]:
    """Median seconds from a question to the first event, one client alone."""
    new, known = [], []
    for i in range(repeats):
        for seconds, question in ((new, QUESTIONS[0]), (known, QUESTIONS[1])):
            seconds.append((await send(client, Call(None, 5000 + i, question, stream=True)))[2])
    figures = {"new image": statistics.median(new), "known image": statistics.median(known)}
    return {name: round(seconds, 4) for name, seconds in figures.items()} | {
        "ratio": round(figures["new image"] / figures["known image"], 2)
    }


async def run(arguments: argparse.Namespace, omni: OmniMamba, process: subprocess.Popen, url: str) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        report = {}
        for name, part in (
            ("load", lambda: under_load(client, process, omni, mixed_calls(arguments.requests, arguments.hang_up, seed=0))),
            ("queue", lambda: overfull_queue(client, arguments.max_waiting + arguments.concurrency)),
            ("throughput", lambda: throughput(client, process, omni, arguments.concurrency, arguments.repeats)),
            ("first token seconds", lambda: first_token(client)),
        ):
            report[name] = await part()
            print(f"{name}: {report[name]}", flush=True)
        return report


def main() -> int:
    parser = argparse.ArgumentParser(description="A server under load, its answers checked.")
    add_json_option(parser)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--preset", help="serve random weights of this shape instead, e.g. 1.3b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--hang-up", type=float, default=0.3, metavar="SHARE")
    parser.add_argument("--concurrency", type=int, default=32, help="requests of the throughput part, and slots")
    parser.add_argument("--max-waiting", type=int, default=256, help="places in the server's queue")
    parser.add_argument("--repeats", type=int, default=3, help="of the throughput part")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments)
    process, url = start_server(sys.argv[1:])
    try:
        with tempfile.TemporaryDirectory() as folder:
            omni = load_model(arguments, Path(folder))
            report = begin(omni.device.type, model=arguments.preset or arguments.model, dtype=arguments.dtype)
            report |= asyncio.run(run(arguments, omni, process, url))
    finally:
        process.terminate()
        report_code = process.wait(120)
    is_ok = report["load"]["ok"] and report["queue"]["ok"] and report_code == 0
    finish(report, arguments.json)
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
