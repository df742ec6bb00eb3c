"""What Prometheus reads: vLLM's names where they mean the same, and where memory is, to the token, under ours."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lab.serve.messages import Answer, Failed, Gauges, News

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)

GAUGES = {  # of lab.serve.messages.Gauges
    "running": ("vllm:num_requests_running", "Requests in memory"),
    "waiting": ("vllm:num_requests_waiting", "Requests that wait for memory"),
    "capacity": ("kvlab:kv_capacity_tokens", "Tokens that KV memory holds"),
    "stored": ("kvlab:kv_stored_tokens", "K and V of running sequences"),
    "ended": ("kvlab:kv_ended_tokens", "K and V held only by ended rows of a batch that goes on"),
    "unwritten": ("kvlab:kv_unwritten_tokens", "Asked for by a policy and still empty"),
    "rounding": ("kvlab:kv_rounding_tokens", "Held and not asked for: the rest of a block, page or power of two"),
    "cached": ("kvlab:kv_cached_tokens", "Held by nobody, but a prefix hit can find it"),
    "free": ("kvlab:kv_free_tokens", "The rest"),
}
DERIVED = {
    "usage": ("vllm:kv_cache_usage_perc", "Share of the blocks that sequences hold, 1 is all"),
    "blocks": ("kvlab:kv_block_utilisation", "The same: what is held, of the capacity"),
    "tokens": ("kvlab:kv_token_utilisation", "What is stored, of the capacity"),
    "tail": ("kvlab:kv_tail_waste_tokens", "Held behind the last token that was written: unwritten and rounding"),
}
COUNTERS = {  # of lab.serve.messages.Counts
    "prompt_tokens": ("vllm:prompt_tokens", "Tokens of the prompts that were computed"),
    "generated": ("vllm:generation_tokens", "Tokens generated"),
    "preemptions": ("vllm:num_preemptions", "Preemptions, for want of memory"),
    "looked_up": ("vllm:prefix_cache_queries", "Tokens of prompts that the prefix cache was asked for"),
    "found": ("vllm:prefix_cache_hits", "Of these, tokens found in memory"),
    "failed_steps": ("kvlab:failed_steps", "Steps of the engine that failed"),
}
HISTOGRAMS = {
    "queue_s": ("vllm:request_queue_time_seconds", "From a request's arrival to its first memory"),
    "ttft_s": ("vllm:time_to_first_token_seconds", "From a request's arrival to its first token"),
    "tpot_s": ("vllm:request_time_per_output_token_seconds", "Mean time from token to token, per request"),
    "e2e_s": ("vllm:e2e_request_latency_seconds", "From a request's arrival to its last token"),
    "gap": ("vllm:inter_token_latency_seconds", "From a token to the next, per token"),
}


class Metrics:
    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()

        def named(kind: Any, name: str, text: str, **options: Any) -> Any:
            return kind(name, text, ["model_name"], registry=self.registry, **options).labels(model)

        self._gauges = {key: named(Gauge, *about) for key, about in (GAUGES | DERIVED).items()}
        self._counters = {key: named(Counter, *about) for key, about in COUNTERS.items()}
        self._times = {key: named(Histogram, *about, buckets=SECONDS) for key, about in HISTOGRAMS.items()}
        labels = ["model_name", "finished_reason"]
        text = "Requests by how they ended: stop, length, abort, error"
        success = Counter("vllm:request_success", text, labels, registry=self.registry)
        self._ends = {reason: success.labels(model, reason) for reason in ("stop", "length", "abort", "error")}
        labels = ["model_name", "limit"]
        text = "Requests refused for want of room (429), by the limit"
        refused = Counter("kvlab:requests_refused", text, labels, registry=self.registry)
        self._refused = {limit: refused.labels(model, limit) for limit in ("queue", "streams")}

        self.streams = named(Gauge, "kvlab:streams_open", "Streams that are being sent")
        self.watchers = named(Gauge, "kvlab:watchers", "Pages of /watch that are open")

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def take(self, news: News) -> None:
        if news.gauges is not None:
            self._set(news.gauges)
        if news.counts is not None:
            for key, counter in self._counters.items():
                counter.inc(getattr(news.counts, key))
            gap = self._times["gap"]
            for seconds, times in news.counts.gaps.items():
                for _ in range(times):
                    gap.observe(seconds)

    def gone(self) -> None:
        """The engine has died, and with it its memory."""
        for gauge in self._gauges.values():
            gauge.set(0)

    def ended(self, event: Answer | Failed) -> None:
        if isinstance(event, Failed):
            if not event.refused:
                self._ends["error"].inc()
            return
        cut = any(output.reason == "length" for output in event.outputs)
        self._ends["length" if cut else "stop"].inc()
        for key, seconds in event.timing._asdict().items():
            if seconds == seconds:  # not NaN: one token has no time per further token
                self._times[key].observe(seconds)

    def cancelled(self, requests: int) -> None:
        self._ends["abort"].inc(requests)

    def refused(self, limit: str) -> None:
        self._refused[limit].inc()

    def _set(self, now: Gauges) -> None:
        held = now.capacity - now.free - now.cached
        derived = {
            "usage": held / now.capacity,
            "blocks": held / now.capacity,
            "tokens": now.stored / now.capacity,
            "tail": now.unwritten + now.rounding,
        }
        for key, value in (now._asdict() | derived).items():
            self._gauges[key].set(value)
