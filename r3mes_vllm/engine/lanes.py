"""vLLM's queue of waiting requests, with a lane for each adapter that can be closed for a step.

It has the order of vLLM's own queues (`vllm/v1/core/sched/request_queue.py`), but a step that must
leave an adapter alone doesn't look at its requests one by one.
"""

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request, RequestStatus

BASE = 0
"""In place of an adapter's id, for the base model's requests."""


def adapter_id(request: Request) -> int:
    return request.lora_request.lora_int_id if request.lora_request else BASE


def plain_name(request: Request) -> str:
    """Of the adapter, without the CID that the host adds; empty for the base model."""
    name: str = request.lora_request.lora_name if request.lora_request else ""
    return name.rpartition("@")[0] or name


@dataclass
class Lane:
    name: str
    heap: list[tuple[Any, Request]] = field(default_factory=list)
    """Each with what it is ordered by."""
    fresh: set[Request] = field(default_factory=set)
    """Those that `take_fresh` hasn't given yet."""

    @property
    def head(self) -> Request:
        return self.heap[0][1]

    def take_fresh(self) -> set[Request]:
        fresh, self.fresh = self.fresh, set()
        return fresh


@dataclass
class View:
    """What the scheduler sees of its queues during one step."""

    open: Collection[int]
    """Adapters whose requests may start."""
    first: set[int]
    """Those of which one request goes before all others."""
    room: Mapping[str, int]
    """How many may start, of adapters with a limit, by plain name."""
    taken: list[Request] = field(default_factory=list)

    def has_room(self, name: str) -> bool:
        if name not in self.room:
            return True
        # What was taken from the queue may have been put back.
        started = [it for it in self.taken if it.status == RequestStatus.RUNNING]
        return sum(plain_name(it) == name for it in started) < self.room[name]


class LanedQueue(RequestQueue):  # type: ignore[misc]
    def __init__(self, by_priority: bool) -> None:
        self.lanes: dict[int, Lane] = {}
        """None is empty."""
        self.view: View | None = None
        """None shows everything."""
        self._by_priority = by_priority
        self._before, self._after = 0, 0

    def add_request(self, request: Request) -> None:
        self._after += 1
        self._push(self._after, request)

    def prepend_request(self, request: Request) -> None:
        self._before -= 1
        self._push(self._before, request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> Request:
        if (adapter := self._next()) is None:
            raise IndexError("no request may start")
        return self.lanes[adapter].head

    def pop_request(self) -> Request:
        if (adapter := self._next()) is None:
            raise IndexError("no request may start")
        lane = self.lanes[adapter]
        request: Request = heapq.heappop(lane.heap)[1]
        lane.fresh.discard(request)
        if not lane.heap:
            del self.lanes[adapter]
        if self.view:
            self.view.first.discard(adapter)
            self.view.taken.append(request)
        return request

    def remove_request(self, request: Request) -> None:
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        gone = set(requests)
        for adapter in {adapter_id(request) for request in gone} & self.lanes.keys():
            lane = self.lanes[adapter]
            lane.heap = [item for item in lane.heap if item[1] not in gone]
            heapq.heapify(lane.heap)
            lane.fresh -= gone
            if not lane.heap:
                del self.lanes[adapter]

    def __bool__(self) -> bool:
        """Whether the step may take one: the scheduler ends its search when this is false."""
        return self._next() is not None

    def __len__(self) -> int:
        return sum(len(lane.heap) for lane in self.lanes.values())

    def __iter__(self) -> Iterator[Request]:
        items = [item for lane in self.lanes.values() for item in lane.heap]
        return iter([request for _, request in sorted(items)])

    def _push(self, number: int, request: Request) -> None:
        lane = self.lanes.setdefault(adapter_id(request), Lane(plain_name(request)))
        heapq.heappush(lane.heap, (request if self._by_priority else number, request))
        lane.fresh.add(request)

    def _next(self) -> int | None:
        """The adapter whose request is next, or None."""
        view = self.view
        if view is None:
            return min(self.lanes, key=lambda it: self.lanes[it].heap[0], default=None)
        return min(
            (it for it in view.open if it in self.lanes and self._may_start(self.lanes[it])),
            key=lambda it: (it not in view.first, self.lanes[it].heap[0]),
            default=None,
        )

    def _may_start(self, lane: Lane) -> bool:
        head = lane.head
        # vLLM expects of a request with blocks that its last token has arrived.
        arriving = head.num_computed_tokens and head.num_in_flight_tokens
        if arriving and head.status == RequestStatus.PREEMPTED:
            return False
        return self.view is None or self.view.has_room(lane.name)
