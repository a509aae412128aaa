"""An adapter's system prompt, from where it is published to where it is kept; what `/chat` does
with it is in test_https.py."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from r3mes_vllm.adapters.catalog import Catalog
from r3mes_vllm.adapters.publish import read_system_prompt
from r3mes_vllm.adapters.supply import Supply
from r3mes_vllm.engine.failures import Failures
from r3mes_vllm.engine.host import Host
from r3mes_vllm.engine.version import Version
from r3mes_vllm.errors import ConfigError, R3mesError, SourceFailed
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.node.registry import Registry
from r3mes_vllm.settings import load
from r3mes_vllm.wire import SYSTEM_PROMPT_CHARACTERS, Lora

ONE, TWO = (CID.of(RAW, text) for text in (b"1", b"2"))
TOO_LONG = "x" * (SYSTEM_PROMPT_CHARACTERS + 1)


def listed(cid: CID = ONE, prompt: str | None = "Be kind.") -> Lora:
    return Lora(id=1, name="legal", ipfs_hash=str(cid), system_prompt=prompt)


class Served:
    """The host's part: `legal` in some version, and whether another one can be had."""

    def __init__(self, cid: CID = ONE, error: R3mesError | None = None) -> None:
        self.cid, self.error = str(cid), error
        self.being_put: set[str] = set()
        self.failures = Failures()

    def find(self, name: str) -> Version:
        return Version(name, self.cid, 1, keep=True)

    async def put(self, name: str, cid: CID, keep: bool) -> None:
        if self.error:
            raise self.error
        self.cid = str(cid)


class NoPaths:
    async def resolve(self, path: IpfsPath) -> CID:
        return path.root


class Known(Registry):
    """One that `read` gives what the backend lists."""

    def __init__(self, state: Path, *fixed: str) -> None:
        settings = load({"state_dir": state})
        super().__init__(settings, cast(Supply, NoPaths()), fixed)

    async def read(self, served: Served, *loras: Lora) -> None:
        self._catalog = Catalog(self._settings.state_dir, loras)
        await self._switch(cast(Host, served), "legal")


async def test_it_goes_with_the_version_that_it_is_listed_with(tmp_path: Path) -> None:
    registry, served = Known(tmp_path), Served()
    await registry.read(served, listed(ONE, "Be kind."))
    await registry.read(served, listed(TWO, "Be brief."))
    assert registry.system_prompt("legal", str(TWO)) == "Be brief."
    assert registry.system_prompt("legal", str(ONE)) is None


async def test_a_version_that_can_not_be_had_brings_no_prompt(tmp_path: Path) -> None:
    registry, served = Known(tmp_path), Served(error=SourceFailed("no"))
    await registry.read(served, listed(ONE, "Be kind."))
    await registry.read(served, listed(TWO, "Be brief."))
    assert registry.system_prompt("legal", str(ONE)) == "Be kind."
    assert registry.system_prompt("legal", str(TWO)) is None


async def test_after_a_start_without_the_backend_it_is_there(tmp_path: Path) -> None:
    await Known(tmp_path).read(Served(), listed())
    again = Known(tmp_path)
    again.take_system_prompt("legal", ONE)
    assert again.system_prompt("legal", str(ONE)) == "Be kind."
    assert again.system_prompt("legal", str(TWO)) is None


async def test_a_name_with_the_operators_cid_has_none(tmp_path: Path) -> None:
    registry = Known(tmp_path, "legal")
    await registry.read(Served(), listed())
    assert registry.system_prompt("legal", str(ONE)) is None


async def test_one_that_is_too_long_is_left_out_with_one_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    registry = Known(tmp_path)
    for _ in range(3):
        await registry.read(Served(), listed(prompt=TOO_LONG))
    assert registry.system_prompt("legal", str(ONE)) is None
    assert capfd.readouterr().err.count("'legal' goes without") == 1
    Catalog(tmp_path, [listed(prompt=TOO_LONG)]).remember({})
    assert json.loads((tmp_path / "system-prompts.json").read_text()) == {}
    await registry.read(Served(), listed(prompt=TOO_LONG[1:]))
    assert registry.system_prompt("legal", str(ONE)) == TOO_LONG[1:]


@pytest.mark.parametrize("memory", ["", "[]", '{"legal": 5}', '{"legal": null}'])
def test_a_broken_memory_is_none(tmp_path: Path, memory: str) -> None:
    (tmp_path / "system-prompts.json").write_text(memory)
    assert Catalog(tmp_path, None).system_prompt_of("legal") is None


def test_the_authors_text_or_file(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Sei höflich.\n", encoding="utf-8")
    assert read_system_prompt("Be kind.") == "Be kind."
    assert read_system_prompt(f"@{file}") == "Sei höflich.\n"
    assert read_system_prompt(TOO_LONG[1:]) == TOO_LONG[1:]
    file.write_bytes(b"\xff")
    wrong: list[Any] = [f"@{file}", f"@{tmp_path / 'absent'}", "@~nobody-here/x", TOO_LONG]
    for given in wrong:
        with pytest.raises(ConfigError, match="system prompt"):
            read_system_prompt(given)
