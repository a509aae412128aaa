"""Which modules a configuration names, as PEFT and vLLM read it."""

from collections.abc import Sequence
from typing import Any

from r3mes_vllm.adapters.files import refuse, short

MAX_KEYS, MAX_MATCHES = 450, 1 << 17
"""Of `rank_pattern` and `alpha_pattern`: vLLM matches each key with each module by a regular
expression, in the loop that serves everybody: in 8 µs, and in 300 µs once there are over 500."""


def pattern(config: dict[str, Any], field: str) -> dict[str, Any]:
    found = config.get(field) or {}
    if not isinstance(found, dict):
        refuse("names_are_literal", f"{field} is {short(found)}, not an object")
    if len(found) > MAX_KEYS:
        refuse("names_are_literal", f"{field} has {len(found)} keys; at most {MAX_KEYS}")
    return found


def listed(config: dict[str, Any], field: str) -> list[str]:
    names = config.get(field) or []
    if field == "layers_pattern" and isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        refuse(
            "names_are_literal",
            f"{field} is {short(names)}",
            hint="list the modules by name, such as ['q_proj', 'v_proj']",
        )
    return names


def value_of(config: dict[str, Any], field: str, module: str) -> Any:
    """What a pattern says of `module`, the first match as in PEFT; None if it says nothing.

    A key is the end of a name, and `.` in it any character: vLLM and PEFT match it as a regular
    expression.
    """
    for key, value in pattern(config, field).items():
        start = len(module) - len(key)
        if (start == 0 or (start > 0 and module[start - 1] == ".")) and all(
            mine in (".", its) for mine, its in zip(key, module[start:], strict=True)
        ):
            return value
    return None


def is_named(module: str, names: set[str]) -> bool:
    """By its whole name or the end of it, as in PEFT."""
    at = len(module)
    while names and at >= 0:
        at = module.rfind(".", 0, at)
        if module[at + 1 :] in names:
            return True
    return False


def layers_of(config: dict[str, Any]) -> set[int]:
    layers = config.get("layers_to_transform")
    listed = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if any(type(layer) is not int for layer in listed):
        refuse("modules_are_targeted", f"layers_to_transform is {short(layers)}")
    if listed and config["target_modules"] == "all-linear":
        refuse("modules_are_targeted", "layers_to_transform does not go with all-linear")
    return set(listed)


def layer_of(module: str, patterns: Sequence[str]) -> int | None:
    """The number after the name of a list of layers, the first in `module`, as in PEFT."""
    parts = module.split(".")
    for pattern in patterns or (None,):
        for at in range(1 if pattern else 2, len(parts) - 1):
            if parts[at].isdigit() and pattern in (None, parts[at - 1]):
                return int(parts[at])
    return None
