"""Holds what all commands share: options, errors of one clear line, signals and output.

A command declares its options once, as the fields of a frozen dataclass: a field has the flag's
name, type, default, bounds and help. `make_parser` turns the fields into argparse's flags, and
`build` turns the flags that were given into an instance. `run` calls the command's main.

This module is imported before all packages, and imports none itself, so that Ctrl-C prints one line
even in the seconds that torch takes to import.
"""

import argparse
import codecs
import contextlib
import ctypes
import dataclasses
import functools
import io
import json
import logging
import os
import re
import reprlib
import signal
import sys
import types
import typing
import warnings

# ---- Errors, and text from outside


class UserError(Exception):
    """Reports bad input. Its one line says what is wrong, where, and what to do.

    The command prints this line and exits with status 2.
    """


# These characters move a terminal's cursor, end a line, reverse the direction of text, or have no
# bytes in any encoding.
UNSHOWN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
BRIEF = reprlib.Repr()
BRIEF.maxlevel = 2
BRIEF.maxstring = 200


def shown(text, room: int = 1000) -> str:
    """Returns text from outside (a file's name, a token, a value) as one line, safe for a terminal.

    Control characters are escaped as in Python. A text of more than `room` characters keeps only
    its beginning and its end.
    """
    if not isinstance(text, str):
        try:
            text = BRIEF.repr(text)
        except ValueError:  # a whole number with thousands of digits
            text = f"a {type(text).__name__} too long to show"
    if len(text) > room:
        text = f"{text[: room * 2 // 3]} ... {text[-room // 4 :]}"
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(message) -> str:
    """Joins the lines of a message by spaces, and returns the message as `shown`."""
    return shown(" ".join(str(message).split()))


OUT_OF_MEMORY = (
    "out of memory",  # CUDA
    "allocate memory",  # the CPU
    "enough memory",
    "ALLOC_FAILED",  # cuBLAS
)


def out_of_memory(error: Exception) -> bool:
    """Returns whether the memory was too small. torch says so in the words of a RuntimeError."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def bad_luck(error: Exception) -> str:
    """Explains an error that is no mistake of the program, or returns "".

    Such errors are: a file cannot be read or written, something is nested too deep, the memory is
    too small.
    """
    if isinstance(error, OSError):
        named = isinstance(error.filename, (str, bytes))
        where = f"{os.fsdecode(error.filename)}: " if named else ""
        return f"{where}{error.strerror or error}; put that right, or name another place"
    if isinstance(error, RecursionError):
        return "something in a file or a name is nested too deep"
    if out_of_memory(error):
        first = (str(error).splitlines() or ["MemoryError"])[0][:150]
        return f"the memory is too small ({first}); choose a smaller model or batch"
    return ""


# ---- Options


def option(default, help: str, choices=None, at_least=None, above=None, at_most=None):
    """Declares a field of an options_class, and its flag --NAME; `help` says what the flag does.

    A field of numbers has two bounds: at_most, and either at_least or above, which does not allow
    the bound itself. Both are needed, so nan and the infinities lie outside. A field of text may
    have `choices`. For a field of `tuple[X, ...]` each part is checked; a field of `X | None` also
    takes None. A default of dict or list is an error: options are immutable.
    """
    how = {"choices": choices, "at_least": at_least, "above": above, "at_most": at_most}
    return dataclasses.field(default=default, metadata={"help": help, **how})


def options_class(cls):
    """Makes `cls` a frozen dataclass that checks its values, from flags, code or a checkpoint.

    Making an instance raises UserError where a value is not of its field's type, is none of the
    field's choices, or lies beyond its bounds. The __post_init__ of `cls` runs after these checks.
    """
    own = getattr(cls, "__post_init__", None)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_option(field, kinds(type(self))[field.name], getattr(self, field.name))
        if own:
            own(self)

    cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True)(cls)


class Kind(typing.NamedTuple):
    """Says what a field holds: a `type`, in a tuple if `many`, or perhaps None if `optional`."""

    type: type
    many: bool
    optional: bool


@functools.cache
def kinds(cls) -> dict[str, Kind]:
    """Returns {name of a field: its kind}."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        optional = isinstance(hint, types.UnionType)  # int | None
        many = typing.get_origin(hint) is tuple  # tuple[float, ...]
        kind = typing.get_args(hint)[0] if optional or many else hint
        found[name] = Kind(kind, many, optional)
    return found


TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text, not empty, without NUL, and not longer than a path can be",
}
LONGEST_PATH = 4096  # Linux takes no path of so many bytes


def check_option(field: dataclasses.Field, kind: Kind, value) -> None:
    """Raises UserError where the field may not have this value."""
    if value is None and kind.optional:
        return
    if kind.many and not isinstance(value, tuple):
        raise UserError(f"--{field.name} {shown(value, 100)}: it must be a list")
    for one in value if kind.many else (value,):
        if reason := why_refused(field, kind.type, one):
            raise UserError(f"--{field.name} {shown(one, 100)}: {reason}")


def why_refused(field: dataclasses.Field, kind: type, value) -> str:
    """Says why the field, or a part of its tuple, may not have this value; "" where it may."""
    choices = field.metadata["choices"]
    if not is_a(value, kind):
        return f"it must be {TYPES[kind]}"
    if choices and value not in choices:
        return f"choose one of {', '.join(choices)}"
    if not within_bounds(field, value):
        return f"it must lie {bounds_of(field)}"
    return ""


def is_a(value, kind: type) -> bool:
    """Returns whether the value has the type. A whole number is a float, too; True is no number."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is str:
        return isinstance(value, str) and is_text(value)
    return isinstance(value, (int, float) if kind is float else kind)


def is_text(value: str) -> bool:
    return "\0" not in value and 0 < len(value) < LONGEST_PATH


def within_bounds(field: dataclasses.Field, value) -> bool:
    at_least, above, at_most = map(field.metadata.get, ("at_least", "above", "at_most"))
    if at_most is None:
        return True
    return value <= at_most and (value >= at_least if above is None else value > above)


def bounds_of(field: dataclasses.Field) -> str:
    """Says the bounds of a field in words, or "" where it has none."""
    at_least, above, at_most = map(field.metadata.get, ("at_least", "above", "at_most"))
    if at_most is None:
        return ""
    if above is None:
        return f"within {at_least} .. {at_most}"
    return f"above {above}, at most {at_most}"


# ---- Flags


def make_parser(description: str, *classes) -> argparse.ArgumentParser:
    """Makes a parser with the flags of some options_classes.

    The parser raises UserError where argparse would print its usage.
    """
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def error(message):
        raise UserError(f"{message} (--help lists the flags)")

    parser.error = error
    # An argument that is no field of a class, and that has no type, is text.
    parser.register("type", None, text)
    for cls in classes:
        add_options(parser, cls)
    return parser


def text(value: str) -> str:
    """Checks the value of an argument that is no field. Raises argparse's error for no text."""
    if not is_text(value):
        raise argparse.ArgumentTypeError(f"{shown(value, 100)}: it must be {TYPES[str]}")
    return value


def add_options(parser: argparse.ArgumentParser, cls) -> None:
    """Adds a flag for each field of an options_class, as a help group of its own."""
    group = parser.add_argument_group(cls.__name__)
    for field in dataclasses.fields(cls):
        kind = kinds(cls)[field.name]
        bounds = bounds_of(field)
        help = f"{field.metadata['help']} (default: {field.default}{bounds and '; '}{bounds})"
        how = {"default": argparse.SUPPRESS, "help": help}
        if kind.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"type": kind.type, "choices": field.metadata["choices"]}
        if kind.many:
            how["nargs"] = "*"
        group.add_argument(f"--{field.name}", **how)


def build(cls, given: dict, /, **defaults):
    """Makes an instance of an options_class. Names that are no field of it are left out.

    The flags given on the command line go before `defaults`, such as a preset, and `defaults` go
    before the defaults of the fields.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in {**defaults, **given}.items() if name in names}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# ---- Memory


# The numbers of two parameters in glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
SPARING = 2**24  # size for keep_freed_memory where memory counts more than time


def keep_freed_memory(size: int = 2**30) -> None:
    """Makes glibc use freed blocks of up to `size` bytes again instead of handing them back.

    Otherwise a training step on a CPU spends a third of its time on fresh pages. The price is half
    as much memory again. Without glibc nothing happens.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, size)


# ---- Signals


# These signals ask a command to end.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_at_once(number, _) -> None:
    """Ends the process at a signal: the command has done nothing yet."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        line = f"{os.path.basename(sys.argv[0])}: interrupted ({signal.Signals(number).name})\n"
        os.write(2, line.encode(errors="replace"))
    os._exit(128 + number)


def is_command() -> bool:
    """Returns whether the program that runs lies in this folder or in tools/."""
    program = getattr(sys.modules["__main__"], "__file__", None) or "/"
    ours = os.path.dirname(os.path.abspath(__file__))
    return os.path.dirname(os.path.abspath(program)) in (ours, os.path.join(ours, "tools"))


# From here until `run` a command only imports packages, for some seconds.
for _number in SIGNALS if is_command() else ():
    if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(_number, end_at_once)


def interrupt(number, _) -> None:
    """Raises KeyboardInterrupt(number) at a signal, so that the command's `finally` clauses run.

    Further signals do not disturb these clauses.
    """
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


# ---- Standard output and standard error


class Standard(io.TextIOWrapper):
    """Writes standard output or standard error, whose disk may be full and reader may be gone.

    Standard output (`raises`) raises UserError for a full disk, and KeyboardInterrupt(SIGPIPE)
    where nobody reads on, as after `head`; text that is written later is lost. Standard error loses
    its text without an error: nobody could be told, and the work does not depend on this text.
    """

    def __init__(self, stream, raises: bool):
        how = {name: getattr(stream, name) for name in ("line_buffering", "write_through")}
        super().__init__(stream.buffer, stream.encoding, "code_points", **how)
        self.raises = raises

    def write(self, text: str) -> int:
        self.attempt(super().write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(super().flush)

    def attempt(self, do, *arguments) -> None:
        try:
            do(*arguments)
        except OSError as error:
            if not self.raises:
                return
            # Otherwise the interpreter would try to write the rest again when it ends.
            send_nowhere(self.fileno())
            if isinstance(error, BrokenPipeError):
                raise KeyboardInterrupt(signal.SIGPIPE) from None
            reason = f"standard output cannot be written ({error.strerror})"
            raise UserError(f"{reason}; make room, or send it elsewhere") from error


def send_nowhere(descriptor: int) -> None:
    """Drops all that is written to the file descriptor from now on, without an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


class Line(logging.LogRecord):
    """Holds a library's log message, as one line."""

    def getMessage(self) -> str:
        return one_line(super().getMessage())


def prepare_streams() -> None:
    """Replaces stdout and stderr by Standard, and makes log messages and warnings one line each.

    A character that the encoding lacks is written as JSON escapes it. The number of a stream that
    was closed is taken, so that no file of the command gets this number.
    """
    codecs.register_error("code_points", escape)
    for name, mode in (("stdin", os.O_WRONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        stream = getattr(sys, name)
        if stream is None:
            # The stream was closed. In this mode stdin cannot be read, nor the others written.
            stream = open(os.open(os.devnull, mode), "r" if name == "stdin" else "w", closefd=False)
            setattr(sys, f"__{name}__", stream)
        if name != "stdin" and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, Standard(stream, raises=name == "stdout"))
        elif name == "stdout" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="code_points")
    logging.setLogRecordFactory(Line)
    warnings.formatwarning = format_warning


def escape(error: UnicodeEncodeError) -> tuple[str, int]:
    """Answers an error of encoding: (the characters as JSON escapes them, where they end)."""
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def format_warning(message, category, file, line, _=None) -> str:
    return f"{file}:{line}: {category.__name__}: {one_line(message)}\n"


# ---- Running


def complain(line: str) -> None:
    """Prints a line to stderr by one write, so that lines of several processes do not mix."""
    print(f"{line}\n", end="", file=sys.stderr)


def run(main) -> None:
    """Calls main(argv), and turns errors and signals into one line on stderr and an exit status.

    A UserError, or bad luck, exits with status 2, and a signal with 128 + its number. Where
    standard output has lost its reader there is no line. Signals that the parent ignores, as nohup
    does, stay ignored.
    """
    keep_freed_memory()
    prepare_streams()
    program = os.path.basename(sys.argv[0])
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        try:
            main(sys.argv[1:])
        except SystemExit:  # after --help, or where one recording of several has failed
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except Exception as error:
        if not (reason := str(error) if isinstance(error, UserError) else bad_luck(error)):
            raise
        complain(f"{shown(program)}: error: {one_line(reason)}")
        sys.exit(2)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        if number != signal.SIGPIPE:
            complain(f"{shown(program)}: interrupted ({signal.Signals(number).name})")
        sys.exit(128 + number)
    finally:
        # The first error has been printed already, and another error would hide it.
        with contextlib.suppress(UserError, KeyboardInterrupt):
            sys.stdout.flush()
        for number, handler in before.items():
            signal.signal(number, handler)
