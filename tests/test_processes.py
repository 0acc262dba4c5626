"""A process is known again, and a start that is told a little otherwise is the same one."""

import os
import platform

import pytest

from abkd.processes import is_gone, this_process


def test_this_process_is_there():
    assert this_process()["pid"] == os.getpid() and not is_gone(this_process())


@pytest.mark.parametrize("seconds, gone", [(-3, False), (3, False), (-60, True), (60, True)])
def test_the_boots_time_may_be_told_anew(seconds, gone):
    owner = this_process()
    assert is_gone(owner | {"started": owner["started"] + seconds}) == gone


@pytest.mark.parametrize("change", [{"pid": None}, {"pid": "12"}, {"pid": -3}, {"started": None}])
def test_what_is_no_process_is_gone(change):
    assert is_gone(this_process() | change)


@pytest.mark.parametrize("host", ["elsewhere", None])
def test_of_another_machine_nothing_is_known(host):
    assert platform.node() != host and not is_gone(this_process() | {"host": host, "pid": 2**22 + 5})
