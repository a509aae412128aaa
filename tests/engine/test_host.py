"""What the host makes of an engine's refusals; a good load is real in tests/node."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r3mes_vllm.engine import host as host_module
from r3mes_vllm.engine.canary import Canary
from r3mes_vllm.engine.host import Host
from r3mes_vllm.errors import AdapterRefused, EngineError


class Engine:
    """Refuses, hangs or dies as vLLM's client does: with a plain Exception."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.errored = how == "dead"
        self.dead_error = RuntimeError("it is dead")

    async def add_lora(self, request: Any) -> bool:
        if self.how == "hang":
            await asyncio.sleep(3600)
        if self.how == "false":
            return False
        raise Exception("Call to add_lora method failed: no such module")

    async def generate(self, prompt: Any, params: Any, request_id: str) -> Any:
        if self.how == "hang":
            await asyncio.sleep(3600)
        if self.how == "refuse":
            raise Exception("out of memory")
        logprob = float("nan") if self.how == "poisoned" else -1.0
        position = {7: SimpleNamespace(logprob=logprob)}
        yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=[position])])


def hosting(engine: Engine) -> tuple[Host, Any]:
    models = SimpleNamespace(
        lora_requests={},
        lora_id_counter=SimpleNamespace(inc=lambda by: by),
        base_model_paths=[SimpleNamespace(name="base")],
    )
    return Host(engine, models), models


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("refuse", AdapterRefused),
        ("false", AdapterRefused),
        ("dead", EngineError),
        ("hang", EngineError),
    ],
)
async def test_an_adapter_that_does_not_load_is_not_served(
    how: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "LOAD_TIMEOUT_S", 0.1)
    host, models = hosting(Engine(how))
    with pytest.raises(error, match="legal"):
        await host.add("legal", "bafy", Path("/adapters/bafy"), rank=8, size=1)
    assert not models.lora_requests
    assert host.find("legal") is None


@pytest.mark.parametrize(
    ("how", "trouble"),
    [
        ("well", None),
        ("poisoned", "not finite"),
        ("refuse", "out of memory"),
        ("dead", "it is dead"),
        ("hang", "generated nothing"),
    ],
)
async def test_the_canary_says_what_is_wrong(
    how: str, trouble: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r3mes_vllm.engine.canary.FIRST_TIMEOUT_S", 0.1)
    found = await Canary(Engine(how)).trouble()
    assert (found is None) if trouble is None else (trouble in (found or ""))
