"""What Prometheus reads at /metrics. Counters are kept here; gauges look at the engine when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from omnimamba.engine.state_cache import StateCache
from omnimamba.server.engine_thread import EngineThread

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Those of one server, in a registry of its own."""

    def __init__(self, thread: EngineThread) -> None:
        self.registry = CollectorRegistry()
        engine, gauge = thread.engine, self._gauge
        self.requests = Counter("omnimamba_requests", "Answered requests", ["path", "status"], registry=self.registry)
        self.tokens = Counter("omnimamba_tokens", "Tokens generated for requests", ["task"], registry=self.registry)
        self.images = Counter("omnimamba_images", "Images painted", registry=self.registry)
        self.cancelled = Counter("omnimamba_cancelled", "Requests whose client hung up", registry=self.registry)
        self.failures = Counter("omnimamba_failures", "Requests that a failed pass of the engine ended", registry=self.registry)
        self.first_token = self._histogram("omnimamba_time_to_first_token_seconds", "From a request to its first token")
        self.request_seconds = self._histogram("omnimamba_request_seconds", "From a request to the end of its answer")
        gauge("omnimamba_slots", "Slots for sequences", lambda: engine.scheduler.num_slots)
        gauge("omnimamba_slots_in_use", "Slots that are taken", lambda: engine.scheduler.num_slots - len(engine.scheduler.free))
        gauge("omnimamba_waiting_requests", "Requests that wait for slots", lambda: len(engine.scheduler.waiting))
        gauge(
            "omnimamba_tokens_per_second",
            "Tokens per second between the first and the last token of the last 10 seconds",
            thread.tokens_per_second,
        )
        gauge("omnimamba_prefix_cache_bytes", "Bytes of prefix snapshots", lambda: engine.prefix_cache.num_bytes)
        self.registry.register(_PrefixCounts(engine.prefix_cache))

    def text(self) -> bytes:
        """All of them, in the format of Prometheus."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, what: str, function: Callable[[], float]) -> None:
        Gauge(name, what, registry=self.registry).set_function(function)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, ["task"], buckets=_SECONDS, registry=self.registry)


class _PrefixCounts(Collector):
    """What the engine itself counts."""

    def __init__(self, cache: StateCache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily("omnimamba_prefix_cache_hits", "Prompts that a snapshot shortened", self._cache.num_hits)
        yield CounterMetricFamily("omnimamba_prefix_cache_misses", "Prompts that none did", self._cache.num_misses)
