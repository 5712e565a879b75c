"""Files: read whole where they are small and honest, written whole or not at all, one writer at a time."""

import contextlib
import csv
import errno
import fcntl
import io
import json
import math
import os
import re
import stat
import time

import yaml

from cli import UNSHOWN, UserError, shown

DYING = 2.0  # seconds for which a process that was killed may yet hold a lock
SMALL = 2**24  # bytes: no vocabulary, list of words or set of options is as large
MANY_NODES = 2**18  # of YAML: no set of options has as many
# Where a spreadsheet finds a formula: where a cell begins, or what some of them take for one.
FORMULA = re.compile("(^|;)(?=\\s*[-+=@\uff0d\uff0b\uff1d\uff20]|[\t\r\n])")


# Reading


def open_file(path: str):
    """A file that somebody names, open to be read as bytes. Raises OSError, also for a pipe or a device, which may have no end
    and where nobody writes is waited for for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError:
        raise OSError(errno.EINVAL, "a name with NUL in it", path) from None
    if stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    reason = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "a pipe or a device, where a file is needed"
    raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, reason, path)


def read_small(path: str, limit: int = SMALL) -> bytes:
    """The content of a file that somebody names. Raises OSError as open_file does; ValueError where the file is longer than
    `limit` bytes."""
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return content


def read_text(path: str, limit: int = SMALL) -> str:
    """The same as text, with a byte order mark or without. Raises OSError, ValueError."""
    return read_small(path, limit).decode("utf-8-sig")


def parse_json(text: str):
    """Raises ValueError for what is no JSON, is nested too deep, or holds a number that is not finite."""
    try:
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("nested too deep") from None


def finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is not finite")
    return value


def read_json(path: str, limit: int = SMALL) -> dict:
    """The JSON object in a file. Raises OSError, ValueError."""
    data = parse_json(read_text(path, limit))
    if not isinstance(data, dict):
        raise ValueError(f"{os.path.basename(path)} holds no JSON object")
    return data


def parse_yaml(text: str):
    """Raises ValueError, which quotes nothing of the text, for what is no YAML, is nested too deep, or has aliases that stand for
    more than a text of that kind ever says."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is not None and written_out(root, {}) > MANY_NODES:
            raise ValueError("its aliases stand for too much")
        return None if root is None else loader.construct_document(root)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"line {line}: {error.problem}"[:100]) from None
    except yaml.YAMLError:
        raise ValueError("characters that no YAML holds") from None
    finally:
        if loader:
            loader.dispose()


def written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes a node of YAML stands for, if its aliases are written out; infinitely many where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = () if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(written_out(part, known) for part in parts)
    return known[id(node)]


# Writing


def json_text(data, **format) -> str:
    """JSON, as json.dumps formats it. A number that is not finite becomes null, which other readers
    than Python's know, and what a terminal would not just show is escaped."""
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    return UNSHOWN.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}",
                       json.dumps(data, **format))


def csv_text(rows) -> str:
    """Rows of strings as CSV. Cells are as `shown`, and what a spreadsheet would take for a formula
    gets an apostrophe before it, as OWASP advises."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([shown(FORMULA.sub(r"\1'", cell), math.inf) for cell in row]
                               for row in rows)
    return text.getvalue()


def write_whole(path: str, content) -> None:
    """Writes bytes to `path`, whole or not at all, whatever is killed or pulled meanwhile: the file is the old or the new one.

    Raises UserError where it cannot be written, as on a full disk; the old one is still there.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: else its name may reach the disk before its content
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room or choose another place") from error
    with contextlib.suppress(OSError):  # some network file systems cannot
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def alone(path: str, what: str):
    """Within it no other process on this machine, nor on others that share a file system with POSIX locks, holds the file `path`.

    The lock ends with the process, however that ends, and children do not inherit it. The file is gone afterwards. Raises
    UserError, naming `what`, where another process holds it or it cannot be made.
    """
    ends = time.monotonic() + DYING
    try:
        while (file := _lock(path)) is None and time.monotonic() < ends:
            time.sleep(0.05)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    if file is None:
        raise UserError(f"{what}: another process is writing there; wait for its end, or choose another place")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.remove(path)
        file.close()


def _lock(path: str):
    """The open file, locked; None where another process holds it."""
    while True:
        file = open(path, "a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                return file
            file.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise
        file.close()  # who held it has removed it meanwhile: lock the file that is there now
