"""The API beyond one machine: a Ray Serve application whose replicas each hold the model, one per GPU or share of the CPUs.

    serve run omnimamba.server.ray:application model=nano min_replicas=2 max_replicas=4

Serve sends each request to a replica with few under way, starts and stops replicas with the load, and replaces those that die or
whose engine has stopped. Clients see the same HTTP API; an answer under way on a replica that dies is an error that may be retried.
Prefix snapshots belong to a replica, and so would kept states: they are off here.
"""

# no postponed annotations: `serve run` looks at the type of the argument of `application`
import os
from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve

from omnimamba.server.config import MIB, ServerConfig


class Options(BaseModel):
    """Arguments of `serve run`, or of a Serve config file. The API key is the variable OMNIMAMBA_API_KEY of the replicas."""

    model_config = ConfigDict(extra="forbid")

    model: str = "nano"
    device: str = "auto"
    dtype: str = "auto"
    num_slots: int = 32
    """Sequences that run at once in a replica."""
    max_waiting: int = 64
    """Requests that may wait in a replica."""
    prefix_cache_mib: int = 256
    fetch_remote: bool = False
    min_replicas: int = 1
    max_replicas: int = 1
    num_cpus: float = 1
    """Of a replica."""
    num_gpus: float = 0
    """Of a replica; 0.5 lets two share a GPU."""


@serve.deployment
@serve.ingress()
class Api:
    """One replica."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def __serve_build_asgi_app__(self) -> FastAPI:
        from omnimamba.engine.omnimamba import OmniMamba
        from omnimamba.server.app import create_api
        from omnimamba.server.engine_thread import aside
        from omnimamba.server.service import Service

        options = self.options
        config = ServerConfig(
            api_key=os.environ.get("OMNIMAMBA_API_KEY"),
            max_waiting=options.max_waiting,
            prefix_cache_bytes=options.prefix_cache_mib * MIB,
            fetch_remote=options.fetch_remote,
        )
        sizes = {"device": options.device, "dtype": options.dtype, "num_slots": options.num_slots}
        omni = aside(lambda: OmniMamba.from_pretrained(options.model, **sizes))
        self.service = Service(omni, config)
        return create_api(self.service, Path(options.model).name)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self.service.trouble:
            raise RuntimeError(self.service.trouble)


def application(options: Options) -> serve.Application:
    """What `serve run` runs."""
    return Api.options(
        max_ongoing_requests=options.max_waiting + options.num_slots,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.num_slots,
        },
    ).bind(options)
