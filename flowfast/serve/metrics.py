"""GET /metrics, for Prometheus. Names are vLLM's where it has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from flowfast.engine.request import Finished
from flowfast.engine.standing import Standing
from flowfast.serve.fleet import Fleet

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
REWARDS = (-100.0, -30.0, -10.0, -3.0, -1.0, -0.3, 0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
PREFIX = "flowfast:"
STOPPED = ("budget", "until", "deadline")
REASONS = ("aborted", "full", "deadline", "prompt", "reward", "model", "engine", "closed", "refused")
"""Those of `Failed`, and refused: a request that means nothing to the engine."""


class Metrics:
    """Of one server. A request here is one search: n pictures are n requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._successes = self._counter(
            "request_success", "Requests that have a picture, by why they ended.", "finished_reason", STOPPED
        )
        self._failures = self._counter("request_failure", "Requests that have none, by why.", "reason", REASONS)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to a slot.")
        self._latency = self._histogram("e2e_request_latency_seconds", "From arrival to the picture.")
        self._partial = self._histogram("time_to_first_partial_seconds", "From arrival to the first partial image.")
        self._best = self._histogram("best_reward", "Of pictures that were handed out.", REWARDS)
        self._nfe = self._counter("nfe", "Rows through the model for requests that have a picture.")
        self._cuts = self._counter("deadline_cuts", "Times that a deadline took budget away.")
        self._errors = self._counter("reward_errors", "Requests that ended because their reward failed.")

    def _counter(self, name: str, text: str, label: str = "", values: tuple[str, ...] = ()) -> Counter:
        """With a label it has each of its values from the start, so that a first one is seen as a rise from 0."""
        counter = Counter(PREFIX + name, text, (label,) if label else (), registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

    def finished(self, event: Finished, stopped: str) -> None:
        """stopped: budget, until or deadline."""
        self._successes.labels(stopped).inc()
        self._queue.observe(event.waited)
        self._latency.observe(event.seconds)
        self._best.observe(event.sample.reward)
        self._nfe.inc(event.sample.nfe)
        self._cuts.inc(len(event.rerun.cuts))

    def full(self, pictures: int) -> None:
        """So many had no room."""
        self._failures.labels("full").inc(pictures)

    def failed(self, reason: str) -> None:
        self._failures.labels(reason).inc()
        self._errors.inc(reason == "reward")

    def first_partial(self, seconds: float) -> None:
        self._partial.observe(seconds)

    def watch(self, standing: Callable[[], Standing | None]) -> None:
        """standing: of the engine, at each scrape; None: there is none yet."""
        self.registry.register(_OfEngine(standing))

    def watch_fleet(self, fleet: Fleet) -> None:
        self.registry.register(_OfFleet(fleet))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _OfEngine:
    """What the engine counts itself."""

    def __init__(self, standing: Callable[[], Standing | None]):
        self.standing = standing

    def collect(self) -> Iterator[Metric]:
        now = self.standing()
        if now is None:
            return
        yield GaugeMetricFamily(PREFIX + "num_requests_running", "Requests in slots.", now.running)
        yield GaugeMetricFamily(PREFIX + "num_requests_waiting", "Requests without one.", now.waiting)
        yield CounterMetricFamily(PREFIX + "rows", "Rows of model calls, padding included.", now.rows)
        yield CounterMetricFamily(PREFIX + "rows_padded", "Rows of them that no request needed.", now.rows_padded)
        reported = now.rows_used + now.rows_padded
        fill = now.rows_used / reported if reported else 0.0
        yield GaugeMetricFamily(PREFIX + "batch_fill", "Share of the rows of model calls that requests needed.", fill)
        text = "Times that memory ran out and micro-batches became half as large."
        yield CounterMetricFamily(PREFIX + "out_of_memory_splits", text, now.splits)
        text = "Candidates whose reward, latent or picture was not finite."
        yield CounterMetricFamily(PREFIX + "nan_rewards", text, now.nan_rewards)
        yield CounterMetricFamily(PREFIX + "reward_seconds", "Seconds in rewards.", now.reward_seconds)


class _OfFleet:
    """Of each engine's process."""

    def __init__(self, fleet: Fleet):
        self.fleet = fleet

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(PREFIX + "engine_up", "1 where the engine takes requests.", labels=["engine"])
        restarts = CounterMetricFamily(
            PREFIX + "engine_restarts", "Times that the engine was started again.", labels=["engine"]
        )
        left = GaugeMetricFamily(
            PREFIX + "engine_outstanding_nfe", "NFE that its requests may still take.", labels=["engine"]
        )
        for seat in self.fleet.seats:
            name = [str(seat.number)]
            up.add_metric(name, seat.up)
            restarts.add_metric(name, seat.restarts)
            left.add_metric(name, self.fleet.load_of(seat))
        yield from (up, restarts, left)
