"""Which adapters a node serves, by what it was told and what it knows."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from r3mes_vllm.adapters import shipped
from r3mes_vllm.adapters.catalog import Catalog
from r3mes_vllm.errors import BadCID, ConfigError, R3mesError, UnknownAdapter
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.wire import Lora

ONE, TWO, THREE = (CID.of(RAW, text) for text in (b"1", b"2", b"3"))
REGISTRY = [
    Lora(id=1, name="first", ipfs_hash=str(ONE), category="law"),
    Lora(id=2, name="second", ipfs_hash=str(TWO), category="health"),
    Lora(id=3, name="broken", ipfs_hash="no cid", category="law"),
]


def last_two(loras: Sequence[Lora]) -> Sequence[Lora]:
    return loras[1:]


def names(catalog: Catalog, items: list[str], policy: str = "first") -> list[str]:
    return [it.name for it in catalog.choose(items, policy)]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path, REGISTRY)


def test_items_are_names_cids_and_paths(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "x.car").touch()
    items = ["second", f"mine={THREE}", f"local={tmp_path / 'x.car'}"]
    second, mine, local = catalog.choose(items, "first")
    assert (second.name, second.where) == ("second", IpfsPath(TWO))
    assert (mine.name, mine.where) == ("mine", IpfsPath(THREE))
    assert (local.name, local.where, local.source) == ("local", None, tmp_path / "x.car")


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        ("first", ["first"]),
        ("all", ["first", "second"]),
        ("category:law", ["first"]),
        ("category:nothing", []),
        (f"{__name__}:last_two", ["second"]),
    ],
)
def test_without_items_the_policy_chooses(catalog: Catalog, policy: str, chosen: list[str]) -> None:
    assert names(catalog, [], policy) == chosen


def test_an_entry_that_nobody_could_serve_is_a_warning(catalog: Catalog) -> None:
    assert names(catalog, ["all"]) == ["first", "second"]
    assert "broken" in catalog.warnings[0]
    with pytest.raises(BadCID):
        catalog.choose(["broken"], "first")


@pytest.mark.parametrize(
    ("items", "error"),
    [
        (["nobody"], UnknownAdapter),
        (["x=nothing"], BadCID),
        (["../x"], ConfigError),
        (["a b=c"], ConfigError),
        (["x@y"], ConfigError),
        (["first", "first"], ConfigError),
        (["first", "all"], ConfigError),
    ],
)
def test_an_item_that_means_nothing(
    catalog: Catalog, items: list[str], error: type[R3mesError]
) -> None:
    with pytest.raises(error, match=r".+"):
        catalog.choose(items, "first")


@pytest.mark.parametrize("policy", ["nothing", "os:absent", "absent.module:x", "os:name"])
def test_a_policy_that_is_no_function(catalog: Catalog, policy: str) -> None:
    with pytest.raises(ConfigError, match=policy):
        catalog.choose([], policy)


def test_while_the_backend_is_away_the_last_run_counts(tmp_path: Path) -> None:
    Catalog(tmp_path, REGISTRY).remember({"mine": THREE})
    away = Catalog(tmp_path, None)
    assert [it.where for it in away.choose(["second", "mine"], "first")] == [
        IpfsPath(TWO),
        IpfsPath(THREE),
    ]
    back = Catalog(tmp_path, [])
    with pytest.raises(UnknownAdapter):  # the registry's word is newer
        back.choose(["second"], "first")


@pytest.mark.parametrize(("policy", "chosen"), [("first", "z"), ("category:law", "a")])
def test_while_the_backend_is_away_a_policy_chooses_the_same(
    tmp_path: Path, policy: str, chosen: str
) -> None:
    listed = [
        Lora(id=1, name="z", ipfs_hash=str(ONE)),
        Lora(id=2, name="a", ipfs_hash=str(TWO), category="law"),
    ]
    Catalog(tmp_path, listed).remember({})
    assert names(Catalog(tmp_path, listed), [], policy) == [chosen]
    assert names(Catalog(tmp_path, None), [], policy) == [chosen]


def test_while_the_backend_is_away_an_unknown_name_ends_nothing(tmp_path: Path) -> None:
    Catalog(tmp_path, REGISTRY).remember({})
    away = Catalog(tmp_path, None)
    assert names(away, ["first", "new"]) == ["first"]
    assert "'new' is left out" in away.warnings[0]
    with pytest.raises(UnknownAdapter):
        away.choose(["new"], "first")


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_broken_memory_is_no_memory(tmp_path: Path, text: str) -> None:
    (tmp_path / "catalog.json").write_text(text)
    assert names(Catalog(tmp_path, None), ["legal"]) == ["legal"]


def test_a_memory_that_can_not_be_kept_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    (tmp_path / "catalog.json").mkdir()
    catalog = Catalog(tmp_path, REGISTRY)
    catalog.remember({"mine": THREE})
    assert names(catalog, ["first"]) == ["first"]


def test_the_shipped_adapters_are_known_without_anything(tmp_path: Path) -> None:
    found = Catalog(tmp_path, None).choose(["legal", "medical"], "first")
    assert {it.name: str(it.where) for it in found} == shipped.cids()
    assert names(Catalog(tmp_path, []), ["all"]) == list(shipped.cids())


def test_what_is_remembered_can_be_read_by_a_person(tmp_path: Path) -> None:
    Catalog(tmp_path, None).remember({"mine": THREE})
    assert json.loads((tmp_path / "catalog.json").read_text())["mine"] == str(THREE)
