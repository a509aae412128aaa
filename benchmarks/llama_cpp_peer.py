"""llama.cpp, one adapter at a time: the requests of each are one batch of as many sequences.

By its library, not by its server: that takes one adapter when it starts, and llama-cpp-python's
answers one request after the other.
"""

import ctypes
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import worker_told
from benchmarks.side_by_side import one_by_one

MISSING = "llama.cpp is not measured: pip install llama-cpp-python builds it (cmake and a compiler)"
_BATCH = 2048
"""Tokens that are given at once."""


def available() -> bool:
    return find_spec("llama_cpp") is not None


class Model:
    """The model in `folder` with `adapters`, of which one is used at a time."""

    def __init__(self, folder: Path, adapters: Sequence[Path], dtype: str, seats: int) -> None:
        import torch

        from benchmarks.gguf_files import write_adapter, write_model

        self._cpp: Any = import_module("llama_cpp")
        self._quiet: Any = self._cpp.llama_log_callback(lambda level, text, data: None)
        self._cpp.llama_log_set(self._quiet, None)
        kind = getattr(torch, dtype)
        with tempfile.TemporaryDirectory() as name:  # it reads all of them at once
            file = Path(name, "file.gguf")
            write_model(folder, file, kind)
            options = self._cpp.llama_model_default_params()
            options.use_mmap = False
            self._model = self._cpp.llama_model_load_from_file(str(file).encode(), options)
            self._adapters = []
            for adapter in adapters:
                file.unlink()
                write_adapter(adapter, folder, file, kind)
                self._adapters.append(
                    self._cpp.llama_adapter_lora_init(self._model, str(file).encode())
                )
        if not self._model or not all(self._adapters):
            raise RuntimeError("llama.cpp can't read what was written for it")
        self._words = self._cpp.llama_vocab_n_tokens(self._cpp.llama_model_get_vocab(self._model))
        context = self._cpp.llama_context_default_params()
        context.n_ctx = seats * 512
        context.n_batch = context.n_ubatch = _BATCH
        context.n_seq_max = seats
        context.kv_unified = True
        context.n_threads = context.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = self._cpp.llama_init_from_model(self._model, context)
        self._tokens = self._cpp.llama_batch_init(_BATCH, 0, 1)

    @property
    def vocabulary(self) -> int:
        return int(self._words)

    def answer(self, adapter: int, prompts: Any, tokens: int) -> list[list[int]]:
        """Greedy, `tokens` each."""
        pointers = (self._cpp.llama_adapter_lora_p_ctypes * 1)(self._adapters[adapter])
        self._cpp.llama_set_adapters_lora(self._context, pointers, 1, (ctypes.c_float * 1)(1))
        self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), True)
        rows = [[int(token) for token in prompt] for prompt in prompts]
        said: list[list[int]] = [[] for _ in rows]
        given = [
            (token, at, row, at == len(prompt) - 1)
            for row, prompt in enumerate(rows)
            for at, token in enumerate(prompt)
        ]
        for _ in range(tokens):
            for begin in range(0, len(given), _BATCH):
                self._decode(
                    given[begin : begin + _BATCH], lambda row, next_: said[row].append(next_)
                )
            given = [
                (answer[-1], len(rows[row]) + len(answer) - 1, row, True)
                for row, answer in enumerate(said)
            ]
        return said

    def _decode(
        self, given: Sequence[tuple[int, int, int, bool]], found: Callable[[int, int], None]
    ) -> None:
        batch = self._tokens
        batch.n_tokens = len(given)
        for number, (token, at, row, last) in enumerate(given):
            batch.token[number] = token
            batch.pos[number] = at
            batch.n_seq_id[number] = 1
            batch.seq_id[number][0] = row
            batch.logits[number] = last
        if status := self._cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: {status}")
        for number, (_, _, row, last) in enumerate(given):
            if last:
                logits = self._cpp.llama_get_logits_ith(self._context, number)
                found(row, int(np.ctypeslib.as_array(logits, (self._words,)).argmax()))


def work(given: dict[str, Any]) -> None:
    """As `cpu_lora.work`: answers with the seconds that a job takes."""
    folders = [Path(it) for it in given["adapters"]]
    model = Model(Path(given["model"]), folders, given["dtype"], given["flags"]["max_num_seqs"])
    one_by_one(given["seed"], model.vocabulary - 1, model.answer)


if __name__ == "__main__":
    work(json.loads(worker_told() or "{}"))
