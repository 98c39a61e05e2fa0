"""Memory that a process of the simulator gives back as it is freed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_... of glibc's malloc.h
LARGE = 2**24  # bytes


def give_back() -> None:
    """Has glibc take blocks of LARGE bytes from the system one by one, and give each back.

    It would do so with 128 KiB, but comes up to 32 MiB as such blocks are freed. From then on they lie in its
    heap, where others keep them apart: a round of 100,000 class rows held 1.2 to 1.6 times its own numbers.
    Of what is free at the heap's end it keeps half as much for the next step; with the first set alone it
    would keep 128 KiB, and each step's memory would go and come page by page.
    For programs alone: it is a setting of the whole process. Nothing happens without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGE)
        mallopt(_TRIM_THRESHOLD, LARGE // 2)
