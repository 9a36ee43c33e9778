"""What a server counts, for Prometheus; a registry for each app."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = self.registry
        self.requests = Counter(
            "rc_requests_total", "Requests by path and status", ["path", "status"], registry=kept
        )
        self.tokens = Counter("rc_tokens_total", "Tokens read and written", ["kind"], registry=kept)
        self.cancelled = Counter(
            "rc_cancelled_total", "Answers whose client went away", registry=kept
        )
        self.waiting = Gauge("rc_waiting", "Answers that wait", registry=kept)
        self.running = Gauge("rc_running", "Answers that are being written", registry=kept)
        self.rows = Histogram(
            "rc_batch_rows",
            "Answers side by side, whenever some begin",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=kept,
        )
        self.first = Histogram(
            "rc_first_token_seconds",
            "From arrival to the first text",
            buckets=SECONDS,
            registry=kept,
        )
        self.seconds = Histogram(
            "rc_answer_seconds", "From arrival to the end", buckets=SECONDS, registry=kept
        )

    def text(self) -> bytes:
        """Returns everything in Prometheus's text form."""
        return generate_latest(self.registry)
