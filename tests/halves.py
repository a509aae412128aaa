"""The whole suite in two halves side by side, since much of it waits.

    python -m tests.halves

What starts most engines shows its output while it runs; that of the rest comes at the end.
"""

import os
import shutil
import subprocess
import sys
import tempfile

_REST = [
    f"tests/{name}"
    for name in (
        # first what computes most, so that it does not meet the thousand streams of the other half
        *("test_killed_nodes.py", "adapters", "backend", "cli", "conformance", "docs", "doctor"),
        *("fuzz", "ipfs", "resilience"),
    )
]
_PYTEST = [sys.executable, "-m", "pytest"]
_FREE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""By itself vLLM binds each engine to the same core, so those of both halves would share it."""


def main() -> int:
    os.environ |= _FREE
    with tempfile.TemporaryFile() as output:
        rest = subprocess.Popen([*_PYTEST, *_REST], stdout=output, stderr=subprocess.STDOUT)
        try:
            engines = subprocess.call([*_PYTEST, *(f"--ignore={it}" for it in _REST)])
            failed = rest.wait()
        except KeyboardInterrupt:  # the terminal has told it too
            rest.wait()
            return 130
        finally:
            output.seek(0)
            shutil.copyfileobj(output, sys.stdout.buffer)
            sys.stdout.flush()
    return engines or failed


if __name__ == "__main__":
    sys.exit(main())
