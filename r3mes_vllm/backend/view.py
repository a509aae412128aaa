"""The registry in memory: what routing reads, so that a request asks no database.

Rows come from this backend's own writes and, by `Follower`, from everybody's.
"""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TypeVar

from r3mes_vllm import wire
from r3mes_vllm.backend.known import KnownLora, KnownNode
from r3mes_vllm.backend.outages import Outages

Row = TypeVar("Row", KnownNode, KnownLora)


class View:
    def __init__(self) -> None:
        self.revision = -1
        """All that was written up to this one is here."""
        self.outages = Outages()
        self._nodes: dict[str, KnownNode] = {}
        self._deleted: Mapping[str, int] = {}
        """Wallets that were forgotten last, and at which revision."""
        self._listing: dict[str, dict[str, None]] = {}
        """For the name of an adapter the wallets of the nodes that list it."""
        self._loras: dict[str, KnownLora] = {}
        self._json: dict[bool, tuple[bytes, str]] = {}
        self._texts: dict[str, tuple[int, bytes]] = {}
        """Of each adapter, and its revision: of thousands one has changed."""
        self._node_texts: dict[str, tuple[int, bytes]] = {}

    def replace(self, nodes: Iterable[KnownNode], loras: Iterable[KnownLora]) -> None:
        self._nodes, self._listing, self._deleted = {}, {}, {}
        for node in nodes:
            self.put_node(node)
        self._loras = {lora.name: lora for lora in loras}
        self._json.clear()
        self._texts.clear()
        self._node_texts.clear()

    def put_node(self, node: KnownNode) -> None:
        """Take `node` in, unless a later form of it is here."""
        wallet = node.wallet_address
        if node.revision < self._deleted.get(wallet, 0):
            return
        before = self._nodes.get(wallet)
        self._nodes = _with(self._nodes, wallet, node)
        if self._nodes[wallet] is node:
            self._note_names(before, node)

    def put_lora(self, lora: KnownLora) -> None:
        """The same for an adapter."""
        self._loras = _with(self._loras, lora.name, lora)
        self._json.clear()

    def _note_names(self, before: KnownNode | None, node: KnownNode) -> None:
        if before and before.available_lora_list == node.available_lora_list:
            return  # as with most beats
        if before:
            self._unlist(node.wallet_address, before.names - node.names)
        for name in node.names:
            self._listing.setdefault(name, {})[node.wallet_address] = None

    def _unlist(self, wallet: str, names: Iterable[str]) -> None:
        for name in names:
            del self._listing[name][wallet]
            if not self._listing[name]:
                del self._listing[name]

    def live_nodes(
        self, now: datetime, max_age_s: float, *, listing: str | None = None
    ) -> list[KnownNode]:
        """The active nodes whose last beat is under `max_age_s` seconds old, outages left out; only
        those that list an adapter's name if one is given."""
        oldest = self.outages.oldest(now, max_age_s)
        if listing is None:
            nodes: Iterable[KnownNode] = self._nodes.values()
        else:
            nodes = (self._nodes[wallet] for wallet in self._listing.get(listing, ()))
        return [it for it in nodes if it.status == wire.ACTIVE and it.last_heartbeat > oldest]

    def silent(self, oldest: datetime, oldest_unproven: datetime) -> list[KnownNode]:
        """The nodes whose last beat is older than that, by whether they have proved their URL."""
        return [
            it
            for it in self._nodes.values()
            if it.last_heartbeat <= (oldest if it.signature == wire.SIGNED else oldest_unproven)
        ]

    def forget(self, nodes: Iterable[KnownNode], deleted: Mapping[str, int]) -> None:
        """Unless a later form of one is here. `deleted` has the revisions at which wallets were,
        for rows of them that are being read."""
        self._deleted = deleted
        for node in nodes:
            wallet = node.wallet_address
            here = self._nodes.get(wallet)
            if here and here.revision <= node.revision:
                del self._nodes[wallet]
                self._node_texts.pop(wallet, None)
                self._unlist(wallet, here.names)

    def nodes(self) -> list[KnownNode]:
        return list(self._nodes.values())

    def node(self, wallet: str) -> KnownNode | None:
        return self._nodes.get(wallet)

    def loras(self, *, active_only: bool) -> list[KnownLora]:
        return [lora for lora in self._loras.values() if lora.active or not active_only]

    def lora(self, name: str) -> KnownLora | None:
        return self._loras.get(name)

    def loras_json(self, *, active_only: bool) -> tuple[bytes, str]:
        """The same as JSON, and an entity tag of it: each node asks every half minute."""
        if active_only not in self._json:
            body = self.dump(self.loras(active_only=active_only))
            tag = hashlib.sha256(body).hexdigest()[:32]
            self._json[active_only] = body, f'"{tag}"'
        return self._json[active_only]

    def dump(self, loras: Iterable[KnownLora]) -> bytes:
        return b"[" + b",".join(map(self._text, loras)) + b"]"

    def nodes_json(self, nodes: Iterable[KnownNode]) -> bytes:
        """`nodes` as JSON: each is put into it anew only when it has changed."""
        texts = (_text(self._node_texts, node.wallet_address, node) for node in nodes)
        return b"[" + b",".join(texts) + b"]"

    def _text(self, lora: KnownLora) -> bytes:
        return _text(self._texts, lora.name, lora)


def _text(texts: dict[str, tuple[int, bytes]], key: str, row: KnownNode | KnownLora) -> bytes:
    revision, text = texts.get(key, (-1, b""))
    if revision != row.revision:
        text = row.model_dump_json().encode()
        texts[key] = row.revision, text
    return text


def _with(rows: dict[str, Row], key: str, row: Row) -> dict[str, Row]:
    """`rows`, changed, in the order of their ids."""
    before, last = rows.get(key), next(reversed(rows.values()), None)
    if before is None or row.revision >= before.revision:
        rows[key] = row
    if before is None and last and row.id < last.id:
        return dict(sorted(rows.items(), key=lambda it: it[1].id))
    return rows
