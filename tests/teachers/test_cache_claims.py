import json
import multiprocessing
import os
import subprocess
import sys
import time

import psutil
import pytest

from abkd.teachers.cache.claims import STALE_S, claim, is_claimed, keep

OLD = STALE_S + 10


def aged(file, seconds):
    moment = time.time() - seconds
    os.utime(file, (moment, moment))
    return file


def written(file, **owner):
    file.write_text(json.dumps(owner))
    return file


@pytest.fixture
def file(tmp_path):
    return tmp_path / "shard-00000.claim"


@pytest.fixture
def other():
    """A live process: (host, pid, started), as a claim names it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(process.pid).create_time()
    yield {"host": os.uname().nodename, "pid": process.pid, "started": started}
    process.communicate(b"\n")


def test_a_claim_is_taken_once_and_is_its_own_processs(file, other):
    assert not is_claimed(file) and claim(file)
    assert not is_claimed(file)  # by another
    owner = json.loads(file.read_text())
    assert owner["pid"] == os.getpid() and owner["started"] == psutil.Process().create_time()
    written(file, **other)
    assert is_claimed(file) and not claim(file)
    assert json.loads(file.read_text()) == other


def test_a_live_process_of_this_machine_may_be_slow(file, other):
    aged(written(file, **other), OLD)
    assert is_claimed(file) and not claim(file)


@pytest.mark.parametrize(
    "change", [{"pid": 2**22 + 5}, {"started": 1.0}, {"pid": None}, {"pid": "12"}, {"pid": -3}, {"started": None}]
)
def test_a_process_that_is_gone_or_another_of_its_number_holds_nothing(file, other, change):
    written(file, **(other | change))
    assert not is_claimed(file) and claim(file)


def test_a_process_that_was_killed_and_not_waited_for_holds_nothing(file):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {"host": os.uname().nodename, "pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    written(file, **owner)
    assert is_claimed(file)
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not is_claimed(file) and claim(file)
    process.communicate()


def test_another_machine_counts_while_it_touches_its_claim(file):
    written(file, host="elsewhere", pid=1, started=1.0)
    assert is_claimed(file) and not claim(file)
    aged(file, OLD)
    assert not is_claimed(file)
    keep(file)
    assert is_claimed(file) and not claim(file)
    assert claim(aged(file, OLD))


@pytest.mark.parametrize("text", ["", '{"host": ', "[]", "5", "null", '"x"'])
def test_a_torn_claim_counts_for_a_while(file, text):
    file.write_text(text)
    assert is_claimed(file) and not claim(file)
    assert not is_claimed(aged(file, OLD)) and claim(file)


def test_a_claim_that_is_gone_cannot_be_kept(file):
    keep(file)
    assert not file.exists()


def _claim(file, start, results):
    start.wait()
    results.put(claim(file))
    start.wait()


def test_of_several_at_once_one_gets_it(file):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_claim, args=(file, start, results)) for _ in range(4)]
    for process in processes:
        process.start()
    got = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(got) == [False, False, False, True]
