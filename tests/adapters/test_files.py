"""What can't be read as an adapter's two files is refused, at once and in little memory."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from r3mes_vllm.adapters.files import printable
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS, vet
from r3mes_vllm.errors import AdapterRefused
from tests import tiny
from tests.adapters.test_vetting import BASE, write


def header(entries: object, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (1,), ends: tuple[int, int] = (0, 4)) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": ends}


def wrongly_encoded(text: str) -> list[bytes]:
    """As Python's json module reads them, and neither vLLM nor Rust does."""
    return [text.encode(it) for it in ("utf-8-sig", "utf-16", "utf-32")]


ENTRY = json.dumps(entry()).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00",
        b"PK\x03\x04 a pickle in a zip",
        struct.pack("<Q", 1 << 60) + b"{}",
        header(b"[1, 2"),
        header(b"[" * 100_000),
        header([]),
        header({"x": 1}),
        header({"x": entry()}),
        header({"x": entry()}, b"12345"),
        header({"x": entry(ends=(4, 8))}, b"12345678"),
        header({"x": entry(), "y": entry()}, b"1234"),
        header(b'{"x": %b, "x": %b}' % ((json.dumps(entry()).encode(),) * 2), b"1234"),
        header({"x": entry("I64", ends=(0, 8))}, b"12345678"),
        header({"x": entry(shape=(-1,))}, b"1234"),
        header({"x": entry(shape=(1 << 62, 1 << 62))}, b"1234"),
        header({"__metadata__": {"a": 1}, "x": entry()}, b"1234"),
        *(header(it, b"1234") for it in wrongly_encoded(json.dumps({"x": entry()}))),
        header({"__metadata__": {"a": "\ud800"}, "x": entry()}, b"1234"),
        header(b'{"__metadata__": {"a": "\xed\xa0\x80"}, "x": %b}' % ENTRY, b"1234"),
        header({"x": entry()}, b"1234").replace(b" [0,", b"[-0,"),
    ],
    ids=range(23),
)
def test_a_broken_weights_file_is_refused(tmp_path: Path, data: bytes) -> None:
    directory = write(tmp_path / "a")
    (directory / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterRefused) as caught:
        vet(directory, base=BASE)
    assert caught.value.rule in ("header_is_sound", "dtype_is_floating")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b'{"r": NaN}', b'{"r": 1, "r": 2}', b"\xff"),
        *wrongly_encoded(json.dumps(tiny.config())),
        json.dumps(tiny.config() | {"name": "\ud800"}).encode(),
        b'{"name": "\xed\xa0\x80"}',
    ],
)
def test_a_broken_configuration_file_is_refused(tmp_path: Path, data: bytes) -> None:
    directory = write(tmp_path / "a")
    (directory / CONFIG).write_bytes(data)
    with pytest.raises(AdapterRefused, match=CONFIG) as caught:
        vet(directory, base=BASE)
    assert caught.value.rule == "config_is_json"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_or_linked_file_is_refused(tmp_path: Path, name: str) -> None:
    directory = write(tmp_path / "a")
    (directory / name).rename(tmp_path / "elsewhere")
    with pytest.raises(AdapterRefused, match="there is no") as missing:
        vet(directory, base=BASE)
    (directory / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterRefused, match="not a regular file") as linked:
        vet(directory, base=BASE)
    assert missing.value.rule == linked.value.rule == "files_are_there"


def test_half_a_character_is_refused_and_a_whole_one_is_not(tmp_path: Path) -> None:
    whole = tiny.config() | {"name": "\U0001f600 \\ud800"}
    assert vet(write(tmp_path / "a", whole), base=BASE).rank == 8


def nested(text: bytes, times: int) -> bytes:
    return b'{"x": [' + text * times + b"0]}"


@pytest.mark.parametrize(
    "text",
    [
        b'{"' + b'\\"' * (1 << 18),  # a string that does not end
        b'{"x": {"dtype": "F32", "shape": [%b9], "data_offsets": [0, 4]}}' % (b"9," * 200_000),
        b"[" * (1 << 19),
    ],
    ids=["string", "shape", "depth"],
)
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_what_is_slow_to_read_is_refused_at_once(tmp_path: Path, file: str, text: bytes) -> None:
    directory = write(tmp_path / "a")
    (directory / file).write_bytes(text if file == CONFIG else header(text, b"1234"))
    began = time.process_time()
    with pytest.raises(AdapterRefused):
        vet(directory, base=BASE)
    assert time.process_time() - began < 2


MEASURED = """
import sys
from pathlib import Path
from r3mes_vllm.adapters.files import read_header

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

before = peak()
try:
    read_header(Path(sys.argv[1]))
except Exception as error:
    print(error)
print((peak() - before) // 1024)
"""


@pytest.mark.parametrize(
    "text",
    [
        nested(b"{},", 1_300_000),
        nested(b'"",', 1_300_000),
        b'{"x": {' + b",".join(b'"%d":1000' % i for i in range(295_000)) + b"}}",
    ],
    ids=["objects", "strings", "fields"],
)
def test_a_header_takes_little_memory_whatever_it_says(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x").write_bytes(header(text))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "x")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(said[-1]) < 100, said


def test_what_a_terminal_obeys_or_cannot_show_is_escaped() -> None:
    assert printable("é\n\x1b[2J\x9b\u202e\ud800") == "é\n\\x1b[2J\\x9b\\u202e\\ud800"
