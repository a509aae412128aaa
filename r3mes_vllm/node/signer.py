"""The signatures of one process of a node."""

import itertools
import time

from r3mes_vllm.identity import Identity
from r3mes_vllm.signatures import TOLERANCE_S, Claim, new_boot, request_text, to_headers


class Signer:
    """Signs requests with the node's key, each with the next number of this boot."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._latest = 0.0
        self._begin(time.time())

    def _begin(self, now: float) -> None:
        self._began, self._boot, self._sequence = now, new_boot(now), itertools.count(1)
        self._latest = max(self._latest, now)

    def headers(self, method: str, path: str, body: bytes) -> dict[str, str]:
        now = time.time()
        # Where the clock was set back, no backend takes the boot of the future. One that knows it
        # takes others again from some minutes before it, and a later one than it in any case.
        if now < self._began - TOLERANCE_S or self._began < self._latest:
            self._begin(now)
        claim = Claim(self._identity.public_key, int(now), self._boot, next(self._sequence))
        signature = self._identity.sign(request_text(claim, method, path, body))
        return to_headers(claim, signature)
