"""Paths as people copy them from browsers, daemons and gateways."""

import pytest

from r3mes_vllm.errors import BadCID
from r3mes_vllm.ipfs.cid import CID, RAW
from r3mes_vllm.ipfs.path import IpfsPath

ROOT = CID.of(RAW, b"x")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{}", ()),
        (" {}\n", ()),
        ("/ipfs/{}/", ()),
        ("{}/a/b", ("a", "b")),
        ("{}/my dir/50%25?", ("my dir", "50%25?")),
        ("ipfs://{}/my%20dir/50%25", ("my dir", "50%")),
        ("IPFS://{}?filename=x", ()),
        ("ipfs://{}/%C3%A9#top", ("é",)),
        ("https://ipfs.io/ipfs/{}", ()),
        ("http://127.0.0.1:8080/ipfs/{}/a%20b/?format=car", ("a b",)),
    ],
)
def test_what_is_a_path(text: str, names: tuple[str, ...]) -> None:
    path = IpfsPath.parse(text.format(ROOT))
    assert path == IpfsPath(ROOT, names)
    assert IpfsPath.parse(str(path)) == path


@pytest.mark.parametrize(
    "text",
    [
        "{}/../x",
        "{}//x",
        "ipfs://{}/%2e%2e/x",
        "ipfs://{}/a%2Fb",
        "ipfs://{}/%ff",
        "https://ipfs.io/{}",
        "https://ipfs.io/ipns/{}",
        "https://{}.ipfs.dweb.link/",
        "https://ipfs.io/ipfs/",
        " ",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(BadCID):
        IpfsPath.parse(text.format(ROOT))
