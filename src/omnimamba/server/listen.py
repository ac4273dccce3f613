"""The port, taken before anything slow is done."""

from __future__ import annotations

import contextlib
import socket


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. ValueError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with contextlib.ExitStack() as closed_on_error:
            bound = closed_on_error.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            closed_on_error.pop_all()
            return bound
    except (OSError, UnicodeError) as error:  # the latter for a host that is no name
        raise ValueError(f"cannot listen on {host} port {port}: {error}; choose another --host or --port") from error
