"""Every metric that an alert or the dashboard names is exported by a real node or backend."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Network
from tests.packaging.conftest import CONFIGS, ROOT, TOOLS, documents, tool

DASHBOARD = json.loads((CONFIGS / "grafana" / "dashboards" / "r3mes.json").read_text())
PROMETHEUS = documents(CONFIGS / "prometheus" / "prometheus.yml")[0]
[RULES] = documents(CONFIGS / "prometheus" / "rules.yml")
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
PANELS = [it for it in DASHBOARD["panels"] if it["type"] != "row"]
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
_ASIDE = ("_sum", "_count", "_created")
OF_PROMETHEUS = {"up"}


@pytest.fixture(scope="module")
def exported(network: Network) -> set[str]:
    names = set(OF_PROMETHEUS)
    for program in (network.node, network.backend):
        text = httpx.get(f"{program.url}/metrics").raise_for_status().text
        for family in text_string_to_metric_families(text):
            names |= {family.name + it for it in _SUFFIXES.get(family.type, ("",))}
    return names


def expressions() -> list[str]:
    of_panels = [target["expr"] for panel in PANELS for target in panel["targets"]]
    found = [*of_panels, *(rule["expr"] for rule in ALERTS)]
    return [it.replace("$__rate_interval", "1m") for it in found]


def metrics(tools: Path, found: list[str]) -> set[str]:
    done = tool(tools, "python", str(TOOLS), "promql", given=json.dumps(found))
    assert done.returncode == 0, done.stderr
    return {name for names in json.loads(done.stdout) for name in names}


def test_every_metric_that_is_named_is_exported(tools: Path, exported: set[str]) -> None:
    named = metrics(tools, expressions())
    assert len(named) > 30
    assert named <= exported, named - exported
    # What the dashboard leaves out of the package's own is little.
    ours = {it for it in exported if it.startswith("r3mes_") and not it.endswith(_ASIDE)}
    assert ours <= named, ours - named


def test_a_metric_that_nobody_exports_is_found(tools: Path, exported: set[str]) -> None:
    assert not metrics(tools, ["rate(r3mes_adapter_request_total[1m])"]) <= exported
    done = tool(tools, "python", str(TOOLS), "promql", given='["sum by (a (b)"]')
    assert done.returncode != 0


def test_an_alert_says_what_is_wrong_and_what_to_do() -> None:
    assert {"NodeNotReady", "EngineUnwell", "HeartbeatLate", "AdapterRefused", "QueueLong"} <= {
        it["alert"] for it in ALERTS
    }
    for rule in ALERTS:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "action"}


def test_jobs_are_called_the_same_everywhere() -> None:
    jobs = {it["job_name"]: it for it in PROMETHEUS["scrape_configs"]}
    monitors = documents(CONFIGS / "kubernetes" / "monitoring" / "pod-monitors.yaml")
    in_kubernetes = {
        relabeling["replacement"]
        for monitor in monitors
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
        for relabeling in endpoint["relabelings"]
    }
    named = set(
        re.findall(
            r'job="([^"]+)"',
            " ".join(expressions()) + json.dumps(DASHBOARD["templating"]).replace("\\", ""),
        )
    )
    assert jobs.keys() == in_kubernetes == named
    # Only a node asks for a key, and it stands where compose.yaml puts it.
    [compose] = documents(ROOT / "compose.yaml")
    secret = f"/run/secrets/{compose['services']['prometheus']['secrets'][0]}"
    assert jobs["r3mes-node"]["authorization"] == {"credentials_file": secret}
    services = {
        it.partition(":")[0] for job in jobs.values() for it in job["static_configs"][0]["targets"]
    }
    assert services == {"node", "backend"}


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    provisioning = CONFIGS / "grafana" / "provisioning"
    [sources] = documents(provisioning / "datasources" / "prometheus.yaml")
    [source] = sources["datasources"]
    used: set[str] = {
        target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]
    }
    assert used == {source["uid"]}
    [providers] = documents(provisioning / "dashboards" / "r3mes.yaml")
    path: str = providers["providers"][0]["options"]["path"]
    [compose] = documents(ROOT / "compose.yaml")
    mounts: list[str] = compose["services"]["grafana"]["volumes"]
    assert f"./configs/grafana/dashboards:{path}:ro" in mounts
    ids: list[Any] = [it["id"] for it in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    cells = [
        (x, y)
        for it in DASHBOARD["panels"]
        for x in range(it["gridPos"]["x"], it["gridPos"]["x"] + it["gridPos"]["w"])
        for y in range(it["gridPos"]["y"], it["gridPos"]["y"] + it["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "two panels on one place"
