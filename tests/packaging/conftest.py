"""What the packaging is made of, read as its own programs read it."""

import re
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml  # type: ignore[import-untyped]

from r3mes_vllm.cli.main import app
from r3mes_vllm.settings import Settings
from tests.peers import installed

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TOOLS = Path(__file__).with_name("tools.py")


@pytest.fixture(scope="session")
def tools() -> Path:
    """The `bin` of an environment with linters and schemas."""
    requirements = Path(__file__).with_name("requirements.txt")
    return installed.environment("packaging", requirements).parent


def tool(tools: Path, *command: str, given: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(tools / command[0]), *command[1:]],
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
    )


def documents(file: Path) -> list[dict[str, Any]]:
    return [it for it in yaml.safe_load_all(file.read_text()) if it]


def interpolated(tree: Any, variables: dict[str, str]) -> Any:
    """As Compose does: `${NAME:-default}`, and `${NAME:?why}`, which raises KeyError."""
    if isinstance(tree, dict):
        return {key: interpolated(it, variables) for key, it in tree.items()}
    if isinstance(tree, list):
        return [interpolated(it, variables) for it in tree]
    if not isinstance(tree, str):
        return tree

    def value(found: "re.Match[str]") -> str:
        name, how, rest = found.groups()
        if given := variables.get(name):
            return given
        if how == ":?":
            raise KeyError(name)
        return str(rest or "")

    return re.sub(r"\$\{([A-Z0-9_]+)(?:(:-|:\?)([^}]*))?\}", value, tree)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Name and rest of each, in their order, with the lines of one joined."""
    lines = [it for it in (ROOT / dockerfile).read_text().splitlines() if not it.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(it.split(" ", 1)[0], it.split(" ", 1)[1]) for it in joined.splitlines() if it.strip()]


def parse(arguments: list[str]) -> dict[str, Any]:
    """The options that `r3mes-vllm ARGUMENTS` would run with. Raises click.UsageError."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    command = group.commands[arguments[0]]
    return dict(command.make_context(arguments[0], list(arguments[1:])).params)


def settings_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What a program would read of it. Raises ConfigError."""
    from r3mes_vllm import settings

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    known = [it for it in settings.misspelt(environment) if "R3MES_" in it]
    assert not known, known
    return settings.load()
