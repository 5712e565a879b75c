"""Reads a model from a .ckpt, a folder or the Hugging Face hub, and writes such a folder.

A .ckpt is what torch.save makes of a dict. A folder holds tensors and JSON, so nothing that could
run when it is read: model.safetensors has the weights, config.json the options and the frontend,
tokenizer.json the tokenizer. tools/export.py puts a model card and the ONNX files beside them. Only
a .ckpt has the state of a training, which --resume needs.

A stranger may have made the file. Reading it runs no code of the file, takes no more memory than
the file has bytes, and ends in UserError where the file is something else: see the checks below.
"""

import io
import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile

from cli import UserError, shown

import huggingface_hub
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.utils._pytree import keystr, tree_flatten_with_path

from files import SMALL, open_file, read_json

HUB_FILES = ("model.safetensors", "config.json", "tokenizer.json")  # of a folder
WEIGHTS, CONFIG, TOKENIZER = HUB_FILES
CONFIG_PARTS = ("model_options", "optim_options", "frontend")  # of a checkpoint, in config.json
PARTS = ("state_dict", *CONFIG_PARTS, "tokenizer")  # of every checkpoint
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # org/name


# ---- Reading and writing


def read_checkpoint(path: str) -> dict:
    """Reads a checkpoint's dict, with tensors on the CPU.

    `path` is that of a .ckpt or a folder, or the name org/name of a hub repository. Raises
    UserError where the checkpoint is missing, unreadable, without a part that every model has, or
    not finite.
    """
    place = locate(path)
    if os.path.isdir(place):
        data = read_folder(place)
    elif not os.path.exists(place):
        raise UserError(
            f"{path}: no such checkpoint; train.py writes OUTPUT_DIR/best.ckpt and "
            "OUTPUT_DIR/last.ckpt"
        )
    else:
        try:
            data = read_weights_only(place)
        except UserError as error:
            raise UserError(f"{path}: not a checkpoint of lightning-U2: {error}") from error
    missing = [key for key in PARTS if not isinstance(data, dict) or key not in data]
    if missing:
        raise UserError(f"{path}: not a checkpoint of lightning-U2 (no {', '.join(missing)} in it)")
    if name := not_finite(data):
        raise UserError(
            f"{path}: damaged by training: {name} is not finite; use a checkpoint from before"
        )
    return data


def is_of_hub(name: str) -> bool:
    """Returns whether `name` is org/name of the hub, and no path."""
    is_path = os.path.exists(name) or name.endswith((".ckpt", ".json"))
    return not is_path and HUB_NAME.fullmatch(name) is not None


def locate(name: str) -> str:
    """Finds the path of a checkpoint: `name` itself, or a hub repository's copy in the cache.

    A path that exists goes before a repository org/name, which huggingface_hub downloads unless it
    is in the cache. Raises UserError where the hub does not give the repository.
    """
    if not is_of_hub(name):
        return name
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES))
    except Exception as error:  # a dozen kinds: no such repository, no access, no network, no space
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: no such file or folder, and nothing comes from the hub ({reason[:200]}); "
            "check the name and the network"
        ) from error


def read_weights_only(path: str, mmap: bool = False):
    """Reads what torch.save wrote into a file, with tensors on the CPU.

    Raises UserError, with the reason alone, where the file is something else.
    """
    try:
        size = check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # of TorchScript, which is refused anyway
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        check_plain(data, size)
        return data
    except UserError:
        raise
    except Exception as error:  # torch.load raises nearly anything where a file is damaged
        reason = f"damaged, or something else ({type(error).__name__})"
        raise UserError(getattr(error, "strerror", None) or reason) from error


def read_folder(folder: str) -> dict:
    """Reads the dict that write_folder was given, with tensors on the CPU.

    Raises UserError where a file is missing or damaged.
    """
    for name in HUB_FILES:
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(
                f"{folder}: a folder without {name}, so not one that `python -m tools.export "
                "--hub_dir` wrote; name such a folder, or a .ckpt"
            )
    try:
        config = read_json(os.path.join(folder, CONFIG))
        tokenizer = read_json(os.path.join(folder, TOKENIZER))
        weights = safetensors.torch.load_file(os.path.join(folder, WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged ({shown(str(error), 200)}); get it again") from error
    parts = {part: config[part] for part in CONFIG_PARTS if part in config}
    return {"state_dict": weights, "tokenizer": tokenizer, **parts}


def write_folder(checkpoint: dict, folder: str) -> None:
    """Writes HUB_FILES of a checkpoint's dict into a folder that exists. Raises OSError."""
    weights = {name: value.contiguous() for name, value in checkpoint["state_dict"].items()}
    path = os.path.join(folder, WEIGHTS)
    try:
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # also where the disk is full
        raise OSError(f"{WEIGHTS}: {error}") from error
    config = {"library_name": "lightning-u2", **{part: checkpoint[part] for part in CONFIG_PARTS}}
    for name, data in ((CONFIG, config), (TOKENIZER, checkpoint["tokenizer"])):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(data, file, ensure_ascii=False, indent=1)


# ---- Checks


# torch.save's pickles of tensors and plain data name these globals, and no others.
GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double")),
    *(f"torch {kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool")),
}
# No state of a training nests deeper.
DEEP = 100
# A pickle has at most so many opcodes, and its data so many parts: enough for 80,000 tensors.
MANY_STEPS = 2**21
MANY_PARTS = 2**20
# MARKER stands on check_pickle's stack where pickle's own mark would.
MARKER = object()
# These opcodes put parts into a value that is there already.
FILLED = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}


def check_archive(path: str) -> int:
    """Returns the size in bytes of a file that torch.save wrote.

    Raises an Exception where a record's bytes are not those of its checksum, and where reading the
    file could take far more memory than its size, or end the process: its records are compressed or
    overlap, or check_pickle refuses one of its pickles.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"PK\3\4":  # before torch 1.6: five pickles, then the numbers
            file.seek(0)
            pickles = io.BytesIO(file.read(SMALL))
            for _ in range(5):
                check_pickle(pickles)
            return size
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            # A comment, or something before the first record, would let torch see another directory
            # than zipfile does.
            if archive.comment or min(record.header_offset for record in records):
                raise UserError("damaged: an archive within another")
            compressed = any(record.compress_type for record in records)
            if compressed or sum(record.file_size for record in records) > size:
                raise UserError(
                    "its records are compressed, which torch.save never does; save it anew"
                )
            if bad := archive.testzip():  # torch reads past the checksums
                raise UserError(f"damaged: {shown(bad, 100)} has another checksum; get it again")
            for record in records:
                if record.filename.lower().endswith(".pkl"):  # torch takes capitals, too
                    check_pickle(io.BytesIO(archive.open(record).read(SMALL)))
    return size


def check_pickle(file) -> None:
    """Raises UnpicklingError where a pickle makes more than tensors and plain data, or nests deep.

    torch's own check is not enough: Python ends with a segmentation fault where a key is made of
    100,000 nested tuples, and torch allows bytearray(n), which takes n bytes. So this function
    follows the pickle's stack machine and makes nothing. In place of a value its stack holds the
    depth to which the value nests; in place of a global, the global's name.
    """
    stack = []
    memo = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        popped = []
        if count > MANY_STEPS:
            raise pickle.UnpicklingError("too many tensors")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            continue
        before = opcode.stack_before
        if pickletools.markobject in before:
            while (value := stack.pop()) is not MARKER:
                popped.append(value)
            before = before[: before.index(pickletools.markobject)]
        popped += [stack.pop() for _ in before]
        if name == "GLOBAL":
            if argument not in GLOBALS:
                raise pickle.UnpicklingError(f"{argument} is not needed")
            stack.append(argument)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(MARKER)
        elif name == "REDUCE" and popped[1] == "collections OrderedDict" and popped[0]:
            raise pickle.UnpicklingError("a dict copied from another")
        elif opcode.stack_after:
            numbers = [value for value in popped if isinstance(value, int)]
            filled = numbers.pop() if name in FILLED and numbers else 0
            depth = max(filled, 1 + max(numbers, default=-1))
            if depth > DEEP:
                raise pickle.UnpicklingError("nested too deep")
            stack.append(depth)


def check_plain(data, size: int) -> None:
    """Raises UserError unless `data`, which was read from a file of `size` bytes, is plain.

    Plain data is made of dicts, lists, tensors, text and numbers, and is not nested deep. Its
    tensors have at most 2 * `size` bytes; tied weights count twice.
    """
    waiting = [(data, 0)]
    nodes = 0
    held = 0  # bytes of the tensors
    while waiting:
        value, depth = waiting.pop()
        nodes += 1
        if depth > DEEP or nodes > MANY_PARTS:
            raise UserError("nested too deep, or within itself")
        if isinstance(value, dict):
            if not all(type(key) in (str, int) for key in value):
                raise UserError("a name in it is neither text nor a whole number")
            waiting += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, torch.Tensor):
            held += value.numel() * value.element_size()
            if held > 2 * size:
                raise UserError("its tensors repeat numbers, for more than the file holds")
        elif not isinstance(value, (str, bytes, int, float, bool, type(None))):
            raise UserError(f"a {type(value).__name__} in it")


def not_finite(checkpoint: dict) -> str | None:
    """Returns the name of the first tensor in a checkpoint that is not finite, or None.

    The tensors are weights, statistics, averages and the optimizer's moments. A model with a number
    that is not finite hears nothing, and training does not mend it.
    """
    for part in ("state_dict", "current_model_state", "optimizer_states"):
        for names, value in tree_flatten_with_path(checkpoint.get(part))[0]:
            numbers = isinstance(value, torch.Tensor) and value.is_floating_point()
            if numbers and not value.float().isfinite().all():
                return shown(part + keystr(names), 200)
    return None
