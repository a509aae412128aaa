"""The systemd units, read by a parser here and, where it is installed, by systemd's own."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.conftest import CONFIGS, parse, settings_of

UNITS = sorted((CONFIGS / "systemd").glob("*.service"))
NAMES = [it.stem for it in UNITS]
EXPOSURE = 20
"""Tenths, of `systemd-analyze security`; 2.0 is the node's, which needs its devices."""


def entries(unit: Path) -> dict[str, list[str]]:
    """Each setting with its values, in their order; raises ValueError for what is no unit."""
    found: dict[str, list[str]] = {}
    section = ""
    for number, line in enumerate(unit.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line.strip("[]")
        elif "=" in line and section in ("Unit", "Service", "Install"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
        else:
            raise ValueError(f"{unit.name}, line {number}: {line}")
    return found


@pytest.mark.parametrize("unit", UNITS, ids=NAMES)
def test_a_unit_hardens_and_drains(unit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = entries(unit)
    last = {name: values[-1] for name, values in found.items()}
    environment = dict(it.split("=", 1) for it in found["Environment"])
    given = settings_of(environment, monkeypatch)
    for name in ("DynamicUser", "NoNewPrivileges", "PrivateTmp", "ProtectHome", "RemoveIPC"):
        assert last[name] == "yes"
    assert last["ProtectSystem"] == "strict"
    assert last["CapabilityBoundingSet"] == ""
    assert found["SystemCallFilter"][0] == "@system-service"
    assert last["KillMode"] == "mixed", "a second signal to the engine would cut what drains"
    assert float(last["TimeoutStopSec"]) > given.drain_timeout
    assert last["Restart"] == "on-failure"
    assert last["RestartPreventExitStatus"] == "2"
    assert last["StartLimitIntervalSec"] == "0", "a database that is away for a minute would end it"
    assert given.state_dir == Path("/var/lib") / last["StateDirectory"]
    writable = (f"/var/lib/{last['StateDirectory']}", f"/var/cache/{last['CacheDirectory']}")
    assert all(
        value.startswith(writable)
        for name, value in environment.items()
        if name.endswith(("_DIR", "HOME"))
    )
    # Keys come from a file that only root reads, not from the unit, which all may read.
    assert not any("KEY" in it or "TOKEN" in it for it in environment)
    assert last["EnvironmentFile"].startswith("/etc/r3mes-vllm/")


def test_a_nodes_unit_leaves_what_cuda_needs() -> None:
    found = entries(CONFIGS / "systemd" / "r3mes-vllm-node.service")
    assert found["PrivateDevices"] == ["no"]
    assert found["DeviceAllow"] == ["char-nvidia* rw"]
    assert not {"MemoryDenyWriteExecute", "ProcSubset", "PrivateUsers"} & found.keys()
    assert found["LimitMEMLOCK"] == ["infinity"]


@pytest.mark.parametrize("unit", UNITS, ids=NAMES)
def test_a_units_command_is_taken(unit: Path) -> None:
    program, *arguments = shlex.split(entries(unit)["ExecStart"][-1])
    assert program == "/opt/r3mes-vllm/bin/r3mes-vllm"
    assert parse(arguments)["config"].parent == Path("/etc/r3mes-vllm")


@pytest.mark.parametrize("unit", UNITS, ids=NAMES)
def test_systemd_has_nothing_to_say(unit: Path, tmp_path: Path) -> None:
    """Where systemd is not installed, the tests above have read the unit."""
    program = shutil.which("systemd-analyze")
    if program is None:
        return
    here = tmp_path / unit.name

    def analyze(text: str, *how: str) -> "subprocess.CompletedProcess[str]":
        here.write_text(text.replace("/opt/r3mes-vllm/bin/r3mes-vllm", "/bin/true"))
        command = [program, *how, str(here)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    text = unit.read_text()
    verified = analyze(text, "verify", "--man=no")
    assert verified.returncode == 0
    assert unit.name not in verified.stderr, verified.stderr
    assert unit.name in analyze(text.replace("KillMode=", "KilMode="), "verify").stderr
    security = ("security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager")
    assert analyze(text, *security).returncode == 0
    softer = text.replace("CapabilityBoundingSet=\n", "").replace("SystemCallFilter", "#")
    assert analyze(softer, *security).returncode != 0
