"""Nobody is shut out of the slots for long (hazard 5); without a crowd the schedule is stock's.

vLLM's schedulers run here without an engine: a model that samples the position as the token, and a
clock that goes on by what a step costs.
"""

import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from r3mes_vllm.engine import plugin
from r3mes_vllm.engine import scheduler as scheduling
from r3mes_vllm.engine.scheduler import FairAsyncScheduler, FairScheduler
from r3mes_vllm.settings import Settings
from tests import tiny

BLOCK = 16
STEP_S, TOKEN_S = 0.05, 0.0005
CYCLE_S = Settings.model_fields["adapter_cycle"].default
SEATS = 8

fair = pytest.mark.parametrize("scheduler", [FairScheduler, FairAsyncScheduler])
Build = Callable[..., "Engine"]


class Engine:
    """A scheduler, what it believes is a model, and a clock of its own."""

    def __init__(self, scheduler: Any, *, is_async: bool) -> None:
        self.scheduler = scheduler
        self.now = 100.0
        scheduler.clock = lambda: self.now
        self._depth = 1 if is_async else 0
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._prompts: dict[str, int] = {}
        self.began: dict[str, float] = {}
        """When each request's first token came."""
        self.asked: dict[str, float] = {}
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.finished: set[str] = set()
        self.running: Counter[str] = Counter()
        """Tokens by adapter."""
        self.schedules: list[SchedulerOutput] = []

    def ask(self, adapter: int, prompt: int = 20, answer: int = 30, **named: Any) -> str:
        name = f"{adapter}-{len(self.asked)}"
        params = SamplingParams(
            max_tokens=answer,
            ignore_eos=True,
            structured_outputs=named.pop("grammar", None),
            **named.pop("params", {}),
        )
        params.update_from_generation_config({}, 0)
        chance = random.Random(name)
        lora = LoRARequest(f"a{adapter}@bafy", adapter, f"/{adapter}") if adapter else None
        request = Request(
            name,
            [chance.randrange(1000) for _ in range(prompt)],
            params,
            None,
            arrival_time=float(len(self.asked)),
            lora_request=lora,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
            **named,
        )
        self.asked[name] = self.now
        self._prompts[name] = prompt
        self.scheduler.add_request(request)
        return name

    def waiting(self, adapter: int) -> int:
        """Requests of it that are not done."""
        return sum(
            name.startswith(f"{adapter}-") for name in self.scheduler.requests if name in self.asked
        )

    def saturate(self, *adapters: int, requests: int = 2 * SEATS, answer: int = 40) -> None:
        for adapter in adapters:
            for number in range(requests - self.waiting(adapter)):
                self.ask(adapter, answer=answer + 3 * number)

    def step(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        self.schedules.append(output)
        self.now += STEP_S + TOKEN_S * output.total_num_scheduled_tokens
        self._in_flight.append((output, self._sampled(output)))
        while len(self._in_flight) > self._depth:
            for group in self.scheduler.update_from_output(*self._in_flight.popleft()).values():
                for it in group.outputs:
                    self.began.setdefault(it.request_id, self.now)
                    self.tokens[it.request_id] += it.new_token_ids
                    self.running[it.request_id.partition("-")[0]] += len(it.new_token_ids)
                    if it.finish_reason is not None:
                        self.finished.add(it.request_id)
        return output

    def run(self, seconds: float, *saturating: int, **how: Any) -> None:
        until = self.now + seconds
        while self.now < until:
            self.saturate(*saturating, **how)
            self.step()

    def finish(self) -> None:
        deadline = self.now + 10_000
        while self.scheduler.has_unfinished_requests():
            self.step()
            assert self.now < deadline, "it never ends"

    def waited(self, name: str) -> float:
        """Seconds until its first token, or until now."""
        return self.began.get(name, self.now) - self.asked[name]

    def _sampled(self, output: SchedulerOutput) -> ModelRunnerOutput:
        computed, known = {}, {}
        for new in output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            # of one that had begun, vLLM's second model runner gets all that it has
            given = new.prefill_token_ids or new.prompt_token_ids
            known[new.req_id] = len(given) - self._prompts[new.req_id]
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            computed[name] = cached.num_computed_tokens[index]
            known[name] = cached.num_output_tokens[index]
        sampled = []
        for name, count in output.num_scheduled_tokens.items():
            position = computed[name] + count
            whole = position >= self._prompts[name] + known[name]
            sampled.append([position] if whole else [])
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(names, {it: i for i, it in enumerate(names)}, sampled)

    def assert_all_tokens(self) -> None:
        """Each answer is whole: no token twice, none left out."""
        assert self.finished == set(self.asked)
        for name, tokens in self.tokens.items():
            first = self._prompts[name]
            assert tokens == list(range(first, first + len(tokens)))


@pytest.fixture
def build(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    init_none_hash(sha256)

    def build(
        scheduler: type[Scheduler] = FairScheduler,
        *,
        slots: int = 1,
        seats: int = SEATS,
        blocks: int = 10_000,
        budget: int = 512,
        policy: str = "fcfs",
        prefix_caching: bool = True,
        **settings: Any,
    ) -> Engine:
        for name, value in ({"adapter_cycle": CYCLE_S} | settings).items():
            monkeypatch.setenv(f"R3MES_{name.upper()}", json.dumps(value))
        model = ModelConfig(str(tiny_model), dtype="bfloat16", seed=0, max_model_len=1024)
        cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=prefix_caching)
        config = VllmConfig(
            model_config=model,
            cache_config=cache,
            scheduler_config=SchedulerConfig(
                max_num_seqs=seats,
                max_num_batched_tokens=budget,
                max_model_len=1024,
                is_encoder_decoder=False,
                enable_chunked_prefill=True,
                policy=policy,
            ),
            lora_config=LoRAConfig(max_lora_rank=8, max_loras=slots, max_cpu_loras=64),
        )
        config.cache_config.num_gpu_blocks = blocks
        is_async = issubclass(scheduler, AsyncScheduler)
        config.scheduler_config.async_scheduling = is_async
        spec = FullAttentionSpec(BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        made = scheduler(
            config,
            KVCacheConfig(blocks, [], groups),
            StructuredOutputManager(config),
            BLOCK,
            log_stats=True,
        )
        return Engine(made, is_async=is_async)

    return build


@fair
def test_a_request_to_a_cold_adapter_starts_within_the_cycle(
    build: Build, scheduler: type[Scheduler]
) -> None:
    engine = build(scheduler)
    engine.run(10, 1)
    for _ in range(5):
        cold = engine.ask(2)
        engine.run(3, 1)
        assert engine.waited(cold) < 2
    engine.finish()
    engine.assert_all_tokens()


@pytest.mark.parametrize("grace", [True, False])
def test_a_turn_is_not_over_a_few_tokens_before_its_requests(
    build: Build, monkeypatch: pytest.MonkeyPatch, grace: bool
) -> None:
    if not grace:
        monkeypatch.setattr(scheduling, "_GRACE", 0)
    engine = build()
    steps = int(CYCLE_S / 2 / STEP_S) + 1
    for number in range(2 * SEATS):
        engine.ask(1 + number % 2, prompt=1, answer=steps)
    engine.finish()
    engine.assert_all_tokens()
    put_off = sum(len(it.preempted_req_ids or ()) for it in engine.schedules)
    assert (put_off == 0) is grace


@pytest.mark.parametrize("scheduler", [Scheduler, AsyncScheduler, FairScheduler])
def test_without_turns_it_starves(build: Build, scheduler: type[Scheduler]) -> None:
    """What the turns are for; when vLLM mends it, this fails and they can go."""
    engine = build(scheduler, adapter_cycle=0)
    engine.run(10, 1)
    cold = engine.ask(2)
    engine.run(60, 1)
    assert cold not in engine.began


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("pair", [(Scheduler, FairScheduler), (AsyncScheduler, FairAsyncScheduler)])
@pytest.mark.parametrize("seed", range(5))
def test_without_a_crowd_the_schedule_is_stocks(
    build: Build, pair: tuple[type[Scheduler], type[Scheduler]], policy: str, seed: int
) -> None:
    """Base model and as many adapters as slots, blocks scarce, long prompts in parts, aborts."""
    made = []
    for scheduler in pair:
        engine = build(scheduler, slots=3, blocks=40, budget=64, policy=policy)
        chance = random.Random(seed)
        for _ in range(300):
            if chance.random() < 0.2:
                for _ in range(chance.randint(1, 6)):
                    engine.ask(
                        chance.randint(0, 3),
                        chance.randint(1, 200),
                        chance.randint(1, 60),
                        priority=chance.randint(0, 2),
                    )
            if engine.asked and chance.random() < 0.05:
                name = chance.choice(list(engine.asked))
                engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            engine.step()
        engine.finish()
        made.append(engine)
    stock, ours = made
    assert sum(len(it.preempted_req_ids or ()) for it in stock.schedules) > 5
    for there, here in zip(stock.schedules, ours.schedules, strict=True):
        assert here == there
    assert ours.tokens == stock.tokens


@fair
@pytest.mark.parametrize(("slots", "adapters"), [(1, 5), (2, 12)])
def test_however_many_saturate_it_all_have_turns(
    build: Build, scheduler: type[Scheduler], slots: int, adapters: int
) -> None:
    engine = build(scheduler, slots=slots, seats=2 * SEATS)
    everyone = range(1, adapters + 1)
    engine.run(4, 1)
    asked = {adapter: engine.ask(adapter) for adapter in everyone}
    engine.run(20, *everyone)
    # A turn is not shorter than what makes it worth while; here that is above an equal part.
    bound = CYCLE_S + 1.0 * adapters / slots
    assert max(map(engine.waited, asked.values())) < bound
    before = engine.running.copy()
    engine.run(10 * bound, *everyone)
    shares = [engine.running[str(it)] - before[str(it)] for it in everyone]
    assert min(shares) > 0.5 * max(shares)
    engine.finish()
    engine.assert_all_tokens()


@pytest.mark.parametrize("often_s", [0.0, 1.0, 4.0])
@fair
def test_the_throughput_stays_near_stocks_however_often_the_cold_one_is_asked(
    build: Build, scheduler: type[Scheduler], often_s: float
) -> None:
    rates = []
    for kind in (AsyncScheduler if scheduler is FairAsyncScheduler else Scheduler, scheduler):
        engine = build(kind, seats=16)
        engine.run(5, 1)
        before, began = engine.running.total(), engine.now
        while engine.now < began + 60:
            if not engine.waiting(2):
                engine.ask(2, answer=40)
            engine.run(often_s or STEP_S, 1, requests=32)
        rates.append((engine.running.total() - before) / (engine.now - began))
    stock, ours = rates
    assert ours > 0.9 * stock
    assert engine.running["2"]


@fair
def test_an_adapter_of_twice_the_weight_gets_twice_as_much(
    build: Build, scheduler: type[Scheduler]
) -> None:
    engine = build(scheduler, adapter_cycle=6, adapters={"a2": {"weight": 2}})
    engine.run(200, 1, 2, 3)
    ratio = engine.running["2"] / engine.running["1"]
    assert 1.7 < ratio < 2.3
    assert 0.8 < engine.running["3"] / engine.running["1"] < 1.25


@fair
def test_no_more_of_an_adapter_run_than_its_limit_and_nobody_else_waits_for_them(
    build: Build, scheduler: type[Scheduler]
) -> None:
    engine = build(scheduler, slots=2, adapters={"a1": {"in_flight": 3}})
    engine.saturate(1, requests=20)
    others = [engine.ask(adapter) for adapter in (0, 2, 2, 0)]
    for _ in range(100):
        engine.step()
        running = Counter(
            it.lora_request and it.lora_request.name for it in engine.scheduler.running
        )
        assert running["a1@bafy"] <= 3
    assert max(map(engine.waited, others)) < 0.3  # three steps
    engine.finish()
    engine.assert_all_tokens()


@fair
def test_the_base_models_requests_need_no_turn(build: Build, scheduler: type[Scheduler]) -> None:
    engine = build(scheduler)
    for _ in range(40):
        base = engine.ask(0, answer=5)
        engine.run(0.5, 1, 2, 3, requests=2)
        assert engine.waited(base) < 0.4
    engine.finish()
    engine.assert_all_tokens()


@fair
def test_one_turn_ends_one_begins_though_the_base_model_wants_every_seat(
    build: Build, scheduler: type[Scheduler]
) -> None:
    engine = build(scheduler)
    engine.run(10, 0, 1)
    cold = engine.ask(2)
    engine.run(3, 0, 1)
    assert engine.waited(cold) < 2
    engine.run(30, 0, 1, 2)
    assert min(engine.running[it] for it in "012") > 0


@fair
def test_with_few_blocks_all_answers_are_whole(build: Build, scheduler: type[Scheduler]) -> None:
    """The blocks of who waits are taken by who runs, and computed again."""
    engine = build(scheduler, blocks=70, budget=64)
    for _ in range(20):
        for adapter in (0, 1, 2, 3):
            engine.ask(adapter, prompt=200, answer=60)
        engine.run(2)
    engine.finish()
    engine.assert_all_tokens()


@fair
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_turns_end_costs_no_computation(
    build: Build, scheduler: type[Scheduler], prefix_caching: bool
) -> None:
    engine = build(scheduler, prefix_caching=prefix_caching)
    for adapter in (1, 2, 3) * 6:
        engine.ask(adapter, prompt=100, answer=60)
    engine.finish()
    engine.assert_all_tokens()
    assert any(it.scheduled_cached_reqs.resumed_req_ids for it in engine.schedules)
    assert sum(it.total_num_scheduled_tokens for it in engine.schedules) == 18 * (100 + 60 - 1)


def test_whose_state_is_not_in_its_blocks_alone_begins_anew(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with Mamba layers that drafts: its blocks have a state after each draft."""
    for mamba, drafts, kept in ((True, 2, False), (True, 0, True), (False, 2, True)):
        engine = build(prefix_caching=False)
        monkeypatch.setattr(engine.scheduler, "has_mamba_layers", mamba)
        monkeypatch.setattr(engine.scheduler, "num_spec_tokens", drafts)
        for adapter in (1, 2, 3) * 6:
            engine.ask(adapter, prompt=100, answer=60)
        resumed: list[int] = []
        while engine.scheduler.has_unfinished_requests() and not resumed:
            cached = engine.step().scheduled_cached_reqs
            resumed = [
                computed
                for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True)
                if name in cached.resumed_req_ids
            ]
        assert resumed
        assert all((computed > 0) is kept for computed in resumed)


@fair
@pytest.mark.parametrize(
    "params", [{"prompt_logprobs": 1}, {"prompt_logprob_token_ids": [[1]] * 699}]
)
def test_a_prompts_log_probabilities_are_of_all_its_parts(
    build: Build,
    scheduler: type[Scheduler],
    params: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's second model runner has those of the parts since the request came into the batch."""
    engine = build(scheduler, budget=24)
    monkeypatch.setattr(engine.scheduler, "use_v2_model_runner", True)
    for _ in range(4):
        engine.ask(1, answer=200)
        engine.ask(2, answer=200)
    engine.run(1)
    asked = engine.ask(1, prompt=700, params=params)
    came = []
    while asked not in engine.began:
        new = engine.step().scheduled_new_reqs
        came += [it.num_computed_tokens for it in new if it.req_id == asked]
    assert len(came) > 1, "its turn never ended while its prompt was read"
    assert came[-1] == 0
    engine.finish()
    engine.assert_all_tokens()


@fair
def test_a_request_too_large_beside_those_that_wait_gets_their_blocks(
    build: Build, scheduler: type[Scheduler]
) -> None:
    engine = build(scheduler, blocks=64)  # 1,008 tokens
    for _ in range(5):
        engine.ask(1, prompt=100, answer=200)
    engine.run(3)
    cold = engine.ask(2, prompt=700, answer=20)
    engine.run(3)
    assert engine.waited(cold) < 2
    engine.finish()
    engine.assert_all_tokens()


@fair
def test_the_prefix_cache_can_be_emptied_while_some_wait_with_blocks(
    build: Build, scheduler: type[Scheduler]
) -> None:
    engine = build(scheduler)
    engine.run(6, 1, 2, 3)
    assert len(engine.scheduler.kv_holding_waiting) > SEATS
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert engine.scheduler.kv_cache_manager.usage == 0
    asked = set(engine.asked)
    engine.finish()
    assert engine.finished == asked


@fair
def test_a_rare_request_has_its_turn_at_once_and_to_its_end(
    build: Build, scheduler: type[Scheduler]
) -> None:
    engine = build(scheduler, adapter_cycle=3)
    engine.run(20, 1)
    cold = engine.ask(2, answer=20)
    engine.run(1.5, 1)
    assert engine.waited(cold) < 0.3
    assert cold in engine.finished


def test_the_more_urgent_gives_way_to_none(build: Build) -> None:
    engine = build(policy="priority")
    for _ in range(20):
        engine.ask(1, priority=0)
    engine.run(3)
    less, same = engine.ask(2, priority=1), engine.ask(3, priority=0)
    engine.run(2)
    assert same in engine.began
    assert less not in engine.began
    engine.finish()
    engine.assert_all_tokens()


def test_a_request_whose_grammar_is_not_ready_takes_no_slot(build: Build) -> None:
    engine = build()
    engine.run(3, 1)
    grammar: Future[Any] = Future()
    cold = engine.ask(2, answer=5, grammar=StructuredOutputsParams(regex="a"))
    request = engine.scheduler.requests[cold]
    request.structured_output_request.grammar = grammar
    before = len(engine.schedules)
    engine.run(3, 1)
    assert cold not in engine.began
    assert not any(it.preempted_req_ids for it in engine.schedules[before:])
    grammar.set_exception(ValueError("no such grammar"))
    engine.run(2, 1)
    assert cold in engine.finished


@fair
def test_aborted_while_it_waits_its_turn_is_another_s(
    build: Build, scheduler: type[Scheduler]
) -> None:
    engine = build(scheduler)
    engine.run(3, 1)
    cold, other = engine.ask(2, answer=500), engine.ask(3)
    engine.run(0.3, 1)
    engine.scheduler.finish_requests([cold], RequestStatus.FINISHED_ABORTED)
    engine.run(CYCLE_S, 1)
    assert other in engine.began
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    engine.step()
    assert not engine.scheduler.has_unfinished_requests()
    assert engine.scheduler.kv_cache_manager.usage == 0


def test_who_pauses_the_engine_for_new_requests_waits_for_no_turn(build: Build) -> None:
    engine = build()
    engine.run(3, 1)
    engine.ask(2)
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.run(10)
    assert not engine.scheduler.running
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.finish()
    engine.assert_all_tokens()


@pytest.mark.parametrize("adapters", [2, 50])
def test_thousands_that_wait_cost_little(build: Build, adapters: int) -> None:
    """Milliseconds of a step; about 0.05 and 0.3 more than stock's where nothing else runs."""
    took = {}
    for scheduler in (Scheduler, FairScheduler):
        engine = build(scheduler)
        for number in range(2000):
            engine.ask(1 + number % adapters, answer=500)
        engine.run(1)
        steps = []
        for _ in range(100):
            began = time.process_time()
            engine.scheduler.schedule()
            steps.append(1000 * (time.process_time() - began))
        took[scheduler] = statistics.median(steps)
    assert took[FairScheduler] < took[Scheduler] + 1


def test_the_plugin_installs_it_unless_the_operator_names_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SchedulerConfig, "get_scheduler_cls", SchedulerConfig.get_scheduler_cls)
    plugin.register()
    config = SchedulerConfig(max_model_len=1024, is_encoder_decoder=False)
    for config.async_scheduling, expected in ((False, FairScheduler), (True, FairAsyncScheduler)):
        assert config.get_scheduler_cls() is expected
    config.scheduler_cls = "vllm.v1.core.sched.scheduler.Scheduler"
    assert config.get_scheduler_cls() is Scheduler


@pytest.fixture(scope="module")
def traffic(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, dict[str, Any]]:
    """What a real engine did, by whether there were turns."""
    folder = tmp_path_factory.mktemp("turns")
    adapters = [tiny.make_adapter(folder / it, seed=seed) for seed, it in enumerate("hc")]
    command = [sys.executable, "-m", "tests.engine.turns", str(tiny_model), *map(str, adapters)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"cycle"')]
    return {it["cycle"] > 0: it for it in found}


def test_on_a_real_engine_the_cold_one_starts_and_every_answer_is_as_alone(
    traffic: dict[bool, dict[str, Any]],
) -> None:
    stock, ours = traffic[False], traffic[True]
    assert stock["waited"] is None
    assert ours["waited"] < 2
    assert ours["differing"] == stock["differing"] == 0
