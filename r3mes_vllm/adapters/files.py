"""Reading an adapter's two files without believing them: nothing is deserialised.

The JSON configuration and the safetensors header are parsed, within limits; the numbers are looked
at as bits. Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import re
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.errors import AdapterRefused

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

MAX_CONFIG, CONFIG_DEPTH = 1 << 20, 16
_MAX_HEADER, _HEADER_DEPTH = 4 << 20, 3
_MAX_TENSORS = 25_000
_MAX_PARTS = 12 * _MAX_TENSORS
"""Of a JSON text: brackets and commas, of which a tensor's entry has eleven. What is parsed is many
times as large as the text."""

_MAX_DIMENSIONS = 8
_LARGEST_NUMBER = 1 << 48
_CHUNK = 1 << 18
"""Bytes; a chunk and its copy stay in a core's cache."""

# One that does not end goes to the end of the text: begun anew at each quote, it takes for ever.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_PART = bytes(set(range(256)) - set(b"[]{},"))

# name → (bytes an element, all but the sign, the exponent: all set means infinite or not a number)
_DTYPES = {
    "F32": (4, 0x7FFFFFFF, 0x7F800000),
    "F16": (2, 0x7FFF, 0x7C00),
    "BF16": (2, 0x7FFF, 0x7F80),
}


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    end: int


@dataclass(frozen=True)
class Candidate:
    """An adapter whose files could be read; what they say is still to be judged."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    max_rank: int
    base: ModelShape | None
    follow_links: bool = False
    """In an operator's own folder; what was fetched or unpacked holds none."""

    @cached_property
    def largest(self) -> dict[str, float]:
        """The largest magnitude in each tensor; infinite for one that holds any NaN or infinity.

        One pass: magnitudes of floats are in the order of their bits without the sign.
        """
        buffer = np.empty(_CHUNK, np.uint8)
        with (self.directory / WEIGHTS).open("rb") as file:
            return {name: _largest(file, it, buffer) for name, it in self.tensors.items()}


def open_candidate(
    directory: Path, *, base: ModelShape | None, max_rank: int, follow_links: bool = False
) -> Candidate:
    """Raises AdapterRefused when a file is missing or broken."""
    config = read_json(
        directory / CONFIG, "config_is_json", MAX_CONFIG, CONFIG_DEPTH, follow_links=follow_links
    )
    tensors, _ = read_header(directory / WEIGHTS, follow_links=follow_links)
    return Candidate(directory, config, tensors, max_rank, base, follow_links)


def read_json(
    path: Path, rule: str, largest: int, depth: int, *, follow_links: bool = False
) -> dict[str, Any]:
    """The JSON object in the file. Raises AdapterRefused in the name of `rule`."""
    return parse_json(_read_regular(path, largest, follow_links), path.name, rule, depth)


def parse_json(
    raw: bytes, name: str, rule: str, depth: int, *, negative: bool = True
) -> dict[str, Any]:
    """The JSON object that `raw` is, in UTF-8. Raises AdapterRefused in the name of `rule`."""
    if raw.count(b'"') > 2 * _MAX_PARTS:
        refuse(rule, f"{name} has over {2 * _MAX_PARTS} quotes")
    between = _STRING.sub(b"", raw)
    if not negative and b"-" in between:  # -0 too, which is none to those who read the file later
        refuse(rule, f"{name} holds a negative number")
    parts = between.translate(None, _NO_PART)
    if len(parts) > _MAX_PARTS:
        refuse(rule, f"{name} has {len(parts)} brackets and commas; at most {_MAX_PARTS}")
    level = 0
    for part in parts:
        level += (part in b"[{") - (part in b"]}")
        if level > depth:
            refuse(rule, f"{name} is nested more than {depth} deep")
    try:
        text = raw.decode()
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        refuse(rule, f"{name} is not valid JSON: {error}")
    if not isinstance(found, dict):
        refuse(rule, f"{name} is not a JSON object")
    return found


def read_header(
    path: Path, *, follow_links: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises AdapterRefused."""
    _require_regular(path, follow_links)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            refuse("header_is_sound", f"{path.name}: a header of {length} bytes in {size}")
        raw = file.read(length)
    title = f"the header of {path.name}"
    header = parse_json(raw, title, "header_is_sound", _HEADER_DEPTH, negative=False)
    if len(header) > _MAX_TENSORS:
        refuse("header_is_sound", f"{path.name}: {len(header)} tensors; at most {_MAX_TENSORS}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        refuse("header_is_sound", f"{path.name}: __metadata__ must map text to text")
    tensors = {name: _read_tensor(name, entry, 8 + length) for name, entry in header.items()}
    expected = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != expected:
            refuse("header_is_sound", f"{path.name}: {short(name)} does not begin at {expected}")
        expected = tensor.end
    if expected != size:
        refuse("header_is_sound", f"{path.name}: the tensors end at {expected}, the file at {size}")
    return tensors, metadata


def refuse(rule: str, message: str, *, hint: str = "") -> NoReturn:
    raise AdapterRefused(rule, message, hint=hint)


def short(value: object) -> str:
    """For messages: one line, and nothing that a terminal obeys."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def printable(text: str) -> str:
    """`text` with all but newlines escaped that a terminal obeys or can't show."""
    return "".join(it if it.isprintable() or it == "\n" else ascii(it)[1:-1] for it in text)


def _largest(
    file: BinaryIO, tensor: Tensor, buffer: "np.ndarray[Any, np.dtype[np.uint8]]"
) -> float:
    size, magnitude, exponent = _DTYPES[tensor.dtype]
    file.seek(tensor.start)
    left, most = tensor.end - tensor.start, 0
    while left:
        part = buffer[: min(_CHUNK, left)]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            refuse("header_is_sound", f"{WEIGHTS} ends early")
        left -= len(part)
        bits = part.view(f"<u{size}")
        bits &= bits.dtype.type(magnitude)
        most = max(most, int(bits.max()))
    if most >= exponent:
        return math.inf
    if tensor.dtype == "BF16":
        return float(np.uint32(most << 16).view(np.float32))
    bits_of_one = np.uint32(most) if size == 4 else np.uint16(most)
    return float(bits_of_one.view(np.float32 if size == 4 else np.float16))


def _read_tensor(name: str, entry: object, data_start: int) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse("header_is_sound", f"{short(name)}: malformed entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        refuse(
            "dtype_is_floating",
            f"{short(name)} has dtype {short(dtype)}; served are {', '.join(_DTYPES)}",
        )
    if not isinstance(shape, list) or not isinstance(offsets, list):
        refuse("header_is_sound", f"{short(name)}: malformed shape or offsets")
    if len(shape) > _MAX_DIMENSIONS or len(offsets) != 2:
        refuse("header_is_sound", f"{short(name)}: malformed shape or offsets")
    for number in (*shape, *offsets):
        if type(number) is not int or not 0 <= number < _LARGEST_NUMBER:
            refuse("header_is_sound", f"{short(name)}: malformed shape or offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype][0]:
        refuse("header_is_sound", f"{short(name)}: the offsets do not fit the shape")
    return Tensor(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _require_regular(path: Path, follow_links: bool) -> None:
    try:
        mode = path.stat(follow_symlinks=follow_links).st_mode
    except OSError:
        if path.is_symlink():
            refuse("files_are_there", f"{path.name} is a link that leads to no file")
        refuse(
            "files_are_there",
            f"there is no {path.name}",
            hint=f"an adapter is a directory with {CONFIG} and {WEIGHTS}; pickles are not loaded",
        )
    if not stat.S_ISREG(mode):
        refuse("files_are_there", f"{path.name} is not a regular file")


def _read_regular(path: Path, limit: int, follow_links: bool) -> bytes:
    _require_regular(path, follow_links)
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        refuse("files_are_there", f"{path.name} is larger than {limit} bytes")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
