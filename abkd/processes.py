"""Which process did something, and whether it is still there: what processes leave behind for each other."""

import os
import platform
from collections.abc import Mapping
from typing import Any

import psutil

_BOOT_S = 5.0  # a start is that of the boot plus ticks, and the boot's is told anew to every process


def this_process() -> dict[str, Any]:
    """`host`, `pid` and `started`, seconds since 1970, of this process."""
    return {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether what `this_process` said is of a process of this machine that has ended, or of none at all.

    Of another machine nothing is known: False.
    """
    pid, started = owner.get("pid"), owner.get("started")
    if owner.get("host") != platform.node():
        return False
    if not isinstance(pid, int) or pid < 1 or not isinstance(started, int | float):
        return True
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # killed, by a parent that does not look after it
            return True
        return abs(process.create_time() - started) > _BOOT_S
    except psutil.NoSuchProcess:
        return True
