"""Every command and every program of README and docs does what its page says: it runs."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.settings import load
from tests.certificates import Authority
from tests.conformance.test_other_clients import HERE as CONFORMANCE
from tests.docs.blocks import PAGES, ROOT, Block, Command, blocks, commands
from tests.docs.checks import check
from tests.docs.session import Reader
from tests.embedded import Embedded
from tests.peers import installed
from tests.peers.js_ipfs import JsIpfs

KINDS = {
    "sh",
    "python",
    "js",
    "javascript",
    "toml",
    "yaml",
    "json",
    "ini",
    "data",
    "",
    "mermaid",
    "nginx",
}


@pytest.fixture(scope="module")
def cid(embedded: Embedded, js_ipfs: JsIpfs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of `legal`, which the daemon has, as it has `medical`."""
    found = {}
    for name in ("legal", "medical"):
        car = tmp_path_factory.mktemp("cars") / f"{name}.car"
        found[name] = str(pack(embedded.folder / name, car))
        js_ipfs.import_car(car)
    return found["legal"]


@pytest.fixture
def reader(embedded: Embedded, js_ipfs: JsIpfs, cid: str, tmp_path: Path) -> Reader:
    modules = installed.npm("openai-node", CONFORMANCE) / "node_modules"
    reader = Reader(tmp_path / "checkout", embedded, js_ipfs.api, modules, cid)
    authority = Authority(tmp_path / "authority")
    pem, key = reader.folder / "fullchain.pem", reader.folder / "privkey.pem"
    authority.issue().write(pem, key)
    return reader


def _with_commands() -> Iterator[Path]:
    for page in PAGES:
        if any(it.kind in ("sh", "python", "js", "javascript") for it in blocks(page)):
            yield page


@pytest.mark.parametrize("page", _with_commands(), ids=lambda it: it.stem)
def test_a_page_can_be_followed(page: Path, reader: Reader) -> None:
    for block in blocks(page):
        reader.read(block)
    assert reader.done


@pytest.mark.parametrize("page", PAGES, ids=lambda it: it.stem)
def test_a_block_says_what_it_is_and_settings_are_taken(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        assert block.kind in KINDS, f"{block}: {block.kind}"
        if block.kind == "toml":
            file = tmp_path / "settings.toml"
            file.write_text(block.text)
            load(config=file)


def typed(text: str) -> Command:
    return next(commands(Block(ROOT / "README.md", 1, "sh", text)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("r3mes-vllm serve --nothing x", "no option --nothing"),
        ("r3mes-vllm adapter pull legal --ipfs-gatway x", "no option --ipfs-gatway"),
        ("sudo -u me r3mes-vllm serve --nothing", "no option --nothing"),
        ("r3mes-vllm serve -- --max-model-length 1", "vLLM has no option --max-model-length"),
        ("r3mes-vllm nothing", "No such command"),
        ("make nothing", "nothing"),
        ("docker compose -f configs/nothing.yaml up", "no configs/nothing.yaml"),
    ],
)
def test_what_is_only_checked_is_checked(text: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check(typed(text))


class TestAReader:
    def test_finds_a_command_that_fails(self, reader: Reader) -> None:
        for text in ("curl -s http://127.0.0.1:8000/nothing", "r3mes-vllm adapter verify nobody"):
            with pytest.raises(AssertionError, match="status"):
                reader.type(typed(text))
        with pytest.raises(AssertionError, match="without an API key"):
            reader.type(typed("r3mes-vllm serve --loras legal"))
        with pytest.raises(AssertionError, match="no command that a test knows"):
            reader.type(typed("wget http://127.0.0.1:8000/"))

    def test_remembers_what_was_exported(self, reader: Reader) -> None:
        reader.type(typed("export MINE='of mine'"))
        reader.type(typed("mkdir inner"))
        reader.type(typed("cd inner"))
        reader.type(typed('printf "%s" "$MINE" > it'))
        assert (reader.folder / "inner" / "it").read_text() == "of mine"


def test_a_page_is_taken_apart() -> None:
    page = ROOT / "README.md"
    found = blocks(page)
    assert found[0].text == "make demo"
    assert {"sh", "python"} <= {it.kind for it in found}
    long = Block(page, 1, "sh", "a \\\n  b\ncat <<X\nc\nX\nprintf 'd\ne'\n# f\n\ng | h")
    assert [it.text for it in commands(long)] == [
        *("a \\\n  b", "cat <<X\nc\nX", "printf 'd\ne'", "g | h"),
    ]
    assert shutil.which("bash")
