import gc
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

if not os.environ.get(
    "GPU_TESTS"
):  # what is tested is what a CPU does, much of it in forked processes, where CUDA cannot work
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        ""  # before torch looks for one, and for all child processes
    )
for name in list(os.environ):  # of a cluster's job, in which each process would wait for others
    if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_")) or name.endswith(
        ("RANK", "WORLD_SIZE")
    ):
        del os.environ[name]
CACHE = tempfile.TemporaryDirectory()  # a home may be read-only or absent
os.environ["HF_HOME"] = CACHE.name

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = float(
    os.environ.get("TEST_DEADLINE", 600)
)  # seconds for a test with its fixtures; see also pytest.ini
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
tqdm.monitor_interval = (
    0  # some tests fork, and what another thread holds at that moment stays locked in the child
)
# Nor must a child collect what other tests left behind: onnxruntime waits there for ever for threads that only the parent has.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)
# Who starts the tests under nohup or in a script's background ignores them, and child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
ends = time.monotonic() + DEADLINE  # of the test that runs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """A test that hangs fails. (One that hangs within C ends its process, by pytest.ini: for xdist a failed test too.)"""
    global ends
    ends = time.monotonic() + DEADLINE
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not done after {DEADLINE:g} s"))
    signal.setitimer(
        signal.ITIMER_REAL, DEADLINE, 30
    )  # and again, should it hang in its cleaning up
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def end_with_the_test():
    """Of forked processes. Those of other programs end with the subprocess.run that waits for them."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(ends - time.monotonic(), 0.01))


os.register_at_fork(after_in_child=end_with_the_test)


@pytest.fixture(scope="session")
def golden():
    """What WeNet computes from a small experiment with random weights: (weights, expectations)."""
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
