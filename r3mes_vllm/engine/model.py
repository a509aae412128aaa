"""What the base model is: where it lies, under which name it is served, which modules it has."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r3mes_vllm.adapters.model_shape import ModelShape
from r3mes_vllm.errors import ConfigError, HubUnreachable, R3mesError

_PASSING = {408, 429}
"""HTTP statuses below 500 with which a hub asks for another try."""


def served_name(model: str) -> str:
    """`model` as given, or the last folder of a path: no path of this machine leaves the node."""
    return Path(model).resolve().name if Path(model).exists() else model


def shape_of(model: str, name: str, targets: Sequence[str] | None = None) -> ModelShape:
    """Of a hub name or a directory, as vLLM takes it; `targets` is its `--lora-target-modules`.

    Raises ConfigError if it is neither, HubUnreachable if that can't be told now.
    """
    try:
        shape = ModelShape.from_config(name, _config(model))
        return replace(shape, targets=frozenset(targets) if targets else None)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"--model {model}: its config.json is not that of a model: {error!r}",
            hint="give the directory that the model was published as",
        ) from error


def targets_of(options: Sequence[str]) -> list[str] | None:
    """What vLLM's `options` say of modules that take adapters; None where they say nothing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--lora-target-modules", "--lora_target_modules", nargs="*")
    given, _ = parser.parse_known_args(list(options))
    return given.lora_target_modules or None


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
        raise why_not(model, error) from error
    return dict(config.to_dict())


def why_not(model: str, error: Exception) -> R3mesError:
    """What vLLM's `error` with a hub's model is for an operator: a setting to correct, or a failure
    that passes."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
    )

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    of_hub = [it for it in chain if isinstance(it, HTTPError)]
    said = str(of_hub[0]).splitlines()[0] if of_hub and str(of_hub[0]) else ""
    status = next((it.response.status_code for it in chain if isinstance(it, HfHubHTTPError)), None)
    if of_hub and (status is None or status >= 500 or status in _PASSING):
        return HubUnreachable(
            f"--model {model}: the model hub does not answer now: {said}",
            hint="the same later, or give a local directory with the model",
        )
    if any(isinstance(it, GatedRepoError) for it in chain):
        return ConfigError(
            f"--model {model}: the model hub gives it to those only whom its owners let in",
            hint=f"ask for it at https://huggingface.co/{model}, then export HF_TOKEN=... of yours",
        )
    if status in (401, 403) or any(isinstance(it, RepositoryNotFoundError) for it in chain):
        return ConfigError(
            f"--model {model}: the model hub knows no such model, or hides it: {said}",
            hint="correct the name; for a private model export HF_TOKEN=... of yours",
        )
    return ConfigError(
        f"--model {model}: {error}", hint="give a model's hub name or a local directory"
    )
