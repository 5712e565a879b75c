"""Reads small files within bounds, and writes files and folders whole or not at all.

Below a folder: walk, follows.
Reading: open_file, read_small, read_text, read_json, parse_json, parse_yaml, cannot_read.
Text for others: json_text, csv_text. Writing: write_whole for a file, `published` for a folder.
Both hold the lock `alone`, so that one process writes at a time.
"""

import collections
import contextlib
import csv
import errno
import fcntl
import fnmatch
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath

from cli import UNSHOWN, UserError, shown

import yaml

# ---- What lies below a folder


MOST_LINKS = 100  # links to one folder: with links to links the number of paths doubles each time
DEEPEST = 100  # folders in folders


def walk(
    folder: str,
    unread: Callable[[str], None] | None = None,
    again: bool = True,
    above: tuple[str, ...] = (),
    seen: collections.Counter | None = None,
) -> Iterator[str]:
    """Yields all files below a folder, and behind links but those that lead back up.

    Hidden ones are left out. Unless `again`, a folder comes once, by the first way that leads
    there. `unread` is told the folders that cannot be read. Without it, they raise UserError, as do
    more than MOST_LINKS ways to a folder, and more than DEEPEST folders in each other.
    """
    real = os.path.realpath(folder)
    seen = collections.Counter() if seen is None else seen
    if real in above or seen[real] and not again:
        return
    seen[real] += 1
    if seen[real] > MOST_LINKS:
        raise UserError(
            f"{folder}: more than {MOST_LINKS} ways lead there, by links; take some out"
        )
    if len(above) > DEEPEST:
        raise UserError(f"{folder}: it lies below {DEEPEST} folders; take it out")
    try:
        entries = sorted((entry.name, entry.path, is_folder(entry)) for entry in os.scandir(folder))
    except OSError as error:
        if unread:
            return unread(folder)
        raise UserError(
            f"{folder} cannot be read ({error.strerror}); change that, or take it out"
        ) from None
    for name, path, goes_on in entries:
        if not name.startswith("."):
            yield from walk(path, unread, again, (*above, real), seen) if goes_on else [path]


def is_folder(entry: os.DirEntry) -> bool:
    """Returns whether an entry is a folder or a link to one; a link to itself is neither."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


@functools.lru_cache(2**16)  # without the cache ** after ** would take for ever
def follows(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Returns whether the names of a path follow a pattern, in which ** is any number of names.

    glob itself would follow links in circles.
    """
    if not pattern or not names:
        return not names and all(step == "**" for step in pattern)
    if pattern[0] == "**":
        return follows(names, pattern[1:]) or follows(names[1:], pattern)
    return fnmatch.fnmatchcase(names[0], pattern[0]) and follows(names[1:], pattern[1:])


# ---- Reading


# Bytes: more than any vocabulary, list of words or set of options has.
SMALL = 2**24
# Nodes of YAML: more than any set of options has.
MANY_NODES = 2**18


def open_file(path: str):
    """Opens a file that somebody names, to be read as bytes.

    Raises OSError, also for a pipe or a device: either may have no end, and whoever opens a pipe
    into which nobody writes waits for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError:
        raise OSError(errno.EINVAL, "a name with NUL in it", path) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "a pipe or a device, where a file is needed", path)


def read_small(path: str, limit: int = SMALL) -> bytes:
    """Returns the content of a file that somebody names.

    Raises OSError as open_file does, and ValueError for a file of more than `limit` bytes.
    """
    content = b""
    with open_file(path) as file:
        # A read takes room for all that it asks for, so it asks for no more than the file has. But
        # a file may grow, and those of /proc have no size.
        size = max(os.fstat(file.fileno()).st_size, 2**16)
        while len(content) <= limit and (more := file.read(min(limit - len(content), size) + 1)):
            content += more
    if len(content) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return content


def read_text(path: str, limit: int = SMALL) -> str:
    """Returns the content as text, without a byte order mark, each line's end as "\\n".

    Raises as read_small does.
    """
    text = read_small(path, limit).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def why(error: OSError | ValueError):
    """Returns why one of these functions failed, without the file's name, which the caller adds."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return getattr(error, "strerror", None) or error


def cannot_read(path: str, error: OSError | ValueError, remedy: str) -> UserError:
    """Makes the error for a file, called `path` by the user, that one of these cannot read."""
    return UserError(f"{path}: cannot be read ({shown(str(why(error)), 200)}); {remedy}")


def parse_json(text: str):
    """Returns what a JSON text says.

    Raises ValueError for no JSON, deep nesting, and a number that is not finite.
    """
    try:
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("nested too deep") from None


def finite(text: str) -> float:
    """Returns the number that a text says. Raises ValueError where the number is not finite."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is not finite")
    return value


def read_json(path: str, limit: int = SMALL) -> dict:
    """Returns the JSON object in a file. Raises OSError, ValueError."""
    data = parse_json(read_text(path, limit))
    if not isinstance(data, dict):
        raise ValueError(f"{os.path.basename(path)} holds no JSON object")
    return data


def parse_yaml(text: str):
    """Returns what a YAML text says.

    Raises ValueError, which quotes nothing of the text, for no YAML, deep nesting, and aliases that
    stand for more than MANY_NODES.
    """
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
    """Counts the nodes that a node of YAML stands for when its aliases are written out.

    The count of a node that holds itself is infinite. known: {id of a node: its count}, so far.
    """
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = () if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(written_out(part, known) for part in parts)
    return known[id(node)]


# ---- Text for other programs


# A spreadsheet looks for a formula where a cell begins. Some programs end a cell at a semicolon, a
# tab or a line break, and read wide forms of the signs as the signs.
FORMULA = re.compile("(^|;)(?=\\s*[-+=@\uff0d\uff0b\uff1d\uff20]|[\t\r\n])")


def json_text(data, **format) -> str:
    """Returns JSON, as json.dumps formats it.

    A number that is not finite becomes null, because only Python reads NaN, and a character that a
    terminal would not just show is escaped.
    """
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    return UNSHOWN.sub(
        lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}",
        json.dumps(data, **format),
    )


def csv_text(rows) -> str:
    """Returns rows of strings as CSV, each cell as `shown`.

    A cell that a spreadsheet would take for a formula gets an apostrophe before it, as OWASP
    advises.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows(
        [shown(FORMULA.sub(r"\1'", cell), math.inf) for cell in row] for row in rows
    )
    return text.getvalue()


# ---- Writing a file


# The end of the name of a file or folder that waits beside a path to take the path's place.
ASIDE = ".lightning-u2"
# The errors of a write for which there is no room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def aside(path: str) -> str:
    """Returns the path beside `path` at which its successor is written.

    No other path has this name beside it, and the name is never too long.
    """
    folder, name = os.path.split(path)
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return os.path.join(folder, f".{name}{ASIDE}")


def check_path(path: str, flag: str, needs: str) -> None:
    """Raises UserError where a library cannot write to the path, which the user gave with `flag`.

    The path is not in UTF-8, which the library `needs` needs, or fsspec, through which datasets and
    Lightning write, would write to another path.
    """
    if "::" in os.path.abspath(path):
        raise UserError(
            f"{flag} {path}: two colons in a name stand for a file within a file; give another name"
        )
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{flag} {path}: its name is not in UTF-8, which {needs} needs, or the "
            f"locale is not; give another {flag}, or set PYTHONUTF8=1"
        ) from None


def cannot_write(path: str, error: OSError) -> UserError:
    """Makes the error for a file or folder, called `path` by the user, that cannot be written."""
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); make room or choose another place"
    )


def check_replaced(path: str, flag: str, inputs: Iterable[str], start: bytes, kind: str) -> None:
    """Raises UserError where an output would replace anything but a `kind`.

    A `kind` begins by `start`. Nor may the output replace one of the `inputs`, or the file that
    stdout or stderr goes to.
    """
    if not os.path.exists(path):
        return
    if identity(path) in map(identity, (*inputs, 1, 2)):
        raise UserError(
            f"{flag} {path} is what this command reads, or where it prints; name another file"
        )
    begins = None
    if os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            begins = file.read(len(start))
    if begins not in (b"", start):
        raise UserError(
            f"{flag} {path} exists and is no {kind}, which alone is replaced; name another file"
        )


def write_whole(path: str, content) -> None:
    """Writes bytes to `path`: even after a kill or a power cut the file is the old or the new one.

    A symbolic link stays, and the file at its end is written. Raises UserError where the file is
    not written, as on a full disk; then the old file is still there.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EINVAL, "a folder, a pipe or a device is there")
        target = os.path.realpath(path)
        with alone(f"{aside(target)}.lock", path):
            _write(aside(target), target, content)
    except OSError as error:
        raise cannot_write(path, error) from error


def _write(temporary: str, target: str, content) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)  # left by a process that was killed
        with open(temporary, "xb") as file:  # "x" opens a new file, and follows no link
            if os.path.exists(target):
                shutil.copymode(target, temporary)
            file.write(content)
            file.flush()
            # This comes before the rename: else the name may reach the disk before the content.
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    _sync_folder(os.path.dirname(target))


def _sync_folder(path: str) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def identity(path: str | int) -> tuple[int, int] | None:
    """Returns two numbers that only this file has, under any of its names; None for no file.

    An open file may be given by its descriptor.
    """
    try:
        return (found := os.stat(path)).st_dev, found.st_ino
    except (OSError, ValueError):
        return None


# ---- Writing a folder


# This file, in a folder that `published` has written, lists the files that were written.
MARK = ".lightning-u2.json"
# The datasets library leaves files with these names beside shards, and can make them again.
CACHE = re.compile(r"cache-[0-9a-f]{16}\w*\.arrow")


@contextlib.contextmanager
def published(path: str, what: str, overwrite: bool, inputs: tuple = ()):
    """Gives a `with` block a new folder to write into, which takes the place of `path` at its end.

    After a kill, a power cut or a full disk, the old folder or the new one is at `path`, whole, or
    the old one is in aside(path), from where the next call for `path` puts it back.

    Raises UserError before the block where `path` cannot be moved or made, where it holds something
    and `overwrite` is False, where it holds files that no earlier call with the same `what` ("an
    export") has put there, or where it holds one of `inputs`. Raises UserError after the block for
    a full disk. In both cases everything is as it was before.
    """
    try:
        root = os.path.realpath(path)
        ours = aside(root)
        new, old, gone = (os.path.join(ours, name) for name in ("new", "old", "gone"))
        os.makedirs(os.path.dirname(root), exist_ok=True)
        with alone(f"{ours}.lock", path):
            _restore(root, old, gone)
            if os.path.lexists(ours):
                _remove(ours)  # left by a process that was killed
            _check_replaceable(path, root, what, overwrite, inputs)
            try:
                _rehearse(path, root, os.path.join(ours, "trap"))
                os.makedirs(new)
                yield new
                _mark(new, what)
                # The block may have taken hours, and somebody may have put files there meanwhile.
                _check_replaceable(path, root, what, overwrite, inputs)
                try:
                    if os.path.isdir(root):
                        shutil.copymode(root, new)
                        os.replace(root, old)
                    os.replace(new, root)
                finally:  # a signal may have come between the two steps
                    _restore(root, old, gone)
                _sync_folder(os.path.dirname(root))
            finally:
                if not os.path.lexists(old):
                    shutil.rmtree(ours, ignore_errors=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _remove(path: str) -> None:
    """Removes a folder. Raises UserError where that fails, as for somebody else's files."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise UserError(
            f"{path} is left of an earlier run and cannot be removed ({error.strerror}); remove it"
        ) from error


def _restore(root: str, old: str, gone: str) -> None:
    """Ends the exchange of two folders that a killed process may have left between two steps.

    Afterwards the folder `old` is back at `root`, or `old` is gone because the new one is there.
    """
    if not os.path.lexists(old):
        return
    if os.path.isdir(root) and not os.listdir(root):
        os.rmdir(root)  # made since the kill, as a container makes the folders that it mounts
    if not os.path.lexists(root):
        os.replace(old, root)
    elif os.path.exists(os.path.join(root, MARK)):
        os.replace(old, gone)  # one step, because a folder deleted in half must not come back
    else:
        raise UserError(
            f"{old} was in the place of {root} when a run was killed, and something "
            "else is there now; move one of the two away"
        )


def _check_replaceable(path: str, root: str, what: str, overwrite: bool, inputs: tuple) -> None:
    """Raises UserError where the folder `root`, called `path` by the user, may not be replaced.

    Raises OSError where the folder cannot be read.
    """
    try:
        os.lstat(root)  # os.path.lexists would say False for a name that is too long
    except FileNotFoundError:
        return
    if not os.path.isdir(root):
        raise UserError(f"{path} is a file; name a folder")
    if _within(os.getcwd(), root):
        raise UserError(
            f"{path} is the current folder or holds it, so it cannot be replaced; name "
            "another folder, or run from elsewhere"
        )
    if os.listdir(root) and not overwrite:
        raise UserError(f"{path} exists; name another folder, or add --overwrite")
    if other := _foreign(root, what):
        raise UserError(
            f"{path} holds more than {what} ({other}), so --overwrite does not replace "
            "it; name another folder, or move away what is new or was changed (where "
            "an older version made the folder, all of it)"
        )
    for name in inputs:
        if name and os.path.exists(name) and _within(name, root):
            raise UserError(f"{path} holds {name}, of which it is to be made; name another folder")


def _within(path: str, folder: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


def _foreign(root: str, what: str) -> str | None:
    """Names something in `root` that `published` did not write, or that has changed; else None."""
    try:
        mark = read_json(os.path.join(root, MARK), 2**28)
        written = dict(mark["files"]) if mark["what"] == what else {}
        folders = {str(folder) for name in written for folder in PurePath(name).parents}
    except (OSError, ValueError, LookupError, TypeError):
        written = {}
        folders = set()
    mounts = _mounts()
    for path, is_folder in _inside(root):
        name = os.path.relpath(path, root)
        if path in mounts or os.path.ismount(path):
            ours = False
        elif is_folder:
            ours = name in folders
        elif name == MARK or CACHE.fullmatch(os.path.basename(name)):
            ours = True
        else:
            ours = name in written and written[name] == _look(path)
        if not ours:
            return name
    return None


def _mounts() -> set[str]:
    """Returns the paths where something is mounted.

    os.path.ismount sees neither a mounted file nor a mounted folder of the same disk.
    """
    try:
        with open("/proc/self/mountinfo", "rb") as file:  # Linux alone has it
            places = [line.split()[4] for line in file]
    except OSError:
        return set()
    return {
        os.fsdecode(re.sub(rb"\\(\d{3})", lambda found: bytes([int(found[1], 8)]), place))
        for place in places
    }


def _inside(root: str):
    """Yields (path, whether it is a folder, and no link) of everything below a folder.

    Raises OSError.
    """

    def fail(error):
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        for name in sorted(folders + names):
            path = os.path.join(folder, name)
            yield path, name in folders and not os.path.islink(path)


def _look(path: str) -> list | None:
    """Returns a file's size and a checksum of its first MB, to see later whether it has changed.

    It returns None where the path is no file.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return None
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, zlib.crc32(file.read(2**20))]


def _mark(folder: str, what: str) -> None:
    """Writes MARK into the folder, and makes sure that all of the folder is on the disk."""
    everything = list(_inside(folder))
    mark = os.path.join(folder, MARK)
    written = {
        os.path.relpath(path, folder): _look(path)
        for path, is_folder in everything
        if not is_folder
    }
    with open(mark, "w") as file:
        json.dump({"what": what, "files": written}, file, indent=1)
    for path, is_folder in (*everything, (mark, False), (folder, True)):
        if is_folder:
            _sync_folder(path)
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _rehearse(path: str, root: str, trap: str) -> None:
    """Raises UserError or OSError where `root` could not be moved or made after the hours of work.

    To find out, the function tries to move `root` onto the folder `trap`, which is not empty. The
    system refuses, and its reason tells whether `root` could have been moved elsewhere.
    """
    os.makedirs(os.path.join(trap, "something"))
    if not os.path.lexists(root):
        os.mkdir(root)
        os.rmdir(root)
        return
    try:
        os.replace(root, trap)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise UserError(
                f"{path} cannot be replaced, being a mount point or in a container's "
                "image; name a folder in it"
            ) from error
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        os.replace(trap, root)


# ---- Locks


# Seconds for which a process that was killed may still hold a lock.
DYING = 2.0


@contextlib.contextmanager
def alone(path: str, what: str):
    """Holds the lock file `path` during a `with` block: no other process can hold it then.

    That is true on this machine, and on others that share a file system with POSIX locks. The lock
    ends with the process, even a killed one, and children do not inherit it. The file is removed
    afterwards. Raises UserError, which names `what`, where another process holds the lock or the
    file cannot be made.
    """
    ends = time.monotonic() + DYING
    try:
        while (file := _lock(path)) is None and time.monotonic() < ends:
            time.sleep(0.05)
    except OSError as error:
        raise cannot_write(what, error) from error
    if file is None:
        raise UserError(
            f"{what}: another process is writing there; wait for its end, or choose another place"
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.remove(path)
        file.close()


def _lock(path: str):
    """Opens and locks the file, or returns None where another process holds the lock."""
    while True:
        file = open(path, "a", opener=lambda *how: os.open(how[0], how[1] | os.O_NOFOLLOW, 0o666))
        try:
            if os.fstat(file.fileno()).st_size:
                raise OSError(errno.EEXIST, f"{path} is no lock, which would be empty")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return file  # this file system has no locks
            file.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise
        # The process that held the lock has removed the file: try the one that is there now.
        file.close()
