"""Each rule refuses what it is there for, and nothing else does: with the rule out, it passes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from r3mes_vllm.adapters import vetting
from r3mes_vllm.adapters.files import open_candidate
from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.adapters.vetting import CONFIG, WEIGHTS, vet
from r3mes_vllm.errors import AdapterRefused
from tests import tiny

BASE = ModelShape(tiny.NAME, tiny.modules())
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in tiny.tensors(seed=0).items()}


def write(
    directory: Path, config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None
) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config or tiny.config()))
    save_file(tensors or weights(), directory / WEIGHTS)
    return directory


def test_a_good_adapter_passes(tmp_path: Path) -> None:
    found = vet(write(tmp_path / "a"), base=BASE)
    assert (found.rank, found.alpha, found.modules) == (8, 16.0, len(tiny.modules()))
    assert found.warnings == ()


def test_another_base_model_of_the_same_shape_is_a_warning(tmp_path: Path) -> None:
    config = tiny.config() | {"base_model_name_or_path": "someone/tuned-llama"}
    assert "someone/tuned-llama" in vet(write(tmp_path / "a", config), base=BASE).warnings[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_floating_types_pass(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in weights().items()}
    assert vet(write(tmp_path / "a", None, tensors), base=BASE).rank == 8


def mapping(library: object) -> dict[str, object]:
    """As PEFT writes it where `task_type` is None."""
    return {"base_model_class": "LlamaForCausalLM", "parent_library": library}


BAD_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("kind_is_lora", {"peft_type": "IA3"}),
    ("kind_is_lora", {"peft_type": None}),
    ("features_are_served", {"use_dora": True}),
    ("features_are_served", {"bias": "all"}),
    ("features_are_served", {"modules_to_save": ["lm_head"]}),
    ("features_are_served", {"layer_replication": [[0, 1]]}),
    ("features_are_served", {"auto_mapping": {"parent_library": "transformers"}}),
    ("features_are_served", {"auto_mapping": mapping("evil")}),
    ("features_are_served", {"auto_mapping": mapping("transformers_modules.evil.modeling")}),
    ("features_are_served", {"auto_mapping": mapping("transformers") | {"more": "evil"}}),
    ("features_are_served", {"auto_mapping": mapping(["transformers"])}),
    ("features_are_served", {"auto_mapping": "transformers"}),
    ("features_are_served", {"trainable_token_indices": [1]}),
    ("features_are_served", {"init_lora_weights": "pissa"}),
    ("features_are_served", {"use_rslora": "yes"}),
    ("features_are_served", {"lora_bias": True}),
    ("features_are_served", {"alora_invocation_tokens": [1]}),
    ("features_are_served", {"kasa_config": {"beta": 1e-4}}),
    ("features_are_served", {"arrow_config": {"top_k": 3}}),
    ("features_are_served", {"monteclora_config": {"num_samples": 8}}),
    ("kind_is_lora", {"peft_type": {"LORA": 1}}),
    ("rank_is_sane", {"rank_pattern": {"q_proj": "8"}}),
    ("names_are_literal", {"target_modules": [{"q_proj": 1}]}),
    ("names_are_literal", {"target_modules": {"q_proj": 1}}),
    ("names_are_literal", {"alpha_pattern": {"q_proj|k_proj": 8}}),
    ("config_is_json", {"runtime_config": [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]}),
    ("rank_is_sane", {"r": 0}),
    ("rank_is_sane", {"r": 4096}),
    ("rank_is_sane", {"r": True}),
    ("rank_is_sane", {"r": "8"}),
    ("rank_is_sane", {"rank_pattern": {"q_proj": -1}}),
    ("alpha_is_sane", {"lora_alpha": 0}),
    ("alpha_is_sane", {"lora_alpha": 10**400}),
    ("alpha_is_sane", {"lora_alpha": None}),
    ("alpha_is_sane", {"alpha_pattern": {"q_proj": 1e30}}),
    ("names_are_literal", {"target_modules": ".*"}),
    ("names_are_literal", {"target_modules": []}),
    ("names_are_literal", {"target_modules": ["(a|aa)+$"]}),
    ("names_are_literal", {"rank_pattern": {"(?:a|aa)+$x": 8}}),
    ("names_are_literal", {"rank_pattern": ["q_proj"]}),
    ("names_are_literal", {"rank_pattern": {f"a{i}": 8 for i in range(451)}}),
    (
        "names_are_literal",
        {
            "rank_pattern": {f"a{i}": 8 for i in range(300)},
            "alpha_pattern": {f"b{i}": 8 for i in range(300)},
        },
    ),
    ("names_are_literal", {"exclude_modules": ".*"}),
    ("names_are_literal", {"exclude_modules": ["(a|aa)+$"]}),
    ("names_are_literal", {"layers_pattern": "(a|aa)+$"}),
    ("shapes_fit", {"rank_pattern": {"q.proj": 4}}),  # it matches as a regular expression
    ("shapes_fit", {"rank_pattern": {"layers.0.self_attn.q.proj": 4}}),
    ("modules_are_targeted", {"target_modules": ["q_proj"]}),
    ("modules_are_targeted", {"target_modules": ["proj", "_proj"]}),
    ("modules_are_targeted", {"exclude_modules": ["q_proj"]}),
    ("modules_are_targeted", {"exclude_modules": ["layers.1.mlp.up_proj"]}),
    ("modules_are_targeted", {"layers_to_transform": [0]}),
    ("modules_are_targeted", {"layers_to_transform": 1}),
    ("modules_are_targeted", {"layers_to_transform": True}),
    ("modules_are_targeted", {"layers_to_transform": ["0"]}),
    ("modules_are_targeted", {"layers_to_transform": [0, 1], "layers_pattern": "h"}),
    ("modules_are_targeted", {"layers_to_transform": [0, 1], "target_modules": "all-linear"}),
    ("alpha_is_sane", {"lora_alpha": 1e-300}),
    ("shapes_fit", {"r": 16}),
]


@pytest.mark.parametrize(("rule", "change"), BAD_CONFIGS, ids=lambda value: str(value)[:40])
def test_a_bad_configuration_is_refused(tmp_path: Path, rule: str, change: dict[str, Any]) -> None:
    with pytest.raises(AdapterRefused) as caught:
        vet(write(tmp_path / "a", tiny.config() | change), base=BASE)
    assert caught.value.rule == rule


@pytest.mark.parametrize("feature", [None, "velora_config", "monteclora_config"])
def test_what_peft_itself_saves_is_served_or_named(tmp_path: Path, feature: str | None) -> None:
    """Without a `task_type`, as many scripts train."""
    import peft
    from peft.tuners.lora.config import MontecloraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    kinds = {"velora_config": peft.VeloraConfig, "monteclora_config": MontecloraConfig}
    more: dict[str, Any] = {feature: kinds[feature]()} if feature else {}
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=16, num_attention_heads=4, num_key_value_heads=2)
    )
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **more)
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path))
    assert "auto_mapping" in json.loads((tmp_path / CONFIG).read_text())
    if feature is None:
        assert vet(tmp_path, base=BASE).rank == 4
        return
    with pytest.raises(AdapterRefused, match=f"{feature} is set") as caught:
        vet(tmp_path, base=BASE)
    assert caught.value.rule == "features_are_served"


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def with_value(
    value: float, dtype: torch.dtype = torch.float32
) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        poisoned = tensors[Q + "A.weight"].to(dtype)
        poisoned[-1, -1] = value
        tensors[Q + "A.weight"] = poisoned

    return change


def scaled(to: float, of: str = "AB") -> Callable[[dict[str, Any]], None]:
    """Each value within its bound, and a product not; a side not named is zero."""

    def change(tensors: dict[str, Any]) -> None:
        for side in "AB":
            tensors[f"{Q}{side}.weight"] *= side in of
        for side in of:
            tensors[f"{Q}{side}.weight"][0, 0] = to

    return change


def moved(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def cut(tensors: dict[str, Any]) -> None:
    tensors[Q + "A.weight"] = tensors[Q + "A.weight"][:, :-1].contiguous()


BAD_TENSORS: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("tensors_are_lora", without(Q + "B.weight")),
    ("tensors_are_lora", moved(Q + "A.weight", Q + "A.default.weight")),
    ("tensors_are_lora", moved(Q + "A.weight", Q + "C.weight")),
    ("tensors_are_lora", moved("layers.0.self_attn.q_proj", "x" * 300 + ".q_proj")),
    ("shapes_fit", cut),
    ("shapes_fit", moved("layers.0", "layers.999")),
    ("shapes_fit", moved("0.self_attn.q_proj", "0.mlp.q_proj")),
    ("numbers_are_finite", with_value(float("nan"))),
    ("numbers_are_finite", with_value(float("-inf"))),
    ("numbers_are_finite", with_value(float("inf"), torch.float16)),
    ("numbers_are_finite", with_value(float("nan"), torch.bfloat16)),
    ("numbers_are_bounded", with_value(1e9)),
    ("numbers_are_bounded", with_value(-2000.0, torch.float16)),
    ("numbers_are_bounded", with_value(3e38, torch.bfloat16)),
    ("numbers_are_bounded", scaled(900.0)),
    ("numbers_are_bounded", scaled(900.0, of="B")),  # by the scaling of 2
    ("numbers_are_bounded", scaled(900.0, of="A")),  # the sum of 128 inputs
]


@pytest.mark.parametrize(("rule", "change"), BAD_TENSORS)
def test_bad_weights_are_refused_by_their_rule_alone(
    tmp_path: Path, rule: str, change: Callable[[dict[str, Any]], None]
) -> None:
    tensors = weights()
    change(tensors)
    directory = write(tmp_path / "a", None, tensors)
    with pytest.raises(AdapterRefused) as caught:
        vet(directory, base=BASE)
    assert caught.value.rule == rule
    others = [it for it in vetting.RULES if it.__name__ not in (rule, "shapes_fit")]
    vet(directory, base=BASE, rules=others)


LAYER = "model.layers.0.self_attn"
TARGETS = [
    *({"q_proj"}, {"qkv_proj"}, {"o_proj"}, {"up_proj", "v_proj"}, {"gate_up_proj", "down_proj"}),
    *({f"{LAYER}.qkv_proj"}, {f"{LAYER}.q_proj"}, {f"{LAYER}.o_proj"}),
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_modules_take_adapters_where_vllm_applies_them(targets: set[str]) -> None:
    from vllm.lora.utils import is_in_target_modules

    packed = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    base = dataclasses.replace(BASE, targets=frozenset(targets))
    for module in tiny.modules():
        path, _, last = module.rpartition(".")
        wrapped = next((it for it, parts in packed.items() if last in parts), last)
        applied = is_in_target_modules(f"{path}.{wrapped}", [*targets], packed)
        assert base.takes(module) == applied, module


def test_what_vllm_would_leave_out_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", tiny.config())
    only = frozenset({"q_proj", "o_proj"})
    with pytest.raises(AdapterRefused, match=r"mlp.*takes no adapters on this node") as caught:
        vet(directory, base=dataclasses.replace(BASE, targets=only))
    assert caught.value.rule == "modules_are_served"
    vet(directory, base=dataclasses.replace(BASE, targets=only | {"gate_proj", "down_proj"}))


@pytest.mark.parametrize("base", [None, ModelShape("a model of no known family", None)])
def test_the_head_takes_none(tmp_path: Path, base: ModelShape | None) -> None:
    """vLLM would end when somebody asks for a prompt's log-probabilities beside it."""
    tensors = weights()
    for side, shape in (("A", (8, 64)), ("B", (300, 8))):
        tensors[f"base_model.model.lm_head.lora_{side}.weight"] = torch.zeros(shape)
    names = sorted({it.rpartition(".")[2] for it in tiny.modules()} | {"lm_head"})
    directory = write(tmp_path / "a", {**tiny.config(), "target_modules": names}, tensors)
    with pytest.raises(AdapterRefused, match="lm_head takes no adapters") as caught:
        vet(directory, base=base)
    assert caught.value.rule == "modules_are_served"


@pytest.mark.parametrize(
    "change",
    [
        {"use_rslora": True},
        {"auto_mapping": mapping("transformers.models.llama.modeling_llama"), "task_type": None},
        {"auto_mapping": {}, "velora_config": {"num_groups": 64}},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.0.self_attn.q_proj": 64}},
        {"target_modules": "all-linear"},
        {"lora_dropout": 0.1, "fan_in_fan_out": True, "inference_mode": True, "revision": None},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers", "task_type": "CAUSAL_LM"},
        {"base_model_name_or_path": ["odd"], "unknown": {"a": [1, {"b": None}]}},
        {"rank_pattern": {"l_proj": 4, "elf_attn.q_proj": 4}},  # not at a dot
        {"rank_pattern": {"q.proj": 8, "q_proj": 4}},  # the first match counts
        {"target_modules": list(tiny.modules()), "layers_to_transform": [0]},
        {"exclude_modules": ["lm_head"], "layers_to_transform": []},
    ],
)
def test_what_changes_nothing_or_is_served_rightly_passes(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    assert vet(write(tmp_path / "a", tiny.config() | change), base=BASE).rank == 8


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenization_evil.py", "import os"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.T", null]}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)
def test_a_tokenizer_with_code_is_refused(tmp_path: Path, name: str, content: str) -> None:
    directory = write(tmp_path / "a")
    (directory / name).write_text(content)
    with pytest.raises(AdapterRefused) as caught:
        vet(directory, base=BASE)
    assert caught.value.rule == "tokenizers_have_no_code"


@pytest.mark.parametrize(
    ("name", "content"),
    [("chat_template.jinja", "{{x}}"), ("tokenizer_config.json", '{"chat_template": "{{x}}"}')],
)
def test_a_chat_template_is_ignored_with_a_note(tmp_path: Path, name: str, content: str) -> None:
    directory = write(tmp_path / "a")
    (directory / name).write_text(content)
    assert "is ignored" in vet(directory, base=BASE).notes[0]


def test_a_base_model_that_is_not_known_is_said(tmp_path: Path) -> None:
    odd = ModelShape.from_config("odd", {"model_type": "odd"})
    assert "not known" in vet(write(tmp_path / "a"), base=odd).warnings[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_the_largest_magnitude_is_found_wherever_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.zeros(3, 200_000, dtype=dtype)
    values[2, 123_456] = -7.5
    candidate = open_candidate(
        write(tmp_path / "a", None, {"x": values, "y": values * 0}), base=None, max_rank=8
    )
    assert candidate.largest == {"x": 7.5, "y": 0.0}


def test_nothing_that_a_terminal_obeys_is_quoted(tmp_path: Path) -> None:
    evil = "\x1b]0;pwned\x07\u202e\x9b2J"
    for field in ("peft_type", "bias", "base_model_name_or_path", "target_modules"):
        config = tiny.config() | {field: evil * 10_000}
        try:
            said = vet(write(tmp_path / "a", config), base=BASE).warnings[0]
        except AdapterRefused as error:
            said = str(error)
        assert said.isprintable()
        assert len(said) < 200
