"""compose.yaml: what its schema says, and what its commands do outside of containers."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from r3mes_vllm import settings
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.node.guard import refuse_open_door
from tests.packaging.conftest import (
    CONFIGS,
    ROOT,
    TOOLS,
    interpolated,
    parse,
    settings_of,
    tool,
)
from tests.peers.postgres import Postgres
from tests.programs import free_port, program

EXAMPLE = (CONFIGS / "compose.env.example").read_text()
DEMANDED = re.findall(r"^([A-Z0-9_]+)=$", EXAMPLE, re.MULTILINE)
SECRETS = {name: f"{name.lower()}-for/a@test" for name in DEMANDED}
TEXT = (ROOT / "compose.yaml").read_text()


def compose(text: str = TEXT) -> dict[str, Any]:
    read: dict[str, Any] = interpolated(yaml.safe_load(text), SECRETS)
    return read


SERVICES: dict[str, Any] = compose()["services"]


def test_it_is_what_the_specification_says(tools: Path, tmp_path: Path) -> None:
    def check(text: str) -> int:
        file = tmp_path / "compose.yaml"
        file.write_text(yaml.safe_dump(compose(text)))  # merge keys resolved, as Compose does
        return tool(tools, "python", str(TOOLS), "compose", str(file)).returncode

    assert check(TEXT) == 0
    assert check(TEXT.replace("healthcheck:", "healthchek:")) != 0
    assert check(TEXT.replace("  node-state:\n", "")) != 0


def test_nothing_starts_without_its_secrets() -> None:
    assert len(DEMANDED) == 4
    for name in DEMANDED:
        with pytest.raises(KeyError, match=name):
            interpolated(yaml.safe_load(TEXT), {it: "x" for it in DEMANDED if it != name})
    offered = set(re.findall(r"^#?([A-Z0-9_]+)=", EXAMPLE, re.MULTILINE))
    assert set(re.findall(r"\$\{([A-Z0-9_]+)", TEXT)) == offered


def test_what_depends_waits_for_health_and_all_is_checked() -> None:
    for name, service in SERVICES.items():
        assert service["restart"] == "unless-stopped"
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other]
        assert "healthcheck" in service or name.startswith("node-"), "a node's is its image's"
        assert "no-new-privileges:true" in service["security_opt"]
        assert "latest" not in service["image"]
        assert ":" in service["image"]


def test_only_kubos_peers_come_in_from_outside() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:") or (name, port[:5]) == ("kubo", "4001:")
            assert not re.search(r":(5001|8080|5432)(/|$)", port)


def test_a_node_has_the_time_to_drain() -> None:
    for name in ("node-cpu", "node-gpu"):
        node = SERVICES[name]
        drain = float(node["environment"]["R3MES_DRAIN_TIMEOUT"])
        assert int(node["stop_grace_period"].rstrip("s")) > drain
        assert node["profiles"] == [name.removeprefix("node-")]
        assert "node-state:/state" in node["volumes"]
        assert node["shm_size"] == "2gb"
    backend = SERVICES["backend"]
    assert int(backend["stop_grace_period"].rstrip("s")) > settings.load().drain_timeout


def test_a_nodes_settings_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    node = SERVICES["node-cpu"]
    parse(node["command"])
    given = settings_of(node["environment"], monkeypatch)
    assert given.backend == "http://backend:8000"
    assert given.loras == ["legal", "medical"]
    assert (given.model, given.max_loras, given.max_lora_rank, given.vllm) == (None, None, None, {})
    refuse_open_door(given)
    assert given.api_keys == [SECRETS["R3MES_API_KEYS"]]
    # Without the line that lets it speak plain HTTP, it would not run without keys either.
    with pytest.raises(ConfigError, match="without an API key"):
        refuse_open_door(given.model_copy(update={"api_keys": [], "insecure": False}))


def test_a_nodes_engine_is_set_in_the_file_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = dict(re.findall(r"^#(R3MES_[A-Z_]+)=(.+)$", EXAMPLE, re.MULTILINE))
    offered["R3MES_VLLM"] = offered["R3MES_VLLM"].strip("'")
    node = interpolated(yaml.safe_load(TEXT), SECRETS | offered)["services"]["node-gpu"]
    given = settings_of(node["environment"], monkeypatch)
    assert (given.max_loras, given.max_lora_rank) == (8, 32)
    assert given.vllm_arguments == ["--max-model-len=8192", "--gpu-memory-utilization=0.92"]


def test_the_backends_command_runs_on_the_database_that_it_is_given(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = SERVICES["backend"]
    settings_of(service["environment"], monkeypatch)
    assert parse(service["command"])["allow_private_nodes"]
    port = str(free_port())
    arguments = [{"8000": port, "0.0.0.0": "127.0.0.1"}.get(it, it) for it in service["command"]]
    environment = dict(service["environment"])
    with postgres.database() as name:
        url = environment["R3MES_DATABASE_URL"]
        assert url == "postgresql://r3mes@postgres/r3mes"
        environment["R3MES_DATABASE_URL"] = postgres.url(name)
        running = program(tmp_path, *arguments, url=f"http://127.0.0.1:{port}", env=environment)
        with running as backend:
            backend.wait_for("/ready", 60)
            assert postgres.sql("SELECT count(*) FROM loras", name) == ["0"]
            assert backend.stop() in (0, -signal.SIGTERM)
