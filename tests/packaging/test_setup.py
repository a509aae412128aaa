"""requirements/setup.sh, with an `nvidia-smi` and a Python that say what a test wants."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT

LIVE = "of-the-node-that-runs"
# Makes an environment whose pip installs nothing, or fails; all else is the real one's.
PYTHON = f"""#!/bin/sh
case "$1 $2" in
  "-m venv")
    mkdir -p $3/bin $3/lib
    cp "$0" $3/bin/python
    echo "#!$PWD/$3/bin/python" >$3/bin/r3mes-vllm
    echo "command = python -m venv $PWD/$3" >$3/pyvenv.cfg ;;
  "-m pip")
    [ -e .venv/{LIVE} ] && echo there >>seen
    case "$*" in *--editable*) exit ${{EDITABLE:-0}} ;; esac ;;
  *) [ -z "${{OLD:-}}" ] || exit 1; exec {sys.executable} "$@" ;;
esac
"""


@dataclass
class Checkout:
    folder: Path

    def setup(self, driver: str | None, **variables: str) -> "subprocess.CompletedProcess[str]":
        """With that driver; None: nvidia-smi fails."""
        smi = self.folder / "bin" / "nvidia-smi"
        failing = "echo 'NVIDIA-SMI has failed'; exit 9"
        smi.write_text(f"#!/bin/sh\n{failing if driver is None else f'echo {driver}'}\n")
        smi.chmod(0o755)
        environment = {name: it for name, it in os.environ.items() if name != "BUILD"}
        environment["PATH"] = f"{smi.parent}:{environment['PATH']}"
        environment["PYTHON"] = str(smi.parent / "python3.11")
        return subprocess.run(
            [str(self.folder / "requirements" / "setup.sh")],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def build(self) -> str:
        return (self.folder / ".venv" / "r3mes-setup").read_text().split()[0]

    def mark(self) -> None:
        (self.folder / ".venv" / LIVE).touch()

    @property
    def marked(self) -> bool:
        return (self.folder / ".venv" / LIVE).exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    for name in ("bin", "requirements"):
        (tmp_path / name).mkdir()
    for name in ("setup.sh", "cpu.lock", "cuda.lock"):
        here = tmp_path / "requirements" / name
        here.write_bytes((ROOT / "requirements" / name).read_bytes())
        here.chmod(0o755)
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for name, text in {"python3.11": PYTHON, "sleep": "#!/bin/sh\nexec /bin/sleep 0.02\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return Checkout(tmp_path)


@pytest.mark.parametrize(
    ("driver", "variables", "build"),
    [
        ("580.95.05", {}, "cuda"),
        (None, {}, "cpu"),
        ("535.1", {"BUILD": "cpu"}, "cpu"),
        ("535.1", {"BUILD": "cuda"}, "cuda"),
        (None, {"BUILD": "cuda"}, "cuda"),
    ],
)
def test_the_build_is_the_one_that_fits_or_that_was_said(
    checkout: Checkout, driver: str | None, variables: dict[str, str], build: str
) -> None:
    done = checkout.setup(driver, **variables)
    assert done.returncode == 0, done.stderr
    assert checkout.build == build
    venv = checkout.folder / ".venv"
    assert (venv / "bin" / "r3mes-vllm").read_text() == f"#!{venv}/bin/python\n"
    assert ".new" not in (venv / "pyvenv.cfg").read_text()
    assert not [it for it in checkout.folder.glob(".venv.*") if it.is_dir()]


def test_an_old_driver_is_said_before_anything_is_fetched(checkout: Checkout) -> None:
    done = checkout.setup("575.57.08")
    assert done.returncode == 1
    assert "driver is 575" in done.stderr
    assert "580" in done.stderr
    assert "BUILD=cpu" in done.stderr
    assert not (checkout.folder / ".venv").exists()


def test_another_python_is_said_with_the_way_to_one(checkout: Checkout) -> None:
    done = checkout.setup("580.1", OLD="1")
    assert done.returncode == 1
    assert "PYTHON=$(uv python find 3.11)" in done.stderr


def test_a_word_that_is_no_build_is_refused(checkout: Checkout) -> None:
    done = checkout.setup("580.1", BUILD="gpu")
    assert done.returncode == 1
    assert "BUILD=gpu" in done.stderr


def test_a_driver_that_fails_for_a_moment_costs_no_environment(checkout: Checkout) -> None:
    assert checkout.setup("580.1").returncode == 0
    checkout.mark()
    done = checkout.setup(None)
    assert done.returncode == 0
    assert "keeps the CUDA build" in done.stderr
    assert checkout.marked
    assert checkout.setup(None, BUILD="cpu").returncode == 0
    assert checkout.build == "cpu"
    assert not checkout.marked


def test_the_environment_stays_until_the_new_one_is_whole(checkout: Checkout) -> None:
    assert checkout.setup(None).returncode == 0
    checkout.mark()
    done = checkout.setup("580.1", EDITABLE="1")
    assert done.returncode == 1
    assert ".venv.new/setup.log" in done.stderr
    assert checkout.build == "cpu"
    assert checkout.marked
    assert checkout.setup("580.1").returncode == 0
    assert checkout.build == "cuda"
    assert not checkout.marked
    # each of pip's runs since the first setup found it there
    assert (checkout.folder / "seen").read_text().split() == ["there"] * 4


def test_an_environment_that_checkouts_share_is_left_to_the_others(checkout: Checkout) -> None:
    shared = checkout.folder / "shared"
    shared.mkdir()
    (checkout.folder / ".venv").symlink_to(shared)
    checkout.mark()
    assert checkout.setup(None).returncode == 0
    assert [it.name for it in shared.iterdir()] == [LIVE]
    assert not (checkout.folder / ".venv").is_symlink()
