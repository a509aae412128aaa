"""The state directory's layout, and who uses it."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from r3mes_vllm.errors import ConfigError, StateInUse
from r3mes_vllm.state_dir import STEPS, Step, prepare, used_by_a_node
from tests.backend.stand_ins import LEGAL_CID
from tests.cli.test_cli import run
from tests.programs import free_port


def contents(folder: Path) -> dict[str, str]:
    return {it.name: it.read_text() for it in folder.iterdir() if it.is_file()}


def test_one_of_the_time_before_gets_a_number_and_keeps_the_rest(tmp_path: Path) -> None:
    (tmp_path / "node.key").write_text("the wallet")
    for _ in range(2):
        prepare(tmp_path)
        assert contents(tmp_path) == {"node.key": "the wallet", "version": f"{len(STEPS)}\n"}


def test_each_step_is_made_once_and_in_order(tmp_path: Path) -> None:
    made: list[int] = []
    steps: list[Step] = [lambda folder, n=n: made.append(n) for n in range(3)]  # type: ignore[misc]
    prepare(tmp_path, steps[:2])
    prepare(tmp_path, steps)
    prepare(tmp_path, steps)
    assert made == [0, 1, 2]


def test_one_of_a_later_version_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("99\n")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="newer r3mes-vllm") as caught:
        prepare(tmp_path)
    assert "upgrade" in caught.value.hint
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["", "one", "-1", "²", "\xff"])
def test_a_number_that_is_none_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "version").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="not the number"):
        prepare(tmp_path)


def _die(folder: Path) -> None:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_step_that_was_broken_off_is_made_again(tmp_path: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(target=prepare, args=(tmp_path, [_die]))
    killed.start()
    killed.join(30)
    assert killed.exitcode == -signal.SIGKILL
    assert contents(tmp_path) == {"half": "half"}
    prepare(tmp_path, [lambda folder: (folder / "half").unlink()])
    assert contents(tmp_path) == {"version": "1\n"}


def test_a_file_in_its_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't use the state directory"):
        prepare(tmp_path / "file")


def test_a_file_that_can_not_be_locked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(ConfigError, match="No locks available"), used_by_a_node(tmp_path):
        pass
    (tmp_path / "node.lock").unlink()
    (tmp_path / "node.lock").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"), used_by_a_node(tmp_path):
        pass


def test_what_a_broken_off_start_left_is_dropped(tmp_path: Path) -> None:
    (tmp_path / ".version.x").write_text("1")
    prepare(tmp_path)
    assert contents(tmp_path) == {"version": f"{len(STEPS)}\n"}


HOLDS = (
    "import sys, pathlib; from r3mes_vllm.state_dir import used_by_a_node\n"
    "with used_by_a_node(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True); sys.stdin.read()"
)


def holder(folder: Path) -> "subprocess.Popen[str]":
    """A process that uses it until its input ends."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout
    assert other.stdout.readline() == "held\n"
    return other


def test_a_second_serve_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    other = holder(tmp_path)
    backend = ("--backend-url", f"http://127.0.0.1:{free_port()}")
    where = ("--host", "127.0.0.1", "--port", str(free_port()))
    found = run(
        "serve",
        *(*where, *backend, "--loras", f"legal={LEGAL_CID}"),
        cwd=tmp_path,
        R3MES_STATE_DIR=str(tmp_path),
    )
    other.communicate()
    assert found.returncode == 1
    assert f"another node runs with the state directory {tmp_path}" in found.stderr
    assert f"process {other.pid}" in found.stderr
    assert "R3MES_STATE_DIR and --port" in found.stderr
    assert "Traceback" not in found.stderr


def test_two_nodes_can_not_use_it_and_a_killed_one_does_not(tmp_path: Path) -> None:
    other = holder(tmp_path)
    with (
        pytest.raises(StateInUse, match=f"process {other.pid}") as caught,
        used_by_a_node(tmp_path),
    ):
        pass
    assert "R3MES_STATE_DIR" in caught.value.hint
    other.kill()
    other.communicate()
    with used_by_a_node(tmp_path):
        assert (tmp_path / "node.lock").read_text() == f"{os.getpid()}\n"
