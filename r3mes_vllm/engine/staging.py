"""Adapters put on the engine beside its streams, not between two of their tokens.

vLLM's own `add_lora` reads, casts, pins and places an adapter in the loop that makes the tokens:
every stream stops meanwhile. Here a thread of each worker reads it, and then it is placed into a
slot a few layers at a time, between steps. No request sees it until it is there as a whole.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import torch
from vllm.engine.protocol import EngineClient
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.utils.import_utils import resolve_obj_by_qualname

from r3mes_vllm.engine import reading
from r3mes_vllm.engine.cpu_lora import CpuPunicaWrapper
from r3mes_vllm.errors import AdapterNotReady, AdapterRefused, EngineError

SLICE_S = 0.008
"""Of placing between two steps, while steps are short."""

_LONGEST_SLICE_S = 0.05
_POLL_S = 0.02
_FORGET_TIMEOUT_S = 5.0
_ATTEMPTS = 3
"""To place an adapter in a slot that no request wants in the meantime."""

READING, PLACING, READY, REFUSED, FAILED = "reading", "placing", "ready", "refused", "failed"
"""How far a worker is. `REFUSED` is the adapter's doing, `FAILED` is not: of memory, the disk."""

_NOT_ITS_OWN = (OSError, MemoryError, torch.OutOfMemoryError, AdapterNotReady)


Timed = Callable[[str, float], None]
"""Called with a phase of a load, `stage` or `place`, and its seconds."""


async def load(
    engine: EngineClient,
    request: LoRARequest,
    limit_s: float,
    timed: Timed = lambda phase, seconds: None,
) -> None:
    """Have every worker of the engine hold the adapter, in a slot if one is idle.

    Raises AdapterRefused when a worker can't load it, AdapterNotReady when it can't now,
    EngineError when the engine dies or takes more than `limit_s`; then, and when it is cancelled,
    no worker keeps anything of it.
    """
    name = request.lora_name
    try:
        async with asyncio.timeout(limit_s):
            trouble = await (_staged if _stages(engine) else _added)(engine, request, timed)
    except AdapterNotReady:
        raise
    except TimeoutError as error:
        raise EngineError(
            f"the engine did not load adapter {name!r} within {limit_s:.0f} s"
        ) from error
    except Exception as error:
        if engine.errored:
            raise EngineError(f"the engine died while it loaded {name!r}: {error}") from error
        # vLLM's client raises plain Exception with the text of whatever its process raised
        raise AdapterRefused("engine", f"the engine can't load {name!r}: {error}") from error
    if trouble is not None:
        raise AdapterRefused("engine", f"the engine can't load {name!r}: {trouble}")


async def resident(engine: EngineClient) -> set[int]:
    """Ids of the adapters that are in a slot of every worker; `list_loras` tells of the cache.

    Empty where the operator gave the workers another extension.
    """
    if not _stages(engine):
        return set()
    return set.intersection(*map(set, await _call(engine, "r3mes_resident")))


def _stages(engine: EngineClient) -> bool:
    """False where the operator gave the workers another extension."""
    config = getattr(engine, "vllm_config", None)
    named = config.parallel_config.worker_extension_cls if config else ""
    return bool(named) and issubclass(resolve_obj_by_qualname(named), StagingExtension)


async def _added(engine: EngineClient, request: LoRARequest, timed: Timed) -> str | None:
    began = time.monotonic()
    trouble = None if await engine.add_lora(request) else "it says no more"
    timed("stage", time.monotonic() - began)
    return trouble


async def _staged(engine: EngineClient, request: LoRARequest, timed: Timed) -> str | None:
    """Why it was not loaded."""
    id_ = request.lora_int_id
    loaded = False
    began = time.monotonic()
    read = None
    try:
        await _call(engine, "r3mes_stage", id_, request.lora_name, request.lora_path)
        while True:
            answers = await _call(engine, "r3mes_advance", id_)
            states = {state: str(text) for state, text in answers}
            if FAILED in states:
                raise AdapterNotReady(
                    f"the engine can't load {request.lora_name!r} now: {states[FAILED]}"
                )
            if REFUSED in states:
                return states[REFUSED]
            if READING not in states and read is None:
                read = time.monotonic()
                timed("stage", read - began)
            if states.keys() == {READY}:
                loaded = True
                timed("place", time.monotonic() - (read or began))
                return None
            if READING in states:
                await asyncio.sleep(_POLL_S)
    finally:
        if not loaded:
            with suppress(Exception):  # of an engine that is dead or hangs
                async with asyncio.timeout(_FORGET_TIMEOUT_S):
                    await _call(engine, "r3mes_forget", id_)


async def _call(engine: Any, method: str, *arguments: Any) -> list[Any]:
    """The answer of every worker of every engine; `collective_rpc` tells those of one engine."""
    answers = await engine.engine_core.call_utility_all_async(
        "collective_rpc", method, None, arguments, None
    )
    return [answer for of_engine in answers for answer in of_engine]


class StagingExtension:
    """What vLLM's worker gets to do besides: `--worker-extension-cls`.

    None of it raises: where one of several workers raises, vLLM's executor leaves the answers of
    the others in their queues, and its next call takes those for its own.
    """

    model_runner: Any

    def r3mes_stage(self, lora_id: int, name: str, path: str) -> None:
        """Start to read the adapter in a thread."""
        loads = self.__dict__.setdefault("_r3mes_loads", {})
        loads[lora_id] = _Load(self.model_runner, LoRARequest(name, lora_id, path))

    def r3mes_advance(self, lora_id: int) -> tuple[str, str]:
        """Place a little of it; then how far it is and, if it failed, why."""
        if lora_id not in self.model_runner.lora_manager.list_adapters():
            load: _Load | None = self._r3mes_loads.get(lora_id)
            answer = load.advance() if load else (FAILED, "the worker was never told of it")
            if answer[0] != READY:
                return answer
        self._r3mes_release(lora_id)
        return READY, ""

    def r3mes_forget(self, lora_id: int) -> None:
        """Leave nothing of it; what its thread still reads is dropped when it has it."""
        self._r3mes_release(lora_id)
        self.model_runner.lora_manager.remove_adapter(lora_id)

    def r3mes_resident(self) -> list[int]:
        slots = self.model_runner.lora_manager._adapter_manager.lora_index_to_id
        return [id_ for id_ in slots if id_ is not None and id_ > 0]

    _r3mes_loads: dict[int, "_Load"] = {}

    def _r3mes_release(self, lora_id: int) -> None:
        if load := self._r3mes_loads.pop(lora_id, None):
            load.release()


class _Load:
    """One adapter on its way to a worker's slots. Only `_read` runs in the thread."""

    def __init__(self, runner: Any, request: LoRARequest) -> None:
        self._runner, self._request = runner, request
        self._manager: Any = runner.lora_manager._adapter_manager
        self._sharded = self._manager.lora_config.fully_sharded_loras
        self._model: LoRAModel | None = None
        self._trouble = FAILED, "reading it ended too early"
        self._placing = self._placed()
        self._last = time.perf_counter()
        # a daemon: a file that never comes must not keep the worker from ending
        self._thread = threading.Thread(target=self._read, name="r3mes-stage", daemon=True)
        self._thread.start()

    def advance(self) -> tuple[str, str]:
        began, last = time.perf_counter(), self._last
        self._last = began
        if self._thread.is_alive():
            return READING, ""
        if self._model is None:
            return self._trouble
        # half of what the engine had since the last slice: a third of its time at most
        until = began + min(max(SLICE_S, (began - last) / 2), _LONGEST_SLICE_S)
        try:
            for _ in self._placing:
                self._last = time.perf_counter()
                if self._last >= until:
                    return PLACING, ""
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises of a tensor's shape
            self.release()
            return _trouble(error)
        return READY, ""

    def release(self) -> None:
        """Give back the slot that it was being placed in; what was read is freed at once."""
        self._placing.close()
        if self._manager.deactivate_adapter(self._placeholder):
            self._free(self._slot)

    @property
    def _placeholder(self) -> int:
        """Stands for it in vLLM's list of slots: not an id of any request."""
        return -int(self._request.lora_int_id)

    def _read(self) -> None:
        try:
            self._model = reading.read(self._runner, self._request)
        except Exception as error:  # noqa: BLE001 - told to whoever asks how far it is
            self._trouble = _trouble(error)

    def _placed(self) -> Generator[None, None, None]:
        """Place it module by module, then hand it to vLLM."""
        slot = None
        for _ in range(_ATTEMPTS):
            slot = self._reserve()
            if slot is None:
                break
            for name, module in self._manager.modules.items():
                self._write(slot, name, module)
                yield
                if self._manager.lora_index_to_id[slot] != self._placeholder:
                    slot = None  # a request needed the slot
                    break
            else:
                break
        self._hand_over(slot)

    def _reserve(self) -> int | None:
        """A slot that is free, or whose adapter no request is using now."""
        if self._manager.is_pooling_model:
            return None  # vLLM places its head too, at the first request
        slots, active = self._manager.lora_index_to_id, self._manager._active_adapters
        if None not in slots:
            idle = self._idle(active)
            if idle is None:
                return None
            self._manager.deactivate_adapter(idle)
        slot = int(slots.index(None))
        slots[slot] = self._placeholder
        self._slot = slot
        self._free(slot)
        others = list(active.order)
        active[self._placeholder] = None
        for id_ in others:  # the placeholder is now the first that a request displaces
            active.touch(id_)
        return slot

    def _free(self, slot: int) -> None:
        """Forget what is laid out of the slot's last adapter."""
        for wrapper in self._manager.punica_wrapper_mapping.values():
            if isinstance(wrapper, CpuPunicaWrapper):
                wrapper.free({slot})

    def _idle(self, cache: Any) -> int | None:
        """Of the adapters in one of vLLM's caches, that which no request has used for longest."""
        used = _in_use(self._runner) | cache.pinned_items
        return next((id_ for id_ in cache.order if id_ > 0 and id_ not in used), None)

    def _write(self, slot: int, name: str, module: Any) -> None:
        """As vLLM's `activate_adapter` does."""
        weights = self._manager._get_lora_layer_weights(self._model, name)

        def write() -> None:
            if weights:
                module.set_lora(slot, weights.lora_a, weights.lora_b)
            else:
                module.reset_lora(slot)

        wrapper = module.punica_wrapper
        ours = isinstance(wrapper, CpuPunicaWrapper)
        if ours and isinstance(module, LogitsProcessorWithLoRA):
            a, b = module.lora_a_stacked, module.lora_b_stacked
            wrapper.place(slot, self._model, (a,), (b,), b.shape[2:3], write)
        elif ours and isinstance(module, BaseLinearLayerWithLoRA) and not self._sharded:
            a, b = module.lora_a_stacked, module.lora_b_stacked
            wrapper.place(slot, self._model, a, b, module.output_slices, write)
        else:
            write()

    def _hand_over(self, slot: int | None) -> None:
        """What vLLM's `add_adapter` and `activate_adapter` note of it."""
        manager, id_ = self._manager, self._request.lora_int_id
        if len(manager) + 1 > manager.capacity:
            idle = self._idle(manager._registered_adapters)
            if idle is None:
                raise AdapterNotReady(
                    f"requests use all of the {manager.capacity} adapters of --max-cpu-loras"
                )
            manager.remove_adapter(idle)
        manager._registered_adapters[id_] = self._model
        if slot is not None:
            manager.lora_index_to_id[slot] = id_
            manager._active_adapters.pop(self._placeholder)
            manager._active_adapters[id_] = None


def _in_use(runner: Any) -> set[int]:
    """Ids of the adapters of the requests that run now."""
    if hasattr(runner, "lora_state"):  # vLLM's second model runner
        return {it.lora_int_id for it in runner.lora_state.lora_requests.values()}
    return set(runner.input_batch.lora_id_to_request_ids)


def _trouble(error: Exception) -> tuple[str, str]:
    state = FAILED if isinstance(error, _NOT_ITS_OWN) else REFUSED
    return state, str(error) or type(error).__name__
