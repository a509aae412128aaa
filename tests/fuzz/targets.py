"""What is fuzzed: one function for each parser of strangers' bytes, with examples to start from.

A target may only raise what its parser says that it raises; anything else is a find.
"""

import contextlib
import io
import json
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from r3mes_vllm.adapters.files import CONFIG, WEIGHTS
from r3mes_vllm.adapters.vetting import vet
from r3mes_vllm.errors import R3mesError
from r3mes_vllm.ipfs import archive, car, varint
from r3mes_vllm.ipfs.car import CarReader
from r3mes_vllm.ipfs.cid import CID, DAG_PB, RAW
from r3mes_vllm.ipfs.path import IpfsPath
from r3mes_vllm.ipfs.tree import Limits
from r3mes_vllm.ipfs.unixfs import Link, encode_directory, encode_file, read
from tests import tiny

_LIMITS = Limits(bytes=1 << 20, files=50, depth=8)


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    examples: tuple[bytes, ...]


def _varint(data: bytes) -> None:
    try:
        found = varint.decode(data)
    except ValueError:
        return
    if found is not None:
        number, end = found
        assert varint.encode(number) == data[:end]


def _cid(data: bytes) -> None:
    with contextlib.suppress(R3mesError):
        cid = CID.from_bytes(data)
        assert CID.parse(str(cid)) == cid == CID.from_bytes(bytes(cid))
    with contextlib.suppress(R3mesError):
        path = IpfsPath.parse(data.decode(errors="surrogateescape"))
        assert IpfsPath.parse(str(path)) == path


def _car(data: bytes) -> None:
    """However the stream comes in parts, and whatever fits into a buffer, the same comes out."""
    step = (data[0] if data else 0) % 61 + 1
    whole = _read_car(data, len(data) + 1, patience_s=60)
    assert whole == _read_car(data, step, patience_s=60) == _read_car(data, step, patience_s=0)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        path = Path(name) / "x.car"
        path.write_bytes(data)
        with contextlib.suppress(R3mesError):
            file, (blocks, _) = car.CarFile(path), whole
            assert {cid: file.block(cid) for cid, _ in reversed(blocks)} == dict(reversed(blocks))


class _InParts:
    def __init__(self, data: bytes, step: int) -> None:
        self._data = memoryview(data)
        self._step = step

    def readinto(self, buffer: memoryview, /) -> int:
        part = self._data[: min(self._step, len(buffer))]
        self._data = self._data[len(part) :]
        buffer[: len(part)] = part
        return len(part)


_BUFFER = memoryview(bytearray(car.BLOCK_LIMIT))


def _read_car(data: bytes, step: int, patience_s: float) -> tuple[list[car.Block], str]:
    """The blocks, and the error after them."""
    reader = CarReader(_InParts(data, step), "sender")
    found: list[car.Block] = []
    try:
        while blocks := reader.fill(_BUFFER, patience_s):
            found += [(cid, bytes(block)) for cid, block in blocks]
    except R3mesError as error:
        return found, str(error)
    return found, ""


_PB = CID.of(DAG_PB, b"")


def _unixfs(data: bytes) -> None:
    with contextlib.suppress(R3mesError):
        node = read(_PB, data)
        assert len(node.blocksizes) in (0, len(node.links))
        assert node.size >= len(node.data)


def _weights(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        (Path(name) / CONFIG).write_text(json.dumps(tiny.config()))
        (Path(name) / WEIGHTS).write_bytes(data)
        with contextlib.suppress(R3mesError):
            vet(Path(name))


def _config(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        (Path(name) / CONFIG).write_bytes(data)
        (Path(name) / "tokenizer_config.json").write_bytes(data)
        (Path(name) / WEIGHTS).write_bytes(_small_weights())
        with contextlib.suppress(R3mesError):
            vet(Path(name))


def _archive(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        path, into = Path(name) / "archive", Path(name) / "into"
        path.write_bytes(data)
        try:
            archive.unpack(path, into, _LIMITS)
        except R3mesError:
            assert not into.exists()
        assert {it.name for it in Path(name).iterdir()} <= {"archive", "into"}


def _small_weights() -> bytes:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    entries = {
        f"{prefix}A.weight": {"dtype": "F16", "shape": [8, 1], "data_offsets": [0, 16]},
        f"{prefix}B.weight": {"dtype": "F16", "shape": [1, 8], "data_offsets": [16, 32]},
    }
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(32)


def _small_car() -> bytes:
    leaves = [(CID.of(RAW, data), data) for data in (b"one", b"two" * 100)]
    parts = [Link(cid, "", len(data)) for cid, data in leaves]
    file = encode_file(parts, [len(data) for _, data in leaves])
    folder = encode_directory([Link(CID.of(DAG_PB, file), "name", len(file))])
    blocks = [(CID.of(DAG_PB, data), data) for data in (folder, file)]
    written = io.BytesIO()
    car.write(written, blocks[0][0], [*blocks, *leaves])
    return written.getvalue()


def _small_dag_pb() -> tuple[bytes, ...]:
    cid = CID.of(RAW, b"x")
    return (
        encode_directory([Link(cid, "a", 1), Link(cid, "b", 1)]),
        encode_file([Link(cid, "", 1)] * 2, [1, 1]),
        b"\x0a\x06\x08\x02\x12\x02hi",
        b"\x0a\x07\x08\x05\x28\x22\x30\x80\x02",
    )


def _small_archives() -> tuple[bytes, ...]:
    made = []
    for mode in ("w:", "w:gz"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode, format=tarfile.PAX_FORMAT) as tar:
            for name in ("a/b", "ü" * 60):
                entry = tarfile.TarInfo(name)
                entry.size = 5
                tar.addfile(entry, io.BytesIO(b"12345"))
        made.append(file.getvalue())
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/b", "12345" * 20)
        packed.writestr("c", "")
    return (*made, file.getvalue())


TARGETS: dict[str, Target] = {
    "varint": Target(_varint, (b"\x01", b"\x80\x01", b"\xff" * 9)),
    "cid": Target(
        _cid,
        (bytes(CID.of(RAW, b"")), str(CID.of(RAW, b"")).encode(), b"bafkqaaa", b"\x01\x55\x00\x00"),
    ),
    "car": Target(_car, (_small_car(),)),
    "unixfs": Target(_unixfs, _small_dag_pb()),
    "weights": Target(_weights, (_small_weights(),)),
    "config": Target(
        _config,
        (json.dumps(tiny.config()).encode(), b'{"rank_pattern": {"q_proj": 8}, "auto_map": 1}'),
    ),
    "archive": Target(_archive, _small_archives()),
}
