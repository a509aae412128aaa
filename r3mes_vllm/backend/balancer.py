"""Which node gets a request: a random live holder of the adapter.

The order returned is the order of trying; the proxy takes the next when one can't be dialled.
"""

import random
from collections.abc import Sequence
from datetime import datetime

from r3mes_vllm.backend.cids import canonical
from r3mes_vllm.wire import Node


class Balancer:
    def __init__(self, chance: random.Random | None = None) -> None:
        self._chance = chance or random.SystemRandom()
        self._undialled: dict[str, datetime] = {}

    def dial_failed(self, node: Node) -> None:
        """Keep `node` out of routing until it beats or registers again."""
        self._undialled[node.wallet_address] = node.last_heartbeat

    def routable(self, nodes: Sequence[Node]) -> list[Node]:
        """`nodes` without those whose dial failed after their last beat, in random order."""
        found = [n for n in nodes if self._undialled.get(n.wallet_address) != n.last_heartbeat]
        self._chance.shuffle(found)
        return found

    def holders(
        self, nodes: Sequence[Node], name: str, cid: str | None, *, exact: bool = False
    ) -> list[Node]:
        """The routable `nodes` that hold the adapter `name`, those known to hold `cid` first.

        A node that says which CIDs it holds must hold this one; an old node that says nothing
        is taken at its word, unless `exact`.
        """
        listing = [node for node in self.routable(nodes) if name in node.available_lora_list]
        if cid is None:
            return listing
        wanted = canonical(cid)
        sure = [n for n in listing if canonical(n.adapters.get(name, "")) == wanted]
        unsure = [] if exact else [n for n in listing if name not in n.adapters]
        return sure + unsure
