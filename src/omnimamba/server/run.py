"""`omnimamba serve`: one process, from the open port to the exit code."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

import uvicorn

from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.server.app import create_api
from omnimamba.server.config import ServerConfig
from omnimamba.server.service import Service

if TYPE_CHECKING:
    from omnimamba.server.page import WithPage


KEEP_ALIVE_SECONDS = 65
"""Of idle connections; longer than clients keep them (the `openai` package 5 s, proxies 60), or requests are sent into closed ones."""


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, then lets the answers under way end, for `drain_seconds` at most; or until the engine is lost."""

    def __init__(self, omni: OmniMamba, config: ServerConfig, model_id: str, *, with_page: bool = True, drain_seconds: int = 60) -> None:
        self.service = Service(omni, config, on_failure=self._stop)
        api = create_api(self.service, model_id)
        self._page: WithPage | None = None
        if with_page:
            from omnimamba.server.page import WithPage  # Gradio takes seconds to import

            self._page = WithPage(api, self.service, model_id)
        options = {
            "log_config": None,
            "access_log": False,
            "timeout_graceful_shutdown": drain_seconds,
            "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        }
        super().__init__(uvicorn.Config(self._page or api, lifespan="on", server_header=False, **options))
        self.model_id = model_id

    def _stop(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = (sockets or [])[0].getsockname()[:2]
            print(f"{self.model_id} is served at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._page is not None:
            self._page.close()
        await super().shutdown(sockets)

    def run_on(self, bound: socket.socket) -> int:
        """The exit code: 0 after a signal, 1 if the engine was lost or did not even start."""
        # uvicorn raises the signal again once it has stopped; SIGTERM has done its work then
        signal.signal(signal.SIGTERM, lambda *_: None)
        self.run(sockets=[bound])
        return 0 if self.started and self.service.thread.failure is None else 1
