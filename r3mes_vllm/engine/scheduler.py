"""Turns for adapters that must share the engine's slots.

Stock vLLM lets a waiting request in only if its adapter has a slot or one is free, so steady
traffic to one adapter keeps all others out for ever (`vllm/v1/core/sched/scheduler.py`, "respects
the max_loras constraint"). Here, as long as more adapters have requests than there are slots, a
slot goes to who was shut out longest, and who holds one gives it up when its turn is over: its
requests wait, and keep their blocks while there are enough. Without such a crowd the schedule is
stock's.

All have their turn within a cycle, which is divided by weight and by how much of a batch each
fills: a batch of one that ran half of the time would halve the throughput. Who had no slot for
long gets a turn as if it filled one, to end a rare request in one go.
"""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import Request, RequestStatus

from r3mes_vllm.engine.lanes import BASE, Lane, LanedQueue, View, adapter_id, plain_name
from r3mes_vllm.settings import load
from r3mes_vllm.tables import AdapterSettings

_RESTED = 20
"""Cycles without a slot after which an adapter gets a turn as if it filled a batch."""

_GRACE = 0.1
"""Cycles by which a turn is longer if all its requests end within: to put them off for a few tokens
would cost two more changes of the slot."""

_FULL = 0.9
"""Share of the blocks in use from which who waits for a turn gives back those it holds."""

_TERMS = AdapterSettings()


@dataclass
class _Turn:
    began: float
    rest: float
    """From 0, it has just had a slot, to 1."""


class FairScheduler(Scheduler):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.clock = time.monotonic
        self._turns: dict[int, _Turn] = {}
        """Of the adapters that run."""
        self._shut_out: dict[int, float] = {}
        """Since when each of the others waits for a slot."""
        self._left: dict[int, float] = {}
        """When an adapter had a slot last, until it is rested."""
        self._last_step = 0.0
        self._step_s = 0.0
        """About what a step takes."""
        self._first: set[int] = set()
        """Whose turns the last step was to begin."""
        self._scarce = False
        if self.lora_config:
            settings = load()
            self._cycle, self._terms = settings.adapter_cycle, settings.adapters
            self._by_priority = self.policy == SchedulingPolicy.PRIORITY
            self.waiting = LanedQueue(self._by_priority)
            self.kv_holding_waiting = LanedQueue(self._by_priority)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if not self.lora_config:
            return super().schedule(throttle_prefills)
        queues = (self.kv_holding_waiting, self.waiting)
        if self._scarce or self.kv_cache_manager.usage > _FULL:
            self._release()
        closed, self._first = self._take_turns(self.clock(), throttle_prefills)
        parked = self.reset_preempted_req_ids.copy()
        view = View(
            {it for queue in queues for it in queue.lanes} - closed, set(self._first), self._room()
        )
        for queue in queues:
            queue.view = view
            for adapter in closed & queue.lanes.keys():
                # as vLLM counts those that it skips
                self.deferred_waiting.update(queue.lanes[adapter].take_fresh())
        try:
            output = super().schedule(throttle_prefills)
        finally:
            for queue in queues:
                queue.view = None
        started = {adapter_id(request) for request in self.running}
        self._scarce = output.preempted_req_ids != parked or not self._first <= started
        return output

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        if self.lora_config and reset_running_requests:
            self._release()
        done: bool = super().reset_prefix_cache(reset_running_requests, reset_connector)
        return done

    def _take_turns(self, now: float, throttled: bool) -> tuple[set[int], set[int]]:
        """The adapters that may start nothing in this step, and those whose turn begins."""
        running: dict[int, list[Request]] = defaultdict(list)
        for request in self.running:
            if adapter := adapter_id(request):
                running[adapter].append(request)
        claims = self._claims(running)
        self._note(running, claims, now)
        free = max(self.lora_config.max_loras - len(running), 0)
        # While the engine is paused, requests that hold blocks must be free to end.
        paused = self._pause_state != PauseState.UNPAUSED
        if len(claims) <= free or paused or not self._cycle:
            return set(), set()
        order = sorted(claims, key=lambda it: self._precedence(it, claims[it]))
        first, closed = order[:free], order[free:]
        over = [] if throttled else self._over(running, claims, now)
        for resident, claimant in zip(over, order[free:], strict=False):
            urgency = min(request.priority for request in running[resident])
            if self._by_priority and urgency < claims[claimant].head.priority:
                continue
            self._park(running[resident], now)
            closed.append(resident)
            closed.remove(claimant)
            first.append(claimant)
        return set(closed), set(first)

    def _claims(self, running: Mapping[int, list[Request]]) -> dict[int, Lane]:
        """The lanes of the adapters that have no slot and a request that could start."""
        room = View((), set(), self._room())
        return {
            adapter: lane
            for queue in (self.waiting, self.kv_holding_waiting)
            for adapter, lane in queue.lanes.items()
            if adapter not in running
            and adapter != BASE
            and room.has_room(lane.name)
            and (self._ready(lane.head) or any(self._ready(request) for _, request in lane.heap))
        }

    def _ready(self, request: Request) -> bool:
        if request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            # What was in flight when its turn ended has to arrive first.
            return not request.num_in_flight_tokens or request.drop_stale_output
        if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
            return request.structured_output_request.grammar is not None
        return request.request_id in self.finished_recving_kv_req_ids

    def _room(self) -> dict[str, int]:
        """How many requests may start, of the adapters with a limit, by plain name."""
        room = {name: terms.in_flight for name, terms in self._terms.items() if terms.in_flight}
        for request in self.running if room else ():
            if (name := plain_name(request)) in room:
                room[name] -= 1
        return room

    def _note(
        self, running: Mapping[int, list[Request]], claims: Mapping[int, Lane], now: float
    ) -> None:
        for adapter in self._turns.keys() - running.keys():
            self._left[adapter] = now
            self._left = {it: left for it, left in self._left.items() if self._rest(it, now) < 1}
        self._turns = {
            # It was let in by the step before this one.
            adapter: self._turns.get(adapter) or _Turn(self._last_step, self._rest(adapter, now))
            for adapter in running
        }
        self._shut_out = {it: self._shut_out.get(it, now) for it in claims}
        self._step_s += (min(now - self._last_step, self._cycle) - self._step_s) / 8
        self._last_step = now

    def _rest(self, adapter: int, now: float) -> float:
        left = self._left.get(adapter)
        return 1.0 if left is None else (now - left) / (_RESTED * self._cycle or 1.0)

    def _precedence(self, adapter: int, lane: Lane) -> tuple[Any, ...]:
        urgency = lane.head.priority if self._by_priority else 0
        return urgency, self._shut_out[adapter], lane.heap[0]

    def _over(
        self, running: Mapping[int, list[Request]], claims: Mapping[int, Lane], now: float
    ) -> list[int]:
        """The adapters whose turn is over, who began first comes first."""
        demand, share = {}, {}
        for adapter in running.keys() | claims.keys():
            requests = running.get(adapter, [])
            name = plain_name(requests[0]) if requests else claims[adapter].name
            terms = self._terms.get(name, _TERMS)
            queues = (self.waiting.lanes, self.kv_holding_waiting.lanes)
            lanes = [lanes[adapter] for lanes in queues if adapter in lanes]
            count = len(requests) + sum(len(lane.heap) for lane in lanes)
            demand[adapter] = min(count, terms.in_flight or count, self.max_num_active_reqs)
            share[adapter] = terms.weight
        batch = max(demand.values())
        for adapter in share:
            turn = self._turns.get(adapter)
            rest = turn.rest if turn else self._rest(adapter, now)
            # Squared, turns with half-empty batches cost a tenth of the throughput at most.
            share[adapter] *= max((demand[adapter] / batch) ** 2, min(rest, 1.0))
        part = self._cycle * self.lora_config.max_loras / sum(share.values())
        over = [
            adapter
            for adapter, turn in self._turns.items()
            if self._ended(turn, min(part * share[adapter], self._cycle), running[adapter], now)
            # or it would never get anywhere
            and not running[adapter][0].is_prefill_chunk
        ]
        return sorted(over, key=lambda it: self._turns[it].began)

    def _ended(self, turn: _Turn, length: float, requests: list[Request], now: float) -> bool:
        late = now - turn.began - length
        grace = _GRACE * self._cycle - late
        if late <= 0 or grace <= 0:
            return late > 0
        tokens: int = max(it.max_tokens - it.num_output_tokens for it in requests)
        return tokens * self._step_s > grace

    def _park(self, requests: list[Request], now: float) -> None:
        """End the turn of `requests`: as preemption does, but they keep their blocks."""
        gone = set(requests)
        self.running: list[Request] = [it for it in self.running if it not in gone]
        for request in reversed(requests):
            if self._needs_more_than_blocks(request):
                self._preempt_request(request, now, drop_stale_output=self.requires_kv_delivery)
                continue
            request.status = RequestStatus.PREEMPTED
            request.spec_token_ids = []
            if self.log_stats:
                request.record_event(EngineCoreEventType.PREEMPTED, now)
            self.kv_holding_waiting.prepend_request(request)
            self.reset_preempted_req_ids.add(request.request_id)

    def _needs_more_than_blocks(self, request: Request) -> bool:
        """It must begin anew: what else it needs a worker forgets when it leaves the batch."""
        if self.connector is not None:
            return True
        if self.has_mamba_layers and self.num_spec_tokens:
            # how many of its last drafts were right, which tells where in its blocks the state is
            return True
        params = request.sampling_params
        # vLLM's second model runner drops the log-probabilities of the prompt's parts so far
        return (
            self.use_v2_model_runner
            and request.is_prefill_chunk
            and params is not None
            and (params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None)
        )

    def _release(self) -> None:
        """Take the blocks from all who wait for a turn; what they held is computed again."""
        if self.connector is not None:
            return
        parked = [it for it in self.kv_holding_waiting if it.status == RequestStatus.PREEMPTED]
        self.kv_holding_waiting.remove_requests(parked)
        for request in reversed(parked):
            request.status = RequestStatus.RUNNING
            self._preempt_request(request, self.clock())


class FairAsyncScheduler(FairScheduler, AsyncScheduler):  # type: ignore[misc]
    pass
