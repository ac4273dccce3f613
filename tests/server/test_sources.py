"""Which addresses are fetched. Local servers stand for the internet: the loopback address 127.0.0.2 is declared public."""

import asyncio
import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from omnimamba.server import sources
from omnimamba.server.config import ServerConfig
from omnimamba.server.errors import ApiError

from .conftest import data_url, drawing

CONFIG = ServerConfig(fetch_remote=True, fetch_seconds=1.0, max_body_bytes=5000)


def read(url, config=CONFIG):
    return asyncio.run(sources.read_image(url, config))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address, expected):
    assert sources.is_public(address) is expected


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "http://localhost/a.png",
        "http://[::1]/a.png",
        "http://0/a.png",
        "http://2130706433/a.png",
        "http://0x7f000001/a.png",
        "http://127.1/a.png",
        "https://169.254.169.254/latest/meta-data/",
        "http://[::ffff:127.0.0.1]/a.png",
        "http://10.0.0.1:443/a.png",
    ],
)
def test_private_addresses_are_refused(url):
    with pytest.raises(ApiError, match="not on the public internet|is unknown") as error:
        read(url)
    assert error.value.status == 400


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://a/b.png",
        "gopher://a",
        "/etc/passwd",
        "",
        "http://",
        "http://a:22/b",
        "http://u:p@a/b",
        "http://[a/b",
        "//a/b",
        "http://a:x/b",
        "http://b\u00fccher.example/b",
    ],
)
def test_other_urls_are_refused(url):
    with pytest.raises(ApiError, match="no plain http or https address"):
        read(url)


def test_unknown_hosts():
    with pytest.raises(ApiError, match="unknown"):
        read("http://no-such-host.invalid/a.png")


class Site(BaseHTTPRequestHandler):
    """What an outside server may do."""

    def do_GET(self):
        name = self.path.strip("/").split("?")[0]
        self.server.seen.append((self.headers["Host"], self.path))
        if name == "image":
            self.answer(200, drawing())
        elif name == "large":
            self.answer(200, bytes(6000))
        elif name == "hop":
            self.answer(302, b"", Location=self.path.split("?to=")[1])
        elif name == "loop":
            self.answer(302, b"", Location="/loop")
        elif name == "nowhere":
            self.answer(302, b"")
        elif name == "slow":
            self.server.hold.wait(5)
        else:
            self.answer(404, b"")

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    """An outside server at 127.0.0.2, whose port stands for 80."""
    server = ThreadingHTTPServer(("127.0.0.2", 0), Site)
    server.seen, server.hold = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    is_public = sources.is_public
    monkeypatch.setattr(sources, "is_public", lambda address: address == "127.0.0.2" or is_public(address))
    monkeypatch.setattr(sources, "_PORTS", {"http": server.server_port, "https": 443})
    yield server
    server.hold.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_image_is_fetched(site):
    assert read("http://127.0.0.2/image") == drawing()
    assert read("http://127.0.0.2/hop?to=http://127.0.0.2/image") == drawing()
    assert read("http://127.0.0.2/hop?to=/image") == drawing()
    assert site.seen[0] == ("127.0.0.2", "/image")


def test_the_address_that_was_checked_is_the_one_connected_to(site, monkeypatch):
    """A name server that answers differently the second time (DNS rebinding) finds nobody asking."""
    answers = iter(["127.0.0.2", "127.0.0.1"])

    async def getaddrinfo(self, host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers) if host == "images.example" else host, port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    assert read("http://images.example/image") == drawing()
    assert site.seen == [("images.example", "/image")]


@pytest.mark.parametrize("target", ["http://127.0.0.1/image", "http://localhost/", "file:///etc/passwd", "http://169.254.169.254/"])
def test_redirects_are_checked_too(site, target):
    with pytest.raises(ApiError, match="not on the public internet|no plain http"):
        read(f"http://127.0.0.2/hop?to={target}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("large", "more than 5000 bytes"),
        ("loop", "one redirect too many"),
        ("nowhere", "status 302"),
        ("\x7f", "cannot be fetched: Invalid non-printable ASCII character"),
        ("slow", "did not come in within 1 s"),
        ("nothing", "status 404"),
    ],
)
def test_what_outside_servers_do(site, name, message):
    with pytest.raises(ApiError, match=message):
        read(f"http://127.0.0.2/{name}")


def test_data_urls_need_no_network():
    assert read(data_url(drawing()), ServerConfig()) == drawing()
    assert read(data_url(drawing()).replace("data:image/png;", "DATA:image/png;charset=x;")) == drawing()
