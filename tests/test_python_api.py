"""What a program gets of `import r3mes_vllm`."""

import asyncio
import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors.numpy import save_file

import r3mes_vllm
from r3mes_vllm import AdapterStore, R3mesError, ServingNode, afetch, fetch, vet
from r3mes_vllm.adapters import shipped
from r3mes_vllm.errors import AdapterError, AdapterRefused, BadCID, ConfigError, EngineError
from r3mes_vllm.ipfs.pack import pack
from r3mes_vllm.settings import load
from tests import tiny
from tests.embedded import Embedded
from tests.peers.gateway import Gateway, flip, listening, packed
from tests.programs import free_port, wait_until

LEGAL = shipped.cids()["legal"]

# Takes the place of `r3mes-vllm`: has a child of its own, and does as it is told.
CHILD = """
import os, signal, subprocess, sys, time
grandchild = subprocess.Popen(["sleep", "1000"], process_group=0)
with open(sys.argv[1], "a") as file:
    print(os.getpid(), grandchild.pid, file=file, flush=True)
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("identity: wallet x", flush=True)
print(" ".join(sorted(it for it in os.environ if it.startswith("R3MES_"))), flush=True)
if "fails" in sys.argv:
    print("error: no adapter named 'x'", flush=True)
    sys.exit(1)
time.sleep(1000)
"""

# A program that embeds a node, and is killed.
MINER = """
import sys, time
from r3mes_vllm import ServingNode

with ServingNode.from_env() as node:
    print(node.status().pid, flush=True)
    time.sleep(1000)
"""


class Fake:
    """In place of the node's program."""

    def __init__(self, folder: Path, *told: str) -> None:
        script = folder / "child.py"
        script.write_text(CHILD)
        self._pids = folder / "pids"
        self.program = [sys.executable, str(script), str(self._pids), *told]

    def pids(self) -> list[int]:
        wait_until(lambda: self._pids.exists() and self._pids.read_text() != "", 20, "the child")
        return [int(pid) for pid in self._pids.read_text().split()]


def are_gone(pids: list[int]) -> bool:
    return not any(
        psutil.pid_exists(it) and psutil.Process(it).status() != psutil.STATUS_ZOMBIE for it in pids
    )


def node_of(folder: Path, *told: str, **options: object) -> tuple[ServingNode, Fake]:
    fake = Fake(folder, *told)
    given = {"enable_serving_node": True, "state_dir": folder, "serving_node_port": free_port()}
    return ServingNode(load(given | options), program=fake.program), fake


class TestTheNames:
    def test_importing_the_package_loads_nothing_else(self) -> None:
        code = (
            "import sys; before = set(sys.modules); import r3mes_vllm; import re;"
            "print(*{it.partition('.')[0] for it in set(sys.modules) - before})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        heavy = {"vllm", "torch", "numpy", "httpx", "pydantic", "asyncio", "transformers"}
        assert not heavy & set(done.stdout.decode().split())

    def test_none_of_them_loads_the_engine(self) -> None:
        names = ", ".join(r3mes_vllm.__all__)
        code = f"from r3mes_vllm import {names}; import sys; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert not {b"vllm", b"torch", b"transformers"} & set(done.stdout.split())

    def test_each_has_a_docstring_and_is_listed(self) -> None:
        assert set(r3mes_vllm.__all__) <= set(dir(r3mes_vllm))
        public = [it for it in r3mes_vllm.__all__ if it != "__version__"]
        missing = []
        for name in public:
            value = getattr(r3mes_vllm, name)
            members = inspect.getmembers(value) if inspect.isclass(value) else []
            own = [
                (f"{name}.{it}", member)
                for it, member in members
                if not it.startswith("_") and it in vars(value)
                if inspect.isroutine(member) or isinstance(member, property)
            ]
            # a dataclass without one has its signature there
            missing += [
                it
                for it, member in [(name, value), *own]
                if not (said := inspect.getdoc(member)) or said.startswith(f"{name}(")
            ]
        assert not missing

    def test_a_name_that_is_not_there_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="nothing"):
            r3mes_vllm.nothing  # noqa: B018


class TestANodeThatIsOff:
    @pytest.mark.parametrize("value", [None, "false"])
    def test_it_does_nothing_and_says_so(
        self,
        value: str | None,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.delenv("R3MES_ENABLE_SERVING_NODE", raising=False)
        if value:
            monkeypatch.setenv("R3MES_ENABLE_SERVING_NODE", value)
        caplog.set_level(logging.INFO, "r3mes_vllm.node")
        with ServingNode.from_env() as node:
            status = node.status()
        assert not status.enabled
        assert not status.running
        assert status.pid is status.exit_code is None
        assert "R3MES_ENABLE_SERVING_NODE" in status.reason
        assert "R3MES_ENABLE_SERVING_NODE" in caplog.text
        assert node.start(wait_s=5) == status
        assert node.stop() is None

    def test_a_wrong_setting_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("R3MES_SERVING_NODE_PORT", "many")
        with pytest.raises(ConfigError, match="serving_node_port"):
            ServingNode.from_env()


class TestItsProcess:
    async def test_the_programs_event_loop_goes_on_meanwhile(self, tmp_path: Path) -> None:
        node, fake = node_of(tmp_path, "deaf")
        steps = 0

        async def count() -> None:
            nonlocal steps
            while True:
                steps += 1
                await asyncio.sleep(0.01)

        counting = asyncio.create_task(count())
        async with node:
            pids = await asyncio.to_thread(fake.pids)
            assert (await node.astatus()).pid == pids[0]
            before = steps
            with pytest.raises(EngineError, match="not ready after 0"):
                await node.astart(wait_s=0.3)
            assert steps > before + 5
            before = steps
            assert await node.astop(drain_s=0.3) == -signal.SIGKILL
            assert steps > before + 5
        counting.cancel()
        await asyncio.to_thread(wait_until, lambda: are_gone(pids), 5, "the child and its child")

    def test_it_has_the_settings_and_none_of_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("R3MES_BODY_TIMEOUT", "7")
        caplog.set_level(logging.INFO, "r3mes_vllm.node")
        node, _ = node_of(tmp_path, body_timeout=30.0, loras=["legal"])
        with node:
            wait_until(lambda: "R3MES_LORAS" in caplog.text, 20, "its words")
        assert "R3MES_STATE_DIR" in caplog.text
        assert "R3MES_BODY_TIMEOUT" not in caplog.text  # an option won, with the default
        assert "ended with status -15" in caplog.text

    def test_what_ended_it_is_said_and_it_starts_again(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        node, fake = node_of(tmp_path, "fails")
        for _ in range(2):
            with pytest.raises(EngineError, match="status 1: no adapter named 'x'"):
                node.start(wait_s=20)
            status = node.status()
            assert status.exit_code == 1
            assert not status.running
        assert [it.levelname for it in caplog.records if "no adapter" in it.message] == [
            "ERROR"
        ] * 2
        pids = fake.pids()
        assert len(pids) == 4
        wait_until(lambda: are_gone(pids), 5, "what the child left behind")

    def test_a_program_that_is_not_there(self, tmp_path: Path) -> None:
        node = ServingNode(load({"enable_serving_node": True}), program=[str(tmp_path / "none")])
        with pytest.raises(EngineError, match="No such file"):
            node.start()
        assert not node.status().running

    def test_it_outlives_the_thread_that_started_it(self, tmp_path: Path) -> None:
        node, fake = node_of(tmp_path)
        starting = threading.Thread(target=node.start)
        starting.start()
        starting.join()
        pids = fake.pids()
        # as soon as that thread is gone the kernel would have sent the signal
        wait_until(lambda: len(fake.pids()) == 2, 5, "its child")
        assert node.status().running
        assert not are_gone(pids[:1])
        assert node.stop() == -signal.SIGTERM

    def test_its_output_may_be_the_programs_own(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        fake = Fake(tmp_path)
        settings = load({"enable_serving_node": True, "state_dir": tmp_path})
        said = ""

        def has_spoken() -> bool:
            nonlocal said
            said += capfd.readouterr().out
            return "identity: wallet x\n" in said

        with ServingNode(settings, output="inherit", program=fake.program):
            wait_until(has_spoken, 20, "its words")


class TestARealNode:
    def test_it_serves(self, embedded: Embedded) -> None:
        status = embedded.node.status()
        assert status.running
        assert status.ready
        assert set(status.adapters) >= {"legal", "medical"}
        assert status.reason == ""
        assert embedded.starting != ""
        body = {"message": "What is a contract?", "lora_name": "legal", "max_tokens": 4}
        for url in (status.url, embedded.backend.url):
            answer = httpx.post(f"{url}/chat", json=body, timeout=60)
            assert answer.is_success
            assert answer.headers["x-r3mes-adapter"] == "legal"
        assert any(it.startswith("engine:") for it in embedded.lines)
        assert embedded.node.start(wait_s=5).pid == status.pid  # it runs already

    def test_it_ends_with_a_program_that_is_killed(self, tiny_model: Path, tmp_path: Path) -> None:
        port = free_port()
        adapter = tiny.make_adapter(tmp_path / "legal", seed=1)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("R3MES_")} | {
            "R3MES_ENABLE_SERVING_NODE": "true",
            "R3MES_MODEL": str(tiny_model),
            "R3MES_LORAS": f"legal={adapter}",
            "R3MES_SERVING_NODE_HOST": "127.0.0.1",
            "R3MES_SERVING_NODE_PORT": str(port),
            "R3MES_BACKEND_URL": f"http://127.0.0.1:{free_port()}",
            "R3MES_STATE_DIR": str(tmp_path / "state"),
            "R3MES_CACHE_DIR": str(tmp_path / "cache"),
        }
        with subprocess.Popen(
            [sys.executable, "-c", MINER], env=environment, stdout=subprocess.PIPE
        ) as miner:
            assert miner.stdout
            pid = int(miner.stdout.readline())
            health = f"http://127.0.0.1:{port}/health"
            wait_until(lambda: httpx.get(health).status_code == 503, 60, "the node to start")
            wait_until(lambda: "engine" in httpx.get(health).json()["reason"], 60, "its engine")
            miner.kill()
        wait_until(lambda: are_gone([pid]), 60, "the node to end with it")


class TestFetch:
    def test_into_the_cache_and_into_a_folder(self, tmp_path: Path) -> None:
        cached = fetch(LEGAL, cache_dir=tmp_path / "cache", gateways=[])
        assert cached.parent.parent == tmp_path / "cache"
        mine = fetch(LEGAL, dest=tmp_path / "mine", cache_dir=tmp_path / "cache")
        assert mine == tmp_path / "mine"
        assert {it.name for it in mine.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert vet(mine).accepted
        with pytest.raises(AdapterError, match="not empty"):
            fetch(LEGAL, dest=tmp_path / "mine", cache_dir=tmp_path / "cache")

    async def test_in_a_program_with_an_event_loop(self, tmp_path: Path) -> None:
        assert fetch(LEGAL, cache_dir=tmp_path).name == LEGAL
        assert (await afetch(LEGAL, cache_dir=tmp_path)).name == LEGAL

    def test_what_is_no_cid(self, tmp_path: Path) -> None:
        with pytest.raises(BadCID):
            fetch("legal", cache_dir=tmp_path)

    async def test_from_a_gateway_whose_bytes_are_hashed(self, tmp_path: Path) -> None:
        published = packed(tiny.make_adapter(tmp_path / "mine", seed=5))
        cid = str(published.root)
        nobody = f"http://127.0.0.1:{free_port()}"
        async with listening(Gateway(published, lie=flip)) as gateway:
            with pytest.raises(R3mesError, match=gateway.name):
                await afetch(
                    cid, gateways=[gateway.name], ipfs_api=nobody, cache_dir=tmp_path / "cache"
                )
        async with listening(Gateway(published)) as gateway:
            got = await afetch(
                cid, gateways=[gateway.name], ipfs_api=nobody, cache_dir=tmp_path / "cache"
            )
            assert published.into(got) or {it.name for it in got.iterdir()} >= {
                "adapter_config.json"
            }
            with pytest.raises(R3mesError, match="1024"):
                await afetch(
                    cid,
                    gateways=[gateway.name],
                    ipfs_api=nobody,
                    cache_dir=tmp_path / "other",
                    max_bytes=1024,
                )

    async def test_what_no_node_would_serve(self, tmp_path: Path) -> None:
        published = packed(poisoned(tmp_path / "bad"))
        async with listening(Gateway(published)) as gateway:
            with pytest.raises(AdapterRefused) as refused:
                await afetch(
                    str(published.root),
                    gateways=[gateway.name],
                    ipfs_api=f"http://127.0.0.1:{free_port()}",
                    cache_dir=tmp_path / "cache",
                )
        assert refused.value.rule == "numbers_are_finite"


class TestVet:
    def test_a_good_one_in_each_form(self, tmp_path: Path, tiny_model: Path) -> None:
        adapter = tiny.make_adapter(tmp_path / "mine", seed=5)
        car = tmp_path / "mine.car"
        pack(adapter, car)
        for path in (adapter, str(adapter), car, adapter / "adapter_model.safetensors"):
            report = vet(path)
            assert report.accepted
            assert report.rank == 8
            assert "not checked" in {it.verdict for it in report.findings}
        compared = vet(adapter, base=tiny_model)
        assert compared.accepted
        assert {it.verdict for it in compared.findings} == {"ok"}

    def test_a_bad_one_is_no_error(self, tmp_path: Path, tiny_model: Path) -> None:
        report = vet(poisoned(tmp_path / "bad"))
        assert not report.accepted
        assert [it.rule for it in report.findings if it.verdict == "refused"] == [
            "numbers_are_finite"
        ]
        (tmp_path / "bad.car").write_bytes(b"no CAR")
        (tmp_path / "bad.zip").write_bytes(b"PK\3\4 no archive")
        (tmp_path / "empty").mkdir()
        for name in ("bad.car", "bad.zip", "empty", "nothing"):
            assert not vet(tmp_path / name).accepted
        shape = vet(shipped.adapters()[0].car, base=tiny_model)
        assert [it.rule for it in shape.findings if it.verdict == "refused"] == ["shapes_fit"]
        assert not vet(shipped.adapters()[0].car, max_rank=1).accepted

    def test_a_base_that_is_no_model_is_the_callers_mistake(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError):
            vet(shipped.adapters()[0].car, base=tmp_path)


class TestTheStore:
    @pytest.fixture
    def store(self, tmp_path: Path) -> AdapterStore:
        for cid in shipped.cids().values():
            fetch(cid, cache_dir=tmp_path)
        return AdapterStore.open(tmp_path)

    def test_what_is_held_stays(self, store: AdapterStore) -> None:
        cids = shipped.cids()
        assert {str(it.cid) for it in store} == {str(it.cid) for it in store.list()}
        assert {str(it.cid) for it in store} == set(cids.values())
        assert LEGAL in store
        assert "legal" not in store
        lease = store.lease(LEGAL)
        assert lease
        with lease:
            assert store.gc(everything=True) > 0
            assert [str(it.cid) for it in store] == [LEGAL]
            assert (lease.path / "adapter_config.json").is_file()
        assert store.gc(everything=True) > 0
        assert store.list() == ()
        assert store.lease(LEGAL) is None

    def test_what_is_damaged_is_dropped(self, store: AdapterStore) -> None:
        with store.lease(LEGAL) as lease:  # type: ignore[union-attr]
            weights = lease.path / "adapter_model.safetensors"
        damaged = bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.chmod(0o600)
        weights.write_bytes(damaged)
        found = {str(it.cid): it for it in store.verify()}
        assert isinstance(found[LEGAL], r3mes_vllm.Damaged)
        assert isinstance(found[shipped.cids()["medical"]], r3mes_vllm.Stored)
        assert LEGAL not in store
        assert len(store.verify(shipped.cids()["medical"])) == 1

    def test_a_quota(self, tmp_path: Path, store: AdapterStore) -> None:
        size = max(it.bytes for it in store)
        AdapterStore.open(tmp_path, quota=max(size, 1 << 20)).gc()
        assert len(store.list()) <= 2

    def test_a_folder_that_can_not_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(AdapterError, match="can't use the cache"):
            AdapterStore.open(tmp_path / "file")


def poisoned(folder: Path) -> Path:
    tensors = tiny.tensors(seed=5)
    next(iter(tensors.values()))[0, 0] = float("nan")
    tiny.make_adapter(folder, seed=5)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
