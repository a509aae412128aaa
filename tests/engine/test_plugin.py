"""What vLLM's processes get from the plugin."""

import subprocess
import sys

import pytest
import torch

ASKED = """
import ctypes
from r3mes_vllm.engine import plugin
plugin.register()
libc, granted = ctypes.CDLL(None), ctypes.c_uint64()
assert not libc.syscall(158, 0x1022, ctypes.byref(granted))  # arch_prctl(ARCH_GET_XCOMP_PERM)
assert granted.value & 1 << 18, hex(granted.value)  # XFEATURE_XTILEDATA
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a processor with AMX")
def test_amx_is_asked_for() -> None:
    subprocess.run([sys.executable, "-c", ASKED], check=True)
