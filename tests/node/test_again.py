"""A program that starts again as the same process, and how often it does."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from r3mes_vllm.errors import EngineError
from r3mes_vllm.node import restart
from r3mes_vllm.node.restart import MOST, WITHIN_S, Again, Failure, Restart
from tests.programs import free_port

FAILURE = Failure("the engine died", ["legal=bafy", "medical=bafz"], ["medical"])

# Listens, leaves a child behind, and fails, with the code under test.
PROGRAM = """
import os, socket, subprocess, sys, time
from r3mes_vllm import settings
from r3mes_vllm.errors import EngineError
from r3mes_vllm.node import restart
restart._PAUSE_S = 0.001
given = settings.load()
restart.reap()
deadline = time.monotonic() + (5 if given.restarts else 0)
try:
    while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) or True:
        if time.monotonic() > deadline:
            print("a child is left")
            break
        time.sleep(0.01)
except ChildProcessError:
    pass
door = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(os.getpid(), *given.restored, *given.followed, *settings.misspelt(), flush=True)
os.environ["R3MES_MODEL"] = "only for this start"
again = restart.Again(tuple(given.restarts), dict(os.environ))
if len(given.restarts) == 3:
    door.detach()  # nobody closes it
subprocess.Popen(["sleep", "0.5"])  # it ends after this program has
try:
    again.start(restart.Failure("the engine died", ["legal=bafy", "medical=bafz"], ["medical"]))
except EngineError as error:
    print(error, flush=True)
    sys.exit(1)
"""

# vLLM's own server without an engine; what is wrong with it is found while it serves.
UNSUPERVISED = """
import asyncio, sys
from contextlib import asynccontextmanager
import uvloop
from fastapi import FastAPI
from vllm.entrypoints.launchers.launcher import create_server_socket, serve_http
from r3mes_vllm.node import restart

@asynccontextmanager
async def lifespan(app):
    asyncio.get_running_loop().call_later(0.3, fail, app)
    yield
    print("closed in order", flush=True)
    restart.end_unsupervised()

def fail(app):
    restart.begin(restart.Failure("the engine died", [], []))
    restart.end(app.state.server)

async def main():
    app = FastAPI(lifespan=lifespan)
    app.state.engine_client = None
    port = int(sys.argv[1])
    door = create_server_socket(("127.0.0.1", port), reuse_port=False)
    await (await serve_http(app, door, host="127.0.0.1", port=port, log_level="warning"))

uvloop.run(main())
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "program.py"
    script.write_text(program)
    command = [sys.executable, str(script), str(free_port())]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def test_the_same_process_starts_again_until_that_happened_too_often(tmp_path: Path) -> None:
    ended = run(PROGRAM, tmp_path)
    assert not ended.stderr
    first, *others, last = ended.stdout.splitlines()
    assert others == [f"{first} legal=bafy medical=bafz medical"] * MOST
    assert last == "the engine died; it was started again 5 times in 10 minutes"
    assert ended.returncode == 1


@pytest.mark.control
def test_children_would_stay_with_the_process(tmp_path: Path) -> None:
    assert "a child is left" in run(PROGRAM.replace("restart.reap()", ""), tmp_path).stdout


def test_without_serve_the_program_ends_with_an_error(tmp_path: Path) -> None:
    ended = run(UNSUPERVISED, tmp_path)
    assert ended.stdout == "closed in order\n"
    assert "the engine died; " in ended.stderr
    assert ended.stderr.endswith("; ending\n")
    assert ended.returncode == 1


@pytest.mark.control
def test_vllm_would_end_as_if_all_were_well(tmp_path: Path) -> None:
    ended = run(UNSUPERVISED.replace("restart.end_unsupervised()", ""), tmp_path)
    assert ended.stdout == "closed in order\n"
    assert ended.returncode == 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, dict[str, str]]]:
    """The pause before each start, and its environment."""
    starts: list[tuple[float, dict[str, str]]] = []
    slept: list[float] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> NoReturn:
        starts.append((sum(slept), environment))
        raise SystemExit

    monkeypatch.setattr("os.execve", execve)
    monkeypatch.setattr("time.sleep", slept.append)
    return starts


def test_the_pauses_grow(started: list[tuple[float, dict[str, str]]]) -> None:
    now = time.monotonic()
    for earlier in range(MOST):
        with pytest.raises(SystemExit):
            Again((now,) * earlier).start(FAILURE)
    assert [slept for slept, _ in started] == [0, 2, 2 + 4, 2 + 4 + 8, 2 + 4 + 8 + 16]
    with pytest.raises(EngineError, match="5 times in 10 minutes"):
        Again((now,) * MOST).start(FAILURE)


def test_what_happened_long_ago_does_not_count(
    started: list[tuple[float, dict[str, str]]],
) -> None:
    long_ago = time.monotonic() - WITHIN_S - 1
    with pytest.raises(SystemExit):
        Again((long_ago,) * MOST).start(FAILURE)
    pause, environment = started[0]
    assert pause == 0
    assert "," not in environment["R3MES_RESTARTS"]


@pytest.mark.parametrize("variable", ["R3MES_FOLLOWED", "R3MES_PASSING"])
def test_what_was_said_of_an_adapter_before_is_forgotten(
    started: list[tuple[float, dict[str, str]]], variable: str
) -> None:
    with pytest.raises(SystemExit):
        Again((), {variable: "legal"}).start(Failure("it died", ["legal=bafy"], []))
    assert not started[0][1][variable]


def test_what_came_on_demand_comes_back_as_such(
    started: list[tuple[float, dict[str, str]]],
) -> None:
    with pytest.raises(SystemExit):
        Again(()).start(Failure("it died", ["a=bafy", "b=bafz"], [], ["b"]))
    assert started[0][1]["R3MES_PASSING"] == "b"


def test_with_no_adapter_left_it_does_not_go_on() -> None:
    with pytest.raises(EngineError, match="no adapter"):
        Again(()).start(Failure("the engine died", [], []))


@pytest.mark.parametrize("wanted", [True, False])
def test_who_is_told_to_end_meanwhile_does_not_start_again(
    wanted: bool,
    started: list[tuple[float, dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Nothing(Restart):
        again = Again(())

    monkeypatch.setattr(restart, "Restart", Nothing)

    async def fail() -> None:
        restart.begin(FAILURE)
        if wanted:
            os.kill(os.getpid(), signal.SIGTERM)
            while not Nothing.ended:
                await asyncio.sleep(0.01)

    asyncio.run(fail())
    assert Nothing.forced
    Nothing.forced.cancel()
    if wanted:
        restart.follow()
    else:
        with pytest.raises(SystemExit):
            restart.follow()
    assert len(started) == (0 if wanted else 1)
