"""What README and docs promise is there."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
import torch

from r3mes_vllm.adapters.vetting import RULES
from r3mes_vllm.cli import adapter, store
from r3mes_vllm.settings import Settings, parse_bytes

ROOT = Path(__file__).parent.parent
NODE_DOC = (ROOT / "docs" / "node.md").read_text()


@pytest.mark.parametrize("page", ["node", "backend"])
def test_every_option_in_the_docs_is_the_commands(page: str) -> None:
    command = {"node": "serve", "backend": "backend"}[page]
    help_text = subprocess.run(
        [sys.executable, "-m", "r3mes_vllm", command, "--help"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200"},
    ).stdout
    elsewhere = {"--help", "--version", "--debug", "--open-chat", "--max-model-len"}
    elsewhere |= {"--otlp-traces-endpoint", "--enable-log-requests"}  # vLLM's
    offered = set(re.findall(r"--[a-z][a-z-]+", help_text)) - elsewhere
    documented = (ROOT / "docs" / f"{page}.md").read_text().split("## Under plain")[0]
    named = set(re.findall(r"--[a-z][a-z-]+", documented)) - elsewhere
    assert named <= offered
    if page == "node":
        assert offered <= named | {"--config"}


def test_every_setting_in_the_docs_exists() -> None:
    table = NODE_DOC.split("## Settings")[1].split("## Adapters")[0]
    variables = {name.lower() for name in re.findall(r"`R3MES_([A-Z_]+)`", table)}
    assert variables <= set(Settings.model_fields)


ADAPTERS_DOC = (ROOT / "docs" / "adapters.md").read_text()


def test_the_adapters_page_names_every_rule_and_every_limit_with_its_default() -> None:
    rules = {rule.__name__ for rule in RULES}
    read_before = {"files_are_there", "config_is_json", "header_is_sound", "dtype_is_floating"}
    table = ADAPTERS_DOC.split("which errors carry:")[1]
    assert set(re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE)) == rules | read_before
    limits = re.findall(r"\| `R3MES_([A-Z_]+)` \| `([a-z_]+)` \| (\S+) \|", ADAPTERS_DOC)
    assert len(limits) == 10
    fields = Settings.model_fields
    for variable, name, told in limits:
        assert variable.lower() == name
        default = fields[name].default
        value = told.strip("`")
        if isinstance(default, bool) or default == []:
            assert value in ("off", "none")
        else:
            assert parse_bytes(value) == default


def test_each_command_about_adapters_is_on_a_page() -> None:
    pages = ADAPTERS_DOC + (ROOT / "docs" / "authors.md").read_text()
    assert {*adapter.COMMANDS, *store.COMMANDS} <= set(
        re.findall(r"r3mes-vllm adapter (\w+)", pages)
    )


def test_each_dependency_has_its_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    page = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in requirements:
        name = re.split(r"[\[<>=]", requirement)[0]
        assert name in page or name == "r3mes-vllm"


def test_nothing_built_for_cuda_is_beside_the_cpu_build() -> None:
    if "+cpu" not in torch.__version__:
        return
    installed = {it.metadata["Name"] for it in metadata.distributions()}
    assert not installed & {"torchvision", "torchaudio", "torchcodec", "triton"}


def test_every_test_that_the_engine_page_names_exists() -> None:
    named = re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`", (ROOT / "docs/engine.md").read_text())
    assert len(named) > 23
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\b", (ROOT / file).read_text(), re.MULTILINE), name
