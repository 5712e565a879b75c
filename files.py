"""Files are read whole where they are small and honest, and written whole or not at all, by one
writer at a time."""

import contextlib
import csv
import errno
import fcntl
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
from pathlib import PurePath

from cli import UNSHOWN, UserError, shown

import yaml

# For so many seconds a process that was killed may still hold a lock.
DYING = 2.0
# No vocabulary, list of words or set of options has so many bytes.
SMALL = 2**24
# No set of options has so many nodes of YAML.
MANY_NODES = 2**18
# A spreadsheet finds a formula where a cell begins. Some take a semicolon, a tab or a line break
# for the end of a cell, and wide forms of the signs for the signs.
FORMULA = re.compile("(^|;)(?=\\s*[-+=@\uff0d\uff0b\uff1d\uff20]|[\t\r\n])")


# Reading


def open_file(path: str):
    """Opens a file that somebody names, to be read as bytes.

    Raises OSError, also for a pipe or a device: it may have no end, and whoever opens a pipe into
    which nobody writes waits for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError:
        raise OSError(errno.EINVAL, "a name with NUL in it", path) from None
    if stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    reason = (
        os.strerror(errno.EISDIR)
        if stat.S_ISDIR(mode)
        else "a pipe or a device, where a file is needed"
    )
    raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, reason, path)


def read_small(path: str, limit: int = SMALL) -> bytes:
    """The content of a file that somebody names. Raises OSError as open_file does, and ValueError
    where the file is longer than `limit` bytes."""
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return content


def read_text(path: str, limit: int = SMALL) -> str:
    """The same, as text. A byte order mark is left out. Raises OSError and ValueError."""
    return read_small(path, limit).decode("utf-8-sig")


def why(error: OSError | ValueError):
    """The reason alone for which one of these functions failed: the caller names the file."""
    return getattr(error, "strerror", None) or error


def parse_json(text: str):
    """What the JSON `text` says. Raises ValueError where it is no JSON, is nested too deep, or
    holds a number that is not finite."""
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
    """What the YAML `text` says. Raises ValueError, which quotes nothing of the text, where it is
    no YAML, is nested too deep, or has aliases that stand for more than options ever say."""
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
    """The number of nodes that a node of YAML stands for when its aliases are written out. It is
    infinite where the node holds itself. `known` has the numbers found before, by the node's id."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = () if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(written_out(part, known) for part in parts)
    return known[id(node)]


# Writing


# What waits beside a path to take the path's place has a name that ends so.
ASIDE = ".lightning-u2"
# This file lists, in a folder of ours, what we wrote there.
MARK = ".lightning-u2.json"
# A write fails with one of these where there is no room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The datasets library leaves such files beside shards, and can make them again.
CACHE = re.compile(r"cache-[0-9a-f]{16}\w*\.arrow")


def json_text(data, **format) -> str:
    """JSON, as json.dumps formats it. A number that is not finite becomes null, which other readers
    than Python's know, and what a terminal would not just show is escaped."""
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    return UNSHOWN.sub(
        lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}",
        json.dumps(data, **format),
    )


def csv_text(rows) -> str:
    """Rows of strings as CSV. Cells are as `shown`, and what a spreadsheet would take for a formula
    gets an apostrophe before it, as OWASP advises."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(
        [shown(FORMULA.sub(r"\1'", cell), math.inf) for cell in row] for row in rows
    )
    return text.getvalue()


def aside(path: str) -> str:
    """Where what is to take the place of `path` is written: beside it, under a name that is
    nobody else's, and never too long."""
    folder, name = os.path.split(path)
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return os.path.join(folder, f".{name}{ASIDE}")


def check_utf8(path: str, flag: str, needs: str) -> None:
    """UserError where the path, which `flag` leads to, is not in UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{flag} {path}: its name is not in UTF-8, which {needs} needs, or the "
            f"locale is not; give another {flag}, or set PYTHONUTF8=1"
        ) from None


def cannot_write(path: str, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); make room or choose another place"
    )


def write_whole(path: str, content) -> None:
    """Writes bytes to `path`, whole or not at all, whatever is killed or pulled meanwhile: the
    file is the old or the new one. A symbolic link stays, and the file that it leads to is
    written. A new file has the permissions of any new file.

    Raises UserError where it cannot be written, as on a full disk; the old one is still there.
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
            os.remove(temporary)  # of a process that was killed
        with open(temporary, "xb") as file:  # a new file: O_EXCL follows no link
            if os.path.exists(target):
                shutil.copymode(target, temporary)
            file.write(content)
            file.flush()
            # Before the rename: else its name may reach the disk before its content.
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
    """What a file, or an open one by its number, has in common with no other one, whatever it is
    called. None where there is none."""
    try:
        return (found := os.stat(path)).st_dev, found.st_ino
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def published(path: str, what: str, overwrite: bool, inputs: tuple = ()):
    """A new folder to write into, which takes the place of `path` at the end of the block.

    Whatever is killed, pulled or full meanwhile, the old folder or the new one is at `path`, whole,
    or the old one is beside it, where the next call for `path` finds it and puts it back. All that
    is beside `path` lies in aside(path).

    Raises UserError before the block where `path` cannot be moved or made, where it holds something
    and `overwrite` is False, where it holds anything but what an earlier call with the same `what`
    ("an export") has put there, or one of `inputs`. Raises it after the block where the disk is
    full. Then everything is as it was before.
    """
    try:
        root = os.path.realpath(path)
        ours = aside(root)
        new, old, gone = (os.path.join(ours, name) for name in ("new", "old", "gone"))
        os.makedirs(os.path.dirname(root), exist_ok=True)
        with alone(f"{ours}.lock", path):
            _restore(root, old, gone)
            if os.path.lexists(ours):
                _remove(ours)  # of a process that was killed
            _check_replaceable(path, root, what, overwrite, inputs)
            try:
                _rehearse(path, root, os.path.join(ours, "trap"))
                os.makedirs(new)
                yield new
                _mark(new, what)
                # Once more: in the hours that the block takes, something may have come there.
                _check_replaceable(path, root, what, overwrite, inputs)
                try:
                    if os.path.isdir(root):
                        shutil.copymode(root, new)
                        os.replace(root, old)
                    os.replace(new, root)
                finally:  # a signal may come between the two
                    _restore(root, old, gone)
                _sync_folder(os.path.dirname(root))
            finally:
                if not os.path.lexists(old):
                    shutil.rmtree(ours, ignore_errors=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _remove(path: str) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:  # somebody else's files were in the folder that it was
        raise UserError(
            f"{path} is left of an earlier run and cannot be removed ({error.strerror}); remove it"
        ) from error


def _restore(root: str, old: str, gone: str) -> None:
    """Ends the exchange of two folders, which a process that was killed may have left between two
    steps. Afterwards the folder `old` is back at `root`, or it is gone because the new one is
    there."""
    if not os.path.lexists(old):
        return
    if os.path.isdir(root) and not os.listdir(root):
        os.rmdir(root)  # made since, as a container makes what it mounts
    if not os.path.lexists(root):
        os.replace(old, root)
    elif os.path.exists(os.path.join(root, MARK)):
        os.replace(old, gone)  # at once, because what is deleted in half must not come back
    else:
        raise UserError(
            f"{old} was in the place of {root} when a run was killed, and something "
            "else is there now; move one of the two away"
        )


def _check_replaceable(path: str, root: str, what: str, overwrite: bool, inputs: tuple) -> None:
    """Raises UserError where the folder `root`, which the user calls `path`, may not be replaced,
    and OSError where it cannot be read."""
    try:
        os.lstat(root)  # lexists would say of a name that is too long that nothing is there
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
    """The name of something in the folder `root` that `published` did not put there, or that was
    changed since. None where there is nothing of the kind."""
    try:
        mark = read_json(os.path.join(root, MARK), 2**28)
        written = dict(mark["files"]) if mark["what"] == what else {}
        folders = {str(folder) for name in written for folder in PurePath(name).parents}
    except (OSError, ValueError, LookupError, TypeError):
        written, folders = {}, set()
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
    """Where something is mounted. os.path.ismount does not see a folder of the same disk, nor a
    file, that is mounted there."""
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
    """Yields (path, whether it is a folder) for everything below a folder. A link counts as no
    folder. Raises OSError."""

    def fail(error):
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        for name in sorted(folders + names):
            path = os.path.join(folder, name)
            yield path, name in folders and not os.path.islink(path)


def _look(path: str) -> list | None:
    """What shows that a file has not been changed since: its size, and a checksum of its
    beginning. None for what is no file."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return None
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, zlib.crc32(file.read(2**20))]


def _mark(folder: str, what: str) -> None:
    """Writes MARK into the folder, and makes sure that all of the folder is on the disk."""
    everything, mark = list(_inside(folder)), os.path.join(folder, MARK)
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
    """Raises UserError or OSError where `root` could not be moved or made later, when everything is
    written.

    To find out, it tries to move `root` onto the folder `trap`, which has something in it. The
    system refuses that, and its reason tells whether `root` could have been moved elsewhere.
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


@contextlib.contextmanager
def alone(path: str, what: str):
    """Within the block no other process holds the lock file `path`, be it on this machine or on one
    that shares a file system with POSIX locks.

    The lock ends with the process, however that ends, and children do not inherit it. The file is
    removed afterwards. Raises UserError, which names `what`, where another process holds the lock
    or the file cannot be made.
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
    """Opens and locks the file. None where another process holds it."""
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
                # This file system has no locks.
                return file
            file.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise
        # The process that held the lock has removed the file: try the one that is there now.
        file.close()
