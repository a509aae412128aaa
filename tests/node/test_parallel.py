"""Engines of several workers and of several engine processes: the same answers from each."""

import asyncio
import itertools
from pathlib import Path

import httpx
import pytest

from r3mes_vllm.errors import StateInUse
from r3mes_vllm.state_dir import used_by_a_node
from tests import tiny
from tests.conftest import NODE_STARTS_S, Network
from tests.in_store import put_in_store
from tests.programs import Program, free_port, program

MODELS = (tiny.NAME, "legal", "medical", "late")
FAR = 0.08
"""In log-probability: what summing in another order makes of bf16 stays under it."""


async def first_tokens(url: str, times: int) -> dict[str, list[float]]:
    """For each model the log-probability of the first token, of as many requests at once."""

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(model: str) -> float:
            body = {
                "model": model,
                "prompt": list(range(52, 57)),  # the models differ most on it
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": 1,
            }
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return float(answer.json()["choices"][0]["logprobs"]["token_logprobs"][0])

        return {
            model: await asyncio.gather(*(one(model) for _ in range(times))) for model in MODELS
        }


async def put_late(url: str, cache: Path, adapter: Path) -> None:
    """One more adapter while it runs: it must reach every worker."""
    cid = await put_in_store(cache, adapter)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        body = {"name": "late", "cid": cid}
        answer = await client.post("/adapters", json=body)
        assert answer.status_code == 200, answer.text
        shown = (await client.get("/adapters")).json()["adapters"]
        assert {it["state"] for it in shown} <= {"staged", "resident", "gone"}


@pytest.fixture
async def expected(network: Network, late: Path) -> dict[str, list[float]]:
    await put_late(network.node.url, network.node_cache, late)
    found = await first_tokens(network.node.url, 1)
    httpx.delete(f"{network.node.url}/adapters/late").raise_for_status()
    values = sorted(it[0] for it in found.values())
    assert all(b - a > 2 * FAR for a, b in itertools.pairwise(values)), values
    return found


@pytest.fixture
def late(tmp_path: Path) -> Path:
    return tiny.make_adapter(tmp_path / "late", seed=20)


async def test_two_workers_answer_as_one(
    network: Network, tiny_model: Path, tmp_path: Path, late: Path, expected: dict[str, list[float]]
) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    with program(
        tmp_path,
        *("serve", "--loras", _both(network), "--model", str(tiny_model), "--host", "127.0.0.1"),
        *("--port", str(port), "--backend-url", "http://127.0.0.1:9"),
        *("--", "--tensor-parallel-size", "2"),
        url=url,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},  # by itself vLLM wants memory nodes of their own
    ) as node:
        await _answers(node, tmp_path / "cache", late, expected)


async def test_two_engines_under_plain_vllm_answer_as_one(
    network: Network, tiny_model: Path, tmp_path: Path, late: Path, expected: dict[str, list[float]]
) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    with program(
        tmp_path,
        *("--model", str(tiny_model), "--served-model-name", tiny.NAME, "--host", "127.0.0.1"),
        *("--port", str(port), "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4"),
        *("--max-lora-rank", "8", "--data-parallel-size", "2", "--api-server-count", "1"),
        *("--lora-modules", f"module={network.folder / 'legal'}"),
        url=url,
        module="vllm.entrypoints.launchers.api_server.entry",
        env={
            "VLLM_PLUGINS": "r3mes",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or both would share a core
            "OMP_NUM_THREADS": "1",
            "R3MES_LORAS": _both(network),
            "R3MES_BACKEND_URL": "http://127.0.0.1:9",
            "R3MES_SERVING_NODE_HOST": "127.0.0.1",
            "R3MES_SERVING_NODE_PORT": str(port),
        },
    ) as node:
        await _answers(node, tmp_path / "cache", late, expected)
        with pytest.raises(StateInUse, match="process"), used_by_a_node(tmp_path / "state"):
            pass
        assert httpx.post(f"{url}/v1/load_lora_adapter", json={}).status_code == 404
        listed = {it["id"]: it for it in httpx.get(f"{url}/v1/models").json()["data"]}
        assert listed["module"]["cid"] == listed["legal"]["cid"]


def _both(network: Network) -> str:
    return ",".join(f"{name}={network.folder / name}" for name in ("legal", "medical"))


async def _answers(
    node: Program, cache: Path, late: Path, expected: dict[str, list[float]]
) -> None:
    node.wait_for("/ready", 2 * NODE_STARTS_S)
    await put_late(node.url, cache, late)
    found = await first_tokens(node.url, 8)
    for model in MODELS:
        assert all(abs(it - expected[model][0]) < FAR for it in found[model]), (model, found)
