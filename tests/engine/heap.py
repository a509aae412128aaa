"""What glibc has given out, for the scripts of tests that watch it."""

import ctypes


class _Found(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]


def used() -> int:
    """Bytes, of this process."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _Found
    found: int = libc.mallinfo2().h
    return found
