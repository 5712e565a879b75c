"""torture.py kills a training a few times here; `make torture` is the long version."""

import re

from tools import torture


def test_killed_runs_end_as_unbroken_ones_and_their_checkpoints_always_load(capsys):
    assert torture.main(["--kills", "4", "--seed", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    kills, loaded, damaged, runs, differ = (
        int(re.search(rf"(\d+) {word}", last)[1])
        for word in ("kills", "checkpoints loaded", "did not", "runs", "of them not")
    )
    assert kills >= 4 and loaded > 0 and runs > 0 and damaged == differ == 0
