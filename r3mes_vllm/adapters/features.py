"""Which features of PEFT an adapter's configuration may set."""

from typing import Any

from r3mes_vllm.adapters.files import Candidate, refuse, short

# They change what an adapter means, and vLLM does not implement or ignores them.
_REFUSED_FEATURES = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "megatron_config",
    "target_parameters",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
)

_HARMLESS_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_VELORA = ".lora_velora_embed"


def features_are_served(it: Candidate) -> None:
    for feature in _REFUSED_FEATURES:
        if it.config.get(feature):
            refuse("features_are_served", f"{feature} is set: {short(it.config[feature])}")
    if it.config.get("velora_config") and any(name.endswith(_VELORA) for name in it.tensors):
        refuse(
            "features_are_served",
            f"velora_config is set, and tensors of its training are among the weights ({_VELORA})",
            hint="without both it is a plain LoRA that answers the same: publish that",
        )
    if not _is_plain_mapping(it.config.get("auto_mapping")):
        refuse(
            "features_are_served",
            f"auto_mapping is {short(it.config['auto_mapping'])}: PEFT imports what it names, and "
            "that must be of transformers",
            hint="remove auto_mapping from the configuration, or save the adapter with "
            "task_type='CAUSAL_LM'",
        )
    if it.config.get("bias", "none") != "none":
        refuse("features_are_served", f"bias is {short(it.config['bias'])}, not 'none'")
    if type(it.config.get("use_rslora", False)) not in (bool, type(None)):
        refuse("features_are_served", f"use_rslora is {short(it.config['use_rslora'])}")
    init = it.config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        # PiSSA and its like change the base model's weights on loading
        refuse(
            "features_are_served",
            f"init_lora_weights is {short(init)}",
            hint="convert it to a plain LoRA with PEFT and publish that",
        )


def _is_plain_mapping(mapping: Any) -> bool:
    """Whether it is absent, or what PEFT writes where `task_type` was not given: the class of the
    base model, which changes nothing."""
    if not mapping:
        return True
    if not isinstance(mapping, dict) or set(mapping) != {"base_model_class", "parent_library"}:
        return False
    if not all(isinstance(value, str) for value in mapping.values()):
        return False
    return str(mapping["parent_library"]).split(".")[0] == "transformers"
