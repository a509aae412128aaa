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

_MAX_CONFIG = 1 << 20
_MAX_HEADER = 16 << 20
_MAX_TENSORS = 100_000
_CONFIG_DEPTH = 16
_LARGEST_NUMBER = 1 << 48
_CHUNK = 1 << 18
"""Bytes; a chunk and its copy stay in a core's cache."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NO_BRACKET = re.compile(rb"[^\[\]{}]+")

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

    @cached_property
    def largest(self) -> dict[str, float]:
        """The largest magnitude in each tensor; infinite for one that holds any NaN or infinity.

        One pass: magnitudes of floats are in the order of their bits without the sign.
        """
        buffer = np.empty(_CHUNK, np.uint8)
        with (self.directory / WEIGHTS).open("rb") as file:
            return {name: _largest(file, it, buffer) for name, it in self.tensors.items()}


def open_candidate(directory: Path, *, base: ModelShape | None, max_rank: int) -> Candidate:
    """Raises AdapterRefused when a file is missing or broken."""
    config = read_json(directory / CONFIG, "config_is_json", _MAX_CONFIG, _CONFIG_DEPTH)
    return Candidate(directory, config, _read_header(directory), max_rank, base)


def read_json(path: Path, rule: str, largest: int, depth: int) -> dict[str, Any]:
    """The JSON object in the file. Raises AdapterRefused in the name of `rule`."""
    raw = _read_regular(path, largest)
    level = 0
    for bracket in _NO_BRACKET.sub(b"", _STRING.sub(b"", raw)):
        level += 1 if bracket in b"[{" else -1
        if level > depth:
            refuse(rule, f"{path.name} is nested more than {depth} deep")
    return _parse(raw, path.name, rule)


def refuse(rule: str, message: str, *, hint: str = "") -> NoReturn:
    raise AdapterRefused(rule, message, hint=hint)


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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


def _parse(raw: bytes, name: str, rule: str) -> dict[str, Any]:
    try:
        found = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        refuse(rule, f"{name} is not valid JSON: {error}")
    if not isinstance(found, dict):
        refuse(rule, f"{name} is not a JSON object")
    return found


def _read_header(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    _require_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            refuse("header_is_sound", f"{WEIGHTS}: a header of {length} bytes in {size}")
        raw = file.read(length)
    # How deep it may be follows from what each entry must be.
    header = _parse(raw, f"the header of {WEIGHTS}", "header_is_sound")
    if len(header) > _MAX_TENSORS:
        refuse("header_is_sound", f"{WEIGHTS}: {len(header)} tensors; at most {_MAX_TENSORS}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        refuse("header_is_sound", f"{WEIGHTS}: __metadata__ must map text to text")
    tensors = {name: _read_tensor(name, entry, 8 + length) for name, entry in header.items()}
    expected = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != expected:
            refuse("header_is_sound", f"{WEIGHTS}: {short(name)} does not begin at {expected}")
        expected = tensor.end
    if expected != size:
        refuse("header_is_sound", f"{WEIGHTS}: the tensors end at {expected}, the file at {size}")
    return tensors


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
    for number in (*shape, *offsets):
        if type(number) is not int or not 0 <= number < _LARGEST_NUMBER:
            refuse("header_is_sound", f"{short(name)}: malformed shape or offsets")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype][0]:
        refuse("header_is_sound", f"{short(name)}: the offsets do not fit the shape")
    return Tensor(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _require_regular(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        refuse(
            "files_are_there",
            f"there is no {path.name}",
            hint=f"an adapter is a directory with {CONFIG} and {WEIGHTS}; pickles are not loaded",
        )
    if not stat.S_ISREG(mode):
        refuse("files_are_there", f"{path.name} is not a regular file")


def _read_regular(path: Path, limit: int) -> bytes:
    _require_regular(path)
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
