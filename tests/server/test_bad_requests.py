"""Generated bad requests: always a 4xx in OpenAI's shape, never a 500, and no slot stays taken.

The OpenAPI description says what a request may hold; hypothesis takes a good request and spoils it. Images are spoiled by bytes.
"""

import copy
import io
import json
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from .conftest import MODEL, about, data_url, drawing

NUM_BODIES, NUM_IMAGES = 250, 200  # of each of 2 endpoints, and of each of 4 formats
SETTINGS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

GOOD = {
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [about(data_url(drawing()), "What?"), {"role": "assistant", "content": "a"}, {"role": "user", "content": "Why?"}],
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.5,
        "n": 1,
        "seed": 1,
        "stop": ["a"],
        "stream": False,
    },
    "/v1/images/generations": {"model": MODEL, "prompt": "zoo", "n": 1, "size": "auto", "guidance_scale": 2.0, "seed": 1, "stream": False},
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "\0", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "data:", "http://169.254.169.254/", "a" * 30_000]
    ),
)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)), max_leaves=8
)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def spoiled(draw, good, names):
    """`good` with one to three places replaced, removed, or given another parameter of the description."""
    body = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in places(body) if path])) if isinstance(body, dict) and body else (None,)
        if last is None:
            break
        owner = body
        for key in path:
            owner = owner[key]
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "replace":
            owner[last] = draw(values)
        elif kind == "remove":
            del owner[last]
        else:
            body[draw(st.sampled_from(names))] = draw(values)
    return body


def check(served, path, body):
    """The status of a request: the answer must be a good one, or a refusal in OpenAI's shape."""
    response = served.http.post(path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    assert response.status_code == 200 or 400 <= response.status_code < 500, (response.status_code, body)
    assert "Traceback" not in response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error" and error["message"]
    return response.status_code


@pytest.mark.parametrize("path", GOOD)
def test_spoiled_bodies(served, path):
    description = served.http.get("/v1/openapi.json").json()
    schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    names = sorted(description["components"]["schemas"][schema.rsplit("/", 1)[1]]["properties"])
    assert set(GOOD[path]) <= set(names)
    assert check(served, path, GOOD[path]) == 200
    statuses = []

    @settings(SETTINGS, max_examples=NUM_BODIES)
    @given(spoiled(GOOD[path], names))
    def spoil(body):
        statuses.append(check(served, path, body))

    spoil()
    served.settle()
    refused = sum(status != 200 for status in statuses)
    print(f"{path}: {len(statuses)} requests, {refused} refused")
    assert refused >= NUM_BODIES // 2
    assert check(served, path, GOOD[path]) == 200


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_spoiled_images(served, form):
    """Cut, with bytes changed, with bytes put in: read as far as the format can tell, or refused."""
    good = drawing(form=form, size=(24, 20))
    changes = st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=6)
    statuses = []

    @settings(SETTINGS, max_examples=NUM_IMAGES)
    @given(st.one_of(st.just(len(good)), st.integers(0, len(good))), changes, st.binary(max_size=8))
    def spoil(end, changes, more):
        data = bytearray(good)
        for place, byte in changes:
            data[place] = byte
        statuses.append(ask_about(served, bytes(data[:end]) + more))

    spoil()
    served.settle()
    refused = sum(status != 200 for status in statuses)
    print(f"{form}: {len(statuses)} images, {refused} refused")
    assert refused >= NUM_IMAGES // 4


def ask_about(served, data, kind="image/png"):
    return check(served, "/v1/chat/completions", {"model": MODEL, "messages": [about(data_url(data, kind), "What?")], "max_tokens": 1})


def png_that_declares(width, height, colour=0, depth=1):
    """A PNG of a few bytes that unfolds into `width` x `height` pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(bytes(min((width // 8 + 1) * height, 10**7)))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(6000, 6000), (100_000, 100_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_decompression_bombs(served, size):
    assert ask_about(served, png_that_declares(*size)) == 400
    served.settle()


def test_a_bomb_in_text_chunks(served):
    text = b"a\0\0" + zlib.compress(bytes(100_000_000))
    data = drawing()
    bomb = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    assert ask_about(served, data[:33] + bomb + data[33:]) in (200, 400)


def test_animations_and_odd_modes(served):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    for form in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:])
        assert ask_about(served, file.getvalue()) == 200
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16", "CMYK"):
        file = io.BytesIO()
        Image.new(mode, (9, 9)).save(file, "JPEG" if mode == "CMYK" else "PNG")
        assert ask_about(served, file.getvalue()) == 200
    served.settle()


def test_nothing_is_kept_of_bad_requests(served):
    before = len(served.server.service.states), served.engine.prefix_cache.num_bytes
    for body in ({"keep_state": True, "max_tokens": 0}, {"keep_state": True, "n": 99}, {"state_id": "state-x"}):
        assert check(served, "/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "a"}], **body}) in (400, 404)
    assert (len(served.server.service.states), served.engine.prefix_cache.num_bytes) == before
