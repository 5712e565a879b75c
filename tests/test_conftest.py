"""The tests themselves: a hang is a failed test, no GPU is seen, and signals do what they do by
default."""

import os
import re
import shutil
import signal
import subprocess
import sys

from helpers import ROOT

TESTS = """
import collections, itertools, multiprocessing, os, signal, threading
import pytest

def loop():  # in C: no handler of Python's is called
    collections.deque(itertools.repeat(0), maxlen=0)

@pytest.fixture
def stuck():
    threading.Event().wait()

def test_fixture(stuck):
    pass

def test_child():
    process = multiprocessing.get_context("fork").Process(target=loop)
    process.start()
    process.join()

def test_world():
    for process in multiprocessing.active_children():  # test_child's, which ends by itself
        process.join()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)

def test_loop():
    loop()
"""


def test_hangs_fail_and_children_get_neither_a_gpu_nor_ignored_signals(tmp_path):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    # Nothing here computes, and the true torch takes seconds to import.
    (tmp_path / "torch.py").write_text("def set_num_threads(number):\n    pass\n")
    words = f"-m pytest -v -c {ROOT}/pytest.ini -o faulthandler_timeout=3 -p no:cacheprovider"
    words += " -p no:xdist --color=no --rootdir"
    changes = {"TEST_DEADLINE": "1", "CUDA_VISIBLE_DEVICES": "0", "GPU_TESTS": ""}
    changes |= {"PYTEST_ADDOPTS": "", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *words.split(), tmp_path, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | changes,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    results = dict(re.findall(r"(test_\w+) (PASSED|FAILED|ERROR)", done.stdout))
    expected = {"test_fixture": "ERROR", "test_child": "FAILED", "test_world": "PASSED"}
    assert results == expected, done.stdout
    assert done.returncode == 1 and "Timeout" in done.stderr and "in test_loop" in done.stderr
