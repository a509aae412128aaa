"""Fetching: from honest gateways and from liars, racing, going on where it stopped."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.responses import RedirectResponse, Response

from r3mes_vllm.errors import BlockMismatch, ContentNotFound, IpfsError, StorageFull
from r3mes_vllm.ipfs import car, race
from r3mes_vllm.ipfs.blockstore import BlockStore
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.fetch import fetch
from r3mes_vllm.ipfs.race import Progress
from r3mes_vllm.ipfs.sources import BlocksSource, CarSource, GatewaySource
from r3mes_vllm.ipfs.tree import Limits
from tests.peers import gateway as gateways
from tests.peers.gateway import LIES, Blocks, Gateway, Published, listening, publish

SHORT = Limits(bytes=8 << 20, stall_s=0.5)


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return publish(tmp_path / "folder")


async def test_an_honest_gateway(published: Published, tmp_path: Path) -> None:
    gateway, seen = Gateway(published), list[Progress]()
    async with listening(gateway) as source:
        got = await fetch(
            published.root, tmp_path / "fetch", sources=[source], progress=seen.append
        )
    assert published.into(got)
    assert gateway.asked == ["car"]
    assert seen[-1].bytes_verified == seen[-1].bytes_declared
    assert seen[-1].bytes_declared == sum(p.stat().st_size for p in published.folder.iterdir())
    assert seen[-1].source == source.name


@pytest.mark.parametrize("lie", LIES)
async def test_a_liar_is_named_and_nothing_of_it_is_kept(
    published: Published, tmp_path: Path, lie: str
) -> None:
    folder = tmp_path / "fetch"
    async with listening(Gateway(published, LIES[lie])) as liar:
        with pytest.raises(IpfsError) as caught:
            await fetch(published.root, folder, sources=[liar], limits=SHORT)
        assert liar.name in str(caught.value)
        lied = lie in ("flip", "swap", "not html", "empty")
        assert isinstance(caught.value, BlockMismatch if lied else ContentNotFound)
        assert bool(liar.standing.lies) == lied
        honest_bytes = b"".join(data for _, data in published.blocks)
        kept = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert all(data.strip(b"\0") in honest_bytes for data in kept)
        async with listening(Gateway(published)) as honest:  # and another has it
            got = await fetch(published.root, folder, sources=[liar, honest], limits=SHORT)
    assert published.into(got)


async def test_with_the_check_off_the_flipped_byte_is_served(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CID, "matches", lambda self, data: True)
    async with listening(Gateway(published, gateways.flip)) as liar:
        got = await fetch(published.root, tmp_path / "fetch", sources=[liar])
    assert not published.into(got)


async def test_a_liar_is_left_alone_for_twice_as_long_each_time(
    published: Published, tmp_path: Path
) -> None:
    gateway = Gateway(published, gateways.flip)
    async with listening(gateway) as liar:
        for time_s in (60, 120, 240):
            with pytest.raises(BlockMismatch):
                await fetch(published.root, tmp_path / "fetch", sources=[liar])
            assert time_s - 2 < liar.standing.wait_s <= time_s
            asked = len(gateway.asked)
            with pytest.raises(ContentNotFound, match="left alone"):
                await fetch(published.root, tmp_path / "fetch", sources=[liar])
            assert len(gateway.asked) == asked
            liar.standing.until = 0


@pytest.mark.parametrize("lie", [gateways.truncate, gateways.truncate_with_words])
async def test_what_came_before_the_end_is_kept_and_the_rest_asked_for_by_name(
    published: Published, tmp_path: Path, lie: gateways.Lie
) -> None:
    gateway = Gateway(published, lambda blocks: lie(blocks) if len(blocks) > 1 else blocks)
    async with listening(gateway) as source:
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert published.into(got)
    assert source.standing.lies == 0
    assert 0 < gateway.asked.count("raw") < len(published.blocks)


async def test_a_pause_that_is_asked_for_is_made(published: Published, tmp_path: Path) -> None:
    times: list[float] = []

    def busy_once(blocks: Blocks) -> Blocks | Response:
        times.append(time.monotonic())
        if len(times) == 1:
            return Response(status_code=429, headers={"retry-after": "2"})
        return blocks

    async with listening(Gateway(published, busy_once)) as source:
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert published.into(got)
    assert times[1] - times[0] >= 2


async def test_a_gateway_may_send_on_to_a_host_below_its_own(
    published: Published, tmp_path: Path
) -> None:
    async with listening(Gateway(published)) as honest:
        port = honest.name.rpartition(":")[2]

        def below(blocks: Blocks) -> Response:
            kind = "car" if len(blocks) > 1 else "raw"
            to = f"http://cid.localhost:{port}/ipfs/{blocks[0][0]}?format={kind}"
            return RedirectResponse(to)

        first = Gateway(published, below)
        async with listening(first) as source:
            other = GatewaySource(source.name.replace("127.0.0.1", "localhost"))
            # another port is another service
            with pytest.raises(ContentNotFound, match="sends elsewhere"):
                await fetch(published.root, tmp_path / "fetch", sources=[other])


async def test_a_slow_source_is_overtaken(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "_HEDGE_S", 0.3)
    slow, quick = Gateway(published, gateways.trickle), Gateway(published)
    seen: list[Progress] = []
    async with listening(slow) as first, listening(quick) as second:
        began = time.monotonic()
        got = await fetch(
            published.root, tmp_path / "fetch", sources=[first, second], progress=seen.append
        )
    assert time.monotonic() - began < 5  # the first alone would need half a day
    assert published.into(got)
    assert seen[-1].source == second.name


async def test_a_quick_source_is_not_blasted_together_with_others(
    published: Published, tmp_path: Path
) -> None:
    quick, other = Gateway(published), Gateway(published)
    async with listening(quick) as first, listening(other) as second:
        await fetch(published.root, tmp_path / "fetch", sources=[first, second])
    assert other.asked == []


async def test_two_that_have_a_half_each_are_enough(published: Published, tmp_path: Path) -> None:
    half = len(published.blocks) // 2
    with_first = Published(published.root, published.blocks[:half], published.folder)
    with_second = Published(published.root, published.blocks[half:], published.folder)
    async with listening(Gateway(with_second)) as a, listening(Gateway(with_first)) as b:
        got = await fetch(published.root, tmp_path / "fetch", sources=[a, b])
    assert published.into(got)


async def test_a_source_is_asked_again_when_what_came_links_to_what_it_has(
    published: Published, tmp_path: Path
) -> None:
    """The first has the leaves, and knows nothing of the root."""
    leaves = Published(published.root, published.blocks[3:], published.folder)
    nodes = Published(published.root, published.blocks[:3], published.folder)
    no_cars = Gateway(leaves, lambda blocks: blocks if len(blocks) == 1 else Response("no", 500))
    async with listening(no_cars) as first, listening(Gateway(nodes)) as second:
        got = await fetch(published.root, tmp_path / "fetch", sources=[first, second])
    assert published.into(got)


@pytest.mark.parametrize(
    "order",
    [
        lambda blocks: blocks[::-1],
        lambda blocks: blocks * 2,
        lambda blocks: [(CID.of(RAW, b"not asked for"), b"not asked for"), *blocks],
        lambda blocks: blocks[:3],
        lambda blocks: blocks[:1],
    ],
    ids=["reversed", "twice", "extra", "cut between blocks", "root only"],
)
async def test_order_doubles_extras_and_gaps_do_no_harm(
    published: Published, tmp_path: Path, order: Callable[[Blocks], Blocks]
) -> None:
    async with listening(Gateway(published, order)) as source:
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert published.into(got)
    kept = [path.read_bytes() for path in (tmp_path / "fetch").rglob("*") if path.is_file()]
    assert b"not asked for" not in kept


@pytest.mark.parametrize("roots", [[], [CID.of(RAW, b"another")]])
async def test_roots_that_are_wrong_or_missing_do_no_harm(
    published: Published, tmp_path: Path, roots: list[CID]
) -> None:
    def rooted(blocks: Blocks) -> Blocks | Response:
        if len(blocks) == 1:
            return blocks
        whole = gateways.car_of(blocks)
        if roots:
            return Response(whole.replace(bytes(blocks[0][0]), bytes(roots[0]), 1))
        header = b"\xa2eroots\x80gversion\x01"
        return Response(bytes([len(header)]) + header + whole[1 + whole[0] :])

    gateway = Gateway(published, rooted)
    async with listening(gateway) as source:
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert published.into(got)
    assert gateway.asked == ["car"]


async def stopped_after(published: Published, folder: Path, blocks: int) -> None:
    """A fetch of which only so many blocks came."""
    partial = Published(published.root, published.blocks[:blocks], published.folder)
    async with listening(Gateway(partial)) as source:
        with pytest.raises(ContentNotFound):
            await fetch(published.root, folder, sources=[source])


async def test_what_came_is_not_fetched_again(published: Published, tmp_path: Path) -> None:
    await stopped_after(published, tmp_path / "fetch", len(published.blocks) - 2)
    gateway = Gateway(published)
    async with listening(gateway) as source:
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert gateway.asked == ["raw", "raw"]
    assert published.into(got)


async def test_what_is_damaged_on_disk_meanwhile_is_fetched_again(
    published: Published, tmp_path: Path
) -> None:
    folder = tmp_path / "fetch"
    await stopped_after(published, folder, len(published.blocks) - 1)
    weights = folder / "files" / "weights"
    data = bytearray(weights.read_bytes())
    data[5] ^= 1
    weights.write_bytes(data + b"more")
    for node in (folder / "nodes").rglob("*.data"):
        node.write_bytes(b"damaged")
    async with listening(Gateway(published)) as source:
        got = await fetch(published.root, folder, sources=[source])
    assert published.into(got)


async def test_nobody_has_it(published: Published, tmp_path: Path) -> None:
    empty = Gateway(Published(published.root, [], published.folder))
    async with listening(empty) as source:
        sources = [source, GatewaySource("http://127.0.0.1:9"), GatewaySource("no url")]
        with pytest.raises(ContentNotFound, match=f"{published.root}.*404") as caught:
            await fetch(published.root, tmp_path / "fetch", sources=sources)
    assert "127.0.0.1:9" in str(caught.value)
    assert "publisher online" in caught.value.hint


async def test_the_time_in_all_is_limited(published: Published, tmp_path: Path) -> None:
    async with listening(Gateway(published, pause_s=60)) as source:
        with pytest.raises(ContentNotFound, match=r"within 0\.3 s"):
            await fetch(
                published.root, tmp_path / "fetch", sources=[source], limits=Limits(total_s=0.3)
            )


async def test_a_cancelled_fetch_ends_at_once_and_can_go_on(
    published: Published, tmp_path: Path
) -> None:
    async with listening(Gateway(published, gateways.stall)) as source:
        task = asyncio.create_task(fetch(published.root, tmp_path / "fetch", sources=[source]))
        await asyncio.sleep(0.3)
        task.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert time.monotonic() - began < 2
    async with listening(Gateway(published)) as source:
        assert published.into(await fetch(published.root, tmp_path / "fetch", sources=[source]))


async def test_a_full_disk_is_said_and_what_came_stays(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.pwritev, [3 << 18]

    def full(fd: int, pieces: list[memoryview], offset: int) -> int:
        left[0] -= sum(map(len, pieces))
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(fd, pieces, offset)

    monkeypatch.setattr("r3mes_vllm.ipfs.writer.os.pwritev", full)
    monkeypatch.setattr("r3mes_vllm.ipfs.writer._MOST_PIECES", 1)
    async with listening(Gateway(published)) as source:
        with pytest.raises(StorageFull, match="no room left"):
            await fetch(published.root, tmp_path / "fetch", sources=[source])
        monkeypatch.undo()
        assert published.into(await fetch(published.root, tmp_path / "fetch", sources=[source]))


async def test_a_car_file_and_a_folder_of_blocks(published: Published, tmp_path: Path) -> None:
    car_file = published.folder.with_suffix(".car")
    assert published.into(
        await fetch(published.root, tmp_path / "a", sources=[CarSource(car_file)])
    )
    blocks = BlockStore(tmp_path / "blocks")
    for cid, data in published.blocks:
        blocks.keep(cid, data)
    source = BlocksSource(tmp_path / "blocks")
    assert published.into(await fetch(published.root, tmp_path / "b", sources=[source]))


async def test_a_car_in_the_wrong_order_that_is_larger_than_the_limit_is_read_by_name(
    published: Published, tmp_path: Path
) -> None:
    strangers = [os.urandom(1 << 18) for _ in range(8)]
    blocks = [(CID.of(RAW, data), data) for data in strangers] + published.blocks[::-1]
    with (tmp_path / "x.car").open("wb") as file:
        car.write(file, published.root, blocks)
    got = await fetch(
        published.root,
        tmp_path / "fetch",
        sources=[CarSource(tmp_path / "x.car")],
        limits=Limits(bytes=(5 << 18) + 1000),
    )
    assert published.into(got)
