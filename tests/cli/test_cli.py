"""The command as a person types it: exit statuses, one line of error, what to do next."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

SEARCHED = ("serve", "backend", "demo")


def start(*arguments: str, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("R3MES_")}
    environment |= {"R3MES_STATE_DIR": str(cwd / "state"), "R3MES_CACHE_DIR": str(cwd / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "r3mes_vllm", *arguments],
        env=environment | variables,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    with start(*arguments, cwd=cwd, **variables) as started:
        said = started.communicate(timeout=120)
    return subprocess.CompletedProcess(started.args, started.returncode, *said)


@pytest.mark.parametrize(
    "command", ["", "serve", "backend", "adapter", "adapter pull", "config", "config show"]
)
def test_version(tmp_path: Path, command: str) -> None:
    found = run(*command.split(), "--version", cwd=tmp_path)
    assert (found.returncode, found.stdout) == (0, "r3mes-vllm 0.1.0\n")


@pytest.mark.parametrize("command", SEARCHED)
def test_help_has_an_example(tmp_path: Path, command: str) -> None:
    found = run(command, "--help", cwd=tmp_path)
    assert found.returncode == 0
    assert f"Example: r3mes-vllm {command}" in found.stdout


@pytest.mark.parametrize(
    ("command", "default"),
    [
        ("serve", "[default: SmolLM2-135M-Instruct]"),
        ("backend", "[on-demand,url,local]"),
        ("adapter verify", "[all]"),
    ],
)
def test_help_has_the_defaults(tmp_path: Path, command: str, default: str) -> None:
    said = run(*command.split(), "--help", cwd=tmp_path).stdout
    assert default in " ".join(said.split())


@pytest.mark.parametrize("group", ["", "adapter", "config"])
def test_help_of_a_group_has_an_example(tmp_path: Path, group: str) -> None:
    assert "Example: r3mes-vllm " in run(*group.split(), "--help", cwd=tmp_path).stdout


def test_without_vllm_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("raise ModuleNotFoundError('none', name='vllm')")
    found = run("serve", "--host", "127.0.0.1", "--model", "no/model", cwd=tmp_path)
    assert (found.returncode, "Traceback" in found.stderr) == (1, False)
    assert "error: vLLM is not installed\n  try: pip install" in found.stderr


def test_a_misspelt_variable_is_said_to_who_runs_a_backend(tmp_path: Path) -> None:
    at = ("--database-url", "sqlite:////proc/none", "--port", "1")
    found = run("backend", *at, cwd=tmp_path, R3MES_ADMIN_KYE="x")
    assert "R3MES_ADMIN_KEY" in found.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("serve", "--nothing"),
        ("serve", "--port", "http"),
        ("serve", "--port", "99999"),
        ("serve", "--cache-size", "lots"),
        ("serve", "--cache-dir", "~nobody-here/x"),
        ("serve", "--", "--ssl-certfile", "~nobody-here/x"),
        ("serve", "--config", "absent.toml"),
        ("serve",),  # beyond loopback without a key
    ],
)
def test_bad_usage_is_status_2_and_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    found = run(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    lines = [it for it in found.stderr.splitlines() if not it.startswith("warning:")]
    assert [it.partition(":")[0] for it in lines] in (["error"], ["error", "  try"])


def test_what_may_pass_is_status_1(tmp_path: Path) -> None:
    """Not 2, after which a supervisor leaves it."""
    away = ("--database-url", "postgresql://r3mes@127.0.0.1:1/r3mes")
    found = run("backend", *away, "--port", "1", cwd=tmp_path)
    assert found.returncode == 1
    assert "error: can't open the database" in found.stderr


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    found = run("adapter", "inspect", "./none", cwd=tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith("error: there is no './none'\n  try: give a directory,")


def test_sigterm_ends_it_while_it_fetches(tmp_path: Path, tiny_model: Path) -> None:
    """Process 1 of a container has only the handlers that it sets."""
    cid = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        gateway = f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = ("--host", "127.0.0.1", "--model", str(tiny_model), "--loras", f"x={cid}")
        sources = ("--ipfs-api", "", "--ipfs-gateway", gateway, "--backend-url", gateway)
        node = start("serve", *options, *sources, cwd=tmp_path)
        silent.settimeout(60)
        asked, _ = silent.accept()
        node.terminate()
        assert node.wait(30) == 128 + signal.SIGTERM
        asked.close()


def serve(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(
        *("serve", "--host", "127.0.0.1", "--backend-url", "http://127.0.0.1:9", *arguments),
        cwd=tmp_path,
        **variables,
    )


def test_a_taken_port_is_said_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = serve(tmp_path, "--port", str(port))
    assert found.returncode == 1
    assert str(port) in found.stderr
    assert f"--port {port + 1}" in found.stderr


@pytest.mark.parametrize(
    ("loras", "said"),
    [
        ("nobody", "no adapter named 'nobody'"),
        ("x=bafynothing", "neither a file nor a CID"),
        ("a b=bafkqaaa", "can't be an adapter's name"),
        ("x=bafkqaaa,x=bafkqaaa", "twice"),
        ("x=absent.car", "neither a file nor a CID"),
    ],
)
def test_an_adapter_that_means_nothing(
    tmp_path: Path, tiny_model: Path, loras: str, said: str
) -> None:
    found = serve(tmp_path, "--model", str(tiny_model), "--loras", loras)
    assert found.returncode in (1, 2)
    assert said in found.stderr
    assert "try:" in found.stderr or "known" in found.stderr or "twice" in said or "name" in said
    assert "Traceback" not in found.stderr


def test_an_adapter_that_may_not_be_served_is_named_with_the_rule(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    (folder / "adapter_config.json").write_text("{}")
    found = serve(tmp_path, "--model", str(tiny_model), "--loras", f"x={folder}")
    assert found.returncode == 1
    assert "adapter_model.safetensors" in found.stderr
    assert "none of the adapters can be served" in found.stderr


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = serve(tmp_path, "--model", str(tmp_path / "empty"))
    assert found.returncode == 2
    assert "config.json" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("passed_on", "status", "said"),
    [
        (("--no-such-option",), 2, "--no-such-option: vLLM has no such option"),
        (("--max-model-len", "99999999"), 1, "vLLM did not start: "),
    ],
)
def test_what_vllm_refuses_is_said_in_its_words(
    tmp_path: Path, tiny_model: Path, passed_on: tuple[str, ...], status: int, said: str
) -> None:
    tiny.make_adapter(tmp_path / "legal", seed=0)
    options = ("--model", str(tiny_model), "--loras", f"legal={tmp_path / 'legal'}")
    found = serve(tmp_path, *options, "--", *passed_on)
    assert found.returncode == status, found.stderr
    assert said in found.stderr
    assert "Traceback" not in found.stderr


def test_a_misspelt_variable_is_reported(tmp_path: Path, tiny_model: Path) -> None:
    found = serve(
        tmp_path, "--model", str(tiny_model), "--loras", "nobody", R3MES_HEARTBEAT_INTERVALL="5"
    )
    assert "did you mean R3MES_HEARTBEAT_INTERVAL?" in found.stderr
