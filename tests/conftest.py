"""Surroundings for all tests: no GPU, no cluster, one thread, and a deadline for each test.

GPU_TESTS=1 shows the tests the GPU. TEST_DEADLINE=SECONDS sets the deadline.
"""

import gc
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

# The tests are about a CPU, and many of them fork, where CUDA cannot work. The variable is set
# before torch looks for a GPU, and child processes inherit it.
if not os.environ.get("GPU_TESTS"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# With the variables of a cluster's job each process would wait for others.
for name in list(os.environ):
    if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_")):
        del os.environ[name]
    elif name.endswith(("RANK", "WORLD_SIZE")):
        del os.environ[name]
# Tests run side by side, and threads of one that wait for others would take the cores of another.
# This variable holds for numpy, and for the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# The home directory may be read-only or absent.
CACHE = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = CACHE.name

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
# A test with its fixtures has so many seconds; see also pytest.ini.
DEADLINE = float(os.environ.get("TEST_DEADLINE", 600))
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
# Some tests fork, and a lock that tqdm's thread holds meanwhile would stay locked in the child.
tqdm.monitor_interval = 0
# The forks would share tqdm's own lock, and one that is killed with it would keep it for ever.
tqdm.set_lock(threading.RLock())
# A child must not collect the garbage of other tests: onnxruntime's would wait for ever for threads
# that only the parent has.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)
# No test pulls the plug, and fsync waits for a disk that other tests keep busy.
os.fsync = lambda file: os.fstat(file) and None
# The test that runs must be done at this time.
ends = time.monotonic() + DEADLINE


def hear_signals():
    """Gives signals Python's own handlers.

    Under nohup or in a script's background signals are ignored, and child processes inherit that. A
    training leaves handlers of its own to the tests that come after.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


hear_signals()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Lets a test that hangs fail. A test that hangs within C ends its process, by pytest.ini, and
    xdist counts that as a failed test, too."""
    global ends
    ends = time.monotonic() + DEADLINE
    hear_signals()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not done after {DEADLINE:g} s"))
    # The signal comes again every 30 s, in case the test hangs while it cleans up.
    signal.setitimer(signal.ITIMER_REAL, DEADLINE, 30)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def end_with_the_test():
    """Makes a forked process end when its test must be done. Other programs end with the
    subprocess.run that waits for them."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(ends - time.monotonic(), 0.01))


os.register_at_fork(after_in_child=end_with_the_test)


@pytest.fixture(scope="session")
def golden():
    """(the random weights of a small experiment, what WeNet computes with them)."""
    folder = ROOT.parent / "shared" / "golden" / "u2pp_conformer"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: parity with WeNet's own output is not checked")
    return tuple(torch.load(folder / name, weights_only=True) for name in ("final.pt", "expect.pt"))


# Fixtures of several files import within. Most runs of one file need none of them, and Lightning
# takes seconds to import; test_conftest.py takes this file elsewhere, without its neighbours.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight training rows (four batches) and two dev rows of noise."""
    from helpers_train import make_data

    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of data and of a checkpoint, as helpers_model.write_world says."""
    from helpers_model import write_world

    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def pipe():
    """A function that makes bytes the standard input, as a pipe or as a file."""
    saved = os.dup(0)

    def feed(content):
        out, into = os.pipe()
        assert os.write(into, content) == len(content) < 65536  # fits the pipe's buffer
        os.close(into)
        os.dup2(out, 0)
        os.close(out)

    yield feed
    os.dup2(saved, 0)
    os.close(saved)
