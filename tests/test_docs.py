"""README.md and docs/ name only what exists: flags, links, files, make targets, functions."""

import operator
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch

from helpers import FILES, ROOT, module

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMANDS = [path.stem for path in FILES if "\ndef main(" in path.read_text()]
# Flags of torchrun and srun, and the flag that README's own example adds.
OTHERS = {"--nnodes", "--nproc_per_node", "--node_rank", "--master_addr", "--master_port"}
OTHERS |= {"--kill-on-bad-exit", "--max_noise", "--help"}
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
DATA = ("json", "onnx", "parquet", "safetensors", "yaml")  # endings of files that are data
CALL = re.compile(r"(?:tools\.(\w+)|\b(\w+)\.py) ([^#|]*)")  # a command and its arguments
FILE = re.compile(r"[\w./]+\.(?:py|md|txt|toml|ini)\b")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page) -> str:
    """The page without its fenced code."""
    return FENCED.sub("", page.read_text())


def code(page) -> list[str]:
    """Every line of fenced code, continued lines joined, and every `span` of code in the prose."""
    fenced = "".join(FENCED.findall(page.read_text())).replace("\\\n", " ")
    return [*fenced.splitlines(), *SPAN.findall(prose(page))]


@pytest.fixture
def flags(capsys):
    """A function from the name of a command to the flags that its --help lists."""

    def of(name: str) -> set[str]:
        with pytest.raises(SystemExit):
            module(name).main(["--help"])
        return set(FLAG.findall(capsys.readouterr().out.split("\n\n")[0]))

    return of


def test_every_flag_exists(flags):
    known = {name: flags(name) for name in COMMANDS}
    anywhere = set.union(OTHERS, *known.values())
    for page in PAGES:
        unknown = set(FLAG.findall(page.read_text())) - anywhere
        assert not unknown, f"{page.name}: no command has {unknown}"
        for line in code(page):
            for tool, command, rest in CALL.findall(line):
                unknown = set(FLAG.findall(rest)) - known.get(tool or command, set()) - OTHERS
                assert not unknown, f"{page.name}: {tool or command} has no {unknown}: {line}"


@each_page
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z0-9_]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(page):
        for target in re.findall(r"(?:^|time )make ([a-z0-9_]+)", line):
            assert target in targets, f"{page.name}: make {target}"


def test_make_lists_every_target_and_variable():
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z0-9_]+):(.*)", text, re.MULTILINE)
    assert [name for name, rest in targets if " ## " not in rest] == []
    recipe = text[text.index("\nhelp:") : text.index("\n.venv/installed:")]
    variables = re.findall(r"^([A-Z0-9_]+) \?=", text, re.MULTILINE)
    assert [name for name in variables if f"$({name})" not in recipe] == []


def test_make_an4_speaks_the_words_only_for_a_start_that_needs_them(tmp_path):
    """What make would run where data/an4 is there, and nothing else."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", ".venv/installed", "data/an4/tokenizer.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def plan(*words):
        make = ["make", "-n", "-C", str(tmp_path), *words]
        env = {"PATH": os.environ["PATH"]}  # without the flags of a make that runs this
        done = subprocess.run(make, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    status, said = plan("an4", "SOURCE=my speech")
    assert status == 0 and '--texts "my speech/train/metadata.csv"' in said
    status, said = plan("an4")
    assert status and "SOURCE is not set" in said and "--texts" not in said
    status, said = plan("an4", "AN4_START=--preset small")
    assert status == 0 and "train.py" in said and "spoken" not in said


@each_page
def test_prose_has_at_most_100_columns(page):
    lines = prose(page).splitlines()  # without tables and links, which cannot be broken
    assert not [x for x in lines if len(x) > 100 and not x.startswith("|") and "](" not in x]


def test_readmes_idea_works_as_it_is_written(monkeypatch):
    """The three blocks of Python, put into transforms.py where README says, make a transform."""
    readme = (ROOT / "README.md").read_text()
    field, function, link = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    code = (ROOT / "transforms.py").read_text()
    for block, place in (
        (field, "    max_trim: int = option("),
        (function, "# ---- Chains\n"),
        (link, "    chain += features_chain("),
    ):
        assert code.count(place) == 1
        code = code.replace(place, block + place)
    changed = types.ModuleType("transforms_with_noise")
    monkeypatch.setitem(sys.modules, changed.__name__, changed)
    exec(code, changed.__dict__)
    example = {"input_values": torch.linspace(-1, 1, 16000)}

    def features(**augment):
        chain = changed.train_transform(changed.Frontend(), changed.Augment(**augment))
        return chain(example, changed.make_generator(0, 0, 0))["features"]

    assert not features(max_noise=0.1).equal(features())
    assert features(max_noise=0.0).equal(features())


def anchors(page) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@each_page
def test_every_function_exists(page):
    """`module.name` and `module.Class.name` in a span are attributes of the project's modules."""
    modules = {path.stem for path in FILES}
    for span in SPAN.findall(prose(page)):
        found = re.fullmatch(r"(\w+)\.(\w+(?:\.\w+)*)", span)
        if found and found[1] in modules and found[2] not in (*DATA, "py"):
            operator.attrgetter(found[2])(module(found[1]))  # AttributeError where it is gone


def test_readmes_tree_is_the_tree():
    """The tree names every file of the project that is no test, and none that is not there."""
    tree = next(
        block
        for block in FENCED.findall((ROOT / "README.md").read_text())
        if block.startswith("train.py")
    )
    named = set()
    for line in tree.splitlines():
        folder = ROOT / (line.split()[0] if line.split()[0].endswith("/") else "")
        named |= {folder / name for name in FILE.findall(line) if name != "test_NAME.py"}
    assert not [str(path) for path in named if not path.exists()]
    assert {path for path in FILES if path.stem != "__init__"} | set(PAGES[1:]) <= named


def test_readme_is_short_and_begins_with_results():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250
    assert "## Results" in lines[:60] and "## Two commands" in lines[:60]
