"""Options, whose values are checked wherever they come from; locks, which end with their process;
signals; and text for terminals that cannot show it."""

import dataclasses
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import cli

import pytest

import files
from helpers import FILES, imported, module


@cli.options_class
class Options:
    count: int = cli.option(1, "how many", at_least=1, at_most=9)
    share: float = cli.option(0.5, "how much", above=0, at_most=1.0)
    kind: str | None = cli.option(None, "which", choices=("a", "b"))
    on: bool = cli.option(False, "whether")
    speeds: tuple[float, ...] = cli.option((), "how fast", at_least=0.1, at_most=10.0)
    names: tuple[str, ...] = cli.option((), "what")


NO_VALUES = {
    "count": (0, 10, -(10**5000), 10**5000, 2.0, True, None, "1", math.nan),
    "share": (0, -0.0, 1.1, math.nan, math.inf, -math.inf, True, 10**5000, "0.5", None),
    "kind": ("c", "", 1, ["a"]),
    "on": (1, None, "yes"),
    "speeds": ((1.0, math.nan), 1.0, "1"),
    "names": ("abc", ("a\0",), ("",), ("x/" * 3000,)),
}


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name, values in NO_VALUES.items() for value in values],
    ids=lambda value: cli.shown(value, 30),
)
def test_what_is_no_value_of_an_option_is_one_line_wherever_it_comes_from(name, value):
    for make in (
        lambda: Options(**{name: value}),
        lambda: dataclasses.replace(Options(), **{name: value}),
        lambda: cli.build(Options, {}, **{name: value}),
    ):
        said = f"^--{name} .*: (it must|choose one of)"
        with pytest.raises(cli.UserError, match=said) as refused:
            make()
        assert len(str(refused.value)) < 300


def test_the_values_within_the_bounds_and_the_bounds_themselves_are_taken():
    made = cli.build(Options, {"speeds": [0.1, 10]}, count=9, share=1, kind="b", cls="x", given="x")
    assert made == Options(9, 1, "b", False, (0.1, 10))
    assert Options(share=5e-324).share > 0 and Options().kind is None


def test_the_help_says_the_bounds(capsys):
    with pytest.raises(SystemExit):
        cli.make_parser("", Options).parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "how many (default: 1; within 1 .. 9)" in said
    assert "(default: 0.5; above 0, at most 1.0)" in said


def test_every_number_among_all_options_has_bounds_and_a_default_within_them():
    modules = [module(path.stem) for path in FILES if path.stem != "__init__"]
    found = {
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type)
        and dataclasses.is_dataclass(kind)
        and not kind.__name__.startswith("_")  # all that are public are options
    }
    assert len(found) > 15
    for kind in found:
        kind()
        for field in dataclasses.fields(kind):
            number = cli.kinds(kind)[field.name].type not in (str, bool)
            assert cli.bounds_of(field) or not number, (kind, field.name)


HOLD = """
import sys, time, files
with files.alone(sys.argv[1], "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")],
        stdout=subprocess.PIPE,
        cwd=os.path.dirname(cli.__file__),
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_is_held_by_one_process_and_not_by_a_dead_one(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(files, "DYING", 0.1)  # the holder does not end
    with (
        pytest.raises(cli.UserError, match="^it: another process"),
        files.alone(str(tmp_path / "lock"), "it"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with files.alone(str(tmp_path / "lock"), "it"):
        assert os.listdir(tmp_path) == ["lock"]
    assert os.listdir(tmp_path) == []


def test_a_child_does_not_inherit_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DYING", 0.1)  # the parent does not end
    with files.alone(str(tmp_path / "lock"), "it"):
        child = os.fork()
        if not child:
            try:
                with files.alone(str(tmp_path / "lock"), "it"):
                    os._exit(1)
            except cli.UserError:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    with (
        pytest.raises(cli.UserError, match="cannot be written"),
        files.alone(str(tmp_path / "none" / "lock"), "it"),
    ):
        pass


TIDY = """
import time, cli
def main(_):
    try:
        print("on", flush=True)
        time.sleep(60)
    finally:
        print("tidying", flush=True)
        time.sleep(0.3)
        print("tidy", flush=True)
cli.run(main)
"""


@pytest.mark.parametrize("first", cli.SIGNALS)
def test_a_signal_ends_a_command_in_one_line_and_the_next_ones_do_not_disturb_that(first):
    def reset():  # a parent may ignore them
        for number in cli.SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", TIDY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=os.path.dirname(cli.__file__),
        preexec_fn=reset,
    )
    assert process.stdout.readline() == b"on\n"
    process.send_signal(first)
    assert process.stdout.readline() == b"tidying\n"
    for number in cli.SIGNALS:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, err.decode()) == (b"tidy\n", f"-c: interrupted ({first.name})\n")
    assert process.returncode == 128 + first


@pytest.mark.parametrize("number", cli.SIGNALS, ids=lambda number: number.name)
def test_a_signal_within_the_imports_of_a_command_is_one_line_too(tmp_path, number):
    shutil.copy(cli.__file__, tmp_path)
    slow = tmp_path / "slow.py"
    slow.write_text("import cli, time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, slow]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[1].decode() == f"slow.py: interrupted ({number.name})\n"
    assert process.returncode == 128 + number


def test_every_command_imports_cli_before_what_takes_seconds():
    commands = [path for path in FILES if re.search(r"\n    (cli\.)?run\(main\)", path.read_text())]
    assert len(commands) >= 9
    for path in commands:
        names = [name for name in imported(path) if name not in sys.stdlib_module_names]
        assert names[0] == "cli", path


def test_what_the_parent_ignores_stays_ignored_and_a_command_leaves_no_handlers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        mine = [signal.getsignal(number) for number in cli.SIGNALS]
        during = []
        cli.run(lambda _: during.extend(signal.getsignal(number) for number in cli.SIGNALS))
        assert during[2] == signal.SIG_IGN and cli.interrupt in during
        assert [signal.getsignal(number) for number in cli.SIGNALS] == mine
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_name_that_is_not_in_utf_8_can_be_printed():
    command = [sys.executable, "-c", "import cli; cli.run(lambda _: print('caf\\udce9'))"]
    assert subprocess.check_output(command, cwd=os.path.dirname(cli.__file__)) == b"caf\\udce9\n"


def test_a_terminal_that_cannot_show_a_character_gets_its_code_point(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    cli.run(lambda argv: print("caf\u00e9 \u4e2d", flush=True))
    assert terminal.buffer.getvalue() == b"caf\xe9 \\u4e2d\n"


def test_an_error_is_one_write_so_that_lines_of_several_processes_do_not_mix(monkeypatch):
    class Written(io.RawIOBase):
        def writable(self):
            return True

        def write(self, content):
            parts.append(bytes(content))
            return len(content)

    def fail(_):
        raise cli.UserError("bad")

    parts = []
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Written(), write_through=True))
    with pytest.raises(SystemExit):
        cli.run(fail)
    assert [part for part in parts if part] == [parts[0]] and parts[0].endswith(b"error: bad\n")
