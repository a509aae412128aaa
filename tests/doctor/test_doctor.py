"""Each check says what is wrong, and its fix."""

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections import namedtuple
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.errors import R3mesError
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.node.backend_client import BackendClient
from r3mes_vllm.node.doctor import checks_adapters, checks_engine, checks_local, checks_network
from r3mes_vllm.node.doctor.checks import checks
from r3mes_vllm.node.doctor.checks_engine import Gpu
from r3mes_vllm.node.doctor.findings import TIMEOUT_S, Finding, examine
from r3mes_vllm.settings import load
from r3mes_vllm.wire import RegisterLora
from tests.backend.stand_ins import LEGAL_CID, serving
from tests.cli.test_cli import run
from tests.doctor.given import settings
from tests.programs import free_port, program

DOCS = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


def test_each_check_has_its_heading(tmp_path: Path) -> None:
    headings = re.findall(r"^## (.+)$", DOCS.read_text(), re.MULTILINE)
    assert headings == [*checks(settings(tmp_path))]


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1 << 20))
    found = checks_local.disk(settings(tmp_path))
    assert found.status == "fail"
    assert "--cache-dir" in found.fix


def test_a_taken_port_fails(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = checks_local.port_free(settings(tmp_path, serving_node_port=port))
    assert found.status == "fail"
    assert "--port" in found.fix


def test_a_port_that_nobody_calls_is_warned_of(tmp_path: Path) -> None:
    given = settings(tmp_path, backend_url="https://backend.test", serving_node_url="http://x:8081")
    found = checks_local.network_port(given)
    assert found.status == "warn"
    assert "--port 8080" in found.fix


async def test_no_backend_fails(tmp_path: Path) -> None:
    found = await checks_network.backend(settings(tmp_path))
    assert found.status == "fail"
    assert "--backend-url" in found.fix


async def test_no_daemon_is_a_warning(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    found = await checks_network.ipfs_daemon(settings(tmp_path, ipfs_api_url=url))
    assert found.status == "warn"
    assert found.fix == "ipfs daemon"


async def test_one_mistake_fails_once() -> None:
    async def fails() -> Finding:
        raise R3mesError("the backend's URL is plain http", hint="--insecure")

    found = await examine({"backend": fails, "clock": fails, "gateways": fails})
    assert [it.status for it in found] == ["fail", "skip", "skip"]
    assert "'backend'" in found[1].message


HANGS = """
import socket, time
resolve = socket.getaddrinfo
def hanging(host, *rest, **named):
    if "example" in str(host):
        time.sleep(100)
    return resolve(host, *rest, **named)
socket.getaddrinfo = hanging
"""


def test_a_name_server_that_never_answers_does_not_hold_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    urls = ("--backend-url", "https://b.example", "--ipfs-gateway", "https://g.example")
    began = time.monotonic()
    found = run("doctor", *urls, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert time.monotonic() - began < 30
    assert found.returncode == 1
    assert "FAIL backend" in found.stdout
    assert "FAIL gateways" in found.stdout


async def test_a_check_that_hangs_ends() -> None:
    async def hang() -> Finding:
        await asyncio.Event().wait()
        raise AssertionError

    (found,) = await examine({"hangs": hang}, timeout_s=0.05)
    assert found.status == "fail"
    assert found.check == "hangs"


def model_in(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


async def test_a_folder_that_is_no_model_fails(tmp_path: Path) -> None:
    whole = model_in(tmp_path / "m", "config.json", "model.safetensors", "tokenizer.json")
    given = settings(tmp_path, model=str(whole))
    assert (await checks_engine.model(given)).status == "ok"
    assert (await checks_engine.tokenizer(given)).status == "ok"
    for missing in ("config.json", "model.safetensors", "tokenizer.json"):
        (whole / missing).rename(tmp_path / missing)
        check = checks_engine.tokenizer if missing == "tokenizer.json" else checks_engine.model
        found = await check(given)
        assert found.status == "fail"
        assert found.fix
        (tmp_path / missing).rename(whole / missing)


async def test_a_hubs_model_that_is_not_here_is_a_warning(tmp_path: Path) -> None:
    found = await checks_engine.model(settings(tmp_path, model="nobody/nothing"))
    assert (found.status, found.fix) == ("warn", "hf download nobody/nothing")


def test_too_little_memory_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(tmp_path, model=str(model_in(tmp_path / "m", "model.safetensors")))
    monkeypatch.setattr(checks_engine, "_build", lambda: "cpu")
    assert checks_engine.memory(given).status == "ok"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    assert checks_engine.memory(given).status == "fail"
    monkeypatch.setattr(checks_engine, "_build", lambda: "cuda")
    monkeypatch.setattr(checks_engine, "gpus_here", lambda: [Gpu("H100", "580.1", 13, 1 << 30)])
    assert checks_engine.memory(given).status == "ok"
    monkeypatch.setattr(checks_engine, "gpus_here", lambda: [Gpu("H100", "580.1", 13, 1)])
    assert checks_engine.memory(given).status == "fail"


async def test_the_memory_that_a_running_node_holds_is_not_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_engine, "_build", lambda: "cpu")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")

    async def health(request: Request) -> Response:
        return Response(b'{"status": "starting"}', media_type="application/json")

    async with serving(Starlette(routes=[Route("/health", health)])) as url:
        given = settings(
            tmp_path,
            model=str(model_in(tmp_path / "m", "model.safetensors")),
            serving_node_port=int(url.rpartition(":")[2]),
        )
        found = await asyncio.to_thread(checks_engine.memory, given)
    assert (found.status, "is running" in found.message) == ("ok", True)
    assert (await asyncio.to_thread(checks_engine.memory, given)).status == "fail"


@pytest.mark.parametrize(
    ("build", "gpus", "status"),
    [
        ("cpu", [], "ok"),
        ("cpu", [Gpu("L4", "580.1", 13, 1)], "warn"),
        ("cuda", [], "fail"),
        ("cuda", [Gpu("L4", "535.1", 12, 1)], "fail"),
        ("cuda", [Gpu("L4", "580.1", 13, 1)], "ok"),
        (None, [], "fail"),
    ],
)
def test_the_build_must_fit_the_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: str | None,
    gpus: list[Gpu],
    status: str,
) -> None:
    monkeypatch.setattr(checks_engine, "_build", lambda: build)
    monkeypatch.setattr(checks_engine, "gpus_here", lambda: gpus)
    monkeypatch.setattr(checks_engine, "_cuda_runtime", lambda: 13)
    found = checks_engine.gpu(settings(tmp_path))
    assert found.status == status
    assert bool(found.fix) is (status != "ok")


def test_a_library_that_the_cpu_build_links_to_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_engine, "_build", lambda: "cpu")
    monkeypatch.setattr(checks_engine, "gpus_here", list)
    monkeypatch.setattr(checks_engine, "_NUMA", "libnot-there.so.1")
    found = checks_engine.gpu(settings(tmp_path))
    assert found.status == "fail"
    assert "libnuma1" in found.fix


@pytest.mark.parametrize(
    ("compiler", "status", "said"),
    [
        (None, "fail", "no C compiler"),
        ("echo 'fatal error: Python.h: No such file' >&2; exit 1", "fail", "Python.h"),
        ("echo 'fatal error: stdlib.h: No such file' >&2; exit 1", "fail", "C library"),
        ("grep -q Python.h", "ok", "Python.h"),
    ],
)
def test_triton_needs_a_compiler_with_headers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiler: str | None,
    status: str,
    said: str,
) -> None:
    monkeypatch.setattr(checks_engine, "_build", lambda: "cuda")
    monkeypatch.setattr(checks_engine, "gpus_here", lambda: [Gpu("L4", "580.1", 13, 1)])
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: str(tmp_path / name) if compiler else None)
    (tmp_path / "gcc").write_text(f"#!/bin/sh\n{compiler}\n")
    (tmp_path / "gcc").chmod(0o755)
    found = checks_engine.compiler(settings(tmp_path))
    assert found.status == status
    assert said in found.message
    assert bool(found.fix) is (status == "fail")
    assert "-dev" in found.fix or status == "ok"
    monkeypatch.setattr(checks_engine, "gpus_here", list)
    assert checks_engine.compiler(settings(tmp_path)).status == "skip"


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in -q) echo "CUDA Version                 : 13.0";; '
        '*) echo "NVIDIA L4, 580.95, 22000";; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert checks_engine.gpus_here() == [Gpu("NVIDIA L4", "580.95", 13, 22000 << 20)]


def test_a_folder_that_can_not_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = checks_local.directories(settings(tmp_path, cache_dir=tmp_path / "file" / "cache"))
    assert found.status == "fail"
    assert "R3MES_CACHE_DIR" in found.fix


def test_a_misspelt_variable_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks_local.variables().status == "ok"
    monkeypatch.setenv("R3MES_BACKENDURL", "http://127.0.0.1:9")
    found = checks_local.variables()
    assert found.status == "warn"
    assert "R3MES_BACKEND_URL" in found.message


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[str]:
    database = f"sqlite:///{tmp_path}/b.sqlite3"
    app = create_app(load({"database_url": database, "allow_private_nodes": True}))
    async with serving(app) as url:
        yield url


async def test_the_backend_calls_back_and_nothing_is_made_for_it(
    tmp_path: Path, backend: str
) -> None:
    given = settings(tmp_path, backend_url=backend)
    assert (await checks_network.public_url(given)).status == "ok"
    assert not given.state_dir.exists()


async def test_a_port_that_the_backend_does_not_reach_is_to_be_forwarded(
    tmp_path: Path, backend: str
) -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    given = settings(tmp_path, backend_url=backend, serving_node_url=closed)
    found = await checks_network.public_url(given)
    assert found.status == "fail"
    assert f"port {given.serving_node_port} is not reachable from outside" in found.message
    assert found.fix.startswith("forward it to ")


@pytest.mark.parametrize(
    "command",
    [
        ("doctor",),
        ("adapter", "publish", ".", "--name", "mine"),
        ("adapter", "pull", "legal"),
        ("serve", "--loras", "legal", "--host", "127.0.0.1"),
    ],
    ids=" ".join,
)
def test_a_state_directory_of_a_later_version_is_said(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "version").write_text("99\n")
    found = run(*command, cwd=tmp_path, R3MES_STATE_DIR=str(state))
    assert found.returncode == 2, found.stderr
    assert "newer r3mes-vllm" in found.stderr
    assert "try: upgrade r3mes-vllm" in found.stderr
    assert [it.name for it in state.iterdir()] == ["version"]


async def test_what_loras_names_must_be_registered(tmp_path: Path, backend: str) -> None:
    given = settings(tmp_path, backend_url=backend)
    assert (await checks_adapters.registered(given)).status == "warn"
    async with BackendClient(backend) as client:
        await client.register_lora(RegisterLora(name="mine", ipfs_hash=LEGAL_CID))
    found = await checks_adapters.registered(settings(tmp_path, backend_url=backend, loras="mine"))
    assert found.status == "ok"
    found = await checks_adapters.registered(settings(tmp_path, backend_url=backend, loras="your"))
    assert found.status == "fail"
    assert "your" in found.message
    assert found.fix
    found = await checks_adapters.registered(settings(tmp_path))
    assert found.status == "skip"


async def test_what_no_source_has_is_named(tmp_path: Path) -> None:
    nowhere = str(CID.of(RAW, b"nobody has this"))
    given = {"ipfs_api_url": "http://127.0.0.1:9"}
    found = await checks_adapters.retrievable(settings(tmp_path, loras=f"a={nowhere}", **given))
    assert found.status == "fail"
    assert nowhere in found.message
    found = await checks_adapters.retrievable(settings(tmp_path, loras="legal", **given))
    assert found.status == "ok"


@pytest.mark.parametrize("lies", [False, True])
async def test_a_gateway_that_lies_is_named(tmp_path: Path, lies: bool) -> None:
    content = b"a block"

    async def block(request: Request) -> Response:
        return Response(b"another" if lies else content, media_type="application/vnd.ipld.raw")

    async with serving(Starlette(routes=[Route("/ipfs/{cid}", block)])) as url:
        given = settings(tmp_path, loras=f"a={CID.of(RAW, content)}", ipfs_gateways=url)
        found = await checks_adapters.gateways(given)
    assert found.status == ("fail" if lies else "ok")
    assert ("not those of" in found.message) is lies


async def test_an_adapter_that_vetting_refuses_is_named(tmp_path: Path) -> None:
    bad = model_in(tmp_path / "bad", "adapter_config.json", "adapter_model.safetensors")
    found = await checks_adapters.load(settings(tmp_path, loras=f"bad={bad}"))
    assert found.status == "fail"
    assert "bad: " in found.message
    assert "inspect" in found.fix


async def test_without_a_node_there_is_no_heartbeat_to_check(tmp_path: Path) -> None:
    found = await checks_adapters.heartbeat(settings(tmp_path))
    assert found.status == "skip"
    assert "serve" in found.fix


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_says_it_all_and_fails_for_one(tmp_path: Path, as_json: bool) -> None:
    port = str(free_port())
    options = ("--host", "127.0.0.1", "--port", port, "--backend-url", "http://127.0.0.1:9")
    found = run("doctor", *options, *(["--json"] if as_json else []), cwd=tmp_path)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    if as_json:
        told = json.loads(found.stdout)
        assert {it["check"] for it in told if it["status"] == "fail"} >= {"backend"}
    else:
        assert "FAIL backend: http://127.0.0.1:9 can't be reached" in found.stdout
        assert re.search(r"\d+ checks, \d+ failed\n$", found.stdout)


def test_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with program(tmp_path, "doctor", "--port", str(free_port()), "--backend-url", url) as it:
            silent.settimeout(60)
            silent.accept()
            began = time.monotonic()
            assert it.stop(signal.SIGINT) == 130
            assert time.monotonic() - began < TIMEOUT_S / 2
            assert "Traceback" not in it.output()
