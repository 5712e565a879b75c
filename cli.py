"""Options as frozen dataclasses, flags generated from them, errors that are one clear line.

A command declares its options once, as fields of a frozen dataclass; `parse` turns the fields into argparse flags and
the given flags back into an instance. What a flag is called, its type, default and help live in one place.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import io
import os
import re
import reprlib
import signal
import sys
import types
import typing


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


def end_at_once(number, _) -> None:
    """Ends a command that has done nothing yet."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        line = f"{os.path.basename(sys.argv[0])}: interrupted ({signal.Signals(number).name})\n"
        os.write(2, line.encode(errors="replace"))
    os._exit(128 + number)


def is_command() -> bool:
    """Whether the program that runs is one of this folder's."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    ours, its = (os.path.dirname(os.path.abspath(path or "/")) for path in (__file__, program))
    return ours == its


for _number in SIGNALS if is_command() else ():  # its imports take seconds
    if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(_number, end_at_once)


def interrupt(number, _) -> None:
    """Ends a command by way of its `finally` clauses, which further signals do not disturb."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def run(main) -> None:
    """Calls main(argv); a UserError becomes one line on stderr and exit status 2, a signal another
    and 128 + its number. Signals that the parent ignores, as nohup does, stay ignored."""
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # what it cannot show, be it a name on disk, is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    program = os.path.basename(sys.argv[0])
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{program}: error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print(f"{program}: interrupted ({signal.Signals(number).name})", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
