"""What can be said of a command without running it."""

import os
import re
import subprocess
import sys
from functools import cache

from tests.docs.blocks import ROOT, Command

_OPTION = re.compile(r"--[a-z][a-z0-9-]*")
_OF_THE_REPOSITORY = re.compile(
    r"(configs|docs|requirements|tests)/\S+|compose\.yaml|Dockerfile\.\w+"
)


def check(command: Command) -> None:
    """Its options are ours or vLLM's, its files in the repository, its target in Makefile."""
    for words in command.of_ours():
        check_options(words)
    for word in command.words:
        if _OF_THE_REPOSITORY.fullmatch(word) and not (ROOT / word).exists():
            raise AssertionError(f"{command.block}: there is no {word}")
    if command.first == "make":
        _run("make", "-n", *command.words[1:])
    if command.first == "python":
        module = command.words[command.words.index("-m") + 1]
        if module.startswith("vllm."):
            _check_vllms(command.words[command.words.index(module) + 1 :])


def check_options(words: list[str]) -> None:
    """`words` come after `r3mes-vllm`."""
    ours, dashes, vllms = _parted(words)
    if dashes:
        _check_vllms(vllms)
    while ours and ours[0] == "--debug":
        ours = ours[1:]
    if not ours or ours[0].startswith("--"):
        path: tuple[str, ...] = ()
    else:
        path = tuple(ours[: 2 if ours[0] in ("adapter", "config") else 1])
    offered = _offered(path)
    for word in ours[len(path) :]:
        option = word.partition("=")[0]
        if _OPTION.fullmatch(option) and option not in offered:
            raise AssertionError(f"r3mes-vllm {' '.join(path)} has no option {option}")


def _parted(words: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in words:
        return words, False, []
    at = words.index("--")
    return words[:at], True, words[at + 1 :]


@cache
def _offered(path: tuple[str, ...]) -> set[str]:
    return set(_OPTION.findall(_run(sys.executable, "-m", "r3mes_vllm", *path, "--help")))


def _check_vllms(words: list[str]) -> None:
    unknown = {it.partition("=")[0] for it in words if _OPTION.match(it)} - _vllms_options()
    assert not unknown, f"vLLM has no option {', '.join(sorted(unknown))}"


@cache
def _vllms_options() -> set[str]:
    from r3mes_vllm.engine.launch import _parser

    return set(_parser()._option_string_actions)


def _run(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "250", "TERM": "dumb"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout
