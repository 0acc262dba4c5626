"""Who is writing which shard: marks that save work twice done, and nothing else goes by them.

A claim is a file that its process touches now and then. One whose process is gone, or on another machine has not
touched it for `STALE_S`, counts for nothing.
"""

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import psutil

STALE_S = 120.0


def is_claimed(file: Path) -> bool:
    """Whether a live process other than this one holds the claim."""
    try:
        age = time.time() - file.stat().st_mtime
        owner = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        owner = None
    if not isinstance(owner, dict):  # it is being written, or torn
        return age < STALE_S
    if owner.get("host") == platform.node():
        return owner.get("pid") != os.getpid() and _is_alive(owner.get("pid"), owner.get("started"))
    return age < STALE_S


def claim(file: Path) -> bool:
    """Takes the claim, if no live process has it."""
    if file.exists():
        if is_claimed(file):
            return False
        file.unlink(missing_ok=True)
    try:
        with file.open("x", encoding="utf-8") as stream:
            started = psutil.Process().create_time()
            stream.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "started": started}))
    except FileExistsError:
        return False
    return True


def keep(file: Path) -> None:
    """Says that the claim's process is at work, if the claim is still there."""
    with suppress(FileNotFoundError):
        os.utime(file)


def _is_alive(pid: object, started: object) -> bool:
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        process = psutil.Process(pid)
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
