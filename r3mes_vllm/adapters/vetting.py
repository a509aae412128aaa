"""Every safety rule an adapter must pass before the engine sees it; one function a rule.

One hostile adapter would otherwise hang the engine (a regex in `rank_pattern`), poison every
tenant's answers (NaN weights, or finite ones so large that they become it) or serve garbage (wrong
shapes).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3mes_vllm.adapters.features import features_are_served
from r3mes_vllm.adapters.files import (
    CONFIG,
    WEIGHTS,
    Candidate,
    open_candidate,
    read_json,
    refuse,
    short,
)
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.targets import (
    MAX_KEYS,
    MAX_MATCHES,
    is_named,
    layer_of,
    layers_of,
    listed,
    pattern,
    value_of,
)

__all__ = [
    "CONFIG",
    "HEADER_RULES",
    "LARGEST_RANK",
    "RULES",
    "RULE_NAMES",
    "WEIGHTS",
    "Adapter",
    "Rule",
    "vet",
]

LARGEST_RANK = 512
"""What vLLM serves at most."""

LARGEST_VALUE = 1e3
"""Of a single weight. Those of trained adapters are below 10."""

SMALLEST_ALPHA, LARGEST_ALPHA = 1e-3, 65536
"""Below, the change rounds to nothing in float16."""

LARGEST_SUM = 1 << 15
"""Of `inputs * max|A|`, what A makes of inputs of 1: beyond 65504 it is infinite in float16, and
times a zero in B not a number."""

LARGEST_CHANGE = 1e4
"""Of `scaling * rank * max|A| * max|B|`, which no element of the change to a weight exceeds.
Trained adapters stay below 1e3; past 1e14 a square in the model's norms is infinite, then NaN."""

_TOKENIZER = "tokenizer_config.json"
_MAX_TOKENIZER, _TOKENIZER_DEPTH = 4 << 20, 32
_MAX_NAME = 256
_LITERAL = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


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
    """Of what it meets here: another base model's name."""
    notes: tuple[str, ...] = ()
    """Of what came with it and is not used."""


def vet(
    directory: Path,
    *,
    base: ModelShape | None = None,
    max_rank: int = LARGEST_RANK,
    rules: Sequence[Rule] | None = None,
    follow_links: bool = False,
) -> Adapter:
    """Check the adapter in `directory` by every rule. Raises AdapterRefused naming the rule."""
    candidate = open_candidate(directory, base=base, max_rank=max_rank, follow_links=follow_links)
    for rule in RULES if rules is None else rules:
        rule(candidate)
    return facts_of(candidate)


def facts_of(it: Candidate) -> Adapter:
    """Of an adapter that passed every rule."""
    named = it.config.get("base_model_name_or_path")
    named = named if isinstance(named, str) else ""
    warnings = []
    if it.base and named and _last_part(named) != _last_part(it.base.name):
        warnings.append(f"trained on {short(named)}, served on {it.base.name!r}")
    if it.base and it.base.modules is None:
        warnings.append(f"which modules {it.base.name!r} has is not known: the engine must tell")
    return Adapter(
        rank=max(it.config["r"], *pattern(it.config, "rank_pattern").values(), 1),
        alpha=float(it.config["lora_alpha"]),
        modules=len(it.tensors) // 2,
        size=(it.directory / WEIGHTS).stat().st_size,
        base_model=named,
        warnings=tuple(warnings),
        notes=_notes(it),
    )


def kind_is_lora(it: Candidate) -> None:
    if it.config.get("peft_type") != "LORA":
        refuse("kind_is_lora", f"peft_type is {short(it.config.get('peft_type'))}, not 'LORA'")


def rank_is_sane(it: Candidate) -> None:
    ranks = {"r": it.config.get("r"), **pattern(it.config, "rank_pattern")}
    for name, rank in ranks.items():
        if type(rank) is not int or not 1 <= rank <= it.max_rank:
            refuse("rank_is_sane", f"{_key(name)} is {short(rank)}; it must be 1 to {it.max_rank}")


def alpha_is_sane(it: Candidate) -> None:
    alphas = {"lora_alpha": it.config.get("lora_alpha"), **pattern(it.config, "alpha_pattern")}
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
            refuse(
                "alpha_is_sane",
                f"{_key(name)} is {short(alpha)}; it must be {SMALLEST_ALPHA} to {LARGEST_ALPHA}",
            )


def names_are_literal(it: Candidate) -> None:
    """vLLM and PEFT take these names for regular expressions; one of them can run for ever."""
    targets = it.config.get("target_modules")
    if targets != "all-linear" and not (
        isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    ):
        refuse(
            "names_are_literal",
            f"target_modules is {short(targets)}",
            hint="list the modules by name, such as ['q_proj', 'v_proj']",
        )
    keys = [*pattern(it.config, "rank_pattern"), *pattern(it.config, "alpha_pattern")]
    asked = len(keys) * (len(it.tensors) // 2)
    if len(keys) > MAX_KEYS or asked > MAX_MATCHES:
        refuse(
            "names_are_literal",
            f"rank_pattern and alpha_pattern have {len(keys)} keys for {len(it.tensors) // 2} "
            f"modules; at most {MAX_KEYS}, and {MAX_MATCHES} times the two",
            hint="name what modules have in common, such as 'q_proj', once",
        )
    names = [] if targets == "all-linear" else list(targets)
    for field in ("exclude_modules", "layers_pattern"):
        names += listed(it.config, field)
    for name in (*keys, *names):
        if not _LITERAL.fullmatch(name):
            refuse("names_are_literal", f"{short(name)} is a pattern, not a module's name")


def tensors_are_lora(it: Candidate) -> None:
    """Only `base_model.model.MODULE.lora_A|B.weight`, A and B in pairs, two dimensions each."""
    if not it.tensors:
        refuse("tensors_are_lora", f"{WEIGHTS} holds no tensor")
    for name, tensor in it.tensors.items():
        match = _TENSOR.fullmatch(name)
        if not match or not _LITERAL.fullmatch(match["module"]) or len(name) > _MAX_NAME:
            refuse("tensors_are_lora", f"{short(name)} is not a LoRA weight")
        if match["module"].endswith((".experts", ".experts.base_layer")):
            refuse("tensors_are_lora", f"{name} is of fused experts")  # of other names in vLLM
        if len(tensor.shape) != 2:
            refuse("tensors_are_lora", f"{name} has shape {tensor.shape}")
        side = "B" if match["side"] == "A" else "A"
        other = f"base_model.model.{match['module']}.lora_{side}.weight"
        if other not in it.tensors:
            refuse("tensors_are_lora", f"{name} has no partner {other}")


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
            refuse(
                "shapes_fit",
                f"{module}: A is {a.shape} and B is {b.shape}, the configured rank is {rank}",
            )
        if it.base is None or it.base.modules is None:
            continue
        if module not in it.base.modules:
            refuse("shapes_fit", f"{it.base.name} has no module {short(module)}")
        if (a.shape[1], b.shape[0]) != it.base.modules[module]:
            refuse(
                "shapes_fit",
                f"{module} maps {a.shape[1]} to {b.shape[0]} values; that of {it.base.name} "
                f"maps {it.base.modules[module][0]} to {it.base.modules[module][1]}",
                hint="it was trained on another base model",
            )


def _module_of(tensor: str) -> str:
    return tensor.removeprefix("base_model.model.").partition(".lora_")[0]


def modules_are_served(it: Candidate) -> None:
    """Without a word vLLM leaves out the weights of modules that its operator left out.

    Log-probabilities of a prompt it computes with what `lm_head` has of some other request; on a
    CPU it ends then.
    """
    for module in map(_module_of, it.tensors):
        if module.rpartition(".")[2] == "lm_head":
            refuse("modules_are_served", "lm_head takes no adapters", hint="train it without that")
        if it.base and not it.base.takes(module):
            refuse(
                "modules_are_served",
                f"{short(module)} takes no adapters on this node",
                hint="its operator must add it to --lora-target-modules, or leave that out",
            )


def modules_are_targeted(it: Candidate) -> None:
    """PEFT ignores the weights of a module that the configuration leaves out; vLLM adds them."""
    targets = it.config["target_modules"]
    named = set(targets)
    excluded = set(listed(it.config, "exclude_modules"))
    patterns, layers = listed(it.config, "layers_pattern"), layers_of(it.config)
    for name in it.tensors:
        module = _module_of(name)
        if is_named(module, excluded):
            refuse("modules_are_targeted", f"{module} is one of exclude_modules")
        if targets == "all-linear" or module in named:
            continue
        if not is_named(module, named):
            refuse("modules_are_targeted", f"{module} is none of target_modules")
        if layers and layer_of(module, patterns) not in layers:
            refuse("modules_are_targeted", f"{module} is in none of layers_to_transform")


def numbers_are_finite(it: Candidate) -> None:
    """NaN or infinity in one adapter stays in the engine after it is unloaded."""
    for name, largest in it.largest.items():
        if largest == math.inf:
            refuse("numbers_are_finite", f"{name} holds a value that is not finite")


def numbers_are_bounded(it: Candidate) -> None:
    """Values far beyond what training gives become infinite within the model."""
    for name, largest in it.largest.items():
        if LARGEST_VALUE < largest < math.inf:
            refuse(
                "numbers_are_bounded",
                f"{name} holds a value of {largest:.3g}; at most {LARGEST_VALUE:g}",
            )
    for name, a in it.largest.items():
        match = _TENSOR.fullmatch(name)
        if not match or match["side"] == "B":
            continue
        module = match["module"]
        if LARGEST_SUM < it.tensors[name].shape[1] * a < math.inf:
            refuse(
                "numbers_are_bounded",
                f"{name} holds a value of {a:.3g} and takes {it.tensors[name].shape[1]} inputs; "
                f"the product may be at most {LARGEST_SUM}",
            )
        b = it.largest.get(f"base_model.model.{module}.lora_B.weight", 0.0)
        rank, scaling = _rank_of(it.config, module), _scaling(it.config, module)
        if LARGEST_VALUE < scaling * b < math.inf:  # vLLM keeps B times the scaling
            refuse(
                "numbers_are_bounded",
                f"{module}: lora_B by the scaling is {scaling * b:.3g}; at most {LARGEST_VALUE:g}",
            )
        change = scaling * rank * a * b
        if LARGEST_CHANGE < change < math.inf:
            refuse(
                "numbers_are_bounded",
                f"{module} may change a weight by {change:.3g}; at most {LARGEST_CHANGE:g}",
            )


def tokenizers_have_no_code(it: Candidate) -> None:
    """A tokenizer that names code has it run where somebody loads it."""
    for path in it.directory.glob("*.py"):
        refuse("tokenizers_have_no_code", f"{short(path.name)} is code")
    found = _tokenizer(it)
    if "auto_map" in found:
        refuse(
            "tokenizers_have_no_code",
            f"{_TOKENIZER} names code to load: {short(found['auto_map'])}",
        )


HEADER_RULES: tuple[Rule, ...] = (
    kind_is_lora,
    features_are_served,
    rank_is_sane,
    alpha_is_sane,
    names_are_literal,
    tensors_are_lora,
    shapes_fit,
    modules_are_served,
    modules_are_targeted,
)
"""What must be asked again of an adapter in the store: the base model may be another today."""

RULES: tuple[Rule, ...] = (
    *HEADER_RULES,
    tokenizers_have_no_code,
    numbers_are_finite,
    numbers_are_bounded,
)

RULE_NAMES = {it.__name__ for it in RULES} | {
    *("files_are_there", "config_is_json", "header_is_sound", "dtype_is_floating"),
    "engine",
}
"""All that an adapter may be refused by: rules, what is read before them, and the engine."""


def _key(name: str) -> str:
    return name if _LITERAL.fullmatch(name) and len(name) <= _MAX_NAME else short(name)


def _rank_of(config: dict[str, Any], module: str) -> int:
    return int(value_of(config, "rank_pattern", module) or config["r"])


def _scaling(config: dict[str, Any], module: str) -> float:
    """As vLLM and PEFT have it, with rank-stabilised LoRA (arXiv 2312.03732)."""
    alpha = value_of(config, "alpha_pattern", module) or config["lora_alpha"]
    rank = _rank_of(config, module)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _tokenizer(it: Candidate) -> dict[str, Any]:
    """Its configuration; empty where there is none."""
    path = it.directory / _TOKENIZER
    if not path.exists():
        return {}
    return read_json(
        *(path, "tokenizers_have_no_code", _MAX_TOKENIZER, _TOKENIZER_DEPTH),
        follow_links=it.follow_links,
    )


def _notes(it: Candidate) -> tuple[str, ...]:
    templates = [path.name for path in it.directory.glob("chat_template*")]
    if not templates and "chat_template" in _tokenizer(it):
        templates = [_TOKENIZER]
    if not templates:
        return ()
    return (
        f"its chat template ({short(templates[0])[1:-1]}) is ignored: the base model's is used",
    )


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
