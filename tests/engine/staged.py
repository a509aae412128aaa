"""Adapters put on a running engine, staged and plainly, and what is left in its worker after each.

    python -m tests.engine.staged MODEL FOLDER

FOLDER has adapters `0` to `5`, and broken ones. Prints what it saw as one line of JSON.
"""

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_PLUGINS": "r3mes",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora import lora_model
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from r3mes_vllm.engine import reading, staging
from r3mes_vllm.engine.staging import StagingExtension
from r3mes_vllm.errors import R3mesError

GOOD = 6
MISFITS = ("too wide", "too narrow", "of no layer")
LACKING = ("no config", "no weights", "missing")
BROKEN = ("truncated", *LACKING, *MISFITS)
SLOW_S = 3.0
LIMIT_S = 30.0
PROMPTS = [[40 + number] * 6 for number in range(3)]

_open = reading.Weights


class Watched(StagingExtension):
    """Tells what the worker holds, and makes its disk slow or its slices short."""

    def watch(self) -> dict[str, Any]:
        gc.collect()
        manager = self.model_runner.lora_manager._adapter_manager
        (wrapper,) = manager.punica_wrapper_mapping.values()
        return {
            "models": sum(isinstance(it, LoRAModel) for it in gc.get_objects()),
            # only the CPU's wrapper keeps any
            "packs": sum(len(it._packs) for it in getattr(wrapper, "_layers", {}).values()),
            "loads": len(self._r3mes_loads),
            "slots": list(manager.lora_index_to_id),
            "cached": sorted(manager.list_adapters()),
        }

    def slow_disk(self, seconds: float) -> None:
        def slow(*arguments: Any, **named: Any) -> Any:
            time.sleep(seconds)
            return _open(*arguments, **named)

        lora_model.safetensors.safe_open = slow if seconds else _open

    def no_memory(self, none: bool) -> None:
        def fails(*arguments: Any, **named: Any) -> Any:
            raise MemoryError

        lora_model.safetensors.safe_open = fails if none else _open

    def short_slices(self, short: bool) -> None:
        staging.SLICE_S = staging._LONGEST_SLICE_S = 0.0 if short else 0.05


class Trial:
    def __init__(self, engine: AsyncLLM, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.number = 0

    async def all(self) -> dict[str, Any]:
        await self.answer(None)
        plain = [await self.plainly(str(number)) for number in range(GOOD)]
        return {
            "base": await self.answer(None),
            "plain": plain,
            "staged": await self.staged(),
            "broken": {name: await self.refused(name) for name in BROKEN},
            "no memory": await self.without_memory(),
            "at once": await self.at_once(),
            "full": await self.full(),
            "displaced": await self.displaced(),
            "cancelled": await self.cancelled(),
            "timed out": await self.timed_out(),
            "gap staged": await self.gap(staged=True),
            "gap plain": await self.gap(staged=False),
            "end": await self.watch(),
        }

    def request(self, name: str) -> LoRARequest:
        self.number += 1
        return LoRARequest(f"{name}@{self.number}", self.number, str(self.folder / name))

    async def ask(self, method: str, *arguments: Any) -> Any:
        (answer,) = await self.engine.collective_rpc(method, args=arguments)
        return answer

    async def watch(self) -> dict[str, Any]:
        return dict(await self.ask("watch"))

    async def load(self, name: str, limit_s: float = LIMIT_S) -> LoRARequest:
        request = self.request(name)
        await staging.load(self.engine, request, limit_s)
        return request

    async def remove(self, *requests: LoRARequest) -> None:
        for request in requests:
            assert await self.engine.remove_lora(request.lora_int_id)

    async def answer(self, adapter: LoRARequest | None) -> list[list[int]]:
        async def one(prompt: list[int]) -> list[int]:
            return [token async for token, _ in self.tokens(adapter, prompt, 12)]

        return await asyncio.gather(*[one(prompt) for prompt in PROMPTS])

    async def tokens(
        self, adapter: LoRARequest | None, prompt: list[int], count: int
    ) -> AsyncIterator[tuple[int, float]]:
        """Each token and when it came."""
        self.number += 1
        params = SamplingParams(
            temperature=0,
            max_tokens=count,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        asked: Any = {"prompt_token_ids": prompt}
        async for output in self.engine.generate(
            asked, params, f"r{self.number}", lora_request=adapter
        ):
            for token in output.outputs[0].token_ids:
                yield token, time.perf_counter()

    @asynccontextmanager
    async def running(self, *adapters: LoRARequest | None) -> AsyncIterator[list[float]]:
        """Streams of these adapters; yields when the tokens came."""
        times: list[float] = []

        async def stream(adapter: LoRARequest | None) -> None:
            while True:  # a fast machine makes as many as there is room for in two seconds
                async for _, when in self.tokens(adapter, PROMPTS[0], 1000):
                    times.append(when)

        tasks = [asyncio.create_task(stream(adapter)) for adapter in adapters]
        try:
            while len(times) < 10 * len(tasks):
                await asyncio.sleep(0.01)
            yield times
            assert not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def plainly(self, name: str) -> list[list[int]]:
        request = self.request(name)
        assert await self.engine.add_lora(request)
        found = await self.answer(request)
        await self.remove(request)
        return found

    async def staged(self) -> dict[str, Any]:
        await self.answer(None)
        before = await self.watch()
        request = await self.load("0")
        resident = await staging.resident(self.engine)
        loaded = await self.watch()
        answer = await self.answer(request)
        await self.remove(request)
        await self.answer(None)
        return {
            "id": request.lora_int_id,
            "resident": sorted(resident),
            "resident after": sorted(await staging.resident(self.engine)),
            "answer": answer,
            "watch": [before, loaded, await self.watch()],
        }

    async def refused(self, name: str) -> dict[str, Any]:
        before = await self.watch()
        error = None
        try:
            await self.load(name)
        except R3mesError as raised:
            error = [type(raised).__name__, str(raised)]
        await self.answer(None)
        return {"error": error, "watch": [before, await self.watch()]}

    async def without_memory(self) -> dict[str, Any]:
        await self.ask("no_memory", True)
        found = await self.refused("0")
        await self.ask("no_memory", False)
        return found

    async def at_once(self) -> list[list[list[int]]]:
        """Four at once into two slots, then a request to each at once."""
        requests = await asyncio.gather(*[self.load(str(number)) for number in range(4)])
        answers = await asyncio.gather(*[self.answer(request) for request in requests])
        await self.remove(*requests)
        return answers

    async def full(self) -> dict[str, Any]:
        """Loaded while streams run in all slots."""
        busy = [await self.load("0"), await self.load("1")]
        async with self.running(*busy):
            before = await staging.resident(self.engine)
            request = await self.load("2")
            after = await staging.resident(self.engine)
            cached = await self.engine.list_loras()
            misfits = {name: await self.refused(name) for name in MISFITS}
        answer = await self.answer(request)
        await self.remove(*busy, request)
        return {
            "before": sorted(before),
            "after": sorted(after),
            "cached": request.lora_int_id in cached,
            "misfits": misfits,
            "answer": answer,
        }

    async def displaced(self) -> dict[str, Any]:
        """Requests to as many adapters as there are slots come while another is being placed."""
        others = [await self.load("3"), await self.load("4")]
        await self.ask("short_slices", True)
        request = self.request("5")
        id_ = request.lora_int_id
        await self.ask("r3mes_stage", id_, request.lora_name, request.lora_path)
        states = []
        while "placing" not in states:
            states.append((await self.ask("r3mes_advance", id_))[0])
        half = await self.watch()
        answers = await asyncio.gather(*[self.answer(other) for other in others])
        then = await self.watch()
        while states[-1] != "ready":
            states.append((await self.ask("r3mes_advance", id_))[0])
        await self.ask("short_slices", False)
        end = await self.watch()
        answers.append(await self.answer(request))
        await self.remove(*others, request)
        return {"id": id_, "watch": [half, then, end], "answers": answers}

    async def cancelled(self) -> dict[str, Any]:
        await self.answer(None)  # a step, with which the last ones' memory goes
        before = await self.watch()
        await self.ask("short_slices", True)
        task = asyncio.create_task(self.load("0"))
        seen = before
        while not any(slot is not None and slot < 0 for slot in seen["slots"]):
            assert not task.done()
            seen = await self.watch()
        task.cancel()
        await asyncio.wait([task])
        await self.ask("short_slices", False)
        await self.answer(None)
        return {"cancelled": task.cancelled(), "watch": [before, await self.watch()]}

    async def timed_out(self) -> dict[str, Any]:
        await self.ask("slow_disk", SLOW_S)
        found = await self.refused_within(SLOW_S / 4)
        await self.ask("slow_disk", 0.0)
        return found

    async def refused_within(self, limit_s: float) -> dict[str, Any]:
        before = await self.watch()
        error = None
        try:
            await self.load("0", limit_s)
        except R3mesError as raised:
            error = [type(raised).__name__, str(raised)]
        deadline = time.monotonic() + 3 * SLOW_S  # its thread still has what it reads
        while (after := await self.watch()) != before and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return {"error": error, "watch": [before, after]}

    async def gap(self, *, staged: bool) -> float:
        """The longest silence of a stream, in seconds, while an adapter comes from a slow disk."""
        await self.ask("slow_disk", SLOW_S)
        request = self.request("1")
        async with self.running(None) as times:
            first = len(times)
            if staged:
                await staging.load(self.engine, request, LIMIT_S)
            else:
                assert await self.engine.add_lora(request)
            await asyncio.sleep(0.1)
            gaps = [after - before for before, after in pairwise(times[first:])]
        await self.ask("slow_disk", 0.0)
        await self.remove(request)
        return max(gaps)


async def main() -> None:
    model, folder = sys.argv[1:]
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model,
            enable_lora=True,
            # In bf16 a near tie falls otherwise in another batch; vLLM's kernels for adapters on a
            # GPU know no float32.
            dtype="float32" if current_platform.is_cpu() else "bfloat16",
            max_loras=2,
            max_cpu_loras=8,
            max_lora_rank=8,
            max_num_seqs=16,
            enable_prefix_caching=False,
            worker_extension_cls="tests.engine.staged.Watched",
            seed=0,
        )
    )
    print(json.dumps(await Trial(engine, Path(folder)).all()), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
