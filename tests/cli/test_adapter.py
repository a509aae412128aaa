"""`r3mes-vllm adapter ...` as authors and operators type it, against a real daemon and backend."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from r3mes_vllm.adapters.files import CONFIG, WEIGHTS
from r3mes_vllm.ipfs.pack import pack
from tests import tiny
from tests.cli.test_cli import run
from tests.peers.js_ipfs import JsIpfs
from tests.programs import Program, free_port, program, wait_until

NOWHERE = {"R3MES_IPFS_API_URL": "http://127.0.0.1:9", "R3MES_BACKEND_URL": "http://127.0.0.1:9"}


def adapter_command(
    cwd: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    found = run("adapter", *arguments, cwd=cwd, **(NOWHERE | variables))
    assert "Traceback" not in found.stderr
    return found


def told(found: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(found.stdout)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tiny.make_adapter(tmp_path / "mine", seed=5)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("backend")
    port = free_port()
    database = f"sqlite:///{folder / 'x.sqlite3'}"
    with program(
        folder,
        *("backend", "--port", str(port), "--database-url", database),
        url=f"http://127.0.0.1:{port}",
    ) as running:
        running.wait_for("/health", 30)
        yield running


@pytest.mark.parametrize("command", ["inspect", "pack", "publish", "pull", "list", "gc", "verify"])
def test_help_has_an_example(tmp_path: Path, command: str) -> None:
    found = adapter_command(tmp_path, command, "--help")
    assert found.returncode == 0
    assert f"Example: r3mes-vllm adapter {command}" in found.stdout


def test_pack_prints_the_cid_and_writes_the_same_bytes_every_time(
    adapter: Path, js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    one = adapter_command(tmp_path, "pack", str(adapter), "-o", "one.car")
    two = adapter_command(tmp_path, "pack", str(adapter), "-o", "two.car", "--json")
    assert one.stdout.split()[0] == told(two)["cid"] == js_ipfs.add(adapter)
    assert (tmp_path / "one.car").read_bytes() == (tmp_path / "two.car").read_bytes()


def test_publish_then_pull_by_name_and_by_cid(
    adapter: Path, js_ipfs: JsIpfs, backend: Program, tmp_path: Path
) -> None:
    network = {"R3MES_IPFS_API_URL": js_ipfs.api, "R3MES_BACKEND_URL": backend.url}
    published = adapter_command(
        tmp_path,
        *("publish", str(adapter), "--name", "mine", "--category", "legal", "--json"),
        **network,
    )
    assert published.returncode == 0, published.stderr
    cid = told(published)["cid"]
    assert cid in js_ipfs.pins()
    (listed,) = httpx.get(f"{backend.url}/api/lora/list").json()
    assert (listed["name"], listed["ipfs_hash"], listed["category"]) == ("mine", cid, "legal")
    facts = (listed["base_model"], listed["rank"], listed["size_bytes"])
    assert facts == (tiny.NAME, 8, (adapter / WEIGHTS).stat().st_size)

    pulled = adapter_command(tmp_path, "pull", "mine", "--json", **network)
    assert pulled.returncode == 0, pulled.stderr
    got = told(pulled)
    assert (got["cid"], got["fetched"], got["rank"]) == (cid, True, 8)
    assert sorted(os.listdir(got["path"]))[:2] == [CONFIG, WEIGHTS]
    again = told(adapter_command(tmp_path, "pull", f"/ipfs/{cid}", "--json"))  # from nowhere
    assert not again["fetched"]
    unpinned = adapter_command(tmp_path, "pull", cid, "--pin")
    assert (unpinned.returncode, "is not pinned" in unpinned.stderr) == (1, True)
    assert told(adapter_command(tmp_path, "list", "--json"))[0]["cid"] == cid
    pulled = adapter_command(tmp_path, "pull", str(adapter), "--pin", "--json")
    assert (told(pulled)["cid"], told(pulled)["fetched"]) == (cid, False)
    assert "not pinned, as it is yours" in pulled.stderr


def test_what_others_keep_is_registered_without_a_daemon(
    adapter: Path, backend: Program, tmp_path: Path
) -> None:
    packed = told(adapter_command(tmp_path, "pack", str(adapter), "-o", "mine.car", "--json"))
    publish = ("publish", str(adapter), "--name", "kept-elsewhere")
    refused = adapter_command(tmp_path, *publish, R3MES_BACKEND_URL=backend.url)
    assert (refused.returncode, "--no-daemon" in refused.stderr) == (1, True)
    found = adapter_command(
        tmp_path, *publish, "--no-daemon", "--json", R3MES_BACKEND_URL=backend.url
    )
    assert found.returncode == 0, found.stderr
    assert (told(found)["cid"], told(found)["daemon"]) == (packed["cid"], None)
    listed = httpx.get(f"{backend.url}/api/lora/list").json()
    assert ("kept-elsewhere", packed["cid"]) in {(it["name"], it["ipfs_hash"]) for it in listed}


def test_a_name_is_published_again_with_its_key_only(
    adapter: Path, js_ipfs: JsIpfs, backend: Program, tmp_path: Path
) -> None:
    publish = ("publish", str(adapter), "--name", "owned")
    network = {"R3MES_IPFS_API_URL": js_ipfs.api, "R3MES_BACKEND_URL": backend.url}
    for state, said in (("mine", ""), ("mine", ""), ("another", "belongs to another key")):
        found = adapter_command(
            tmp_path, *publish, **network, R3MES_STATE_DIR=str(tmp_path / state)
        )
        assert (found.returncode, said in found.stderr) == (bool(said), True)


def test_a_closed_registry_takes_a_new_name_with_the_admins_key(
    adapter: Path, js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    arguments = (
        "backend",
        "--port",
        str(port),
        "--database-url",
        f"sqlite:///{tmp_path}/b.sqlite3",
    )
    publish = ("publish", str(adapter), "--name", "mine")
    network = {"R3MES_IPFS_API_URL": js_ipfs.api, "R3MES_BACKEND_URL": url}
    (tmp_path / "key").write_text("s3cret-of-the-admin\n")
    with program(
        tmp_path, *arguments, url=url, env={"R3MES_ADMIN_KEY": "s3cret-of-the-admin"}
    ) as running:
        running.wait_for("/health", 30)
        refused = adapter_command(tmp_path, *publish, **network)
        assert refused.returncode == 1
        assert "only the admin" in refused.stderr
        # Once it is there, its owner needs no admin.
        for more in (("--admin-key-file", "key"), ()):
            assert adapter_command(tmp_path, *publish, *more, **network).returncode == 0
    missing = adapter_command(tmp_path, *publish, "--admin-key-file", "absent", **network)
    assert (missing.returncode, "can't read the key" in missing.stderr) == (2, True)


def test_inspect_says_what_every_rule_says(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    pack(adapter, tmp_path / "mine.car")
    for what in (str(adapter), "mine.car"):
        good = adapter_command(tmp_path, "inspect", what, "--model", str(tiny_model), "--json")
        assert good.returncode == 0, good.stderr
        found = told(good)
        assert found["accepted"]
        assert (found["rank"], found["base_model"]) == (8, tiny.NAME)
        assert {it["verdict"] for it in found["findings"]} == {"ok"}
        assert len(found["findings"]) > 10
    without_model = adapter_command(tmp_path, "inspect", str(adapter))
    assert "not checked" in without_model.stdout
    assert without_model.stdout.endswith("accepted\n")

    (adapter / CONFIG).write_text(json.dumps(tiny.config() | {"use_dora": True, "r": "8"}))
    bad = adapter_command(tmp_path, "inspect", str(adapter), "--json")
    assert bad.returncode == 1
    refused = {it["rule"] for it in told(bad)["findings"] if it["verdict"] == "refused"}
    assert {"features_are_served", "rank_is_sane"} <= refused
    assert not told(bad)["accepted"]


def test_inspecting_a_file_leaves_it_where_it_is(adapter: Path, tmp_path: Path) -> None:
    lone = (adapter / WEIGHTS).rename(tmp_path / "lone.safetensors")
    content = lone.read_bytes()
    shutil.copytree(adapter, tmp_path / "folder")
    (tmp_path / "folder" / CONFIG).unlink()
    shutil.copy(lone, tmp_path / "folder" / "my.safetensors")
    for what in ("lone.safetensors", "folder"):
        assert adapter_command(tmp_path, "inspect", what).returncode == 0
    assert lone.read_bytes() == (tmp_path / "folder" / "my.safetensors").read_bytes() == content


@pytest.mark.parametrize(
    "config",
    [
        tiny.config() | {"r": 0},
        tiny.config() | {"lora_alpha": 10**400},
        json.dumps(tiny.config() | {"r": 7}).replace("7", "1e999"),
        tiny.config() | {"base_model_name_or_path": "\ud800"},
        tiny.config() | {"peft_type": "\x1b[2J" * 200_000},
        tiny.config() | {"base_model_name_or_path": "\x1b]0;pwned\x07", "r": "8"},
        tiny.config() | {"rank_pattern": {f"a{i}": 1 for i in range(60_000)}},
    ],
    ids=range(7),
)
def test_whatever_an_adapter_says_inspect_says_why_it_is_refused(
    adapter: Path, tmp_path: Path, config: Any
) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (adapter / CONFIG).write_text(text)
    found = adapter_command(tmp_path, "inspect", str(adapter))
    assert found.returncode == 1
    assert found.stdout.endswith("refused\n")
    assert len(found.stdout) < 5000
    assert found.stdout.replace("\n", "").isprintable()


def test_a_name_that_is_not_utf8_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / os.fsdecode(b"\xff")).write_bytes(b"")
    found = adapter_command(tmp_path, "pack", "odd", "-o", "x.car")
    assert found.returncode == 1
    assert "not UTF-8" in found.stderr


@pytest.mark.parametrize("config", ["[]", "{", '{"model_type": "llama"}', '{"model_type": []}'])
def test_a_model_whose_config_is_none_is_said(adapter: Path, tmp_path: Path, config: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(config)
    found = adapter_command(tmp_path, "inspect", str(adapter), "--model", "model")
    assert found.returncode == 2
    assert "config.json" in found.stderr


def test_what_is_refused_is_not_published_and_not_pulled(
    adapter: Path, js_ipfs: JsIpfs, tmp_path: Path
) -> None:
    (adapter / "tokenizer.py").write_text("import os")
    for arguments in (("publish", str(adapter), "--name", "x"), ("pull", str(adapter))):
        found = adapter_command(tmp_path, *arguments, R3MES_IPFS_API_URL=js_ipfs.api)
        assert found.returncode == 1
        assert "tokenizer.py" in found.stderr
    assert told(adapter_command(tmp_path, "list", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("pull", "nobody"), 1, "no adapter named 'nobody'"),
        (("pull", "no/name"), 2, "can't be an adapter's name"),
        (("pull", "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"), 1, "offered"),
        (("inspect", "absent"), 1, "no adapter named"),
        (("pack", "absent", "-o", "x.car"), 1, "absent"),
        (("publish", "absent", "--name", "x"), 1, "not a directory"),
        (("publish", ".", "--name", "not a name"), 2, "can't be an adapter's name"),
        (("verify", "nobody"), 1, "nobody"),
        (("gc", "--cache-size", "lots"), 2, "lots"),
        (("pull",), 2, "Missing argument"),
        (("inspect", "~nouser/x"), 2, "~nouser"),
        (("inspect", "a" * 5000), 2, "too long"),
        (("pull", "a" * 5000), 2, "too long"),
        (("verify", "~nouser/x"), 2, "~nouser"),
        (("publish", "a" * 5000, "--name", "x"), 1, "too long"),
        (("pack", ".", "-o", "."), 2, "is a directory"),
    ],
)
def test_mistakes_are_one_line_and_what_to_do(
    tmp_path: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    found = adapter_command(tmp_path, *arguments)
    assert found.returncode == status
    assert said in found.stderr


def test_the_daemon_that_is_not_there_is_said(adapter: Path, tmp_path: Path) -> None:
    found = adapter_command(tmp_path, "publish", str(adapter), "--name", "x")
    assert found.returncode == 1
    assert "IPFS daemon" in found.stderr
    assert "try:" in found.stderr


def test_verify_finds_a_flipped_bit_and_gc_frees_the_rest(adapter: Path, tmp_path: Path) -> None:
    other = tiny.make_adapter(tmp_path / "other", seed=6)
    paths = [
        Path(told(adapter_command(tmp_path, "pull", str(it), "--json"))["path"])
        for it in (adapter, other)
    ]
    assert adapter_command(tmp_path, "verify").returncode == 0
    data = bytearray((paths[0] / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (paths[0] / WEIGHTS).write_bytes(data)
    found = adapter_command(tmp_path, "verify", "--json")
    assert found.returncode == 1
    damaged = {it["cid"]: it["dropped"] for it in told(found) if it["damage"]}
    assert damaged == {paths[0].name: True}
    assert adapter_command(tmp_path, "verify", paths[1].name).returncode == 0
    freed = told(adapter_command(tmp_path, "gc", "--all", "--json"))
    assert freed["freed_bytes"] > 0
    assert freed["adapters"] == 0


def test_ctrl_c_ends_a_fetch_with_130_and_what_came_is_kept(tmp_path: Path) -> None:
    """A gateway that gives the first block and then nothing."""
    adapter = tiny.make_adapter(tmp_path / "mine", seed=5)
    cid = pack(adapter, tmp_path / "mine.car")
    script = (
        "import asyncio, sys; from pathlib import Path; from tests.peers import gateway as g; "
        "from r3mes_vllm.ipfs import car\n"
        "async def main():\n"
        "    blocks = list(car.read_file(Path(sys.argv[1])))\n"
        "    p = g.Published(blocks[0][0], blocks, Path('.'))\n"
        "    def lie(found):\n"
        "        return found[:2] if len(found) > 1 else g.stall(found)\n"
        "    async with g.listening(g.Gateway(p, lie)) as source:\n"
        "        print(source.name, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())"
    )
    gateway = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "mine.car")],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert gateway.stdout
        url = gateway.stdout.readline().strip()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("R3MES_")} | NOWHERE
        pulling = subprocess.Popen(
            [
                *(sys.executable, "-m", "r3mes_vllm", "adapter", "pull", str(cid)),
                *("--ipfs-gateway", url, "--cache-dir", str(tmp_path / "cache")),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        incoming = tmp_path / "cache" / "incoming" / str(cid)
        wait_until(lambda: bool(list(incoming.rglob("*.data"))), 30, "the first block")
        pulling.send_signal(signal.SIGINT)
        assert pulling.wait(15) == 130
        assert pulling.stderr
        assert "Traceback" not in pulling.stderr.read()
        assert list(incoming.rglob("*.data"))
    finally:
        gateway.kill()
        gateway.wait()
    shutil.rmtree(tmp_path / "cache")
