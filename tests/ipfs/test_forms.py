"""Gateways that give blocks in one form only."""

from pathlib import Path

import pytest
from starlette.responses import Response

from r3mes_vllm.errors import ContentNotFound
from r3mes_vllm.ipfs.fetch import fetch, resolve
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.ipfs.tree import Limits
from tests.peers import gateway as gateways
from tests.peers.gateway import Blocks, Gateway, Published, listening, packed, publish

SHORT = Limits(stall_s=0.5)


@pytest.fixture
def published(tmp_path: Path) -> Published:
    return publish(tmp_path / "folder", leaves=9)


def cars_only(published: Published, lie: gateways.Lie | None = None) -> Gateway:
    return Gateway(published, lie, forms=("car",))


async def test_after_a_car_that_broke_the_rest_comes_in_cars(
    published: Published, tmp_path: Path
) -> None:
    gateway = cars_only(published, lambda it: gateways.truncate(it) if len(it) > 1 else it)
    async with listening(gateway) as source:
        got = await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert published.into(got)
    assert source.standing.lies == 0
    assert source.standing.bytes < sum(len(data) for _, data in published.blocks) * 1.1


async def test_what_a_stalling_source_began_one_ends_that_gives_only_cars(
    published: Published, tmp_path: Path
) -> None:
    def stalls(blocks: Blocks) -> Blocks | Response:
        return blocks[:1] if len(blocks) > 1 else Response("no", 504)

    async with (
        listening(Gateway(published, stalls)) as first,
        listening(cars_only(published)) as second,
    ):
        sources = [first, second]
        got = await fetch(published.root, tmp_path / "fetch", sources=sources, limits=SHORT)
    assert published.into(got)


async def test_a_path_is_followed_with_cars_and_no_more_is_fetched_than_its_nodes(
    tmp_path: Path,
) -> None:
    (tmp_path / "outer").mkdir()
    publish(tmp_path / "outer" / "inner")
    (tmp_path / "outer" / "inner.car").unlink()
    outer = packed(tmp_path / "outer")
    path = IpfsPath(outer.root, ("inner", "weights"))
    async with listening(cars_only(outer)) as source:
        end = await resolve(path, tmp_path / "way", sources=[source])
    assert end in dict(outer.blocks)
    assert source.standing.bytes < 1000
    whole = cars_only(outer, lambda _: outer.blocks)  # it knows nothing of `dag-scope`
    async with listening(whole) as source:
        assert await resolve(path, tmp_path / "way", sources=[source]) == end


async def test_a_lie_in_such_a_car_is_named(published: Published, tmp_path: Path) -> None:
    gateway = cars_only(published, lambda it: it[:1] if len(it) > 1 else gateways.flip(it))
    async with listening(gateway) as liar, listening(Gateway(published)) as honest:
        got = await fetch(published.root, tmp_path / "fetch", sources=[liar, honest])
    assert published.into(got)
    assert liar.standing.lies == 1


@pytest.mark.parametrize("forms", [(), ("raw",), ("car",)])
async def test_who_has_nothing_in_any_form_is_asked_a_few_times_only(
    published: Published, tmp_path: Path, forms: tuple[str, ...]
) -> None:
    empty = Gateway(Published(published.root, [], published.folder), forms=forms)
    async with listening(empty) as source:
        with pytest.raises(ContentNotFound, match=f"{source.name} answered 40[46]"):
            await fetch(published.root, tmp_path / "fetch", sources=[source])
    assert len(empty.asked) <= 3
