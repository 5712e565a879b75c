"""Options as frozen dataclasses, flags generated from them, errors that are one clear line.

A command declares its options once, as fields of a frozen dataclass; `parse` turns the fields into argparse flags and
the given flags back into an instance. What a flag is called, its type, default, bounds and help live in one place.
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

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class UserError(Exception):
    """Bad input from outside: says in one line what is wrong, where, and what to do. Commands exit with status 2."""


# These characters move a terminal's cursor, end a line, turn the direction of text round, or have
# no bytes in any encoding.
UNSHOWN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxstring = 2, 200


def shown(text, room: int = 1000) -> str:
    """What a stranger wrote (a name on disk, a token, a value of a file), as one line that does
    nothing to a terminal. Control characters are escaped as in Python. Of what is longer than
    `room` characters, only the beginning and the end are kept."""
    if not isinstance(text, str):
        try:
            text = BRIEF.repr(text)
        except ValueError:  # of a whole number with thousands of digits
            text = f"a {type(text).__name__} too long to show"
    if len(text) > room:
        text = f"{text[: room * 2 // 3]} ... {text[-room // 4 :]}"
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(message) -> str:
    """A message as `shown` makes it, after its lines are joined by spaces."""
    return shown(" ".join(str(message).split()))


def option(default, help: str, choices=None, at_least=None, above=None, at_most=None):
    """A field of an options_class that becomes the flag --NAME. `default` of dict or list is not allowed: options are
    immutable. A number has a lower and an upper bound: what is not finite lies beyond one of them."""
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "at_least": at_least,
            "above": above,
            "at_most": at_most,
        },
    )


def options_class(cls):
    """Makes `cls` a frozen dataclass, whose every instance is checked, wherever its values come from: UserError where one
    is of another type than its field's, none of its choices, or beyond its bounds."""
    own = getattr(cls, "__post_init__", None)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_option(field, kinds(type(self))[field.name], getattr(self, field.name))
        if own:
            own(self)

    cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True)(cls)


TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text, not empty, without NUL, and not longer than a path can be",
}
LONGEST_PATH = 4096  # Linux takes no path of so many bytes


class Kind(typing.NamedTuple):
    """What a field holds: a `type`, `many` of it in a tuple, or None, where that is `optional`."""

    type: type
    many: bool
    optional: bool


@functools.cache
def kinds(cls) -> dict[str, Kind]:
    """The kind of each field, by name."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        parts = typing.get_args(hint)
        optional, many = (
            isinstance(hint, types.UnionType),
            typing.get_origin(hint) is tuple,
        )  # int | None, tuple[float, ...]
        found[name] = Kind(parts[0] if optional or many else hint, many, optional)
    return found


def check_option(field: dataclasses.Field, kind: Kind, value) -> None:
    """UserError where the value is none for the field."""
    if value is None and kind.optional:
        return
    if kind.many and not isinstance(value, tuple):
        raise UserError(f"--{field.name} {shown(value, 100)}: it must be a list")
    for one in value if kind.many else (value,):
        typed = isinstance(one, (int, float) if kind.type is float else kind.type)
        if (
            not typed
            or isinstance(one, bool) != (kind.type is bool)
            or kind.type is str
            and not is_text(one)
        ):
            raise UserError(f"--{field.name} {shown(one, 100)}: it must be {TYPES[kind.type]}")
        if field.metadata["choices"] and one not in field.metadata["choices"]:
            raise UserError(
                f"--{field.name} {shown(one, 100)}: choose one of {', '.join(field.metadata['choices'])}"
            )
        if bounds := bounds_of(field):
            low, high = field.metadata["above"], field.metadata["at_most"]
            if not (
                low < one <= high if low is not None else field.metadata["at_least"] <= one <= high
            ):
                raise UserError(f"--{field.name} {shown(one, 100)}: it must lie {bounds}")


def is_text(value: str) -> bool:
    return "\0" not in value and 0 < len(value) < LONGEST_PATH


def text(value: str) -> str:
    """The value, of an argument that is no field."""
    if not is_text(value):
        raise argparse.ArgumentTypeError(f"{shown(value, 100)}: it must be {TYPES[str]}")
    return value


def bounds_of(field: dataclasses.Field) -> str:
    """The bounds of a field in words, or "" where it has none."""
    at_least, above, at_most = map(field.metadata.get, ("at_least", "above", "at_most"))
    if at_most is None:
        return ""
    if above is None:
        return f"within {at_least} .. {at_most}"
    return f"above {above}, at most {at_most}"


def make_parser(description: str, *classes) -> argparse.ArgumentParser:
    """A parser with the flags of the dataclasses `classes`. It raises UserError where argparse would print its usage."""
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def error(message):
        raise UserError(f"{message} (--help lists the flags)")

    parser.error = error
    parser.register("type", None, text)  # of what is no field and names no type
    for cls in classes:
        add_options(parser, cls)
    return parser


def add_options(parser: argparse.ArgumentParser, cls) -> None:
    """Adds one flag per field of the dataclass `cls` (as its own help group)."""
    group = parser.add_argument_group(cls.__name__)
    for field in dataclasses.fields(cls):
        kind, bounds = kinds(cls)[field.name], bounds_of(field)
        extra = {
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['help']} (default: {field.default}{bounds and '; '}{bounds})",
        }
        if kind.type is bool:
            group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **extra)
            continue
        if kind.many:
            extra["nargs"] = "*"
        group.add_argument(
            f"--{field.name}", type=kind.type, choices=field.metadata["choices"], **extra
        )


def build(cls, given: dict, /, **defaults):
    """An instance of `cls`: the flags given on the command line, over `defaults` (a preset), over the field defaults."""
    names = {field.name for field in dataclasses.fields(cls)}
    values = {
        **{k: v for k, v in defaults.items() if k in names},
        **{k: v for k, v in given.items() if k in names},
    }
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
    """Whether the program that runs is one of this folder's, or of its tools."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    ours, its = (os.path.dirname(os.path.abspath(path or "/")) for path in (__file__, program))
    return its in (ours, os.path.join(ours, "tools"))


for _number in SIGNALS if is_command() else ():  # its imports take seconds
    if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(_number, end_at_once)


def interrupt(number, _) -> None:
    """Ends a command by way of its `finally` clauses, which further signals do not disturb."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


OUT_OF_MEMORY = (
    "out of memory",
    "allocate memory",
    "enough memory",
    "ALLOC_FAILED",
)  # of CUDA, the CPU, cuBLAS


def out_of_memory(error: Exception) -> bool:
    """Whether memory was too small; torch says so in a RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or isinstance(error, RuntimeError)
        and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def bad_luck(error: Exception) -> str:
    """What to say of an error that no other place has caught and that is no mistake of the program:
    a file cannot be read or written, something is nested too deep, or the memory is too small.
    "" for any other error."""
    if isinstance(error, OSError):
        where = (
            f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        )
        return f"{where}{error.strerror or error}; put that right, or name another place"
    if isinstance(error, RecursionError):
        return "something in a file or a name is nested too deep"
    if out_of_memory(error):
        return f"the memory is too small ({(str(error).splitlines() or ['MemoryError'])[0][:150]}); choose a smaller model or batch"
    return ""


class Standard(io.TextIOWrapper):
    """Standard output or standard error, where the disk may be full and the reader may have gone.

    Standard output raises UserError for that, or KeyboardInterrupt(SIGPIPE) where nobody reads on,
    as after `head`; what is written from there on is lost. What standard error cannot take is lost
    at once: nobody could be told, and the work does not depend on it.
    """

    def __init__(self, stream, raises: bool):
        super().__init__(
            stream.buffer,
            stream.encoding,
            "code_points",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
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
            raise UserError(
                f"standard output cannot be written ({error.strerror}); make room, or "
                "send it elsewhere"
            ) from error


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
    codecs.register_error(
        "code_points",
        lambda error: (json.dumps(error.object[error.start : error.end])[1:-1], error.end),
    )
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
        f"{file}:{line}: {category.__name__}: {one_line(message)}\n"
    )


def run(main) -> None:
    """Calls main(argv); a UserError, or bad luck, becomes one line on stderr and exit status 2, a signal another
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
    except Exception as error:
        if not (reason := str(error) if isinstance(error, UserError) else bad_luck(error)):
            raise
        print(f"{shown(program)}: error: {one_line(reason)}", file=sys.stderr)
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
