import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
tqdm.monitor_interval = 0  # some tests fork, and what another thread holds at that moment stays locked in the child
# Nor must a child collect what other tests left behind: onnxruntime waits there for ever for threads that only the parent has.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)


@pytest.fixture(scope="session")
def golden():
    """What WeNet computes from a small experiment with random weights: (weights, expectations)."""
    folder = ROOT.parent / "shared" / "golden" / "u2pp_conformer"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: parity with WeNet's own output is not checked")
    return tuple(torch.load(folder / name, weights_only=True) for name in ("final.pt", "expect.pt"))


def distance(a, b):
    """Levenshtein, by its definition."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]
