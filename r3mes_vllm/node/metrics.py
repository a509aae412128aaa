"""What the node shows Prometheus, beside vLLM's own metrics.

vLLM's `vllm:lora_requests_info` names whole sets of adapters in one label and tells running from
waiting no more; it stays for the Gateway API. The labels here are few, whoever sends what.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.adapters.vetting import RULE_NAMES
from r3mes_vllm.engine.host import Host
from r3mes_vllm.engine.version import State
from r3mes_vllm.node.heartbeat import Registration
from r3mes_vllm.node.measures import OTHER, Histogram, Measures, OfAdapter

_Values = Iterable[tuple[tuple[str, ...], float]]
_Histograms = Iterable[tuple[str, Histogram]]


class NodeMetrics(Collector):
    """`registration` is None until the node is in the network."""

    registration: Registration | None = None

    def __init__(self, host: Host, supply: Supply, measures: Measures) -> None:
        self._host = host
        self._supply = supply
        self._measures = measures

    def collect(self) -> Iterator[Metric]:
        yield from self._of_adapters()
        yield from self._of_loads()
        yield from self._of_node()

    def _of_adapters(self) -> Iterator[Metric]:
        found = self._measures.by_name()

        def each(value: Callable[[OfAdapter], float]) -> _Values:
            return [((name,), value(it)) for name, it in found.items()]

        def histograms(value: Callable[[OfAdapter], Histogram]) -> _Histograms:
            return [(name, value(it)) for name, it in found.items()]

        by = ("adapter",)
        yield _counter(
            "r3mes_adapter_requests",
            "Requests that have ended.",
            ("adapter", "outcome"),
            [
                ((name, outcome), count)
                for name, it in found.items()
                for outcome, count in list(it.requests.items())
            ],
        )
        running = each(lambda it: it.running)
        yield _gauge("r3mes_adapter_requests_running", "Requests the engine has.", by, running)
        prompt = each(lambda it: it.prompt_tokens)
        yield _counter("r3mes_adapter_prompt_tokens", "Tokens of prompts.", by, prompt)
        generated = each(lambda it: it.generated_tokens)
        yield _counter("r3mes_adapter_generated_tokens", "Tokens generated.", by, generated)
        yield _histogram(
            "r3mes_adapter_first_token_seconds",
            "Until the first token.",
            "adapter",
            histograms(lambda it: it.first_token),
        )
        yield _histogram(
            "r3mes_adapter_token_seconds",
            "Between two tokens of an answer.",
            "adapter",
            histograms(lambda it: it.token),
        )
        yield _histogram(
            "r3mes_adapter_queue_seconds",
            "In the engine's queue.",
            "adapter",
            histograms(lambda it: it.queue),
        )

    def _of_loads(self) -> Iterator[Metric]:
        host, supply = self._host, self._supply
        versions = [it.state for it in host.versions]
        yield _gauge(
            "r3mes_adapters",
            "Versions here.",
            ("state",),
            [((it,), versions.count(it)) for it in State if it is not State.GONE],
        )
        loads = [((outcome,), count) for outcome, count in list(host.loads.items())]
        yield _counter("r3mes_adapter_loads", "Put on the engine.", ("outcome",), loads)
        yield _histogram(
            "r3mes_adapter_load_seconds",
            "Of each phase of a load.",
            "phase",
            list(self._measures.loads.items()),
        )
        rules = Counter({"engine": host.failures.refused_by_engine})
        for rule, count in list(supply.refusals.items()):
            rules[rule if rule in RULE_NAMES else OTHER] += count
        refusals = [((rule,), count) for rule, count in rules.items()]
        yield _counter("r3mes_adapter_refusals", "Adapters refused.", ("rule",), refusals)
        yield _counter(
            "r3mes_fetched_bytes",
            "Of verified blocks.",
            ("source", "host"),
            [((kind, name), count) for (kind, name), count in supply.fetched_bytes().items()],
        )

    def _of_node(self) -> Iterator[Metric]:
        measures, registration = self._measures, self.registration
        beats = registration.beats if registration else {}
        counts = [((outcome,), count) for outcome, count in list(beats.items())]
        yield _counter("r3mes_heartbeats", "Sent to the backend.", ("outcome",), counts)
        at = registration.accepted_at if registration else None
        age = [] if at is None else [((), time.monotonic() - at)]
        yield _gauge("r3mes_heartbeat_age_seconds", "Since the last accepted one.", (), age)
        checks = [(labels, count) for labels, count in list(measures.checks.items())]
        yield _counter("r3mes_canary_checks", "Looks at the engine.", ("kind", "outcome"), checks)
        seconds = list(measures.check_seconds.items())
        yield _histogram("r3mes_canary_seconds", "That a look took.", "kind", seconds)


def _counter(name: str, text: str, labels: tuple[str, ...], values: _Values) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for given, value in values:
        family.add_metric(given, value)
    return family


def _gauge(name: str, text: str, labels: tuple[str, ...], values: _Values) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for given, value in values:
        family.add_metric(given, value)
    return family


def _histogram(name: str, text: str, label: str, values: _Histograms) -> Metric:
    family = HistogramMetricFamily(name, text, labels=[label])
    for given, it in values:
        family.add_metric([given], it.buckets(), it.sum)
    return family
