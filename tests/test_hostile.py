"""Attacks by kind: bad input or bad luck gets one line and status 2, and what was there before is still there.

What could swell or wait runs as a command of its own, with little memory and a deadline: a bomb fails, and freezes nothing.
"""

import csv
import io
import json
import logging
import math
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from urllib.parse import unquote_to_bytes

import hypothesis
import pytest
from hypothesis import strategies as st

import cli
import compare
import export
import files
import transcribe
import words

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 6 * 2**30  # bytes of address space; torch and datasets alone take 3 to 4
DEADLINE = 60  # seconds


def limited(*command, memory=MEMORY, deadline=DEADLINE, **kwargs) -> subprocess.CompletedProcess:
    """python COMMAND, with little memory and time."""
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (deadline, deadline))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | kwargs.pop("env", {})
    return subprocess.run([sys.executable, *map(str, command)], cwd=kwargs.pop("cwd", ROOT), preexec_fn=limit, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=4 * deadline, env=environment, **kwargs)


def refused(*command, **kwargs) -> str:
    """The one line that `limited` refuses with."""
    done = limited(*command, **kwargs)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    *notes, line = done.stderr.strip().splitlines()
    assert ": error: " in line and len(line) < 2000, done.stderr[-2000:]
    return line


def tree(folder) -> dict:
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------ writing without destroying


# ------------------------------------------------------------------------------------- files that promise too much


# ----------------------------------------------------------------------- what reaches a terminal or another program


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "a\u202eb", "a\udce9", "a\x9b2J", "a\u2028b"])
def test_what_is_shown_moves_no_cursor_and_ends_no_line(text):
    assert cli.shown(text).isprintable() and cli.shown(text).isascii()


def test_what_is_shown_is_short_whatever_holds_it():
    bomb = "x" * 100
    for _ in range(40):
        bomb = [bomb] * 9
    assert len(cli.shown(bomb)) <= 1100 and len(cli.shown("x" * 10**7)) <= 1100


HOSTILE = ["a\x1b[2Jb", "a\nb", "a\tb", "a\r\nb.wav\tforged", "\n\n7\n00:00:01,000 --> 00:00:02,000\nforged", "-->",
           "</v><b>&", ";;a", "a\udce9", "\ud800", "a\x9b2J", "a\u2028b", "a\u202eb", "\x0b\x0c\x1c\x85", "\u3000",
           "a b", "a%20b", "a_b", "\0"]
ANY = st.text(st.characters(), min_size=1) | st.sampled_from(HOSTILE)


def is_shown(text: str, *signs: str) -> bool:
    return not cli.UNSHOWN.search("".join(c for c in text if c not in signs))


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
@hypothesis.given(ANY, st.lists(ANY, max_size=5))
def test_no_name_and_no_word_forges_a_line_a_column_or_a_cue(name, said):
    heard = [words.Word(text, i, i + 0.1, 0.5, i % 2 == 0) for i, text in enumerate(said)]
    transcript = words.Transcript(name, words.text_of(heard), math.inf, heard)
    texts = [text for text in said if text.strip()]
    line, rest = words.as_txt(transcript).split("\n")
    assert is_shown(line, "\t") and line.count("\t") == 1 and not rest
    line, rest = words.as_json(transcript).split("\n")
    assert is_shown(line) and not rest and "Infinity" not in line
    assert [word["word"] for word in json.loads(line)["words"]] == said or "\ud800" <= max("".join(said))
    ctm = words.as_ctm(transcript)
    assert is_shown(ctm, "\n") and not ctm.startswith(";")
    assert [len(row.split()) for row in ctm.splitlines()] == [6] * len(texts)
    for made, arrow in ((words.as_srt(transcript), ","), (words.as_vtt(transcript)[8:], ".")):
        cues = made.split("\n\n")[:-1]
        assert is_shown(made, "\n") and made.count("-->") == len(cues) == len(words.cues(heard))
        assert all(line.strip() for cue in cues for line in cue.split("\n"))
        assert all(f"{arrow}000 --> " in cue for cue in cues)
    assert not set("<>") & set(words.as_vtt(transcript).replace("-->", ""))


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
@hypothesis.given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_a_recording_has_its_own_name_in_ctm(name):
    heard = [words.Word("x", 0.0, 0.1, 0.5)]
    made = words.as_ctm(words.Transcript(os.fsdecode(name), "x", 1.0, heard))
    assert unquote_to_bytes(made.split()[0]) == name


def test_honest_names_are_as_they_are():
    heard = [words.Word("50%", 0.0, 0.1, 0.5)]
    transcript = words.Transcript("Ü/今天; a-b_[1]+'.wav".replace(" ", ""), "50%", 1.0, heard)
    assert words.as_ctm(transcript) == f"{transcript.file} 1 0.000 0.100 50% 0.5000\n"
    assert words.as_txt(transcript) == f"{transcript.file}\t50%\n"
    assert files.csv_text([["train", transcript.file, "no audio"]]) == f"train,{transcript.file},no audio\r\n"


@pytest.mark.parametrize("cell", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "＝1", "a;=1",
                                  "a; @b", '";=1', *HOSTILE])
def test_no_cell_is_a_formula_or_a_line_of_its_own(cell):
    text = files.csv_text([("split", "file_name", "reason"), ("train", cell, "why")])
    (_, row) = csv.reader(io.StringIO(text, newline=""))
    assert len(row) == 3 and row[2] == "why" and is_shown(text, "\r", "\n") and text.count("\n") == 2
    assert all(part.strip()[:1] not in [*"=+-@＝"] for part in row[1].split(";"))


def test_what_is_not_finite_is_null_in_json():
    data = {"wer": math.nan, "rows": [math.inf, {"a": -math.inf}], "b": (1, 1e300, "NaN")}
    assert files.json_text(data) == '{"wer": null, "rows": [null, {"a": null}], "b": [1, 1e+300, "NaN"]}'
    assert files.json_text({"a": "\x9b\x7fé\u202e\udce9"}, ensure_ascii=False, indent=1) == (
        '{\n "a": "\\u009b\\u007fé\\u202e\\udce9"\n}')


@pytest.mark.parametrize("hostile", ["\x1b]0;title\x07", "a\nforged", "a\x9b2J", ["a\nb"], {"a": "\x1b"}])
def test_tables_and_the_model_card_show_what_a_run_says_of_itself(hostile, capsys):
    compare.print_table(("run", "\x1b[2J"), [["a", hostile]])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2 and is_shown(out, "\n")
    assert is_shown(export.markdown(compare.show(hostile)))


def test_a_cell_of_the_model_card_is_one_cell_and_no_html():
    assert export.markdown("a|<script>[x](https://x) &amp;") == "a\\|\\<script\\>\\[x\\](https\\://x) \\&amp;"


def test_what_libraries_log_and_warn_of_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = logging.getLogRecordFactory()
    try:
        cli.run(lambda _: None)
        record = logging.getLogger("x").makeRecord("x", logging.INFO, "x", 1, "%s is\x1b[2J", ("a\nb\udce9",), None)
        assert record.getMessage() == "a b\\udce9 is\\x1b[2J"
        assert warnings.formatwarning("a\nb\x1b", UserWarning, "x.py", 1) == "x.py:1: UserWarning: a b\\x1b\n"
    finally:
        logging.setLogRecordFactory(before)


def test_what_is_told_of_a_recording_is_one_line(capsys):
    transcribe.tell("note", transcribe.Recording("a\n\x1b[2J.wav", "a"), "odd\n\x1b")
    transcribe.show("a\x1b[2J\nb", 1.0, True)
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 2 and is_shown(err, "\n")


def command(code: str, redirect: str = "", **kwargs) -> subprocess.CompletedProcess:
    """A command of which main is `code`, as a shell starts it."""
    code = f"import cli, os, sys\ndef main(_):\n {code}\ncli.run(main)"
    kwargs["env"] = os.environ | {"PYTHONUNBUFFERED": ""} | kwargs.get("env", {})
    return subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, code], cwd=ROOT, timeout=DEADLINE,
                          **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs)


full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
WAYS = {"midway": "print('x', flush=True); print('y')", "at the end": "print('x')", "before status 2": "print('x'); sys.exit(2)",
        "before an error": "print('x'); raise cli.UserError('first')"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("redirect", [pytest.param(">/dev/full", marks=full), ">&-"])
def test_output_that_cannot_be_written_is_one_line(redirect, way):
    done = command(WAYS[way], redirect)
    reason = b"first" if "error" in way else b"No space left" if "full" in redirect else b"Bad file descriptor"
    assert done.returncode == 2 and done.stderr.startswith(b"-c: error: ") and reason in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_reader_that_has_enough_ends_a_command_quietly(way):
    reading, writing = os.pipe()
    os.close(reading)
    done = command(WAYS[way], stdout=writing)
    os.close(writing)
    expected = (2, b"-c: error: first\n") if "error" in way else (141, b"")
    assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize("redirect", ["2>&-", pytest.param("2>/dev/full", marks=full), "<&- 2>&-"])
def test_what_stderr_cannot_take_ends_nothing(redirect, tmp_path):
    note = f"print('n' * 9999, file=sys.stderr); open({str(tmp_path / 'mine')!r}, 'w').write('x'); os.write(2, b'?'); print('out')"
    note = note if "full" not in redirect else note.replace("os.write(2, b'?'); ", "")
    done = command(note, redirect)
    assert (done.returncode, done.stdout) == (0, b"out\n") and (tmp_path / "mine").read_text() == "x"
    assert command("raise cli.UserError('bad')", redirect).returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "ascii:strict"])
def test_json_is_json_in_every_encoding(encoding):
    text = "a\\\xe9\u4eca\U0001f600\udce9\x9b"
    done = command(f"import files; print(files.json_text({text!r}, ensure_ascii=False)); print({text!r})",
                   env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    line, shown = done.stdout.decode(encoding.split(":")[0]).splitlines()
    assert json.loads(line) == text and shown.startswith("a\\") and len(shown) > 4


# ------------------------------------------------------------------------------------------------------- tracebacks


# ----------------------------------------------------------------------------------------------------------- streams


# --------------------------------------------------------------------------------------------------- small, but wrong
