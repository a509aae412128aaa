"""Every safety rule an adapter must pass before the engine sees it; one function a rule.

Nothing is ever deserialised: the JSON configuration and the safetensors header are parsed, the
numbers are looked at as bits. One hostile adapter would otherwise hang the engine (a regex in
`rank_pattern`), poison every tenant's answers (NaN weights) or serve garbage (wrong shapes).
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.errors import AdapterRefused

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

LARGEST_RANK = 512
"""What vLLM serves at most."""

_MAX_CONFIG = 1 << 20
_MAX_HEADER = 16 << 20
_CHUNK = 1 << 22
_LITERAL = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# name → (bytes an element, mask of the exponent bits: all set means infinite or not a number)
_DTYPES = {
    "F32": (4, np.uint32(0x7F800000)),
    "F16": (2, np.uint16(0x7C00)),
    "BF16": (2, np.uint16(0x7F80)),
}

# Features of PEFT that change what an adapter means and that vLLM does not implement or ignores.
_REFUSED_FEATURES = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "auto_mapping",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "megatron_config",
    "target_parameters",
)

_HARMLESS_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    end: int


@dataclass(frozen=True)
class Candidate:
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    max_rank: int
    base: ModelShape | None


Rule = Callable[[Candidate], None]


@dataclass(frozen=True)
class Adapter:
    """What is known of an adapter that passed."""

    rank: int
    alpha: float
    modules: int
    size: int
    """Bytes of the weights file."""
    base_model: str
    warnings: tuple[str, ...] = ()


def vet(
    directory: Path,
    *,
    base: ModelShape | None = None,
    max_rank: int = LARGEST_RANK,
    rules: Sequence[Rule] | None = None,
) -> Adapter:
    """Check the adapter in `directory` by every rule. Raises AdapterRefused naming the rule."""
    config = _read_config(directory)
    candidate = Candidate(directory, config, _read_header(directory), max_rank, base)
    for rule in rules or RULES:
        rule(candidate)
    named = str(config.get("base_model_name_or_path") or "")
    warnings: tuple[str, ...] = ()
    if base and named and _last_part(named) != _last_part(base.name):
        warnings = (f"trained on {named!r}, served on {base.name!r}",)
    return Adapter(
        rank=max(config["r"], *_pattern(config, "rank_pattern").values(), 1),
        alpha=float(config["lora_alpha"]),
        modules=len(candidate.tensors) // 2,
        size=(directory / WEIGHTS).stat().st_size,
        base_model=named,
        warnings=warnings,
    )


def kind_is_lora(it: Candidate) -> None:
    if it.config.get("peft_type") != "LORA":
        _refuse("kind_is_lora", f"peft_type is {it.config.get('peft_type')!r}, not 'LORA'")


def features_are_served(it: Candidate) -> None:
    for feature in _REFUSED_FEATURES:
        if it.config.get(feature):
            _refuse("features_are_served", f"{feature} is set: {_short(it.config[feature])}")
    if it.config.get("bias", "none") != "none":
        _refuse("features_are_served", f"bias is {_short(it.config['bias'])}, not 'none'")
    init = it.config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        # PiSSA and its like change the base model's weights on loading
        _refuse(
            "features_are_served",
            f"init_lora_weights is {_short(init)}",
            hint="convert it to a plain LoRA with PEFT and publish that",
        )


def rank_is_sane(it: Candidate) -> None:
    ranks = {"r": it.config.get("r"), **_pattern(it.config, "rank_pattern")}
    for name, rank in ranks.items():
        if type(rank) is not int or not 1 <= rank <= it.max_rank:
            _refuse("rank_is_sane", f"{name} is {_short(rank)}; it must be 1 to {it.max_rank}")


def alpha_is_sane(it: Candidate) -> None:
    alphas = {"lora_alpha": it.config.get("lora_alpha"), **_pattern(it.config, "alpha_pattern")}
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not 0 < alpha <= 65536:
            _refuse("alpha_is_sane", f"{name} is {_short(alpha)}; it must be over 0 to 65536")


def names_are_literal(it: Candidate) -> None:
    """vLLM and PEFT take these names for regular expressions; one of them can run for ever."""
    targets = it.config.get("target_modules")
    if targets != "all-linear" and not (
        isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    ):
        _refuse(
            "names_are_literal",
            f"target_modules is {_short(targets)}",
            hint="list the modules by name, such as ['q_proj', 'v_proj']",
        )
    names = [] if targets == "all-linear" else list(targets)
    for field in ("rank_pattern", "alpha_pattern"):
        names += _pattern(it.config, field)
    for name in names:
        if not _LITERAL.fullmatch(name):
            _refuse("names_are_literal", f"{_short(name)} is a pattern, not a module's name")


def tensors_are_lora(it: Candidate) -> None:
    """Only `base_model.model.MODULE.lora_A|B.weight`, A and B in pairs, two dimensions each."""
    if not it.tensors:
        _refuse("tensors_are_lora", f"{WEIGHTS} holds no tensor")
    for name, tensor in it.tensors.items():
        match = _TENSOR.fullmatch(name)
        if not match or not _LITERAL.fullmatch(match["module"]):
            _refuse("tensors_are_lora", f"{_short(name)} is not a LoRA weight")
        if len(tensor.shape) != 2:
            _refuse("tensors_are_lora", f"{name} has shape {tensor.shape}")
        side = "B" if match["side"] == "A" else "A"
        other = f"base_model.model.{match['module']}.lora_{side}.weight"
        if other not in it.tensors:
            _refuse("tensors_are_lora", f"{name} has no partner {other}")


def shapes_fit(it: Candidate) -> None:
    """A is (rank, inputs), B is (outputs, rank), of a module that the base model has."""
    for name, a in it.tensors.items():
        match = _TENSOR.fullmatch(name)
        if not match or match["side"] == "B":
            continue
        module = match["module"]
        b = it.tensors[f"base_model.model.{module}.lora_B.weight"]
        rank = _rank_of(it.config, module)
        if a.shape[0] != rank or b.shape[1] != rank:
            _refuse(
                "shapes_fit",
                f"{module}: A is {a.shape} and B is {b.shape}, the configured rank is {rank}",
            )
        if it.base is None or it.base.modules is None:
            continue
        if module not in it.base.modules:
            _refuse("shapes_fit", f"{it.base.name} has no module {_short(module)}")
        if (a.shape[1], b.shape[0]) != it.base.modules[module]:
            _refuse(
                "shapes_fit",
                f"{module} maps {a.shape[1]} to {b.shape[0]} values; that of {it.base.name} "
                f"maps {it.base.modules[module][0]} to {it.base.modules[module][1]}",
                hint="it was trained on another base model",
            )


def numbers_are_finite(it: Candidate) -> None:
    """NaN or infinity in one adapter stays in the engine after it is unloaded."""
    with (it.directory / WEIGHTS).open("rb") as file:
        for name, tensor in it.tensors.items():
            size, mask = _DTYPES[tensor.dtype]
            file.seek(tensor.start)
            left = tensor.end - tensor.start
            while left:
                data = file.read(min(_CHUNK, left))
                if not data:
                    _refuse("numbers_are_finite", f"{name} ends early")
                left -= len(data)
                bits = np.frombuffer(data, dtype=f"<u{size}")
                if np.any((bits & mask) == mask):
                    _refuse("numbers_are_finite", f"{name} holds a value that is not finite")


HEADER_RULES: tuple[Rule, ...] = (
    kind_is_lora,
    features_are_served,
    rank_is_sane,
    alpha_is_sane,
    names_are_literal,
    tensors_are_lora,
    shapes_fit,
)
"""What must be asked again of an adapter in the store: the base model may be another today."""

RULES: tuple[Rule, ...] = (*HEADER_RULES, numbers_are_finite)


def _read_config(directory: Path) -> dict[str, Any]:
    data = _read_regular(directory / CONFIG, _MAX_CONFIG)
    try:
        config = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse("config_is_json", f"{CONFIG} is not valid JSON: {error}")
    if not isinstance(config, dict):
        _refuse("config_is_json", f"{CONFIG} is not a JSON object")
    return config


def _read_header(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    _require_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            _refuse("header_is_sound", f"{WEIGHTS}: a header of {length} bytes in {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse("header_is_sound", f"{WEIGHTS}: the header is not valid JSON: {error}")
    if not isinstance(header, dict):
        _refuse("header_is_sound", f"{WEIGHTS}: the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse("header_is_sound", f"{WEIGHTS}: __metadata__ must map text to text")
    tensors = {name: _read_tensor(name, entry, 8 + length) for name, entry in header.items()}
    expected = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != expected:
            _refuse("header_is_sound", f"{WEIGHTS}: {_short(name)} does not begin at {expected}")
        expected = tensor.end
    if expected != size:
        _refuse("header_is_sound", f"{WEIGHTS}: the tensors end at {expected}, the file at {size}")
    return tensors


def _read_tensor(name: str, entry: object, data_start: int) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse("header_is_sound", f"{_short(name)}: malformed entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _refuse(
            "dtype_is_floating",
            f"{_short(name)} has dtype {_short(dtype)}; served are {', '.join(_DTYPES)}",
        )
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(number) is int and 0 <= number < 1 << 48 for number in numbers
        ):
            _refuse("header_is_sound", f"{_short(name)}: malformed shape or offsets")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype][0]:
        _refuse("header_is_sound", f"{_short(name)}: the offsets do not fit the shape")
    return Tensor(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _require_regular(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        _refuse(
            "files_are_there",
            f"there is no {path.name}",
            hint=f"an adapter is a directory with {CONFIG} and {WEIGHTS}; pickles are not loaded",
        )
    if not stat.S_ISREG(mode):
        _refuse("files_are_there", f"{path.name} is not a regular file")


def _read_regular(path: Path, limit: int) -> bytes:
    _require_regular(path)
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        _refuse("files_are_there", f"{path.name} is larger than {limit} bytes")
    return data


def _pattern(config: dict[str, Any], field: str) -> dict[str, Any]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        _refuse("names_are_literal", f"{field} is {_short(pattern)}, not an object")
    return pattern


def _rank_of(config: dict[str, Any], module: str) -> int:
    for key, rank in _pattern(config, "rank_pattern").items():
        if module == key or module.endswith(f".{key}"):
            return int(rank)
    return int(config["r"])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse(rule: str, message: str, *, hint: str = "") -> NoReturn:
    raise AdapterRefused(rule, message, hint=hint)
