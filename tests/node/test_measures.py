"""The labels stay few and what is counted is right; a real node's are in test_observed.py."""

from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from r3mes_vllm.engine.version import State
from r3mes_vllm.engine.watching import Generation
from r3mes_vllm.node.measures import MOST, Histogram, Measures
from r3mes_vllm.node.metrics import NodeMetrics


def generation(adapter: str | None) -> Generation:
    return Generation(adapter, None, prompt_tokens=5, streamed=True, first_s=0.3, queue_s=0.01)


def measured(*served: str) -> Measures:
    measures = Measures()
    measures.served = lambda: served
    return measures


def shown(measures: Measures, **of_host: Any) -> dict[str, float]:
    host: Any = SimpleNamespace(
        **{
            "versions": [],
            "loads": {"done": 2},
            "failures": SimpleNamespace(refused_by_engine=1),
            **of_host,
        }
    )
    supply: Any = SimpleNamespace(
        refusals={"rank_is_sane": 1, "made up by somebody": 2},
        fetched_bytes=lambda: {("gateway", "ipfs.example"): 7},
    )
    registry = CollectorRegistry()
    registry.register(NodeMetrics(host, supply, measures))
    lines = generate_latest(registry).decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_a_histogram_counts_as_prometheus_does() -> None:
    histogram = Histogram((1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(seconds)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == 12.0


def test_a_generation_is_counted_under_its_adapter() -> None:
    measures = measured("legal")
    it = generation("legal")
    watch = measures.observe(it)
    assert shown(measures)['r3mes_adapter_requests_running{adapter="legal"}'] == 1
    watch.generated(1)
    it.token_s = 0.03
    watch.generated(4)
    watch.ended()
    found = shown(measures)
    of = '{adapter="legal"}'
    assert found[f"r3mes_adapter_requests_running{of}"] == 0
    assert found[f"r3mes_adapter_prompt_tokens_total{of}"] == 5
    assert found[f"r3mes_adapter_generated_tokens_total{of}"] == 5
    for name, sum_ in (("first_token", 0.3), ("queue", 0.01), ("token", 0.03)):
        assert found[f"r3mes_adapter_{name}_seconds_count{of}"] == 1
        assert found[f"r3mes_adapter_{name}_seconds_sum{of}"] == sum_


def test_what_is_not_served_is_other_and_no_name_is_the_base_model() -> None:
    measures = measured("legal", "ipfs://baf1")
    for name in (None, "ipfs://baf1", "unknown", "what is a contract?"):
        measures.observe(generation(name)).generated(1)
    found = shown(measures)
    assert found['r3mes_adapter_generated_tokens_total{adapter="base"}'] == 1
    assert found['r3mes_adapter_generated_tokens_total{adapter="other"}'] == 3
    assert not [name for name in found if "ipfs" in name and "adapter=" in name]


def test_a_name_that_is_removed_takes_its_series_along() -> None:
    served = ["legal", "medical"]
    measures = Measures()
    measures.served = lambda: served
    watch = measures.observe(generation("legal"))
    measures.of("legal").requests["complete"] += 1
    assert [name for name in shown(measures) if '"legal"' in name]
    served.remove("legal")
    watch.generated(3)
    watch.ended()
    measures.of("legal").requests["complete"] += 1
    assert not [name for name in shown(measures) if '"legal"' in name]


def test_beyond_so_many_names_the_next_are_other() -> None:
    names = [f"adapter-{number}" for number in range(MOST + 50)]
    measures = measured(*names)
    for name in names:
        measures.observe(generation(name)).generated(1)
    series = [it for it in shown(measures) if it.startswith("r3mes_adapter_generated_tokens_total")]
    assert len(series) == MOST
    measures.served = lambda: ["late"]
    measures.observe(generation("late")).generated(1)
    series = [it for it in shown(measures) if it.startswith("r3mes_adapter_generated_tokens_total")]
    assert len(series) == 3


def test_rules_and_sources_are_of_known_kinds() -> None:
    found = shown(measured(), versions=[SimpleNamespace(state=State.STAGED)])
    assert found['r3mes_adapter_refusals_total{rule="rank_is_sane"}'] == 1
    assert found['r3mes_adapter_refusals_total{rule="engine"}'] == 1
    assert found['r3mes_adapter_refusals_total{rule="other"}'] == 2
    assert found['r3mes_fetched_bytes_total{host="ipfs.example",source="gateway"}'] == 7
    assert found['r3mes_adapters{state="staged"}'] == 1
    assert found['r3mes_adapter_loads_total{outcome="done"}'] == 2


def test_loads_and_looks_are_timed() -> None:
    measures = measured()
    measures.loaded("fetch", 0.5)
    measures.checked("token", True, 0.02)
    measures.checked("token", False, 8.0)
    found = shown(measures)
    assert found['r3mes_adapter_load_seconds_sum{phase="fetch"}'] == 0.5
    assert found['r3mes_canary_checks_total{kind="token",outcome="well"}'] == 1
    assert found['r3mes_canary_checks_total{kind="token",outcome="unwell"}'] == 1
    assert found['r3mes_canary_seconds_count{kind="token"}'] == 2
