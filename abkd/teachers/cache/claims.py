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

from abkd.processes import is_gone, this_process

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
        return owner.get("pid") != os.getpid() and not is_gone(owner)
    return age < STALE_S


def claim(file: Path) -> bool:
    """Takes the claim, if no live process has it."""
    if file.exists():
        if is_claimed(file):
            return False
        file.unlink(missing_ok=True)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(this_process()))
    except FileExistsError:
        return False
    return True


def keep(file: Path) -> None:
    """Says that the claim's process is at work, if the claim is still there."""
    with suppress(FileNotFoundError):
        os.utime(file)
