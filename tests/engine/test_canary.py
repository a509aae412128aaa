"""The canary and engines that hang, die and lie, in seconds that pass at once."""

import asyncio
import math
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from r3mes_vllm.engine import canary as canary_module
from r3mes_vllm.engine.canary import Canary
from r3mes_vllm.engine.cores import Cores

Result = TypeVar("Result")

FOUND_S = 15.0
FOR_EVER = 10_000.0


class Hurrying(asyncio.SelectorEventLoop):
    """Its clock jumps to whatever it would wait for."""

    def __init__(self) -> None:
        self.now = 1000.0
        loop = self

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                loop.now += timeout or 0
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now


def hurry(work: Coroutine[Any, Any, Result]) -> Result:
    with asyncio.Runner(loop_factory=Hurrying) as runner:
        return runner.run(work)


class Engine:
    """What the canary uses of vLLM's `AsyncLLM`."""

    def __init__(self) -> None:
        self.errored = False
        self.step_s = 0.01
        self.queue_s = 0.0
        """For the canary's token."""
        self.others = 0
        self.logprob = -1.0
        self.counts_nans = True
        self.starved = 0.0
        """The share of the time in which it has no core."""
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(_api_process_count=1), num_speculative_tokens=0
        )
        self.output_processor = SimpleNamespace(
            process_outputs=lambda outputs, *rest: None,
            request_states={
                "base": SimpleNamespace(lora_name=None),
                "adapter": SimpleNamespace(lora_name="legal@bafy"),
                "bystander": SimpleNamespace(lora_name="medical@bafz"),
            },
        )

    def get_num_unfinished_requests(self) -> int:
        return self.others + 1

    async def is_paused(self) -> bool:
        began = (loop := asyncio.get_running_loop()).time()
        while loop.time() < began + self.step_s:
            await asyncio.sleep(min(self.step_s, 0.5))
        return False

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        if self.errored:
            raise RuntimeError("the engine core encountered an issue")
        await asyncio.sleep(self.queue_s + self.step_s)
        position = {7: SimpleNamespace(logprob=self.logprob)}
        yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=[position])])

    def shutdown(self, timeout: float | None = None) -> None:
        self.errored = True

    def give(self, request: str, nans: int = 0) -> None:
        """A token of somebody's request passes."""
        output = SimpleNamespace(
            request_id=request, num_nans_in_logits=nans if self.counts_nans else 0
        )
        self.output_processor.process_outputs([output], 0.0, None)


class Starved(Cores):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.asked = 0.0

    def waited(self) -> float:
        before, self.asked = self.asked, asyncio.get_running_loop().time()
        return self.engine.starved * (self.asked - before)


Change = Callable[[Engine], None]


def watched(
    change: Change = lambda engine: None,
    *,
    at: float = 12.0,
    for_s: float = 200.0,
    before: Change = lambda engine: None,
    beside: Callable[[Engine], Awaitable[None]] | None = None,
) -> tuple[str | None, float, Canary]:
    """What the canary of an engine says that `change`s after `at` seconds, and how many seconds
    after that; None if it says nothing."""

    async def watch() -> tuple[str | None, float, Canary]:
        engine = Engine()
        before(engine)
        canary = Canary(engine)
        canary.cores = lambda: Starved(engine)
        assert canary.trouble == "not checked yet"
        assert await canary.check() is None
        loop = asyncio.get_running_loop()
        began = loop.time()
        running = asyncio.create_task(canary.run())
        others = asyncio.ensure_future(beside(engine)) if beside else None
        await asyncio.sleep(at)
        assert not running.done()
        assert canary.trouble is None
        change(engine)
        await asyncio.wait({running}, timeout=for_s)
        took = loop.time() - began - at
        found = running.result() if running.done() else None
        for task in (running, *([others] if others else [])):
            task.cancel()
        await asyncio.gather(*filter(None, (running, others)), return_exceptions=True)
        return found, took, canary

    return hurry(watch())


def setting(**values: Any) -> Change:
    return lambda engine: vars(engine).update(values)


async def traffic(engine: Engine) -> None:
    engine.others = 50
    while engine.step_s < FOR_EVER:
        engine.give("base")
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("at", [0.1, 1.5, 2.5, 4.9, 5.01, 12.3])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (setting(step_s=FOR_EVER), "hangs"),
        (setting(queue_s=FOR_EVER), "generated nothing"),
        (setting(logprob=math.nan), "not finite"),
        (setting(logprob=-math.inf), "not finite"),
        (setting(errored=True), "died"),
    ],
)
def test_trouble_of_an_idle_engine_is_found_in_time(at: float, change: Change, says: str) -> None:
    found, took, canary = watched(change, at=at)
    assert says in (found or "")
    assert canary.trouble == found
    assert took < FOUND_S


@pytest.mark.parametrize("at", [0.1, 2.5, 5.01, 12.3])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (setting(step_s=FOR_EVER, queue_s=FOR_EVER), "hangs"),
        (lambda engine: engine.give("base", nans=3), "not finite"),
        (lambda engine: engine.give("adapter", nans=3), "answers of legal@bafy have NaN"),
        (setting(errored=True), "died"),
    ],
)
def test_trouble_of_a_busy_engine_is_found_in_time(at: float, change: Change, says: str) -> None:
    """Whose queue is so long that the canary's token does not come for a minute."""
    found, took, _ = watched(change, at=at, beside=queue_of_a_minute)
    assert says in (found or "")
    assert took < FOUND_S


async def queue_of_a_minute(engine: Engine) -> None:
    engine.queue_s = 60.0
    await traffic(engine)


def test_without_a_look_at_the_logits_poison_is_found_when_the_queue_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "0")

    def poison(engine: Engine) -> None:
        engine.counts_nans = False
        engine.logprob = math.nan
        engine.give("base", nans=3)

    found, took, _ = watched(poison, beside=queue_of_a_minute)
    assert "not finite" in (found or "")
    assert took > FOUND_S


@pytest.mark.parametrize("counted", ["0", "1"])
def test_a_long_queue_is_no_trouble(counted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", counted)
    found, _, canary = watched(beside=queue_of_a_minute)
    assert found is None
    assert canary.trouble is None


def test_a_token_with_a_deadline_would_take_a_long_queue_for_a_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "0")
    monkeypatch.setattr(Canary, "_alone", lambda self: True)
    found, _, _ = watched(beside=queue_of_a_minute, at=2)
    assert "generated nothing" in (found or "")


def test_a_queue_that_lets_nothing_in_is_trouble_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def jam(engine: Engine) -> None:
        engine.others, engine.queue_s = 50, FOR_EVER

    found, took, _ = watched(jam, for_s=400)
    assert "generated nothing" in (found or "")
    assert took < canary_module.STUCK_S + FOUND_S


def test_a_slow_step_is_no_trouble() -> None:
    assert watched(before=setting(step_s=7.0), at=30)[0] is None


@pytest.mark.parametrize("slow", [setting(step_s=60.0), setting(queue_s=60.0)])
def test_an_engine_without_a_core_does_not_hang(
    slow: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    def starve(engine: Engine) -> None:
        engine.starved = 0.95
        slow(engine)

    assert watched(starve, for_s=55)[0] is None
    assert "the engine had no core for 8 s: other programs" in capsys.readouterr().err
    assert watched(slow, for_s=55)[0] is not None


@pytest.mark.parametrize("stuck", [setting(step_s=FOR_EVER), setting(queue_s=FOR_EVER)])
def test_an_engine_that_hangs_and_has_no_core_is_found_later(stuck: Change) -> None:
    def starve(share: float) -> Change:
        def change(engine: Engine) -> None:
            engine.starved = share
            stuck(engine)

        return change

    found, took, _ = watched(starve(0.5))
    assert found is not None
    assert took < 2 * FOUND_S
    found, took, _ = watched(starve(1.0))
    assert found is not None
    assert took < canary_module.STARVED_S + FOUND_S


async def flood(engine: Engine) -> None:
    """So many tokens that for a minute no answer comes through between them."""
    engine.others = 50
    for _ in range(600):
        engine.step_s = 60.0
        engine.give("base")
        await asyncio.sleep(0.1)
    engine.step_s, engine.others = 0.01, 0


def test_an_engine_that_generates_does_not_hang() -> None:
    assert watched(beside=flood, at=0.1)[0] is None


def test_an_idle_engine_stays_well() -> None:
    assert watched()[0] is None


def test_an_adapter_that_is_broken_by_itself_is_blamed_and_the_engine_goes_on() -> None:
    found, _, canary = watched(lambda engine: engine.give("adapter", nans=3))
    assert found is None
    assert canary.blamed == {"legal@bafy"}


def test_an_adapter_that_poisoned_the_engine_is_blamed() -> None:
    def poison(engine: Engine) -> None:
        engine.logprob = math.nan
        for request in ("adapter", "bystander", "base"):
            engine.give(request, nans=3)

    found, took, canary = watched(poison)
    assert "not finite" in (found or "")
    assert took < 1
    assert canary.blamed == {"legal@bafy"}


def test_an_adapter_that_got_poison_from_the_base_model_is_not_blamed() -> None:
    def poison(engine: Engine) -> None:
        for request in ("base", "adapter"):
            engine.give(request, nans=3)

    found, _, canary = watched(poison)
    assert "not finite" in (found or "")
    assert not canary.blamed


def drafting(engine: Engine) -> None:
    engine.vllm_config.num_speculative_tokens = 2


@pytest.mark.parametrize("named", ["adapter", "base"])
def test_with_drafts_a_nan_is_nobodys(named: str) -> None:
    """vLLM says it of another request than it was found in."""
    found, _, canary = watched(lambda engine: engine.give(named, nans=3), before=drafting)
    assert found is None
    assert not canary.blamed


@pytest.mark.parametrize("beside", [None, queue_of_a_minute])
def test_with_drafts_poison_is_found_in_time(
    beside: Callable[[Engine], Awaitable[None]] | None,
) -> None:
    def poison(engine: Engine) -> None:
        engine.logprob = math.nan
        engine.give("adapter", nans=3)

    found, took, canary = watched(poison, before=drafting, beside=beside)
    assert "not finite" in (found or "")
    assert took < (FOUND_S if beside else 1)
    assert not canary.blamed


def test_with_drafts_poison_is_found_that_vllm_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
    found, _, canary = watched(setting(logprob=math.nan), before=drafting, beside=traffic)
    assert "not finite" in (found or "")
    assert not canary.blamed


def test_a_process_that_was_held_up_itself_blames_nobody() -> None:
    def hold_up(engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Hurrying)
        loop.now += 60

    for at in (1.0, 5.005, 5.1, 9.9, 10.005):
        assert watched(hold_up, at=at, before=setting(step_s=0.02))[0] is None


def test_an_engine_that_is_shut_down_is_no_trouble() -> None:
    found, took, canary = watched(lambda engine: engine.shutdown(timeout=15))
    assert canary.stopping
    assert found is None
    assert took < 1


def test_ctrl_c_may_reach_the_engine_first() -> None:
    def interrupt(engine: Engine) -> None:
        engine.errored = True
        asyncio.get_running_loop().call_later(0.1, engine.shutdown)

    assert watched(interrupt, at=12.15)[0] is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"logprob": math.nan}, "not finite"), ({"errored": True}, "died")],
)
def test_the_first_check(wrong: dict[str, Any], says: str) -> None:
    async def check() -> str | None:
        engine = Engine()
        vars(engine).update(wrong)
        return await Canary(engine).check()

    assert says in (hurry(check()) or "")


def test_the_first_token_may_wait_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(seconds: float) -> str | None:
        engine = Engine()
        engine.queue_s = seconds
        return await Canary(engine).check()

    assert hurry(check(120)) is None
    assert "generated nothing" in (hurry(check(FOR_EVER)) or "")
