"""What vLLM's processes get from the plugin."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.utils import get_captured_lora_counts

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


NOTICES = """
import select
import sys
import time
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from r3mes_vllm.engine import plugin
if sys.argv[2] == "ours":
    plugin.register()
context, kept = zmq.Context(), 0
writer, reader = (SpinCondition(it, context, f"ipc://{sys.argv[1]}") for it in (False, True))
time.sleep(1)
for _ in range(20):
    writer.notify()
    time.sleep(0.05)
    reader.record_read()
    kept += bool(select.select([reader.local_notify_socket.fd], [], [], 0)[0])
print("kept", kept)
"""


@pytest.mark.parametrize(("whose", "kept"), [("ours", 0), ("vllm", 20)])
def test_a_busy_reader_leaves_no_notices(whose: str, kept: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", NOTICES, str(tmp_path / "ipc"), whose]
    assert f"kept {kept}" in subprocess.check_output(command, text=True)


def test_vllms_kernels_count_the_base_model_as_one_more_adapter() -> None:
    """While this is so, a graph that was captured for the eight adapters of a batch leaves one out
    where the base model is beside them."""
    counts = get_captured_lora_counts(32, specialize=True)
    kernels = LoRAKernelMeta.make(32, 9, device="cpu", captured_lora_counts=counts)
    kernels.prepare_tensors(torch.arange(8))
    assert kernels.num_active_loras_cpu.item() == 8
    kernels.prepare_tensors(torch.arange(-1, 8))
    assert kernels.num_active_loras_cpu.item() == 16


SPECIALIZED = """
import sys
from vllm.engine.arg_utils import EngineArgs
from r3mes_vllm.engine import plugin
plugin.register()
flags = EngineArgs(sys.argv[1], enable_lora=True, specialize_active_lora=True, max_loras=8)
print("specialized", flags.create_engine_config().lora_config.specialize_active_lora)
"""


def test_no_graph_is_of_a_number_of_adapters(tiny_model: Path) -> None:
    command = [sys.executable, "-c", SPECIALIZED, str(tiny_model)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "specialized False" in ended.stdout
    assert "--specialize-active-lora is left out" in ended.stdout + ended.stderr


FREES = """
import sys
import time
import psutil
from r3mes_vllm.engine import plugin
plugin._TRIM_S = 0.2
if sys.argv[1] == "ours":
    plugin._give_back_what_is_free()
    plugin._give_back_what_is_free()  # a plugin may be loaded twice
    assert [it.name for it in plugin.threading.enumerate()].count(plugin._TRIM) == 1
resident = psutil.Process().memory_info
kept = [b"x" * 50_000 for _ in range(4000)]
before = resident().rss
del kept[::2]
time.sleep(1)
print("given back", before - resident().rss > 50_000_000)
"""


@pytest.mark.parametrize(("whose", "given_back"), [("ours", True), ("glibc's", False)])
def test_what_is_free_between_what_is_used_is_given_back(whose: str, given_back: bool) -> None:
    told = subprocess.check_output([sys.executable, "-c", FREES, whose], text=True)
    assert f"given back {given_back}" in told
