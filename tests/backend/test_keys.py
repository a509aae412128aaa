"""Who may do what."""

from pathlib import Path

import pytest

from r3mes_vllm.backend.app import create_app
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.settings import load
from tests.backend.conftest import StartBackend, StartNode
from tests.backend.stand_ins import LEGAL_CID, StandIn

LORA = {"name": "legal", "ipfs_hash": LEGAL_CID}
WRONG = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer"},
    {"Authorization": "Basic right"},
    {"Authorization": "right"},
    {"X-API-Key": "righ"},
    {"X-API-Key": "right\u00e9"},
]
RIGHT = [
    {"Authorization": "Bearer right"},
    {"Authorization": "bearer right"},
    {"X-API-Key": "right"},
]


async def test_registering_an_adapter_needs_the_admin_key(start_backend: StartBackend) -> None:
    network = await start_backend(admin_key="right")
    for headers in WRONG:
        raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
        answer = await network.http.post("/api/lora/register", json=LORA, headers=raw)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "unauthorized"
    assert (await network.http.get("/api/lora/list")).json() == []
    for headers in RIGHT:
        answer = await network.http.post("/api/lora/register", json=LORA, headers=headers)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/chat"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/embeddings"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/legal"),
    ],
)
async def test_using_the_network_needs_a_client_key(
    start_backend: StartBackend, start_node: StartNode, method: str, path: str
) -> None:
    network = await start_backend(api_keys=["other", "right"])
    node = StandIn()
    await network.register(await start_node(node), "legal")
    body = {"message": "hi", "model": "legal"} if method == "POST" else None
    for headers in WRONG:
        raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
        answer = await network.http.request(method, path, json=body, headers=raw)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert not node.seen
    for headers in RIGHT:
        answer = await network.http.request(method, path, json=body, headers=headers)
        assert answer.status_code == 200


async def test_without_keys_everyone_may(
    start_backend: StartBackend, start_node: StartNode
) -> None:
    """The twin of the two above."""
    network = await start_backend()
    await network.register(await start_node(StandIn()), "legal")
    assert (await network.http.post("/chat", json={"message": "hi"})).status_code == 200
    assert (await network.http.post("/api/lora/register", json=LORA)).status_code == 200


async def test_nodes_register_without_a_key(start_backend: StartBackend) -> None:
    network = await start_backend(admin_key="a", api_keys=["b"])
    await network.register("http://127.0.0.1:1", "legal")
    assert (await network.beat()).status_code == 200


async def test_keys_come_from_a_file_too(start_backend: StartBackend, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# clients\none\n\n two \n")
    network = await start_backend(api_keys_file=file)
    for key, status in (("one", 200), ("two", 200), ("# clients", 401), ("", 401)):
        answer = await network.http.get("/v1/models", headers={"X-API-Key": key})
        assert answer.status_code == status


def test_a_key_file_without_a_key_does_not_open_the_backend(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n# none yet\n")
    with pytest.raises(ConfigError, match="holds no key"):
        create_app(load({"api_keys_file": file}))
    with pytest.raises(ConfigError, match="can't read the keys"):
        create_app(load({"api_keys_file": tmp_path / "missing"}))
