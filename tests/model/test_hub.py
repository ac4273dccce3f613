"""The real Hub client against a server on this computer that speaks the part of the Hub's protocol it needs.

Clients are processes of their own, since huggingface_hub reads its environment when it is imported.
"""

import base64
import dataclasses
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.parse

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimamba.config import SPECIAL_TOKENS, TowerConfig, preset
from omnimamba.model import convert as conversion
from omnimamba.model import hub, weights
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.vision import VisionTowers
from omnimamba.model.vq import VQModel

RELEASED = "hustvl/OmniMamba"
DINO_REPO, SIGLIP_REPO = "timm/vit_large_patch14_reg4_dinov2.lvd142m", "timm/vit_so400m_patch14_siglip_384.webli"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Repositories {id: {file: content}}. Large files are LFS files, served from another path as by the Hub's CDN."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.uploads, self.gated = {}, {}, set()
        self.requests = []
        """(method, path, Range header)"""
        self.once = {}
        """file: what happens to its content the next time it is sent"""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, method="GET"):
        """Files that were sent, by repository/file."""
        return [
            path.removeprefix("/cdn/").replace(f"resolve/{COMMIT}/", "").lstrip("/") for verb, path, _ in self.requests if verb == method
        ]


def is_large(name):
    return name.endswith((".safetensors", ".pth", ".pt", ".bin"))


def etag(name, content):
    return hashlib.sha256(content).hexdigest() if is_large(name) else hashlib.sha1(content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for verbs, pattern, answer in self.ROUTES:
            if self.command in verbs and (match := re.fullmatch(pattern, path)):
                return answer(self, *match.groups(), **({"body": body} if "GET" not in verbs else {}))
        self.reply(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def files(self, repo):
        """The files of a repository; None after an error reply."""
        if repo in self.server.gated:
            self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted")
        elif repo not in self.server.repos:
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        else:
            return self.server.repos[repo]

    def info(self, repo):
        if (files := self.files(repo)) is not None:
            self.reply(200, {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})

    def tree(self, repo):
        if (files := self.files(repo)) is not None:
            entries = [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40} for name, content in files.items()]
            for entry in entries:
                if is_large(entry["path"]):
                    content = files[entry["path"]]
                    entry["lfs"] = {"oid": etag(entry["path"], content), "size": len(content), "pointerSize": 134}
            self.reply(200, entries)

    def resolve(self, repo, name):
        if (files := self.files(repo)) is None:
            return
        if name not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        tag = f'"{etag(name, files[name])}"'
        if is_large(name):
            linked = {"X_Linked_Etag": tag, "X_Linked_Size": len(files[name])}
            return self.reply(302, X_Repo_Commit=COMMIT, Location=f"http://localhost:{self.server.server_port}/cdn/{repo}/{name}", **linked)
        self.reply(200, files[name], X_Repo_Commit=COMMIT, ETag=tag)

    def content(self, repo, name):
        content = self.server.repos[repo][name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        change = self.server.once.pop(name, None)
        if change == "cut":  # the connection breaks after 15 MB
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:15_000_000])
            self.close_connection = True
            return
        if change == "flip":
            content = bytes([content[0] ^ 1]) + content[1:]
        if change == "shorten":
            content = content[:-1]
        ranges = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.reply(206 if start else 200, content[start:], **ranges)

    def create(self, body):
        request = json.loads(body)
        repo = f"{request['organization']}/{request['name']}"
        self.server.repos.setdefault(repo, {})
        self.reply(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def preupload(self, repo, body):
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if is_large(file["path"]) else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.reply(200, {"files": modes})

    def batch(self, repo, body):
        objects = json.loads(body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.server.url}/upload/{item['oid']}"}}
        self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid, body):
        self.server.uploads[oid] = body
        self.reply(200)

    def commit(self, repo, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.server.repos[repo][value["path"]] = self.server.uploads[value["oid"]]
        self.reply(200, {"commitOid": COMMIT, "commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}"})

    ROUTES = (
        ({"GET"}, r"/api/models/([^/]+/[^/]+)(?:/revision/main)?", info),
        ({"GET"}, rf"/api/models/([^/]+/[^/]+)/tree/{COMMIT}", tree),
        ({"GET", "HEAD"}, rf"/([^/]+/[^/]+)/resolve/(?:main|{COMMIT})/(.+)", resolve),
        ({"GET", "HEAD"}, r"/cdn/([^/]+/[^/]+)/(.+)", content),
        ({"POST"}, r"/api/repos/create", create),
        ({"POST"}, r"/api/models/([^/]+/[^/]+)/preupload/main", preupload),
        ({"POST"}, r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
        ({"PUT"}, r"/upload/(\w+)", upload),
        ({"POST"}, r"/api/models/([^/]+/[^/]+)/commit/main", commit),
        ({"POST"}, r"/api/validate-yaml", lambda self, body: self.reply(200, {"errors": [], "warnings": []})),
    )


@pytest.fixture
def server():
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def client(server, tmp_path):
    """Runs code in a process whose Hub is the server, and returns what it printed; a ValueError is printed too."""

    def run(code, **environment):
        indented = "\n".join(f"    {line}" for line in code.splitlines())
        script = (
            f"from pathlib import Path\nfrom omnimamba.model import hub\ntry:\n{indented}\nexcept ValueError as error:\n    print(error)\n"
        )
        base = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        defaults = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        process = subprocess.run([sys.executable, "-c", script], env={**base, **defaults, **environment}, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    return run


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- files


FETCH = 'path = hub.fetch_file("some/repo", "big.bin"); print(hub.sha256(path))'


def test_a_cut_download_continues(server, client):
    content = os.urandom(24_000_000)
    server.repos["some/repo"] = {"big.bin": content, "other.bin": b"not asked for"}
    server.once["big.bin"] = "cut"
    assert client(FETCH) == hashlib.sha256(content).hexdigest()
    ranges = [wanted for verb, path, wanted in server.requests if verb == "GET" and path.endswith("/big.bin")]
    assert ranges == [None, f"bytes={10 * 2**20}-"]  # the client keeps whole chunks of 10 MiB
    assert not any("other.bin" in path for _, path, _ in server.requests)


def test_a_wrong_checksum_is_an_error_and_is_not_kept(server, client):
    content = os.urandom(1000)
    server.repos["some/repo"] = {"big.bin": content}
    server.once["big.bin"] = "flip"
    first, second = client(f"try:\n    {FETCH}\nexcept ValueError as error:\n    print(error)\n{FETCH}").splitlines()
    found = hashlib.sha256(bytes([content[0] ^ 1]) + content[1:]).hexdigest()
    wanted = hashlib.sha256(content).hexdigest()
    assert first == f"some/repo/big.bin: SHA-256 {found} is not {wanted}, which the Hub names; removed, try again"
    assert second == wanted


def test_a_wrong_size_is_an_error(server, client):
    server.repos["some/repo"] = {"big.bin": os.urandom(1000)}
    server.once["big.bin"] = "shorten"
    assert re.fullmatch(r"some/repo: Consistency check failed: file should be of size 1000 but has size 999 .*", client(FETCH))


def test_what_the_hub_refuses(server, client):
    server.repos["some/repo"] = {"config.json": b"{}"}
    server.gated.add("some/gated")
    code = """for repo in "some/nothing", "some/gated", "some/repo":
    try:
        hub.fetch_file(repo, "big.bin")
    except ValueError as error:
        print(error)"""
    nothing, gated, no_file = client(code).splitlines()
    assert nothing == (
        f"{server.url} has no repository 'some/nothing' that you may read; check the name, or run `hf auth login` if it is private"
    )
    assert gated == f"some/gated is gated; ask for access on {server.url}/some/gated, then run `hf auth login`"
    assert no_file == f"some/repo on {server.url} has no file big.bin"


@pytest.mark.parametrize(
    ("source", "is_id"), [("me/model", True), ("a.b/c-d_2", True), ("me/model.pth", False), ("../x", False), ("x", False)]
)
def test_hub_ids(source, is_id):
    assert hub.is_repo_id(source) == is_id


# ---- models


@pytest.fixture(scope="module")
def small(redraw, tmp_path_factory):
    """The released model in small: a folder of all its parts in fp16, and that model's config."""
    towers = {
        name: TowerConfig(timm_name, dim=32, image_size=70, num_tokens=25, timm_kwargs=(("embed_dim", 32), ("depth", 3), ("num_heads", 2)))
        for name, timm_name in (("dino", "vit_large_patch14_reg4_dinov2.lvd142m"), ("siglip", "vit_so400m_patch14_siglip_384"))
    }
    config = dataclasses.replace(preset("tiny"), towers=towers)
    parts = OmniMambaModel(config), VisionTowers(towers), VQModel(config.vq)
    folder = tmp_path_factory.mktemp("small")
    (folder / "tokenizer.json").write_text(f'{{"special": {len(SPECIAL_TOKENS)}}}')
    bundle = weights.Bundle(config, *(redraw(part, seed) for seed, part in enumerate(parts)), folder / "tokenizer.json")
    weights.save(bundle, folder / "model", dtype=torch.float16, texts={"generation.json": '{"top_k": 7}'})
    return folder / "model", config


@pytest.fixture
def published(server, small, tmp_path):
    """The server holds what the released model is made of, in small, each where it is published."""
    folder, _ = small
    path = conversion.convert(folder, tmp_path / "OmniMamba-1.3b.pth", to="official", without=["vision", "vq"]).path
    server.repos[RELEASED] = {"OmniMamba-1.3b.pth": path.read_bytes(), "README.md": b"#", "pretokenized.jsonl": b"{}"}
    path = tmp_path / "vq_ds16_t2i.pt"
    torch.save({"model": {**load_file(folder / "vq.safetensors"), "quantize.codebook_used": torch.zeros(65536)}}, path)
    server.repos["peizesun/llamagen_t2i"] = {"vq_ds16_t2i.pt": path.read_bytes(), "t2i_XL.pt": b"large"}
    server.repos["EleutherAI/gpt-neox-20b"] = {"tokenizer.json": (folder / "tokenizer.json").read_bytes(), "config.json": b"{}"}
    vision = load_file(folder / "vision.safetensors")
    for name, repo in (("dino", DINO_REPO), ("siglip", SIGLIP_REPO)):
        prefix = f"towers.{name}."
        save_file({key.removeprefix(prefix): tensor for key, tensor in vision.items() if key.startswith(prefix)}, tmp_path / "tower")
        server.repos[repo] = {"model.safetensors": (tmp_path / "tower").read_bytes(), "pytorch_model.bin": b"the same again"}


def gather(tmp_path, small):
    (tmp_path / "sizes.json").write_text((small[0] / "config.json").read_text())
    arguments = f'"{RELEASED}", "{tmp_path / "out"}", config="{tmp_path / "sizes.json"}"'
    return f"from omnimamba.model.convert import convert\ndone = convert({arguments}, progress=print)\nprint(done.missing)"


@pytest.mark.slow
def test_the_released_model_is_gathered_from_its_places(server, client, published, small, tmp_path):
    lines = client(gather(tmp_path, small)).splitlines()
    assert lines[0] == f"opening {RELEASED}" and lines[-1] == "()"
    assert [line for line in lines if line.startswith("fetching")] == [
        "fetching EleutherAI/gpt-neox-20b/tokenizer.json",
        "fetching peizesun/llamagen_t2i/vq_ds16_t2i.pt",
        f"fetching {DINO_REPO}/model.safetensors",
        f"fetching {SIGLIP_REPO}/model.safetensors",
    ]
    fetched = {path.rsplit("/", 1)[-1] for verb, path, _ in server.requests if verb == "GET" and "/api/" not in path}
    assert fetched == {"README.md", "OmniMamba-1.3b.pth", "vq_ds16_t2i.pt", "tokenizer.json", "model.safetensors"}
    for part in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / part).read_bytes() == (small[0] / part).read_bytes()
    for part in weights.COMPONENTS:
        first, second = (load_file(folder / f"{part}.safetensors") for folder in (tmp_path / "out", small[0]))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    server.requests.clear()
    code = f'from omnimamba.model import weights\nprint(weights.load("{tmp_path / "out"}").fingerprint)'
    alone = client(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert alone == weights.load(small[0]).fingerprint and server.requests == []


@pytest.mark.slow
def test_offline_says_what_is_missing(server, client, published, small, tmp_path):
    code = gather(tmp_path, small)
    first = client(code, HF_HUB_OFFLINE="1").splitlines()[-1]
    cache = tmp_path / "home" / "hub"
    remedy = "connect once, or pass files that are on this computer"
    reached = f"and {server.url} cannot be reached (HF_HUB_OFFLINE=1); {remedy}"
    encoders = f"peizesun/llamagen_t2i (vq_ds16_t2i.pt); {DINO_REPO} (model.safetensors); {SIGLIP_REPO} (model.safetensors)"
    everything = f"{RELEASED} (OmniMamba-1.3b.pth); EleutherAI/gpt-neox-20b (tokenizer.json); {encoders}"
    assert first == f"not in the cache {cache}: {everything}; {reached}"
    server.repos.pop("peizesun/llamagen_t2i")
    assert client(code).splitlines()[-1].startswith(f"{server.url} has no repository 'peizesun/llamagen_t2i'")
    second = client(code, HF_HUB_OFFLINE="1").splitlines()[-1]
    assert second == f"not in the cache {cache}: {encoders}; {reached}"
    assert not (tmp_path / "out").exists()


def test_an_endpoint_that_does_not_answer(server, client, tmp_path):
    nowhere = f"http://127.0.0.1:{free_port()}"
    line = client('from omnimamba.model import weights\nweights.load("me/model")', HF_ENDPOINT=nowhere)
    assert re.fullmatch(rf"not in the cache .*: me/model \(config.json, .*\); and {nowhere} cannot be reached \(.*refused.*\); .*", line)


@pytest.mark.slow
def test_models_on_the_hub(server, client, small):
    server.repos["me/model"] = {path.name: path.read_bytes() for path in small[0].iterdir()} | {
        "judge.safetensors": (small[0] / "vq.safetensors").read_bytes(),
        "optimizer.pt": b"?",
        "README.md": b"#",
    }
    server.repos[RELEASED] = {"OmniMamba-1.3b.pth": b"large"}
    code = 'from omnimamba import OmniMamba\nfrom omnimamba.model import weights\nprint(weights.load("{}").fingerprint)'
    expected = weights.load(small[0]).fingerprint
    assert client(code.format("me/model")) == expected
    fetched = {path.rsplit("/", 1)[-1] for _, path, _ in server.requests}
    assert "judge.safetensors" in fetched and "optimizer.pt" not in fetched
    assert client(code.format("me/model"), HF_HUB_OFFLINE="1") == expected
    line = client(code.format(RELEASED))
    assert re.fullmatch(r".* has no config.json, so it is no model folder; official checkpoints become one by `omnimamba convert .*", line)
    assert not any(path.endswith(".pth") for _, path, _ in server.requests)


@pytest.mark.slow
def test_one_checkpoint_must_be_there(server, client):
    server.repos["me/two"] = {"a.pth": b"1", "b.pth": b"2"}
    server.repos["me/none"] = {".gitattributes": b""}
    code = 'from omnimamba.model.convert import convert\nconvert("{}", "out")'
    assert client(code.format("me/two")).startswith("me/two should have one checkpoint file (a.pth, b.pth) or a config.json")
    assert client(code.format("me/none")).startswith("me/none should have one checkpoint file (none) or a config.json")


PUSH = """from omnimamba.engine.omnimamba import GenerationDefaults, OmniMamba
from omnimamba.model import weights
bundle = weights.load("{folder}")
bundle.tokenizer_file = None
print(OmniMamba(bundle, defaults=GenerationDefaults(top_k=7)).push_to_hub("me/pushed", dtype="float16"))
print(weights.load("me/pushed").fingerprint == bundle.fingerprint)"""


@pytest.mark.slow
def test_push(server, client, small):
    lines = client(PUSH.format(folder=small[0]), HF_TOKEN="hf_test").splitlines()
    assert lines == [f"{server.url}/me/pushed", "True"]
    pushed = server.repos["me/pushed"]
    assert pushed.keys() == {"README.md", "config.json", "generation.json", *(f"{part}.safetensors" for part in weights.COMPONENTS)}
    assert pushed["model.safetensors"] == (small[0] / "model.safetensors").read_bytes()
    assert json.loads(pushed["generation.json"])["top_k"] == 7
    card = pushed["README.md"].decode()
    assert card.startswith("---\nlibrary_name: omnimamba\n") and 'OmniMamba.from_pretrained("me/pushed")' in card


def test_push_without_a_token(server, client, small):
    line = client(PUSH.format(folder=small[0]))
    assert line == f"pushing to {server.url}/me/pushed needs a token; run `hf auth login`, or set HF_TOKEN"
