"""A tiny random model behind a real HTTP server in a thread, and the unmodified `openai` client."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import threading
import time

import httpx
import openai
import pytest
import torch
from PIL import Image

from omnimamba.config import preset
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.server.config import ServerConfig
from omnimamba.server.listen import listen
from omnimamba.server.run import Server

MODEL = "tiny"


@pytest.fixture(scope="session")
def new_omni(tokenizer_file):
    """Makes the model anew, with the same weights each time: a server and a test may not share one engine."""

    def new_omni(num_slots=8):
        config = dataclasses.replace(preset("tiny"), base_vocab_size=257, text_vocab_size=272, max_caption_tokens=24, mmu_positions=400)
        omni = OmniMamba.from_config(config, tokenizer_file=tokenizer_file, num_slots=num_slots)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for name, parameter in omni.bundle.model.named_parameters():  # else greedy answers repeat one token for ever
                if "embedding" in name or "positions" in name:
                    torch.nn.init.normal_(parameter, std=0.5)
                elif "out_proj" in name or "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.5)
        return omni

    return new_omni


@pytest.fixture(scope="session")
def omni(new_omni):
    """The offline API that the server's answers are compared with."""
    return new_omni()


@dataclasses.dataclass
class Running:
    """A server in a thread, and clients of it."""

    server: Server
    url: str
    client: openai.OpenAI
    http: httpx.Client

    @property
    def engine(self):
        return self.server.service.engine

    def settle(self):
        """Waits until nothing runs or waits any more; fails if a slot is stuck."""
        deadline = time.monotonic() + 20
        while self.engine.has_work or self.server.service.thread._inboxes:
            assert time.monotonic() < deadline, "a slot is stuck"
            time.sleep(0.01)
        assert self.engine.scheduler.free == list(range(self.engine.scheduler.num_slots))


@contextlib.contextmanager
def running(omni, config=None, *, with_page=False, drain_seconds=10):
    server = Server(omni, config or ServerConfig(), MODEL, with_page=with_page, drain_seconds=drain_seconds)
    server.capture_signals = contextlib.nullcontext  # those are for the main thread
    bound = listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server does not start"
        time.sleep(0.01)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    key = server.service.config.api_key or "none"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)
    try:
        with client, httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"}) as http:
            yield Running(server, url, client, http)
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
    assert not thread.is_alive(), "the server does not stop"


@pytest.fixture(scope="session")
def serve():
    """`with serve(omni, config) as running:`"""
    return running


@pytest.fixture(scope="session")
def served(new_omni):
    """A server for many tests, with its defaults and states."""
    with running(new_omni(), ServerConfig(state_bytes=50_000_000)) as found:
        yield found


@pytest.fixture
def client(served):
    yield served.client
    served.settle()


@pytest.fixture
def http(served):
    yield served.http
    served.settle()


def drawing(seed=0, size=(40, 30), form="PNG"):
    """The bytes of an image file."""
    generator = torch.Generator().manual_seed(seed)
    pixels = (torch.rand((size[1], size[0], 3), generator=generator) * 255).byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def about(url, text):
    """A user message of an image and a question."""
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}
