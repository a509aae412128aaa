"""The engine that a backend starts for itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from r3mes_vllm.backend import local_model
from r3mes_vllm.backend.local_model import LocalModel
from r3mes_vllm.settings import load
from tests import tiny
from tests.conftest import NODE_STARTS_S
from tests.programs import free_port, program, wait_until, wait_until_async

# Tells of itself, leaves a child behind, and does as it is told.
CHILD = """
import os, subprocess, sys, time
grandchild = subprocess.Popen(["sleep", "1000"], process_group=0)
with open(os.path.join(sys.argv[1], "pids"), "a") as file:
    print(os.getpid(), grandchild.pid, file=file, flush=True)
print("it says:", *sys.argv[2:])
print(*sorted(it for it in os.environ if it.startswith("R3MES_")), flush=True)
if "dies" in sys.argv:
    sys.exit(3)
time.sleep(1000)
"""

PARENT = """
import asyncio, sys
from r3mes_vllm.backend.local_model import LocalModel
from r3mes_vllm.settings import load

async def main():
    model = LocalModel("m", load(), program=sys.argv[1:])
    await asyncio.sleep(1000)

asyncio.run(main())
"""


class Lives:
    """Of the children so far, each with its own child."""

    def __init__(self, folder: Path, *told: str) -> None:
        self._file = folder / "pids"
        script = folder / "child.py"
        script.write_text(CHILD)
        self.program = [sys.executable, str(script), str(folder), *told]

    @property
    def pids(self) -> list[list[int]]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return [[int(pid) for pid in line.split()] for line in lines]


def are_gone(pids: list[int]) -> bool:
    return not any(map(_is_there, pids))


def _is_there(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def test_it_ends_with_its_children_when_it_is_closed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R3MES_LORAS", "legal")
    lives = Lives(tmp_path)
    model = LocalModel("some/model", load({"state_dir": str(tmp_path)}), program=lives.program)
    await wait_until_async(lambda: bool(lives.pids) and model.where is not None, 20, "the child")
    assert model.where
    port = httpx.URL(model.where.root).port
    said = ""

    def has_spoken() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "R3MES_STATE_DIR" in said

    await wait_until_async(has_spoken, 20, "its words")
    await model.aclose()
    await wait_until_async(lambda: are_gone(lives.pids[0]), 5, "their end")
    assert model.where is None
    arguments = f"serve --model some/model --host 127.0.0.1 --port {port}"
    assert f"local model: it says: {arguments}\n" in said
    assert "R3MES_BASE_ONLY" in said
    assert "R3MES_LORAS" not in said


async def test_it_starts_again_after_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_model, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(local_model, "_LONGEST_PAUSE_S", 0.04)
    lives = Lives(tmp_path, "dies")
    model = LocalModel("m", load({"state_dir": str(tmp_path)}), program=lives.program)
    await wait_until_async(lambda: len(lives.pids) >= 5, 30, "five lives")
    await model.aclose()
    said = capfd.readouterr().err
    for pause in ("0.01", "0.02", "0.04"):
        assert f"ended with status 3; it starts again in {pause} s" in said
    pids = [pid for life in lives.pids for pid in life]
    await wait_until_async(lambda: are_gone(pids), 5, "their end")


async def test_a_program_that_is_not_there_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = LocalModel("m", load({"state_dir": str(tmp_path)}), program=["/nonexistent"])
    said = ""

    def is_said() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "can't be started" in said

    await wait_until_async(is_said, 20, "the warning")
    await model.aclose()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_the_backend(tmp_path: Path, number: signal.Signals) -> None:
    lives = Lives(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *lives.program],
        env={**os.environ, "R3MES_STATE_DIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as parent:
        try:
            wait_until(lambda: bool(lives.pids), 20, "the child")
            child = lives.pids[0][0]
            assert not are_gone([child])
            os.killpg(parent.pid, number)  # as a terminal does
            wait_until(lambda: are_gone([child]), 20, "the child's end")
        finally:
            parent.kill()
            for pids in lives.pids:
                for pid in pids:
                    if psutil.pid_exists(pid):
                        os.kill(pid, signal.SIGKILL)


def test_a_real_one_answers_where_no_node_can(tiny_model: Path, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    arguments = ("backend", "--port", str(port), "--with-local-model", str(tiny_model))
    database = f"sqlite:///{tmp_path / 'backend.sqlite3'}"
    with program(tmp_path, *arguments, "--database-url", database, url=url) as backend:
        backend.wait_for("/health", 30)
        lora = {"name": "legal", "ipfs_hash": "Qm" + "a" * 44}
        assert httpx.post(f"{url}/api/lora/register", json=lora).is_success
        early = httpx.post(f"{url}/chat", json={"message": "hi", "lora_name": "legal"})
        assert early.status_code == 503
        assert early.headers["retry-after"]
        asked = {"message": "hi", "lora_name": "legal", "max_tokens": 8, "seed": 1}
        wait_until(
            lambda: httpx.post(f"{url}/chat", json=asked, timeout=60).is_success,
            NODE_STARTS_S,
            "an answer",
            backend.output,
        )
        processes = psutil.Process(backend.process.pid).children(recursive=True)
        text = httpx.post(f"{url}/chat", json=asked, timeout=60)
        assert text.headers["x-r3mes-fallback"] == "local"
        assert text.headers["x-r3mes-fallback-model"] == tiny.NAME
        assert "x-r3mes-cid" not in text.headers
        whole = httpx.post(f"{url}/chat", json=asked | {"stream": False}, timeout=60).json()
        assert whole["response"] == text.text
        assert (whole["lora_name"], whole["cid"]) == (None, None)
        assert whole["usage"]["completion_tokens"] == 8
        messages = [{"role": "user", "content": "hi"}]
        v1 = {"model": "legal", "messages": messages, "max_tokens": 8, "seed": 1}
        openais = httpx.post(f"{url}/v1/chat/completions", json=v1, timeout=60).json()
        assert openais["choices"][0]["message"]["content"] == text.text
        assert openais["model"] == tiny.NAME
        assert httpx.get(f"{url}/api/serving-node/list").json()["count"] == 0
        began = time.monotonic()
        backend.process.kill()
        backend.process.wait()
        _, alive = psutil.wait_procs(processes, timeout=40)
        assert not alive, (time.monotonic() - began, backend.output()[-3000:])
        assert "Traceback" not in backend.output()
