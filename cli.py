"""Options as frozen dataclasses, flags generated from them, errors that are one clear line.

A command declares its options once, as fields of a frozen dataclass; `parse` turns the fields into argparse flags and
the given flags back into an instance. What a flag is called, its type, default and help live in one place.
"""

import argparse
import codecs
import contextlib
import ctypes
import dataclasses
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


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class UserError(Exception):
    """Bad input from outside: says in one line what is wrong, where, and what to do. Commands exit with status 2."""


# What moves a terminal's cursor, ends a line, turns the direction of text round, or is in no encoding.
UNSHOWN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxstring = 2, 200


def shown(text, room: int = 1000) -> str:
    """What a stranger wrote (a name on disk, a token, a value of a file), on one line that a terminal can only show:
    escaped as in Python, and where it is longer than `room` characters, its beginning and its end."""
    if not isinstance(text, str):
        text = BRIEF.repr(text)
    if len(text) > room:
        text = f"{text[:room * 2 // 3]} ... {text[-room // 4:]}"
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(message) -> str:
    """The same of a message, the lines of which are joined by spaces."""
    return shown(" ".join(str(message).split()))


def option(default, help: str, choices=None):
    """A dataclass field that becomes the flag --NAME. `default` of dict or list is not allowed: options are immutable."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def make_parser(description: str, *classes) -> argparse.ArgumentParser:
    """A parser with the flags of the dataclasses `classes`. It raises UserError where argparse would print its usage."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(message):
        raise UserError(f"{message} (--help lists the flags)")

    parser.error = error
    for cls in classes:
        add_options(parser, cls)
    return parser


def add_options(parser: argparse.ArgumentParser, cls) -> None:
    """Adds one flag per field of the dataclass `cls` (as its own help group)."""
    hints = typing.get_type_hints(cls)
    group = parser.add_argument_group(cls.__name__)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # int | None -> int
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        extra = {"default": argparse.SUPPRESS, "help": f"{field.metadata['help']} (default: {field.default})"}
        if kind is bool:
            group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **extra)
            continue
        if typing.get_origin(kind) is tuple:  # tuple[float, ...] takes any number of values
            kind, extra["nargs"] = typing.get_args(kind)[0], "*"
        group.add_argument(f"--{field.name}", type=kind, choices=field.metadata["choices"], **extra)


def build(cls, given: dict, **defaults):
    """An instance of `cls`: the flags given on the command line, over `defaults` (a preset), over the field defaults."""
    names = {field.name for field in dataclasses.fields(cls)}
    values = {**{k: v for k, v in defaults.items() if k in names}, **{k: v for k, v in given.items() if k in names}}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


SPARING = 2**24  # of keep_freed_memory, where memory counts more than time


def keep_freed_memory(size: int = 2**30) -> None:
    """Has glibc reuse freed blocks of up to `size` bytes instead of handing them back: on a CPU a training step would otherwise
    spend a third of its time on getting fresh pages. It takes a half more memory. Elsewhere than on glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(parameter, size)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that ask a command to end


def interrupt(number, _) -> None:
    """Ends a command by way of its `finally` clauses, which further signals do not disturb."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


class Standard(io.TextIOWrapper):
    """Standard output or standard error, where the disk may be full and the reader may have gone.

    Standard output raises UserError for that, or KeyboardInterrupt(SIGPIPE) where nobody reads on,
    as after `head`; what is written from there on is lost. What standard error cannot take is lost
    at once: nobody could be told, and the work does not depend on it.
    """

    def __init__(self, stream, raises: bool):
        super().__init__(stream.buffer, stream.encoding, "code_points",
                         line_buffering=stream.line_buffering, write_through=stream.write_through)
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
            send_nowhere(self.fileno())  # or the interpreter would try again when it ends
            if isinstance(error, BrokenPipeError):
                raise KeyboardInterrupt(signal.SIGPIPE) from None
            raise UserError(f"standard output cannot be written ({error.strerror}); make room, or "
                            "send it elsewhere") from error


def send_nowhere(descriptor: int) -> None:
    """What is written to the descriptor is lost from here on, without an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


class Line(logging.LogRecord):
    """What a library logs, on one line that a terminal can only show."""

    def getMessage(self) -> str:
        return one_line(super().getMessage())


def prepare_streams() -> None:
    """Makes standard output and standard error a Standard each, which shows what its encoding lacks
    as JSON does. The number of a closed stream goes to no file that the command opens."""
    codecs.register_error("code_points", lambda error: (
        json.dumps(error.object[error.start:error.end])[1:-1], error.end))
    for name, mode in (("stdin", os.O_WRONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        stream = getattr(sys, name)
        if stream is None:  # closed: a mode that makes what is read or written fail all the same
            stream = open(os.open(os.devnull, mode), "r" if name == "stdin" else "w", closefd=False)
            setattr(sys, f"__{name}__", stream)
        if name != "stdin" and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, Standard(stream, raises=name == "stdout"))
        elif name == "stdout" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="code_points")
    logging.setLogRecordFactory(Line)
    warnings.formatwarning = lambda message, category, file, line, _=None: (
        f"{file}:{line}: {category.__name__}: {one_line(message)}\n")


def run(main) -> None:
    """Calls main(argv); a UserError becomes one line on stderr and exit status 2, a signal another
    and 128 + its number, without a line where standard output has lost its reader. Signals that the
    parent ignores, as nohup does, stay ignored."""
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
    except UserError as error:
        print(f"{shown(program)}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        if number != signal.SIGPIPE:
            print(f"{shown(program)}: interrupted ({signal.Signals(number).name})", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        with contextlib.suppress(UserError, KeyboardInterrupt):  # the one error is said already
            sys.stdout.flush()
        for number, handler in before.items():
            signal.signal(number, handler)
