"""The house rules that a reader relies on."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (("cli", "containers"), ("files",), ("hub",), ("transforms", "sampler", "tokenizer", "conformer", "decode", "demo"),
          ("stream", "words", "audio", "context"), ("datamodule", "model", "recovery", "sources"), ("onnx_graphs",), ("onnx_checks",),
          ("prepare", "train", "score", "transcribe", "align", "compare", "wenet_import", "bench"), ("export", "torture"),
          ("parity",))
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.glob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    assert path.stem in FLOOR, f"{path.name} has no place in FLOORS"
    for name in imported(path):
        assert FLOOR.get(name, -1) < FLOOR[path.stem], f"{path.name} imports {name}"


@pytest.mark.parametrize("name", ["transforms", "sampler", "tokenizer", "conformer", "stream", "decode", "words", "audio"])
def test_lightning_stays_out_of_the_ground_floor(name):
    assert not {"pytorch_lightning", "lightning", "lightning_fabric"} & set(imported(ROOT / f"{name}.py"))


def test_no_file_shadows_a_package():
    assert not {"lightning", "datasets", "onnx", "tokenizers", "types", "torch", "tqdm"} & {path.stem for path in FILES}
