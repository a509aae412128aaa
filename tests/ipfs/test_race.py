"""The race with sources that are busy, and with those that send what nobody asked for."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest
from starlette.responses import Response, StreamingResponse

from r3mes_vllm.errors import ContentNotFound
from r3mes_vllm.ipfs import car, sources, varint
from r3mes_vllm.ipfs.cid import CID, IDENTITY, RAW, SHA2_256
from r3mes_vllm.ipfs.fetch import fetch
from r3mes_vllm.ipfs.sources import Standing
from r3mes_vllm.ipfs.tree import Limits, Tree
from tests.peers.gateway import Blocks, Gateway, Published, car_of, listening, publish


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return publish(tmp_path / "folder")


def busy(_: Blocks) -> Response:
    return Response(status_code=429, headers={"retry-after": "0"})


async def test_a_source_that_stays_busy_is_asked_less_and_less_and_then_given_up(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_FIRST_PAUSE_S", 0.1)
    gateway = Gateway(published, busy)
    began = time.monotonic()
    async with listening(gateway) as source:
        with pytest.raises(ContentNotFound, match=r"nobody offered.*answered 429"):
            await fetch(
                published.root, tmp_path / "fetch", sources=[source], limits=Limits(total_s=20)
            )
    assert gateway.asked == ["car"] * 5
    assert time.monotonic() - began > 0.1 + 0.2 + 0.4 + 0.8


async def test_the_time_out_says_what_the_sources_said(
    published: Published, tmp_path: Path
) -> None:
    async with listening(Gateway(published, busy)) as source:
        with pytest.raises(ContentNotFound, match=rf"within 0\.6 s: {source.name} answered 429"):
            await fetch(
                published.root, tmp_path / "fetch", sources=[source], limits=Limits(total_s=0.6)
            )


async def test_a_block_of_use_begins_the_count_of_refusals_anew(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_FIRST_PAUSE_S", 0.01)
    turns = count()

    def every_second_time(blocks: Blocks) -> Blocks | Response:
        if len(blocks) > 1:
            return Response("no CARs", 500)
        return blocks if next(turns) % 2 else busy(blocks)

    async with listening(Gateway(published, every_second_time)) as source:
        source.at_once = 1
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert published.into(got)
    assert next(turns) > 2 * 5


def test_of_two_pauses_the_later_end_counts() -> None:
    liar = Standing()
    liar.lied()
    liar.busy(0)
    assert liar.wait_s > 50
    assert "wrong bytes" in liar.reason
    resting = Standing()
    resting.busy(3600)
    resting.lied()
    assert resting.wait_s > 3500


def test_many_who_hear_of_one_refusal_count_it_once() -> None:
    standing = Standing()
    for _ in range(8):
        standing.busy(0)
    assert standing.refusals == 1


def small(number: int) -> car.Block:
    data = number.to_bytes(8, "big")
    return CID(RAW, SHA2_256, hashlib.sha256(data).digest()), data


def inline(number: int) -> car.Block:
    data = number.to_bytes(8, "big")
    return CID(RAW, IDENTITY, data), data


def same(number: int) -> car.Block:
    return small(7)


JUNK = {"small": small, "inline": inline, "same": same}


def sections(kind: str) -> Iterator[bytes]:
    """For ever, many blocks at a time."""
    for start in count(0, 2000):
        blocks = (JUNK[kind](number) for number in range(start, start + 2000))
        named = ((bytes(cid), data) for cid, data in blocks)
        yield b"".join(varint.encode(len(name) + len(data)) + name + data for name, data in named)


class Flood:
    """A small file of the tree, then junk."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, blocks: Blocks) -> Response:
        if len(blocks) == 1:
            return Response("no", 404)

        async def body() -> AsyncIterator[bytes]:
            yield car_of(blocks[:2])
            for junk in sections(self.kind):
                yield junk
                await asyncio.sleep(0)

        return StreamingResponse(body())


@pytest.mark.parametrize("kind", JUNK)
async def test_who_sends_what_nobody_asked_for_is_done_with(
    published: Published, tmp_path: Path, kind: str
) -> None:
    limits = Limits(blocks=5000, total_s=20)
    async with listening(Gateway(published, Flood(kind))) as flood:
        with pytest.raises(ContentNotFound, match=r"nobody offered.*what nobody asked for"):
            await fetch(published.root, tmp_path / "fetch", sources=[flood], limits=limits)


async def test_who_sends_junk_ends_neither_the_fetch_nor_the_time_it_may_take(
    published: Published, tmp_path: Path
) -> None:
    async with (
        listening(Gateway(published, Flood("small"))) as flood,
        listening(Gateway(published)) as honest,
    ):
        began = time.monotonic()
        with pytest.raises(ContentNotFound, match="within 2 s"):
            await fetch(published.root, tmp_path / "a", sources=[flood], limits=Limits(total_s=2))
        assert time.monotonic() - began < 4
        got = await fetch(published.root, tmp_path / "b", sources=[flood, honest])
    assert published.into(got)


def test_what_comes_before_it_is_linked_to_takes_bounded_room_and_no_files(
    tmp_path: Path,
) -> None:
    published = publish(tmp_path / "folder", leaves=2)
    (*nodes, (leaf, data)) = published.blocks

    def kept_beside(junk: list[car.Block]) -> bool:
        """Whether the leaf was kept until the node that links to it came."""
        folder = tmp_path / os.urandom(4).hex()
        tree = Tree(published.root, folder, Limits(blocks=50))
        try:
            tree.offer([*junk, (leaf, data)])
            assert list(folder.iterdir()) == []
            tree.offer(nodes)
            return leaf not in tree.wanted
        finally:
            tree.close()

    assert kept_beside([small(number) for number in range(49)])
    assert kept_beside([inline(number) for number in range(60)])
    assert kept_beside([same(number) for number in range(60)])
    assert not kept_beside([small(number) for number in range(60)])
