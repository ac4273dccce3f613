"""Routes, keys, limits, hang-ups, failures: what a server must do whatever it is asked."""

import asyncio
import concurrent.futures
import json
import logging
import socket
import threading
import time

import openai
import pytest

from omnimamba.server import service as service_module
from omnimamba.server.app import create_api
from omnimamba.server.config import ServerConfig

from .conftest import MODEL, about, data_url, drawing


def is_openai_error(response):
    error = response.json()["error"]
    return set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str) and response.status_code >= 400


def chat_body(text="Hi", **options):
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **options}


def metric(http, name):
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


# ---- routes


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "omnimamba"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/images/edits", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("POST", "/metrics", 405),
        ("GET", "/docs", 404),
        ("HEAD", "/v1/images/generations", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
    ],
)
def test_wrong_routes(http, method, path, status):
    response = http.request(method, path)
    assert response.status_code == status and (method == "HEAD" or is_openai_error(response))
    assert status != 405 or response.headers["allow"]


def test_head_is_get_without_a_body(http):
    for path in ("/health", "/v1/models", f"/v1/models/{MODEL}", "/metrics"):
        response = http.head(path)
        assert response.status_code == 200 and response.content == b"" and int(response.headers["content-length"]) > 10


def test_allow_names_all_methods_of_a_path(http):
    assert http.post("/v1/states/some").headers["allow"] == "DELETE, GET"


def test_a_body_where_none_belongs_is_not_read(new_omni, serve):
    with serve(new_omni(), ServerConfig(max_body_bytes=1000)) as running:
        assert running.http.request("GET", "/v1/models", content=b"a" * 5000).status_code == 200


def test_scripts_of_other_pages(new_omni, serve):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with serve(new_omni(), ServerConfig(api_key="secret", cors_origins=("https://a.example",))) as running:
        response = running.http.options("/v1/chat/completions", headers=asked | {"Authorization": ""})  # browsers ask without the key
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in response.headers["access-control-allow-headers"].lower()
        for headers, status in (({"Origin": "https://a.example"}, 200), ({"Origin": "https://a.example", "Authorization": ""}, 401)):
            response = running.http.get("/v1/models", headers=headers)
            assert response.status_code == status and response.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in running.http.get("/v1/models", headers={"Origin": "https://b.example"}).headers
    for origin in ("a.example", "https://a.example/", ""):
        with pytest.raises(ValueError, match="is no origin; pass one such as"):
            ServerConfig(cors_origins=(origin,))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/images/generations"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"{}", b"1" * 10_000, b"\0"]
)
def test_bodies_that_are_no_request(http, path, content):
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and is_openai_error(response)


@pytest.mark.parametrize("kind", [None, "text/plain", "multipart/form-data; boundary=x"])
def test_bodies_of_another_type(http, kind):
    response = http.post("/v1/chat/completions", content=json.dumps(chat_body()), headers={"Content-Type": kind} if kind else {})
    assert response.status_code == 400 and is_openai_error(response)


def test_lone_surrogates(http):
    for body in (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "tiny", "\\ud800": 1, "messages": [{"role": "user", "content": "a"}]}',
    ):
        response = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code in (400, 404) and is_openai_error(response)


def test_health(served, http):
    response = http.get("/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok", "model": MODEL, "device": "cpu", "slots": 8, "slots_in_use": 0, "waiting_requests": 0
    }  # fmt: skip


def test_metrics(http, client):
    names = ["omnimamba_tokens_total", "omnimamba_images_total", "omnimamba_requests_total", "omnimamba_time_to_first_token_seconds_count"]
    before = {name: metric(http, name) for name in names}
    client.chat.completions.create(**chat_body(max_tokens=7))
    client.images.generate(model=MODEL, prompt="zoo", n=2)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**chat_body() | {"model": "other"})
    gained = {name: metric(http, name) - before[name] for name in names}
    num_image_tokens = 2 * client.images.generate(model=MODEL, prompt="zoo").usage.output_tokens
    assert gained["omnimamba_tokens_total"] == 7 + num_image_tokens
    assert gained["omnimamba_images_total"] == 2 and gained["omnimamba_time_to_first_token_seconds_count"] == 2
    assert 3 <= gained["omnimamba_requests_total"] <= 9  # and the reading of the metrics themselves
    text = http.get("/metrics").text
    for name in ("slots", "slots_in_use", "waiting_requests", "tokens_per_second", "prefix_cache_hits_total", "prefix_cache_bytes"):
        assert f"\nomnimamba_{name} " in text
    assert 'path="other",status="404"' not in text or "/v1/nothing" not in text
    assert http.get("/metrics").headers["content-type"].startswith("text/plain")


# ---- keys and limits


@pytest.mark.parametrize("key", ["secret\n", " secret", "schl\u00fcssel", "a\tb"])
def test_keys_that_no_client_could_send(key):
    with pytest.raises(ValueError, match="the API key has white space around it, or characters"):
        ServerConfig(api_key=key)


def test_api_key(new_omni, serve):
    with serve(new_omni(), ServerConfig(api_key="secret")) as running:
        assert running.client.chat.completions.create(**chat_body(max_tokens=2)).usage.completion_tokens == 2
        for headers in (
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer \xff"},
            {"Authorization": ""},
        ):
            for response in (
                running.http.post("/v1/chat/completions", json=chat_body(), headers={k: v.encode("latin-1") for k, v in headers.items()}),
                running.http.get("/v1/nothing", headers={k: v.encode("latin-1") for k, v in headers.items()}),
            ):
                assert response.status_code == 401 and is_openai_error(response)
        assert running.http.get("/health", headers={"Authorization": ""}).status_code == 200


def test_large_bodies(new_omni, serve):
    with serve(new_omni(), ServerConfig(max_body_bytes=1000)) as running:
        response = running.http.post("/v1/chat/completions", json=chat_body("a" * 2000))
        assert response.status_code == 413 and is_openai_error(response)

        def pieces():
            for _ in range(100):
                yield b"a" * 100

        response = running.http.post("/v1/chat/completions", content=pieces(), headers={"Content-Type": "application/json"})
        assert response.status_code == 413 and is_openai_error(response)


def test_refusals_before_the_body_reach_clients_that_still_send_it(new_omni, serve):
    """Large bodies in many pieces: a connection closed too early would be a broken pipe to the client."""
    body = json.dumps(chat_body("a" * 3_000_000)).encode()

    def pieces():
        for start in range(0, len(body), 50_000):
            yield body[start : start + 50_000]

    headers = {"Content-Type": "application/json"}
    with serve(new_omni(), ServerConfig(api_key="secret")) as running:
        for _ in range(5):
            response = running.http.post("/v1/chat/completions", content=pieces(), headers=headers | {"Authorization": "Bearer wrong"})
            assert response.status_code == 401
    with serve(new_omni(), ServerConfig(max_body_bytes=2_000_000)) as running:
        response = running.http.post("/v1/chat/completions", content=body, headers=headers)
        assert response.status_code == 413


def test_large_pictures(new_omni, serve):
    with serve(new_omni(), ServerConfig(max_image_pixels=1199)) as running:
        with pytest.raises(openai.BadRequestError, match="40x30 pixels, the limit is 1199") as error:
            running.client.chat.completions.create(model=MODEL, messages=[about(data_url(drawing()), "What?")])
        assert error.value.code == "image_too_large"


def test_slow_bodies(new_omni, serve):
    with serve(new_omni(), ServerConfig(body_seconds=0.3)) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 408") and b'"code": "body_timeout"' in answer


def test_answers_that_take_too_long(new_omni, serve, monkeypatch):
    with serve(new_omni(), ServerConfig(request_seconds=0.05)) as running:
        engine = running.server.service.engine
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1])
        response = running.http.post("/v1/images/generations", json={"prompt": "zoo", "n": 8, "guidance_scale": 2.0})
        assert response.status_code == 504 and is_openai_error(response)
        running.settle()


def test_a_full_queue(new_omni, serve):
    """2 run, 2 wait, the others are sent away with a time to come again."""
    with serve(new_omni(num_slots=2), ServerConfig(max_waiting=2)) as running, concurrent.futures.ThreadPoolExecutor(12) as pool:
        hold, posted = threading.Event(), running.server.service.thread.post
        posted(hold.wait)
        body = chat_body(max_tokens=5)
        futures = [pool.submit(running.http.post, "/v1/chat/completions", json=body) for _ in range(12)]
        concurrent.futures.wait(futures, timeout=20, return_when=concurrent.futures.FIRST_COMPLETED)
        time.sleep(0.3)
        hold.set()
        responses = [future.result() for future in futures]
        statuses = [response.status_code for response in responses]
        assert statuses.count(200) == 4 and statuses.count(429) == 8
        for response in responses:
            if response.status_code == 429:
                assert is_openai_error(response) and 1 <= int(response.headers["retry-after"]) <= 60
        assert len({response.json()["choices"][0]["message"]["content"] for response in responses if response.status_code == 200}) == 1
        running.settle()
        assert running.http.post("/v1/chat/completions", json=body).status_code == 200


# ---- hang-ups


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/images/generations"])
def test_hanging_up_frees_the_slots(served, http, path, stream):
    before = metric(http, "omnimamba_cancelled_total")
    body = chat_body(n=4) if "chat" in path else {"prompt": "zoo", "n": 1 if stream else 4}
    content = json.dumps(body | {"stream": stream}).encode()
    host, port = served.url.removeprefix("http://").split(":")
    hold = threading.Event()
    with socket.create_connection((host, int(port))) as connection:
        header = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(header.encode() + content)
        deadline = time.monotonic() + 20
        while not served.engine.has_work:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        served.server.service.thread.post(lambda: hold.wait(20))
    time.sleep(0.2)
    hold.set()
    served.settle()
    assert metric(http, "omnimamba_cancelled_total") == before + 1


def test_a_client_that_does_not_read_on_is_dropped(new_omni, caplog):
    """Its place in the queue is free again, and so are its slots."""
    service = service_module.Service(new_omni(), ServerConfig(send_seconds=0.2))
    api = create_api(service, MODEL)
    content, sent = json.dumps(chat_body(stream=True)).encode(), []
    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": headers,
        "query_string": b"",
        "http_version": "1.1",
    }
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        if len(sent) > 3:
            await asyncio.Event().wait()

    async def call():
        async with api.router.lifespan_context(api):
            await asyncio.wait_for(api(scope, receive, send), 20)
            deadline = time.monotonic() + 20
            while service.engine.has_work:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)

    asyncio.run(call())
    assert len(sent) == 4 and "did not read on for 0.2 s" in caplog.text


def test_a_client_that_reads_slowly_does_not_hold_up_others(served, client):
    with client.chat.completions.create(**chat_body(stream=True)) as stream:
        next(iter(stream))
        for _ in range(3):
            assert client.chat.completions.create(**chat_body(max_tokens=5)).usage.completion_tokens == 5


# ---- failures


@pytest.fixture
def quiet(caplog):
    caplog.set_level(logging.CRITICAL + 1, logger="omnimamba")


def break_once(owner, name, monkeypatch):
    method = getattr(owner, name)

    def broken(*args, **options):
        monkeypatch.setattr(owner, name, method)
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_failed_step_fails_its_requests_only(new_omni, serve, monkeypatch, quiet, stream, name):
    with serve(new_omni()) as running:
        expected = running.client.chat.completions.create(**chat_body(max_tokens=9)).choices[0].message.content
        break_once(running.engine.runner, name, monkeypatch)
        with pytest.raises(openai.APIError, match="the engine failed on this request") as error:
            found = running.client.chat.completions.create(**chat_body("Other", max_tokens=9, stream=stream))
            list(found)
        assert error.value.code == "engine_failed"
        assert stream and name == "decode" or error.value.status_code == 500
        running.settle()
        assert running.client.chat.completions.create(**chat_body(max_tokens=9)).choices[0].message.content == expected
        assert running.http.get("/health").status_code == 200


def test_a_lost_engine_ends_the_server(new_omni, serve, monkeypatch, quiet):
    with serve(new_omni()) as running:

        def lost():
            raise RuntimeError("device lost")

        monkeypatch.setattr(running.engine, "step", lost)
        response = running.http.post("/v1/chat/completions", json=chat_body())
        assert response.status_code == 503 and is_openai_error(response)
        assert running.server.should_exit and isinstance(running.server.service.thread.failure, RuntimeError)


def test_a_step_that_never_ends_is_unhealthy(new_omni, serve, monkeypatch):
    with serve(new_omni()) as running:
        monkeypatch.setattr(service_module, "STALLED_SECONDS", 0.1)
        hold = threading.Event()
        running.server.service.thread.post(lambda: hold.wait(20))
        time.sleep(0.3)
        response = running.http.get("/health")
        hold.set()
        assert response.status_code == 503 and "takes longer" in response.json()["status"]
        deadline = time.monotonic() + 20
        while running.http.get("/health").status_code != 200:
            assert time.monotonic() < deadline


def test_an_error_of_our_own_is_a_500_without_its_text(new_omni, serve, monkeypatch, quiet, caplog):
    caplog.set_level(logging.CRITICAL + 1, logger="uvicorn.error")
    with serve(new_omni()) as running:

        def broken(*args, **options):
            raise KeyError("a secret path")

        monkeypatch.setattr(running.server.service, "question", broken)
        # after an error that escapes, the HTTP server closes the connection: the client must not use it again
        response = running.http.post("/v1/chat/completions", json=chat_body(), headers={"Connection": "close"})
        assert response.status_code == 500 and is_openai_error(response) and "secret" not in response.text
        assert 'omnimamba_requests_total{path="/v1/chat/completions",status="500"} 1.0' in running.http.get("/metrics").text
