"""What each adapter does, for Prometheus, beside vLLM's own metrics.

vLLM's `vllm:lora_requests_info` names whole sets of adapters in one label and tells running from
waiting no more; it stays for the Gateway API. The labels here are the names that are served now.
"""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from r3mes_vllm.engine.host import Host
from r3mes_vllm.engine.version import State


class AdapterMetrics(Collector):
    def __init__(self, host: Host) -> None:
        self._host = host

    def collect(self) -> Iterator[Metric]:
        host = self._host
        requests = CounterMetricFamily(
            "r3mes_adapter_requests", "Requests since the name is served.", labels=["adapter"]
        )
        running = GaugeMetricFamily(
            "r3mes_adapter_requests_running", "Requests that hold it.", labels=["adapter"]
        )
        for name, version in host.adapters.items():
            requests.add_metric([name], host.requests[name])
            running.add_metric([name], version.uses)
        yield requests
        yield running
        states = GaugeMetricFamily("r3mes_adapters", "Versions here.", labels=["state"])
        versions = [it.state for it in host.versions]
        for state in State:
            if state is not State.GONE:
                states.add_metric([state], versions.count(state))
        yield states
        loads = CounterMetricFamily(
            "r3mes_adapter_loads", "Adapters put on the engine.", labels=["outcome"]
        )
        for outcome, count in host.loads.items():
            loads.add_metric([outcome], count)
        yield loads
