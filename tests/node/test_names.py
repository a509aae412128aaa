"""Names that don't resolve: each is said, with whose it is; what needs none goes on."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from r3mes_vllm.engine.model import why_not
from r3mes_vllm.errors import HubUnreachable
from r3mes_vllm.node.doctor import checks_adapters, checks_network
from tests import without_names
from tests.doctor.given import settings as settings_of
from tests.node.test_heartbeat import OldBackend, listening, registered, until
from tests.programs import free_port

BACKEND = "https://backend.invalid"
SOURCES = ("--ipfs-api", "http://daemon.invalid:5001", "--ipfs-gateway", "https://gateway.invalid")


def without(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("R3MES_")}
    found = subprocess.run(
        [sys.executable, "-m", "tests.without_names", *arguments],
        env=environment
        | {"R3MES_STATE_DIR": str(folder / "state"), "R3MES_CACHE_DIR": str(folder / "cache")}
        | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if found.returncode == without_names.CANNOT:
        pytest.skip(found.stderr)
    assert "Traceback" not in found.stderr
    return found


def test_a_pull_names_each_source_that_has_no_address(tmp_path: Path) -> None:
    cid = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
    found = without(tmp_path, "adapter", "pull", cid, *SOURCES, "--backend-url", BACKEND)
    assert found.returncode == 1
    for host in ("daemon.invalid", "gateway.invalid"):
        assert f"the name {host} does not resolve" in found.stderr
    assert "try: " in found.stderr


def test_a_pull_by_name_names_the_backend_and_takes_what_is_known(tmp_path: Path) -> None:
    known = without(tmp_path, "adapter", "pull", "legal", *SOURCES, "--backend-url", BACKEND)
    assert known.returncode == 0
    unknown = without(tmp_path, "adapter", "pull", "nobodys", *SOURCES, "--backend-url", BACKEND)
    assert (unknown.returncode, "no adapter named 'nobodys'" in unknown.stderr) == (1, True)
    for found in (known, unknown):
        assert f"the backend {BACKEND} can't be reached: " in found.stderr
        assert "Name or service not known" in found.stderr


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Which names below `.invalid` have which address; nobody else is asked for one."""
    known: dict[str, str] = {}
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else str(host)
        if name.endswith(".invalid"):
            if name not in known:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            host = known[name]
        return real(host, *args, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


async def test_a_backend_whose_name_resolves_again_has_the_node_soon(
    names: dict[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r3mes_vllm.node.backend_client.refuse_plain_http", lambda url: None)
    backend, port = OldBackend(), free_port()
    url = f"http://backend.invalid:{port}"
    async with registered(url) as registration:
        await until(lambda: registration.beats["unreachable"] >= 2)
        said = f"not registered: the backend {url} can't be reached: "
        assert said in registration_warnings(capfd)
        async with listening(backend, port):
            await asyncio.sleep(0)
            names["backend.invalid"] = "127.0.0.1"
            await until(lambda: backend.known)
            await until(lambda: registration.trouble == "")


def registration_warnings(capfd: pytest.CaptureFixture[str]) -> str:
    said = capfd.readouterr().err
    assert said.count("not registered") == 1, "the same failure is said once"
    assert "Name or service not known; trying again, serving meanwhile" in said
    return said


def test_a_hub_without_an_address_is_one_that_passes(names: dict[str, str]) -> None:
    with pytest.raises(Exception, match="not known") as caught:
        HfApi(endpoint="https://hub.invalid").list_repo_files("its/model")
    found = why_not("its/model", caught.value)
    assert isinstance(found, HubUnreachable)
    assert "--model its/model: the model hub does not answer now: " in found.message
    assert "Name or service not known" in found.message
    assert "give a local directory with the model" in found.hint


async def test_doctor_names_what_does_not_resolve(tmp_path: Path, names: dict[str, str]) -> None:
    given = settings_of(
        tmp_path,
        backend_url=BACKEND,
        ipfs_api_url="http://daemon.invalid:5001",
        ipfs_gateways=["https://gateway.invalid"],
    )
    for found, host in (
        (await checks_network.backend(given), "backend.invalid"),
        (await checks_network.ipfs_daemon(given), "daemon.invalid"),
        (await checks_adapters.gateways(given), "gateway.invalid"),
    ):
        assert (found.status in ("fail", "warn"), host in found.message) == (True, True), found
        assert found.fix
