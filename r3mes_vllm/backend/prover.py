"""Whether a node's URL is its own: the node at that URL must sign a nonce with the node's key.

Asked in the background before the first use of a URL, and again after a failure when the node
beats; a request waits for it only where no other node could answer.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta

from pydantic import ValidationError

from r3mes_vllm import signatures, wire
from r3mes_vllm.backend.dial import Dialler, Outgoing
from r3mes_vllm.backend.endpoints import normal_form
from r3mes_vllm.backend.known import KnownNode
from r3mes_vllm.backend.refusals import BadInput, DatabaseDown, NodeFailed, NoSocket
from r3mes_vllm.backend.registry import Registry

log = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_RETRY_S = 10.0
_ANSWER_BYTES = 4096
_AT_ONCE = 256
_HEADERS = [
    (b"content-type", b"application/json"),
    (b"accept", b"application/json"),
    (b"accept-encoding", b"identity"),
]


class Prover:
    """Asks nodes for their proof. Close it with `aclose`."""

    def __init__(self, registry: Registry, dialler: Dialler, clock: Callable[[], datetime]) -> None:
        self._registry = registry
        self._dialler = dialler
        self._clock = clock
        self._asking: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def aclose(self) -> None:
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def look(self, node: KnownNode) -> None:
        """Ask `node` in the background, if it has not proved its URL and was not asked just now."""
        which = (node.wallet_address, node.endpoint_url)
        if node.usable or which in self._asking or len(self._asking) >= _AT_ONCE:
            return
        retry = timedelta(seconds=_RETRY_S)
        if node.asked and node.proof_at and self._clock() - node.proof_at < retry:
            return
        task = asyncio.create_task(self._ask(node), name="proof")
        self._asking[which] = task
        task.add_done_callback(lambda _: self._asking.pop(which))

    async def settle(self, nodes: Iterable[KnownNode]) -> bool:
        """Wait until those of `nodes` that were never asked have been; False if there are none."""
        new = [node for node in nodes if not node.usable and not node.asked]
        for node in new:
            self.look(node)
        asking = [self._asking.get((node.wallet_address, node.endpoint_url)) for node in new]
        waited_for = [task for task in asking if task]
        if waited_for:
            await asyncio.wait(waited_for)
        return bool(new)

    async def _ask(self, node: KnownNode) -> None:
        try:
            failure = await self._failure(node)
            if failure:
                log.warning("node %s can't be used: %s", node.wallet_address, failure)
            await self._registry.note_proof(node, failure, self._clock())
        except (DatabaseDown, NoSocket) as error:
            # The node stays as it was, and its next beat has it asked again.
            log.warning("the proof of node %s is lost: %r", node.wallet_address, error)

    async def _failure(self, node: KnownNode) -> str | None:
        """Why `node` has not proved its URL; None if it has."""
        nonce = secrets.token_hex(32)
        challenge = Outgoing("/identity", _HEADERS, json.dumps({"nonce": nonce}).encode())
        try:
            answer = await self._dialler.exchange(
                node.endpoint_url, challenge, limit=_ANSWER_BYTES, timeout_s=_TIMEOUT_S
            )
        except NodeFailed as error:
            return f"POST {node.endpoint_url}/identity: {error.message}"
        return fault(answer, nonce, node)


def fault(answer: bytes, nonce: str, node: KnownNode) -> str | None:
    """What keeps `answer` from proving that the key of `node` answers at its URL."""
    try:
        proof = wire.Proof.model_validate_json(answer)
        url = normal_form(proof.url)
    except (ValidationError, BadInput):
        return "what answers at its URL knows no proof"
    if proof.key != node.public_key:
        return "another key answers at its URL"
    if url != node.endpoint_url:
        return "what answers at its URL says that it lives at another"
    text = signatures.endpoint_text(nonce, proof.url)
    if not signatures.is_signed(bytes.fromhex(proof.key), bytes.fromhex(proof.signature), text):
        return "what answers at its URL can't sign with its key"
    return None
