"""Large blocks of memory on a CPU.

glibc gives every freed block above 32 MiB back to the system, and takes a new one for the next
tensor: each of its pages is then faulted in and cleared again, which costs more than most layers do
with them. Feature maps are often that large.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 30
_MAX_INT = (1 << 31) - 1


def keep_large_blocks() -> bool:
    """Let the C library keep freed blocks of up to 1 GiB for the next tensor.

    It concerns the whole process, which then holds on to the most memory that it has needed; so a
    program decides on it, not a library. The command-line tools call it when they run on a CPU.

    Returns:
        Whether there is a C library that can be told (glibc).
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE) and mallopt(_M_TRIM_THRESHOLD, _MAX_INT))
