"""What is said while a hub's weights are fetched."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from r3mes_vllm.engine import weights

FILES = {
    "config.json": 700,
    "model-1.safetensors": 5_000_000_000,
    "model-2.safetensors": 3_000_000_000,
    "original/model.safetensors": 8_000_000_000,
    "pytorch_model.bin": 8_000_000_000,
}


def test_the_hub_is_asked_for_the_size_of_what_vllm_fetches() -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files = [{"rfilename": name, "size": size} for name, size in FILES.items()]
            body = json.dumps({"id": "its/model", "siblings": files}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert weights.size_at_hub("its/model", url) == 8_000_000_000
    assert weights.size_at_hub("its/model", url) is None, "nobody answers any more"


def test_half_fetched_weights_are_not_here(tmp_path: Path) -> None:
    assert not weights.are_here(tmp_path)
    for file in ("snapshots/abc/config.json", "blobs/1.incomplete"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert not weights.are_here(tmp_path)
    (tmp_path / "snapshots/abc/model-1.safetensors").touch()
    assert not weights.are_here(tmp_path)
    (tmp_path / "blobs/1.incomplete").unlink()
    assert weights.are_here(tmp_path)


def test_it_says_how_far_it_is_until_all_is_there(tmp_path: Path) -> None:
    said: list[str] = []
    blob = tmp_path / "1.incomplete"

    def say(text: str) -> None:
        said.append(text)
        (tmp_path / str(len(said))).write_bytes(bytes(1 << 20))

    blob.write_bytes(bytes(1 << 20))
    watching = threading.Thread(
        target=weights.watch, args=(tmp_path, 4 << 20, say), kwargs={"every_s": 0.01}, daemon=True
    )
    watching.start()
    watching.join(10)
    assert not watching.is_alive()
    assert set(said) == {"  weights: 0.0 of 0.0 GB"}


@pytest.mark.parametrize("total", [None, 1 << 40])
def test_it_ends_when_nothing_comes_any_more(tmp_path: Path, total: int | None) -> None:
    said: list[str] = []
    weights.watch(tmp_path, total, said.append, every_s=0.001)
    assert said == []


def test_nothing_is_said_of_a_folder_or_of_another_place(tmp_path: Path) -> None:
    said: list[str] = []
    weights.follow(str(tmp_path), [], said.append)
    weights.follow("its/model", ["--download-dir", "/srv"], said.append)
    weights.follow("its/model", ["--load-format=dummy"], said.append)
    assert said == []
