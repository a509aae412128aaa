"""Coverage-guided fuzzing with Atheris.

    python -m tests.fuzz TARGET|all [--seconds N] [--corpus DIR]

`all` shares the seconds. The status is 1 when something was found; the input is then in the corpus
as `crash-...` and printed. What was learnt stays in the corpus.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

SLOWEST_S = 10
MEMORY_MB = 1024
PLANTED = "planted"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = options.corpus or Path(scratch)
        if options.target == "all":
            from tests.fuzz.targets import TARGETS

            each = max(1, options.seconds // len(TARGETS))
            return max([_apart(name, each, corpus) for name in TARGETS])
        fuzz(options.target, options.seconds, corpus)
    return 0


def _apart(name: str, seconds: int, corpus: Path) -> int:
    """A process each: a find ends it."""
    command = [sys.executable, "-m", "tests.fuzz", name, "--corpus", str(corpus)]
    run = subprocess.run(
        [*command, "--seconds", str(seconds)], capture_output=True, text=True, timeout=seconds + 120
    )
    runs = [line for line in run.stderr.splitlines() if line.startswith("Done")]
    print(f"{name}: {'found something' if run.returncode else ''.join(runs) or 'nothing found'}")
    if run.returncode:
        print(run.stderr[-3000:])
    return int(run.returncode != 0)


def fuzz(name: str, seconds: int, corpus: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["r3mes_vllm.ipfs", "r3mes_vllm.adapters"]):
        from tests.fuzz.targets import TARGETS, Target

    targets = {**TARGETS, PLANTED: Target(_planted, (b"....",))}
    target, folder = targets[name], corpus / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(target.examples):
        (folder / f"example-{number}").write_bytes(example)
    atheris.Setup(
        [
            *("fuzz", str(folder), f"-artifact_prefix={folder}/"),
            *(f"-max_total_time={seconds}", f"-timeout={SLOWEST_S}"),
            *(f"-rss_limit_mb={MEMORY_MB}", "-print_final_stats=0"),
        ],
        target.run if name != PLANTED else atheris.instrument_func(target.run),
    )
    atheris.Fuzz()


def _planted(data: bytes) -> None:
    """A fault to be found, one byte after the other."""
    if data[:1] == b"b" and data[1:2] == b"u" and data[2:3] == b"g":
        raise AssertionError("found")


if __name__ == "__main__":
    sys.exit(main())
