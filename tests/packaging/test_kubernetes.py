"""The manifests: what their schemas say, what refers to what, and what a real node answers."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from r3mes_vllm import settings
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.ipfs.cid import CID
from tests.conftest import Network
from tests.packaging.conftest import CONFIGS, TOOLS, documents, parse, settings_of, tool

FOLDER = CONFIGS / "kubernetes"
VERSIONS = ("1.32", "1.37")
"""Of Kubernetes: one that knows `sleep` before the end by itself, and the latest known."""
FILES = sorted(it for it in FOLDER.glob("*/*.yaml") if it.name != "kustomization.yaml")
DOCUMENTS = [it for file in FILES for it in documents(file)]
PODS = {
    it["metadata"]["name"]: it for it in DOCUMENTS if it["kind"] in ("Deployment", "StatefulSet")
}


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [it for it in DOCUMENTS if it["kind"] == kind]


def pod(name: str) -> dict[str, Any]:
    template: dict[str, Any] = PODS[name]["spec"]["template"]
    return template


def container(name: str) -> dict[str, Any]:
    [found] = pod(name)["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def own(document: dict[str, Any]) -> bool:
    """Of Kubernetes itself, not of something that is installed into it."""
    group = document["apiVersion"].partition("/")[0]
    return "." not in group or group == "networking.k8s.io"


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_what_kubernetes_takes(version: str, tools: Path, tmp_path: Path) -> None:
    def check(text: str) -> int:
        file = tmp_path / "all.yaml"
        file.write_text(text)
        validate = ("python", "-m", "kubernetes_validate", "--strict", "-k", version)
        return tool(tools, *validate, str(file)).returncode

    text = yaml.safe_dump_all([it for it in DOCUMENTS if own(it)])
    assert check(text) == 0
    assert check(text.replace("readinessProbe", "readynessProbe")) != 0


def test_custom_resources_are_what_their_definitions_say(tools: Path) -> None:
    def check(found: list[dict[str, Any]]) -> int:
        schemas = str(Path(__file__).with_name("crds.json"))
        given = json.dumps(found)
        return tool(tools, "python", str(TOOLS), "schema", schemas, given=given).returncode

    custom = [it for it in DOCUMENTS if not own(it)]
    assert len(custom) == 6
    assert check(custom) == 0
    assert check([json.loads(json.dumps(custom[0]).replace('"poolRef"', '"pool"'))]) != 0


def test_each_file_is_in_its_kustomization() -> None:
    for folder in ("base", "monitoring", "gateway"):
        [kustomization] = documents(FOLDER / folder / "kustomization.yaml")
        files = {it.name for it in FILES if it.parent.name == folder}
        assert {it for it in kustomization["resources"] if it != "../base"} == files


@pytest.mark.parametrize("folder", ["base", "monitoring", "gateway"])
def test_kustomize_builds_them(folder: str) -> None:
    """Where kubectl is not installed, the test above has read what it would."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return
    command = [kubectl, "kustomize", str(FOLDER / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert all(
        it["metadata"].get("namespace") == "r3mes" for it in built if it["kind"] != "Namespace"
    )
    for it in built:
        if it["kind"] == "StatefulSet":
            [node] = it["spec"]["template"]["spec"]["containers"]
            public = {"name": "R3MES_PUBLIC_METRICS", "value": "true"} in node["env"]
            assert public == (folder == "gateway")
            assert node["image"].startswith("registry.example/")


@pytest.mark.parametrize("name", PODS)
def test_a_pod_gives_up_what_it_can_and_has_the_time_to_end(name: str) -> None:
    spec, of_it = pod(name)["spec"], container(name)
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    inner = of_it["securityContext"]
    assert inner["readOnlyRootFilesystem"]
    assert inner["allowPrivilegeEscalation"] is False
    assert inner["capabilities"] == {"drop": ["ALL"]}
    drain = settings.load().drain_timeout
    waits = of_it["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > waits + drain
    mounted = {it["mountPath"] for it in of_it["volumeMounts"]}
    assert {"/cache", "/state", "/tmp"} <= mounted


def test_a_nodes_settings_are_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [kustomization] = documents(FOLDER / "base" / "kustomization.yaml")
    [node_map] = kustomization["configMapGenerator"]
    environment = dict(it.split("=", 1) for it in node_map["literals"])
    environment |= {it["name"]: it.get("value", "x") for it in container("r3mes-node")["env"]}
    assert environment["R3MES_SERVING_NODE_URL"].startswith("http://$(POD_NAME).r3mes-node.")
    given = settings_of(environment, monkeypatch)
    assert given.drain_timeout == 60
    assert given.backend == "http://r3mes-backend:8000"
    assert parse(container("r3mes-node")["args"])
    assert parse(container("r3mes-backend")["args"])["allow_private_nodes"]
    assert container("r3mes-node")["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_variables_of_services_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(pod(name)["spec"]["enableServiceLinks"] is False for name in PODS)
    monkeypatch.setenv("BACKEND_PORT", "tcp://10.0.0.7:8000")  # of a Service named `backend`
    with pytest.raises(ConfigError):
        settings.load()


def test_probes_ask_for_what_is_answered(network: Network) -> None:
    urls = {"r3mes-node": network.node.url, "r3mes-backend": network.backend.url}
    for name, url in urls.items():
        ports = {it["name"] for it in container(name)["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container(name)[probe]["httpGet"]
            assert asked["port"] in ports
            assert httpx.get(url + asked["path"]).status_code == 200
    node = container("r3mes-node")
    assert node["readinessProbe"]["httpGet"]["path"] == "/ready"
    for probe, seconds in (("startupProbe", 1800), ("livenessProbe", 300)):
        assert node[probe]["periodSeconds"] * node[probe]["failureThreshold"] >= seconds


def test_selectors_select() -> None:
    labels = [pod(name)["metadata"]["labels"] for name in PODS]

    def selected(by: dict[str, str]) -> int:
        return sum(by.items() <= it.items() for it in labels)

    for document in DOCUMENTS:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            assert selected(spec["selector"]) == 1
        elif "selector" in spec:
            assert selected(spec["selector"]["matchLabels"]) == 1
    for policy in of_kind("NetworkPolicy"):
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        for rule in policy["spec"].get("ingress", []):
            assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]
            assert rule["from"]


def test_a_gateway_finds_the_node_that_holds_an_adapter(network: Network) -> None:
    """Its picker compares the request's model with the names in `vllm:lora_requests_info`."""
    [pool] = of_kind("InferencePool")
    assert pool["spec"]["targetPorts"] == [{"number": 8081}]
    assert container("r3mes-node")["ports"] == [{"name": "http", "containerPort": 8081}]
    [rewrite] = of_kind("InferenceModelRewrite")
    assert rewrite["spec"]["poolRef"]["name"] == pool["metadata"]["name"]
    for rule in rewrite["spec"]["rules"]:
        [match], [target] = rule["matches"], rule["targets"]
        name, _, cid = target["modelRewrite"].partition("@")
        assert name == match["model"]["value"]
        assert str(CID.parse(cid)) == cid

    listed = httpx.get(f"{network.node.url}/v1/models").json()["data"]
    [cid] = [it["cid"] for it in listed if it["id"] == "legal"]
    asked = f"legal@{cid}"
    body = {"model": asked, "prompt": "x", "max_tokens": 4}
    httpx.post(f"{network.node.url}/v1/completions", json=body, timeout=60).raise_for_status()
    text = httpx.get(f"{network.node.url}/metrics").text
    info = re.findall(r"^vllm:lora_requests_info\{(.*)\}", text, re.MULTILINE)
    assert any(f'running_lora_adapters="{asked}"' in it and "max_lora=" in it for it in info)
    assert not any('running_lora_adapters="legal"' in it for it in info), (
        "then no rewrite is needed"
    )
