"""Huge memory pages, and memory that stays, for processes that train.

A training step on the CPU walks through gigabytes of activations. In pages of 4 KB, handed back and fetched anew in every step,
translating addresses took a seventh to a half of it on a virtual machine (docs/results.md, Speed). glibc can do better from 2.35 on, but only
for a process that is told so before it starts: hence a restart, once, before anything is imported.
"""

import os
import platform
import sys
from pathlib import Path

TRANSPARENT_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES = ":".join((
    "glibc.malloc.hugetlb=1",  # ask for huge pages (madvise) wherever the heap grows
    "glibc.malloc.mmap_max=0",  # large blocks come from the heap, too,
    "glibc.malloc.trim_threshold=1099511627776",  # which is not given back between steps
    "glibc.malloc.top_pad=268435456",
    # Every aligned block leaves crumbs beside it. Kept in lists of small pieces they never join it again when it is freed, no
    # block is then found twice, and after 760 steps glibc's search for room took 39 % of a training on texts of changing length.
    "glibc.malloc.tcache_count=0",
    "glibc.malloc.mxfast=0",
))  # fmt: skip


def restart_with_large_pages() -> None:
    """Replace this process by itself with glibc's TUNABLES, where they help; returns where they do not, or are set already.

    REMASK_LARGE_PAGES=0 keeps a process as it is, so does a GLIBC_TUNABLES of the user's own.
    """
    if is_wanted():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment())


def environment() -> dict[str, str]:
    """What a process that computes for long is started with: this one's environment, with TUNABLES where they help."""
    return dict(os.environ) | ({"GLIBC_TUNABLES": TUNABLES} if is_wanted() else {})


def is_wanted() -> bool:
    """Whether a restart would change anything on this machine."""
    if "GLIBC_TUNABLES" in os.environ or os.environ.get("REMASK_LARGE_PAGES") == "0":
        return False
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return False
    try:
        return "[never]" not in TRANSPARENT_HUGE_PAGES.read_text()
    except OSError:
        return False
