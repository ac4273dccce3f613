"""The OpenAPI description: what the server answers is what it says, and what it says is taken."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from omnimamba.server import schema
from omnimamba.server.config import ServerConfig

from .conftest import MODEL

SECONDS = 15
NEEDS_MEANING = "positive_data_acceptance"
"""A check for APIs whose description says all: ours cannot say that roles alternate, or which text is no caption."""


def test_every_answer_is_that_of_the_description(http):
    """Keys and types; a key that the description does not have would be lost on the way through it."""

    def is_a(kind, value):
        return TypeAdapter(kind).validate_python(value, strict=True) == value

    message = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    for body in (message, message | {"n": 2, "keep_state": True}):
        answer = http.post("/v1/chat/completions", json=body).json()
        assert is_a(schema.ChatCompletion, answer)
    state_id = answer["choices"][0]["state_id"]
    for options in ({}, {"stream_options": {"include_usage": True}}, {"keep_state": True}):
        assert all(is_a(schema.ChatChunk, chunk) for chunk in events(http, "/v1/chat/completions", message | options))
    caption = {"prompt": "zoo", "seed": 0}
    assert is_a(schema.Images, http.post("/v1/images/generations", json=caption | {"n": 2}).json())
    *partial, completed = events(http, "/v1/images/generations", caption | {"partial_images": 2})
    assert len(partial) == 2 and all(is_a(schema.PartialImage, event) for event in partial) and is_a(schema.CompletedImage, completed)
    assert is_a(schema.ModelList, http.get("/v1/models").json())
    assert is_a(schema.ServedModel, http.get(f"/v1/models/{MODEL}").json())
    assert is_a(schema.Health, http.get("/health").json())
    file = http.get(f"/v1/states/{state_id}").content
    kept = http.post("/v1/states", content=file).json()
    assert is_a(schema.KeptState, kept)
    assert is_a(schema.DeletedState, http.delete(f"/v1/states/{kept['id']}").json())
    for response in (http.get("/v1/nothing"), http.delete("/v1/models"), http.post("/v1/chat/completions", json={})):
        assert is_a(schema.ErrorBody, response.json())


def events(http, path, body):
    with http.stream("POST", path, json=body | {"stream": True}) as response:
        return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: {")]


def test_the_description_names_every_route_and_error(http):
    description = http.get("/v1/openapi.json").json()
    routes = {(path, method) for path, methods in description["paths"].items() for method in methods}
    assert routes == {
        ("/v1/chat/completions", "post"),
        ("/v1/images/generations", "post"),
        ("/v1/models", "get"),
        ("/v1/models/{name}", "get"),
        ("/v1/states", "post"),
        ("/v1/states/{state_id}", "get"),
        ("/v1/states/{state_id}", "delete"),
        ("/health", "get"),
        ("/metrics", "get"),
    }
    for path, method in routes:
        responses = description["paths"][path][method]["responses"]
        assert all(response["content"] for response in responses.values())
        if path.startswith("/v1/"):
            assert set(responses) == {"200", "4XX", "5XX"}
    properties = description["components"]["schemas"]["ChatRequest"]["properties"]
    assert properties["temperature"]["description"].startswith("0, the most probable token")


def test_the_description_says_that_a_key_is_needed(new_omni, serve):
    with serve(new_omni(), ServerConfig(api_key="secret")) as running:
        description = running.http.get("/v1/openapi.json").json()
    assert description["paths"]["/v1/models"]["get"]["security"] and "security" not in description["paths"]["/health"]["get"]
    assert description["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None and os.environ.get("CI") != "true", reason="needs `pip install schemathesis`"
)
def test_schemathesis(served, http, tmp_path):
    """Thousands of requests, good and bad, made from the description by a program that others wrote."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/v1/openapi.json"]
    limits = ["--max-time", str(SECONDS), "--seed", "0", "--phases", "coverage,fuzzing", "--request-timeout", "30", "--no-color"]
    checks = ["--checks", "all", "--exclude-checks", NEEDS_MEANING, "--warnings", "off"]
    result = subprocess.run([*command, *limits, *checks], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
