"""The signatures of one process of a node."""

import itertools
import time

from r3mes_vllm.identity import Identity
from r3mes_vllm.signatures import Claim, new_boot, request_text, to_headers


class Signer:
    """Signs requests with the node's key, each with the next number of this boot."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._boot = new_boot(time.time())
        self._sequence = itertools.count(1)

    def headers(self, method: str, path: str, body: bytes) -> dict[str, str]:
        claim = Claim(self._identity.public_key, int(time.time()), self._boot, next(self._sequence))
        signature = self._identity.sign(request_text(claim, method, path, body))
        return to_headers(claim, signature)
