"""What a server counts, in Prometheus's form; one registry per server, so that tests may run several in a process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ROUNDS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 56)


class Metrics:
    """Names begin with `remask_`; docs/serving.md lists them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._checkpoints: dict[str, str] = {}
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Requests answered", "protocol", "method", "code")
        self.request_seconds = self._histogram(
            "request_seconds", "From a complete request to its answer", SECONDS, "protocol", "method"
        )
        self.in_flight = self._gauge("in_flight", "Requests being handled", "protocol")
        self.streams = self._gauge("streams", "Open WebSockets, gRPC sessions and event streams", "kind")
        self.ready = self._gauge("ready", "1 if warm and not draining")
        self.model = self._gauge("model_info", "1 for the model being served", "model", "checkpoint")

        self.queue_depth = self._gauge("policy_queue_depth", "Observations waiting for the policy")
        self.queue_seconds = self._histogram("policy_queue_seconds", "From admission to compute", SECONDS)
        self.batch_size = self._histogram("policy_batch_size", "Observations computed together", SIZES)
        self.batch_seconds = self._histogram("policy_batch_seconds", "Compute of one batch", SECONDS)
        self.chunks = self._counter("policy_chunks", "Action chunks computed")
        self.rounds = self._histogram("policy_rounds", "Decoding rounds of a chunk", ROUNDS)
        self.dropped = self._counter("policy_dropped", "Observations dropped before compute", "reason")
        self.restarts = self._counter("worker_restarts", "Worker processes that ended unasked", "worker")
        self.recovery_seconds = self._gauge("worker_recovery_seconds", "From the last worker's death to ready", "worker")

        self.tokens = self._counter("chat_tokens", "Tokens: prompt, completion, drafted, accepted", "kind")
        self.chat_rounds = self._counter("chat_rounds", "Speculative rounds")
        self.tokens_per_round = self._histogram(
            "chat_tokens_per_round", "Tokens of one request sent at once: its first, then a round's, the bonus included", SIZES
        )
        self.accepted = self._counter("chat_accepted", "Draft tokens accepted, by position in the draft", "position")
        self.image_cache = self._counter("image_cache", "Image embeddings looked up", "result")

    def set_model(self, model: str, checkpoint: str) -> None:
        """What is being served under a name from now on."""
        if model in self._checkpoints:
            self.model.remove(model, self._checkpoints[model])
        self._checkpoints[model] = checkpoint
        self.model.labels(model, checkpoint).set(1)

    def text(self) -> tuple[bytes, str]:
        """The page that Prometheus reads, and its content type."""
        return generate_latest(self.registry), "text/plain; version=0.0.4; charset=utf-8"

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"remask_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"remask_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"remask_{name}", text, labels, buckets=buckets, registry=self.registry)
