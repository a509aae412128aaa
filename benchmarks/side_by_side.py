"""Peers measured in one run: each in a process of its own, one works while the others wait.

The parent asks, `with Worker(__name__, told, ...) as worker: ready(worker); worker.ask(job)`; the
worker is the same module started with `--worker`, and answers: `tell(None)` when it is ready, then
each of `jobs()` with a `tell`. Where there is a GPU all start at once, else one after the other.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import platformdirs

from r3mes_vllm.engine import environment

_ANSWER = "answer "
_ENDS_S = 10
SETTLES_S = 1.5
"""Before another side is asked: for a second after their last message vLLM's workers look for the
next one all the time, on a core that the next side would lack."""


class Worker:
    """`plugins` is vLLM's choice: "r3mes" for ours, "none" for stock; `others` are added to the
    environment."""

    _asked: ClassVar["Worker | None"] = None
    """The last one of all."""

    def __init__(self, module: str, told: Any, plugins: str, **others: str) -> None:
        name = sys.modules[module].__spec__
        self._process = subprocess.Popen(
            [sys.executable, "-m", name.name if name else module, "--worker", json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment.of_kernels(os.environ)
            | {
                "VLLM_PLUGINS": plugins,
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            | others,
            start_new_session=True,  # Ctrl-C is the parent's: it ends them all
        )
        self._ready = False

    def __enter__(self) -> "Worker":
        if not on_gpu():
            self.ready()
        return self

    def ready(self) -> None:
        if not self._ready:
            self._answer()
            self._ready = True

    def __exit__(self, kind: object, *_: object) -> None:
        assert self._process.stdin
        with suppress(OSError):
            self._process.stdin.close()
        if kind is None:
            self._process.wait()
        for number in (signal.SIGTERM, signal.SIGKILL):  # what is left of it
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDS_S)

    def ask(self, job: Any) -> Any:
        assert self._process.stdin
        if Worker._asked not in (None, self):
            time.sleep(SETTLES_S)
        Worker._asked = self
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
        raise RuntimeError(f"the engine ended with {self._process.wait()}")


def ready(*workers: Worker) -> None:
    """Wait until all have started."""
    for worker in workers:
        worker.ready()


def on_gpu() -> bool:
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def jobs() -> Iterator[Any]:
    """What the parent asks, until it has no more."""
    for line in iter(sys.stdin.readline, ""):
        yield json.loads(line)


def tell(answer: Any) -> None:
    print(f"{_ANSWER}{json.dumps(answer)}", flush=True)


def one_by_one(seed: int, most: int, answer: Callable[[int, Any, int], object]) -> None:
    """The jobs of a peer that has one adapter at a time: its seconds for each.

    `answer` is called with an adapter's number, the prompts of all its requests, as rows of tokens
    below `most`, and the tokens wanted of each.
    """
    tell(None)
    for job in jobs():
        rng = np.random.default_rng(seed)
        prompts = rng.integers(min(1000, most // 2), most, (job["requests"], job["prompt"]))
        began = time.perf_counter()
        for number in range(min(job["adapters"], job["requests"])):
            answer(number, prompts[number :: job["adapters"]], job["answer"])
        tell(time.perf_counter() - began)


def base_model() -> str:
    from r3mes_vllm.engine.base_model import embedded_base_model

    return str(embedded_base_model(Path(platformdirs.user_cache_dir("r3mes-vllm"))))


def processor() -> str:
    """With what decides how fast it multiplies."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    found = dict(line.partition(":")[::2] for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in found.items()}
    flags = set(fields.get("flags", "").split()) & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    name = fields.get("model name", platform.machine())
    return f"{name} ({', '.join(sorted(flags))})" if flags else name
