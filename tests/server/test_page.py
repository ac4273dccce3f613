"""The web page in a real browser without a window: Chromium by Playwright."""

import io
import json
import os
import re
import shutil

import httpx
import pytest
from PIL import Image

from omnimamba.server.config import ServerConfig

from .conftest import MODEL, drawing

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Gradio uses what its newest pandas is about to drop, and leaves the images that it looks at to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="needs Chromium on the PATH, e.g. apt-get install chromium"
)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def served(new_omni, serve):
    with serve(new_omni(), ServerConfig(max_image_pixels=10_000), with_page=True) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM is not None, "CI has no Chromium; .ci/run installs it"
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def page(request, browser, served):
    """The page as it opens, at both widths. Nothing of it may come from elsewhere or throw."""
    width, height = SIZES[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(30_000)
    errors, elsewhere = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda sent: elsewhere.append(sent.url) if not sent.url.startswith((served.url, "data:", "blob:")) else None)
    page.goto(served.url)
    page.wait_for_selector("#paint-button")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    page.close()
    assert not errors and not elsewhere
    served.settle()


def shown_image(page, http, selector):
    """The pixels of the image that the page shows."""
    return Image.open(io.BytesIO(http.get(page.get_attribute(f"{selector} img", "src")).content)).convert("RGB")


@needs_browser
def test_painting_row_by_row(page, served, omni):
    page.fill("#prompt textarea", "red apple")
    page.fill("#seed input, #seed textarea", "7")
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const image = document.querySelector('#canvas img');
                if (image && window.seen.at(-1) !== image.src) window.seen.push(image.src);
            }).observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ['src']});
        }"""
    )
    page.click("#paint-button")
    page.wait_for_selector("#gallery img")
    grid_size = omni.vq.config.grid_size
    page.wait_for_function(f"document.querySelector('#painted').innerText.includes('row {grid_size} of {grid_size}')")
    assert "seed 7" in page.inner_text("#painted")
    expected = {}
    final = omni.generate_image("red apple", seed=7, callback=lambda _, image, done: expected.setdefault(image.tobytes(), done))[0]
    assert shown_image(page, served.http, "#canvas").tobytes() == final.tobytes()
    seen = [Image.open(io.BytesIO(served.http.get(url).content)).convert("RGB") for url in page.evaluate("window.seen")]
    shares = [expected[image.tobytes()] for image in seen]
    assert len(shares) >= 2 and shares == sorted(shares) and shares[-1] == 1, "the picture did not appear row by row"


@needs_browser
def test_uploading_and_asking(page, served, omni, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(drawing())
    page.click("button[role=tab]:has-text('Ask')")
    page.set_input_files("#image input[type=file]", str(path))
    page.wait_for_selector("#image img")
    for question in ("What is this?", "Why?"):  # the second while the first is being answered: it stays, and its click waits
        page.fill("#question textarea, #question input", question)
        page.click("#ask-button")
        page.wait_for_selector(f"#chat >> text={question}")
    served.settle()
    answer = omni.describe(drawing(), "What is this?", max_new_tokens=60)
    word = max(re.findall("[A-Za-z0-9]+", answer), key=len)  # a page cannot show all that a model of random weights says
    page.wait_for_function("word => document.querySelector('#chat').innerText.includes(word)", arg=word)
    page.click("button:has-text('Start over')")
    page.wait_for_selector("#chat >> text=What is this?", state="detached")


@needs_browser
def test_mistakes_are_shown(page):
    page.fill("#prompt textarea", "zoo")
    page.fill("#seed input, #seed textarea", "soon")
    page.click("#paint-button")
    page.wait_for_selector("text=seed 'soon' is not a whole number")


@needs_browser
def test_the_page_says_what_runs_where(page):
    assert f"{MODEL} on cpu in float32" in page.inner_text("#status") and "of 8 slots busy" in page.inner_text("#status")


def call(http, part, data):
    """The last event of the page's function that reads `part`, called as a browser calls it."""
    config = http.get("/config").json()
    part_id = next(component["id"] for component in config["components"] if component["props"].get("elem_id") == part)
    index = next(dependency["id"] for dependency in config["dependencies"] if part_id in dependency["inputs"])
    body = {"data": data, "fn_index": index, "session_hash": "test"}
    assert http.post("/gradio_api/queue/join", json=body).status_code == 200
    with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "test"}) as response:
        for line in response.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if event.get("msg") == "process_completed":
                return event
    raise AssertionError("no event says that the call is over")


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml", "../../../../etc/passwd"])
def test_no_path_of_a_client_is_opened(served, path):
    event = call(served.http, "question", ["What?", {"path": path, "meta": {"_type": "gradio.FileData"}}, None])
    assert event["success"] is False and "root:" not in json.dumps(event)
    assert served.http.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_long_texts_are_refused(new_omni, serve):
    """By the page as by the API: tokenising them would keep everybody else waiting."""
    with serve(new_omni(), ServerConfig(max_text_chars=100), with_page=True) as running:
        event = call(running.http, "question", ["a" * 101, None, None])
        assert event["success"] is False and "101 characters in the messages, the limit is 100" in json.dumps(event)
        event = call(running.http, "prompt", ["a" * 101, 1, 1, "", None])
        assert event["success"] is False and "101 characters in the prompt, the limit is 100" in json.dumps(event)
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "a" * 60}, {"role": "assistant", "content": "b" * 41}]}
        for path, body in (("chat/completions", chat), ("images/generations", {"prompt": "a" * 101})):
            error = running.http.post(f"/v1/{path}", json=body).json()["error"]
            assert error["code"] == "string_above_max_length" and "101 characters" in error["message"]


def test_large_uploads_are_refused(new_omni, serve):
    with serve(new_omni(), ServerConfig(max_body_bytes=10_000), with_page=True) as running:
        response = running.http.post("/gradio_api/upload", files={"files": ("a.png", bytes(20_000))})
        assert response.status_code == 413


def test_the_key_is_the_pages_password(new_omni, serve):
    with serve(new_omni(), ServerConfig(api_key="secret"), with_page=True) as running, httpx.Client(base_url=running.url) as http:
        assert http.get("/config").status_code == 401
        assert http.post("/login", data={"username": "omnimamba", "password": "wrong"}).status_code == 400
        assert http.post("/login", data={"username": "omnimamba", "password": "secret"}).status_code == 200
        assert http.get("/config").status_code == 200


def test_the_api_keeps_its_errors_beside_the_page(served):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405)):
        response = served.http.request(method, path)
        assert response.status_code == status and set(response.json()) == {"error"}
    for method, path in (("POST", "/chat/completions"), ("POST", "/images/generations"), ("GET", "/models")):
        response = served.http.request(method, path)
        assert (
            response.status_code == 404 and f"it is at /v1{path}: end the client's base URL in /v1" in response.json()["error"]["message"]
        )
