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


WAITS = """
import time
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from r3mes_vllm.engine import plugin
plugin.register()
reader = SpinCondition(True, zmq.Context(), "inproc://nobody", busy_loop_s=60)
until, before = time.monotonic() + 1, time.thread_time()
while time.monotonic() < until:
    reader.wait()
print(time.thread_time() - before)
"""


def test_a_worker_that_waits_leaves_its_core_to_others() -> None:
    """Another engine's worker may be bound to it: vLLM's own wait starves behind that one."""
    took = subprocess.check_output([sys.executable, "-c", WAITS], text=True)
    assert 0 < float(took.split()[-1]) < 0.5, "seconds of a core for a second's wait"
