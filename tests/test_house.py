"""The house rules that a reader relies on."""

import pytest

from helpers import FILES, ROOT, imported

FLOORS = (
    ("cli", "bootstrap", "containers", "fused", "frames"),
    ("files", "graphs", "kernels", "muon"),
    ("checkpoint",),
    ("transforms", "sampler", "tokenizer", "presets", "decode"),
    ("conformer", "joint"),
    ("words", "audio", "context", "recovery", "wfst"),
    ("datamodule", "model", "ngram", "sources"),
    ("stream",),
    ("prepare", "train", "score", "transcribe"),
    ("lm", "onnx_graphs", "speak", "traffic", "workloads", "report_heard", "report_plots"),
    ("demo", "onnx_checks"),
    ("align", "compare", "live", "web", "wenet_import", "bench"),
    ("ablate", "export", "torture", "gpu_work", "report_page"),
    ("parity", "gpu_check", "report"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    """The floors of tools/ are the upper ones, so nothing at the top imports tools/."""
    assert path.stem in FLOOR or path.stem == "__init__", f"{path.name} has no place in FLOORS"
    for name in imported(path):
        assert FLOOR.get(name, -1) < FLOOR[path.stem], f"{path.name} imports {name}"


LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities"}
# The network, its decoding and the features are of use without the trainer, too.
WITHOUT_LIGHTNING = (
    *("conformer", "frames", "presets", "kernels", "fused", "graphs", "muon"),
    *("decode", "joint", "context", "ngram", "stream", "wfst", "words"),
    *("transforms", "sampler", "audio", "containers", "tokenizer"),
    *("cli", "files", "checkpoint"),
)


@pytest.mark.parametrize("name", WITHOUT_LIGHTNING)
def test_lightning_stays_out_of_the_ground_floor(name):
    assert not LIGHTNING & set(imported(ROOT / f"{name}.py"))


def test_no_file_shadows_a_package():
    assert not {"lightning", "datasets", "onnx", "tokenizers", "types", "torch", "tqdm"} & {
        path.stem for path in FILES
    }
