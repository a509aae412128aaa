"""The registry in memory, whatever the order in which its rows come."""

import itertools
import random
from datetime import UTC, datetime

import pytest

from r3mes_vllm.backend.known import KnownLora, KnownNode
from r3mes_vllm.backend.view import View
from tests.backend.stand_ins import LEGAL_CID, OTHER_CID, wallet

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def node(id_: int, revision: int, *names: str) -> KnownNode:
    return KnownNode(
        id=id_,
        revision=revision,
        wallet_address=wallet(id_),
        endpoint_url=f"http://node/{revision}",
        available_lora_list=list(names),
        status="active",
        current_load=0,
        last_heartbeat=NOW,
    )


def lora(id_: int, revision: int, cid: str = LEGAL_CID) -> KnownLora:
    return KnownLora(id=id_, revision=revision, name=f"lora-{id_}", ipfs_hash=cid)


@pytest.mark.parametrize("rows", itertools.permutations([(1, 1), (2, 2), (1, 3), (3, 4)]))
def test_the_latest_form_of_each_row_stays(rows: list[tuple[int, int]]) -> None:
    """One that this backend wrote may come after a later one that it read."""
    view = View()
    for id_, revision in rows:
        view.put_node(node(id_, revision))
        view.put_lora(lora(id_, revision))
    expected = [(1, 3), (2, 2), (3, 4)]
    assert [(it.id, it.revision) for it in view.nodes()] == expected
    assert [(it.id, it.revision) for it in view.loras(active_only=True)] == expected


def test_those_that_list_a_name_are_found_whatever_came_before() -> None:
    chance, view, names = random.Random(1), View(), "abc"
    for revision in range(500):
        listed = chance.sample(names, chance.randrange(4))
        late = chance.random() < 0.2  # a form that is older than the one here
        view.put_node(
            node(chance.randrange(8), max(revision - 50, 0) if late else revision, *listed)
        )
        if revision == 300:
            view.replace(view.nodes()[:4], [])
        for name in (*names, "d"):
            expected = [it for it in view.nodes() if name in it.names]
            found = view.live_nodes(NOW, 60, listing=name)
            assert sorted(found, key=lambda it: it.id) == expected


def test_the_json_is_of_what_is_there_now() -> None:
    view = View()
    view.put_lora(lora(1, 1))
    first, tag = view.loras_json(active_only=True)
    assert LEGAL_CID.encode() in first
    assert view.loras_json(active_only=True)[1] == tag
    view.put_lora(lora(1, 2, OTHER_CID))
    second, other_tag = view.loras_json(active_only=True)
    assert OTHER_CID.encode() in second
    assert other_tag != tag
    view.replace([], [])
    assert view.loras_json(active_only=True)[0] == b"[]"
