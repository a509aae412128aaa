"""`r3mes-vllm ARGUMENTS` where no name but those in /etc/hosts resolves:

    python -m tests.without_names ARGUMENTS

The C library itself is told so, in a mount namespace of this process, which takes root: vLLM's
server asks no Python for a name. No packet leaves the machine. Exit status 77 where that can't be.
"""

import ctypes
import os
import sys
import tempfile

_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 1 << 18
_NAMES = "/etc/nsswitch.conf"
CANNOT = 77


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write("passwd: files\ngroup: files\nhosts: files\n")
        file.flush()
        failed = (
            libc.unshare(_CLONE_NEWNS)
            or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
            or libc.mount(file.name.encode(), _NAMES.encode(), None, _MS_BIND, None)
        )
    if failed:
        print(f"no mount namespace: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(CANNOT)
    os.execv(sys.executable, [sys.executable, "-m", "r3mes_vllm", *sys.argv[1:]])


if __name__ == "__main__":
    main()
