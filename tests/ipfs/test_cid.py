"""CIDs against the `multiformats` package as oracle."""

import hashlib

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiformats import CID as Oracle
from multiformats import multihash

from r3mes_vllm.errors import BadCID, BlockMismatch
from r3mes_vllm.ipfs import varint
from r3mes_vllm.ipfs.cid import CID, DAG_PB, RAW

DATA = b"some block"
BASES = ["base32", "base36", "base58btc", "base64url"]
HASHES = ["sha2-256", "sha2-512", "blake2b-256", "blake3", "identity"]


def digest(name: str) -> bytes:
    if name == "blake3":
        return b"\x1e\x20" + blake3.blake3(DATA).digest()
    return bytes(multihash.digest(DATA, name))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("codec", ["raw", "dag-pb"])
@pytest.mark.parametrize("name", HASHES)
def test_every_spelling_is_the_same_cid(base: str, codec: str, name: str) -> None:
    oracle = Oracle(base, 1, codec, digest(name))
    found = CID.parse(str(oracle))
    assert bytes(found) == bytes(oracle)
    assert str(found) == str(oracle.set(base="base32"))
    assert {found: 1}[CID.from_bytes(bytes(oracle))] == 1
    found.check(DATA, "me")
    with pytest.raises(BlockMismatch, match="me"):
        found.check(DATA + b"!", "me")


def test_version_0_is_the_version_1_that_it_stands_for() -> None:
    oracle = Oracle("base58btc", 0, "dag-pb", digest("sha2-256"))
    assert str(oracle).startswith("Qm")
    found = CID.parse(str(oracle))
    assert found == CID(DAG_PB, 0x12, hashlib.sha256(DATA).digest())
    assert found == CID.from_bytes(bytes(oracle))


def test_the_probe_of_gateways_is_a_cid() -> None:
    assert CID.parse("bafkqaaa").inline == b""


def test_of() -> None:
    assert str(CID.of(RAW, b"")) == "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"


GOOD = str(CID.of(RAW, DATA))
V1 = Oracle("base32", 1, "raw", digest("sha2-256"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "Qm",
        "Qm" + "0" * 44,
        GOOD[:-1],
        GOOD + "a",
        GOOD.upper(),
        f" {GOOD}",
        f"{GOOD}\n",
        f"/ipfs/{GOOD}",
        "f" + bytes(V1).hex(),
        "m" + "AVUSI",
        "💥",
        "baf" * 300,
        "b" + "a" * 20,
        str(Oracle("base32", 1, "dag-cbor", digest("sha2-256"))),
        str(Oracle("base32", 1, "raw", multihash.digest(DATA, "sha1"))),
        str(Oracle("base32", 1, "raw", multihash.digest(DATA, "sha3-256"))),
        "Qm1111111111111111111111111111111111111111111111",
    ],
)
def test_what_is_no_cid_or_not_supported_is_refused(text: str) -> None:
    with pytest.raises(BadCID):
        CID.parse(text)


@pytest.mark.parametrize(
    "data",
    [
        b"\x01\x55\x12\x1f" + b"a" * 31,  # a cut digest
        b"\x01\x55\x12\x20" + b"a" * 31,
        b"\x01\x55\x00\x81\x01" + b"a" * 129,  # an identity of 129 bytes
        b"\x02\x55\x12\x20" + b"a" * 32,
        b"\x81\x00\x55\x12\x20" + b"a" * 32,  # a varint that is too long
        b"\x12\x20" + b"a" * 31,
        b"\x11\x14" + b"a" * 20,  # version 0 over sha1
        b"",
    ],
)
def test_a_binary_cid_that_is_wrong_is_refused(data: bytes) -> None:
    with pytest.raises(BadCID):
        CID.from_bytes(data)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_cid_or_refused(data: bytes) -> None:
    try:
        cid = CID.from_bytes(data)
    except BadCID:
        return
    assert CID.parse(str(cid)) == cid


@given(st.text(max_size=80))
def test_any_text_is_a_cid_or_refused(text: str) -> None:
    try:
        assert str(CID.parse(text))
    except BadCID:
        return


@given(st.integers(0, (1 << 63) - 1), st.binary(max_size=3))
def test_varints_come_back(number: int, rest: bytes) -> None:
    encoded = varint.encode(number)
    assert varint.decode(encoded + rest) == (number, len(encoded))
    assert varint.decode(encoded[:-1]) is None


@pytest.mark.parametrize("data", [b"\x80\x00", b"\xff" * 9, b"\x80" * 9 + b"\x01"])
def test_varints_that_are_too_long(data: bytes) -> None:
    with pytest.raises(ValueError, match="longer"):
        varint.decode(data)
