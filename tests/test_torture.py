"""torture.py kills a training a few times here; `make torture` is the long version."""

import os
import re
import signal

from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

from tools import torture


def test_killed_runs_end_as_unbroken_ones_and_their_checkpoints_always_load(capsys, monkeypatch):
    # test_train.py kills the other kinds, at places that it chooses.
    monkeypatch.setattr(torture, "KINDS", torture.KINDS[:1])
    monkeypatch.setattr(tqdm, "_lock", TqdmDefaultWriteLock())  # as in a program of its own
    monkeypatch.setattr(torture, "SMALL", f"{torture.SMALL} --max_epochs 2")
    # By this seed the first kill is late in the run, behind several checkpoints, and the second
    # comes while one is saved.
    assert torture.main(["--kills", "2", "--seed", "323"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    kills, loaded, damaged, runs, differ = (
        int(re.search(rf"(\d+) {word}", last)[1])
        for word in ("kills", "checkpoints loaded", "did not", "runs", "of them not")
    )
    assert kills >= 2 and loaded > 0 and runs > 0 and damaged == differ == 0
    if not (child := os.fork()):  # A process that is killed keeps no lock from the others.
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert tqdm.get_lock().acquire(blocking=False)
    tqdm.get_lock().release()
