"""What the base model is: where it lies, under which name it is served, which modules it has."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.errors import ConfigError


def served_name(model: str) -> str:
    """`model` as given, or the last folder of a path: no path of this machine leaves the node."""
    return Path(model).resolve().name if Path(model).exists() else model


def shape_of(model: str, name: str, targets: Sequence[str] | None = None) -> ModelShape:
    """Of a hub name or a directory, as vLLM takes it; `targets` is its `--lora-target-modules`.

    Raises ConfigError if it is neither.
    """
    try:
        shape = ModelShape.from_config(name, _config(model))
        return replace(shape, targets=frozenset(targets) if targets else None)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"--model {model}: its config.json is not that of a model: {error!r}",
            hint="give the directory that the model was published as",
        ) from error


def _config(model: str) -> dict[str, Any]:
    directory = Path(model)
    if directory.is_dir():
        path = directory / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"--model {model}: can't read {path}: {error}") from error
        if not isinstance(config, dict):
            raise TypeError("a JSON object is wanted")
        return config
    # Only for a hub's model: importing vLLM takes seconds, a mistake should be said before.
    from vllm.transformers_utils.config import get_config

    try:
        config = get_config(model, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"--model {model}: {error}", hint="give a model's hub name or a local directory"
        ) from error
    return dict(config.to_dict())
