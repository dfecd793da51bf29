"""Metrics of a server in the format of Prometheus. Names follow vLLM's, with the prefix ``rq_``."""

from __future__ import annotations

from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from rq_compile.serving.served_model import ServedModel

# Seconds.
TO_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
BETWEEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    def __init__(self, model: ServedModel) -> None:
        self._registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self._registry}
        Gauge("rq_num_requests_running", "Sequences in slots", **given).set_function(lambda: model.running)
        Gauge("rq_num_requests_waiting", "Sequences that wait for a slot", **given).set_function(lambda: model.waiting)
        self.requests = Counter("rq_requests", "Requests by endpoint and status", ["endpoint", "status"], **given)
        self.cancelled = Counter("rq_requests_cancelled", "Requests whose client disconnected", **given)
        self.prompt_tokens = Counter("rq_prompt_tokens", "Tokens of prompts", **given)
        self.generation_tokens = Counter("rq_generation_tokens", "Tokens of answers", **given)
        self._to_first = Histogram(
            "rq_time_to_first_token_seconds", "From a request to its first token", buckets=TO_FIRST, **given
        )
        self._between = Histogram("rq_inter_token_latency_seconds", "Between tokens of an answer", buckets=BETWEEN, **given)
        self._whole = Histogram(
            "rq_e2e_request_latency_seconds", "From a request to the end of its answer", buckets=WHOLE, **given
        )

    def exposed(self) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def watch(self) -> Watch:
        """Times one answer from now on."""
        return Watch(self)


class Watch:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = monotonic()
        self._last: float | None = None

    def token(self) -> None:
        now = monotonic()
        if self._last is None:
            self._metrics._to_first.observe(now - self._started)
        else:
            self._metrics._between.observe(now - self._last)
        self._last = now
        self._metrics.generation_tokens.inc()

    def end(self) -> None:
        self._metrics._whole.observe(monotonic() - self._started)
