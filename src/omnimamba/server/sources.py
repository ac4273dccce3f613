"""Images that requests bring: `data:` URLs, and if that is switched on, addresses on the public internet."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import re
import socket
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx
from PIL import Image

from omnimamba.server.config import ServerConfig
from omnimamba.server.errors import ApiError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""Those of OpenAI's API. Pillow's other readers stay shut: a stranger's file needs few of them, and EPS runs Ghostscript."""
MAX_REDIRECTS = 3
_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.=+-]+)*;base64,", re.ASCII | re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}
_PARAM = "messages"


def _refused(message: str, code: str = "invalid_image_url") -> ApiError:
    return ApiError(400, message, param=_PARAM, code=code)


async def read_image(url: str, config: ServerConfig) -> bytes:
    """The bytes of an image file, not looked into. ApiError for a URL that may not be read. No path is ever opened."""
    if url[:5].lower() == "data:":
        return _read_data_url(url)
    if not config.fetch_remote:
        raise _refused("image_url must be a data: URL with base64, data:image/png;base64,...; this server fetches no remote images")
    try:
        async with asyncio.timeout(config.fetch_seconds):
            return await _fetch(url, config.max_body_bytes)
    except TimeoutError:
        raise _refused(f"the image at {url} did not come in within {config.fetch_seconds:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _refused(f"the image at {url} cannot be fetched: {str(error) or type(error).__name__}") from error


def check_image(data: bytes, max_pixels: int) -> None:
    """ApiError for a file that is none of FORMATS or declares more than `max_pixels`; its pixels are not decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Exception as error:  # Pillow's readers raise errors of many kinds for damaged files
        raise _refused(f"the image is not a whole {', '.join(FORMATS)} file", "invalid_image") from error
    if width * height > max_pixels:
        raise _refused(f"the image is {width}x{height} pixels, the limit is {max_pixels}; scale it down first", "image_too_large")


def _read_data_url(url: str) -> bytes:
    header = _DATA_URL.match(url)
    if header is None:
        raise _refused("the data: URL is not of the form data:image/png;base64,...")
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError):  # the latter for characters beyond ASCII
        raise _refused("the data: URL is not valid base64") from None


async def _fetch(url: str, max_bytes: int) -> bytes:
    """The body at `url`, redirects followed. Each hop's name is resolved once, here, and the address found is the one connected to."""
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False) as client:
        for _ in range(MAX_REDIRECTS + 1):
            parts = _parse(url)
            address = await _public_address(parts)
            host = f"[{address}]" if ":" in address else address
            target = parts._replace(netloc=f"{host}:{_port(parts)}", fragment="").geturl()
            assert parts.hostname is not None
            # identity: a compressed body could grow past the limit in one piece
            headers = {"Host": parts.netloc, "Accept": "image/*", "Accept-Encoding": "identity"}
            async with client.stream("GET", target, headers=headers, extensions={"sni_hostname": parts.hostname}) as response:
                if response.has_redirect_location:
                    url = urljoin(url, response.headers["Location"])
                    continue
                if response.status_code != 200:
                    raise _refused(f"the image at {url} cannot be fetched: status {response.status_code}")
                return await _read_body(response, url, max_bytes)
    raise _refused(f"{url} is one redirect too many, the limit is {MAX_REDIRECTS}")


async def _read_body(response: httpx.Response, url: str, max_bytes: int) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > max_bytes:
            raise _refused(f"the image at {url} has more than {max_bytes} bytes", "image_too_large")
    return bytes(body)


def _parse(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_plain = parts.scheme in _PORTS and parts.hostname and parts.netloc.isascii() and parts.port in (None, *_PORTS.values())
    except ValueError:
        is_plain = False
    if not is_plain or parts.username is not None:
        raise _refused(f"image_url {url[:200]!r} is no plain http or https address on port 80 or 443, its host in ASCII")
    return parts


def _port(parts: SplitResult) -> int:
    return parts.port or _PORTS[parts.scheme]


async def _public_address(parts: SplitResult) -> str:
    """The first address of the host. ApiError if any of its addresses is not on the public internet."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, _port(parts), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _refused(f"the host {parts.hostname!r} is unknown") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not all(is_public(address) for address in addresses):
        raise _refused(f"the host {parts.hostname!r} is not on the public internet")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether the address is global unicast, also behind an IPv4-mapped, 6to4, NAT64 or Teredo form: none leads to a private network."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in ipaddress.ip_network("64:ff9b::/96") or ip in ipaddress.ip_network("64:ff9b:1::/48") or ip.sixtofour or ip.teredo:
            return False
        ip = ip.ipv4_mapped or ip
    return ip.is_global and not ip.is_multicast
