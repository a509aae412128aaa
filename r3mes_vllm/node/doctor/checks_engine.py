"""What the engine will need: a model with its tokenizer, memory, a GPU that fits the build."""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from r3mes_vllm.engine.base_model import CONVERTED_BYTES, find
from r3mes_vllm.errors import ConfigError
from r3mes_vllm.node.doctor.checks_local import is_ours
from r3mes_vllm.node.doctor.findings import Finding
from r3mes_vllm.settings import Settings, parse_bytes

_GIB = 1 << 30
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12")
_ASKING_S = 5.0
_NUMA = "libnuma.so.1"
_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
_COMPILER = f"sudo apt-get install -y gcc libc6-dev {_PYTHON}-dev"

_DRIVER = (
    "install driver 580 or later: https://www.nvidia.com/drivers  # a container has its host's: "
    "rent another"
)


async def model(settings: Settings) -> Finding:
    """Without the base model there is nothing to serve adapters on."""
    if settings.model is None:
        try:
            found = find(settings.cache_dir)
        except ConfigError as error:
            return Finding("fail", str(error), error.hint)
        later = "" if found else ", to be converted at the first start"
        return Finding("ok", f"the embedded one{later}")
    folder = model_folder(settings)
    if folder is None:
        fix = f"hf download {settings.model}"
        return Finding("warn", f"{settings.model} is not here: the first start fetches it", fix)
    for wanted, present in {
        "config.json": (folder / "config.json").is_file(),
        "weights": any(True for _ in _weights(folder)),
    }.items():
        if not present:
            fix = "r3mes-vllm doctor --model DIRECTORY  # the one that the model was published as"
            return Finding("fail", f"{folder} has no {wanted}", fix)
    return Finding("ok", f"{settings.model}, {_bytes(folder) / _GIB:.1f} GiB")


async def tokenizer(settings: Settings) -> Finding:
    """An adapter brings none: the base model's is used."""
    folder = model_folder(settings)
    if folder is None:
        return Finding("skip", "the model is not here yet")
    if any((folder / name).is_file() for name in _TOKENIZERS):
        return Finding("ok", f"in {folder}")
    fix = f"hf download {settings.model} --include 'tokenizer*'"
    return Finding("fail", f"{folder} has none of {', '.join(_TOKENIZERS)}", fix)


def memory(settings: Settings) -> Finding:
    """Weights and KV cache must fit, and adapters beside them."""
    folder, gpus = model_folder(settings), [] if _build() == "cpu" else gpus_here()
    weights = _bytes(folder) if folder else CONVERTED_BYTES if settings.model is None else None
    if weights is None:
        return Finding("skip", "the size of the model is not known yet")
    if gpus:
        free = sum(it.free for it in gpus)
        if weights > free:
            fix = "nvidia-smi  # what else runs there; or a smaller --model"
            said = f"{weights / _GIB:.1f} GiB of weights, {free / _GIB:.1f} free on the GPU"
            return _too_little(settings, said, fix)
        return Finding("ok", f"{free / _GIB:.1f} GiB of GPU free, {weights / _GIB:.1f} for weights")
    kv_cache = parse_bytes(f"{os.environ.get('VLLM_CPU_KVCACHE_SPACE', '4')}G")
    needed, free = weights + kv_cache, psutil.virtual_memory().available
    said = f"{free / _GIB:.1f} GiB free, {needed / _GIB:.1f} for weights and KV cache"
    if needed > free:
        fix = "export VLLM_CPU_KVCACHE_SPACE=1  # GiB; or a smaller --model"
        return _too_little(settings, said, fix)
    return Finding("ok", said)


def _too_little(settings: Settings, said: str, fix: str) -> Finding:
    """Unless it is the node itself that holds it."""
    if is_ours(settings):
        return Finding("ok", f"this node is running; beside it {said}")
    return Finding("fail", said, fix)


def gpu(settings: Settings) -> Finding:
    """The CUDA build wants a driver that is new enough; on a GPU the CPU build is a waste, and it
    links to a library of the system's."""
    gpus, build = gpus_here(), _build()
    if build is None:
        return Finding("fail", "vLLM is not installed", "make setup")
    if build == "cpu":
        if gpus:
            said = f"the CPU build is installed, and there is {gpus[0].name}"
            return Finding("warn", said, "make setup")
        try:
            ctypes.CDLL(_NUMA)
        except OSError:
            said = f"the CPU build of vLLM can't start without {_NUMA}"
            return Finding("fail", said, "sudo apt-get install -y libnuma1")
        return Finding("ok", "the CPU build, and no GPU")
    if not gpus:
        return Finding("fail", "the CUDA build is installed, and no driver answers", _DRIVER)
    wanted, offered = _cuda_runtime(), gpus[0].cuda
    if wanted and offered and offered < wanted:
        said = f"driver {gpus[0].driver} is for CUDA {offered}, the build for {wanted}"
        return Finding("fail", said, _DRIVER)
    return Finding("ok", f"{', '.join(it.name for it in gpus)}, driver {gpus[0].driver}")


def compiler(settings: Settings) -> Finding:
    """On a GPU Triton compiles C for this Python while the engine starts. It takes `CC`, then gcc,
    then clang, as its `runtime/build.py` has it."""
    if _build() != "cuda" or not gpus_here():
        return Finding("skip", "nothing is compiled without a GPU")
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        return Finding("fail", "there is no C compiler, and Triton calls one", _COMPILER)
    headers = sysconfig.get_path("include")
    try:
        done = subprocess.run(  # noqa: S603
            [*shlex.split(found), f"-I{headers}", "-fsyntax-only", "-x", "c", "-"],
            input="#include <stdlib.h>\n#include <Python.h>\n",
            capture_output=True,
            text=True,
            timeout=_ASKING_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("fail", f"{found} does not run: {error}", _COMPILER)
    if done.returncode:
        lacking = "Python.h" if "Python.h" in done.stderr else "the C library's headers"
        return Finding("fail", f"{found} finds not {lacking}, which Triton needs", _COMPILER)
    return Finding("ok", f"{found}, with Python.h in {headers}")


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    cuda: int | None
    """Major version that the driver is for."""
    free: int
    """Bytes."""


def gpus_here() -> list[Gpu]:
    """As `nvidia-smi` tells; none without it."""
    asked = "--query-gpu=name,driver_version,memory.free"
    told = _smi(asked, "--format=csv,noheader,nounits")
    major = [line for line in _smi("-q").splitlines() if line.startswith("CUDA Version")]
    cuda = major[0].partition(":")[2].strip().split(".")[0] if major else ""
    found = []
    for line in told.splitlines():
        name, driver, free = (part.strip() for part in line.rsplit(",", 2))
        mebibytes = int(free) if free.isdigit() else 0
        found.append(Gpu(name, driver, int(cuda) if cuda.isdigit() else None, mebibytes << 20))
    return found


def model_folder(settings: Settings) -> Path | None:
    """Where the model's files are on this machine; None if they are not here."""
    if settings.model is None:
        try:
            return find(settings.cache_dir)
        except ConfigError:
            return None
    if Path(settings.model).is_dir():
        return Path(settings.model)
    from huggingface_hub import try_to_load_from_cache  # takes half a second

    try:
        config = try_to_load_from_cache(settings.model, "config.json")
    except ValueError:  # no name of a hub's
        return None
    return Path(config).parent if isinstance(config, str) else None


def _build() -> str | None:
    for name, build in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return build
    return None


def _cuda_runtime() -> int | None:
    for name in _RUNTIMES:
        try:
            return int(metadata.version(name).split(".")[0])
        except (metadata.PackageNotFoundError, ValueError):
            continue
    return None


def _smi(*arguments: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            ["nvidia-smi", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=_ASKING_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _weights(folder: Path) -> Iterator[Path]:
    for pattern in _WEIGHTS:
        yield from folder.glob(pattern)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _weights(folder))
