"""The command as a process: signals, exit codes, a port that is taken."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from omnimamba.engine.engine import Engine
from omnimamba.server.listen import listen

from .conftest import MODEL


@pytest.fixture
def start(new_omni, tmp_path):
    """Starts `omnimamba serve` on a free port, with code that runs before it; gives the process and its URL."""
    folder = tmp_path / MODEL
    new_omni().save_pretrained(folder)
    processes = []

    def start(*args, before=""):
        code = f"import sys; {before}\nfrom omnimamba.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "serve", "--model", str(folder), "--port", "0", "--no-page", *args]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        processes.append(process)
        line = process.stdout.readline()
        assert line.startswith(f"{MODEL} is served at http://127.0.0.1:"), line + process.stderr.read()
        return process, line.split()[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


SLOW = "import time; from omnimamba.engine.engine import Engine; step = Engine.step; Engine.step = lambda e: (time.sleep(0.02), step(e))[1]"


def test_sigterm_lets_answers_end(start):
    process, url = start(before=SLOW)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    message = {"role": "user", "content": "Hi"}
    stream = client.chat.completions.create(
        model=MODEL, messages=[message], max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = iter(stream)
    next(chunks)
    whole = {}
    other = threading.Thread(target=lambda: whole.update(found=client.images.generate(model=MODEL, prompt="zoo")))
    other.start()
    for _ in range(3):
        next(chunks)
    process.send_signal(signal.SIGTERM)
    assert list(chunks)[-1].usage.completion_tokens == 60
    other.join(30)
    assert whole["found"].data[0].b64_json
    assert process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_draining_has_an_end(new_omni, serve, monkeypatch):
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(0.3), step(engine))[1])
    with serve(new_omni(), drain_seconds=1) as running:
        message = {"role": "user", "content": "Hi"}
        stream = iter(running.client.chat.completions.create(model=MODEL, messages=[message], stream=True))
        next(stream)
        began = time.monotonic()
        running.server.should_exit = True
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    assert time.monotonic() - began < 10


LOST = """
from omnimamba.engine.engine import Engine
step = Engine.step
def lost(engine):
    if engine._num_submitted > {num_good}:
        raise RuntimeError("device lost")
    return step(engine)
Engine.step = lost
"""


def test_an_engine_that_fails_at_the_start_ends_the_process(new_omni, tmp_path):
    new_omni().save_pretrained(tmp_path / MODEL)
    code = LOST.format(num_good=0) + "import sys\nfrom omnimamba.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", "--model", tmp_path / MODEL, "--port", "0", "--no-page"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode in (1, 3)  # 3 is that of uvicorn, which from some version on ends the process itself
    assert "served at" not in result.stdout and "device lost" in result.stderr


def test_a_lost_engine_ends_the_process(start):
    process, url = start(before=LOST.format(num_good=2))  # those of the warm-up
    response = httpx.post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}, timeout=30)
    assert response.status_code == 503
    assert process.wait(30) == 1
    assert "device lost" in process.stderr.read()


def test_addresses_that_cannot_be_had():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for host, port in (("127.0.0.1", taken.getsockname()[1]), ("no-such-host.invalid", 8000), ("a" * 64, 8000)):
            with pytest.raises(ValueError, match=f"cannot listen on {host} port {port}: .*; choose another --host or --port"):
                listen(host, port)


def test_a_port_that_is_taken(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "omnimamba.cli", "serve", "--port", str(taken.getsockname()[1])]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "cannot listen on 127.0.0.1 port" in result.stderr and "choose another" in result.stderr
