"""A model as a folder for the Hugging Face hub: tensors and JSON, nothing that could run when it is read.

model.safetensors has the weights, config.json the options and the frontend, tokenizer.json the tokenizer. export.py puts a
model card and the ONNX files beside them. What a resumed training would need besides stays in the .ckpt.
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

WEIGHTS, CONFIG, TOKENIZER = FILES = "model.safetensors", "config.json", "tokenizer.json"
CONFIG_PARTS = ("model_options", "optim_options", "frontend")  # of a checkpoint
PARTS = ("state_dict", *CONFIG_PARTS, "tokenizer")  # of every checkpoint
# The pickles of torch.save name these, and no others, where they hold tensors and plain data.
GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(
        f"torch {kind}Storage"
        for kind in (
            "Float",
            "Half",
            "BFloat16",
            "Double",
            "Long",
            "Int",
            "Short",
            "Char",
            "Byte",
            "Bool",
        )
    ),
}
DEEP = 100  # no state of a training nests so deep
# A pickle may have so many opcodes, and what it makes so many parts: enough for 80,000 tensors.
MANY_STEPS, MANY_PARTS = 2**21, 2**20
# MARK stands on check_pickle's stack where pickle's own mark would. The opcodes in FILLED put parts
# into a value that is there already.
MARK, FILLED = object(), {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # org/name


def locate(name: str) -> str:
    """The path of a checkpoint: `name` itself, or, where there is no such path and it looks like org/name, the copy of that
    hub repository in huggingface_hub's cache, downloaded unless it is there. Raises UserError where the hub has none."""
    if os.path.exists(name) or name.endswith((".ckpt", ".json")) or not HUB_NAME.fullmatch(name):
        return name
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=list(FILES))
    except Exception as error:  # no such repository, no access, no network, no space: it has a dozen kinds for these
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: no such file or folder, and nothing comes from the hub ({reason[:200]}); "
            "check the name and the network"
        ) from error


def read_checkpoint(path: str) -> dict:
    """The checkpoint's dict, tensors on the CPU, of a .ckpt, a folder for the hub or a hub repository org/name, which have no
    state of training. Raises UserError where it is missing, unreadable, without a part that every model has, or not finite."""
    place = locate(path)
    if os.path.isdir(place):
        data = read_folder(place)
    elif not os.path.exists(place):
        raise UserError(
            f"{path}: no such checkpoint; train.py writes OUTPUT_DIR/best.ckpt and OUTPUT_DIR/last.ckpt"
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


def read_weights_only(path: str, mmap: bool = False):
    """What torch.save wrote, tensors on the CPU, without running any code that is in it or taking more memory than the file has
    bytes. Raises UserError, with the reason alone, where it is something else."""
    try:
        size = check_archive(path)
        with warnings.catch_warnings(
            action="ignore"
        ):  # of a TorchScript archive, which is refused anyway
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        check_plain(data, size)
        return data
    except UserError:
        raise
    except Exception as error:  # what is damaged makes torch.load raise nearly anything
        reason = (
            getattr(error, "strerror", None)
            or f"damaged, or something else ({type(error).__name__})"
        )
        raise UserError(reason) from error


def check_archive(path: str) -> int:
    """The size in bytes of a file that torch.save wrote. Raises an Exception where reading the file
    could take far more memory than that, or end the process: its records are compressed or overlap,
    or check_pickle refuses one of its pickles."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"PK\3\4":  # from before torch 1.6: five pickles, and then numbers
            file.seek(0)
            pickles = io.BytesIO(file.read(SMALL))
            for _ in range(5):
                check_pickle(pickles)
            return size
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            # A comment, or something before the first record, would let torch see another directory than zipfile does.
            if archive.comment or min(record.header_offset for record in records):
                raise UserError("damaged: an archive within another")
            if (
                any(record.compress_type for record in records)
                or sum(record.file_size for record in records) > size
            ):
                raise UserError(
                    "its records are compressed, which torch.save never does; save it anew"
                )
            for record in records:
                if record.filename.lower().endswith(".pkl"):  # torch takes capitals, too
                    check_pickle(io.BytesIO(archive.open(record).read(SMALL)))
    return size


def check_pickle(file) -> None:
    """Raises UnpicklingError unless the pickle in an open file makes nothing but tensors and plain
    data that are not nested deep.

    torch's own check is not enough: Python ends with a segmentation fault where a key is made of
    100,000 nested tuples, and torch allows bytearray(n), which takes n bytes. So this follows the
    pickle's stack machine and makes nothing. In place of a value its stack holds the depth to which
    the value nests, or, in place of a global, the global's name.
    """
    stack, memo = [], {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name, popped = opcode.name, []
        if count > MANY_STEPS:
            raise pickle.UnpicklingError("too many tensors")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            continue
        before = opcode.stack_before
        if pickletools.markobject in before:
            while (value := stack.pop()) is not MARK:
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
            stack.append(MARK)
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
    """Raises UserError unless `data`, which was read from a file of `size` bytes, is made of dicts,
    lists, tensors and the like, is not nested deep, and has tensors of at most twice as many bytes,
    because tied weights count twice."""
    waiting, nodes, held = [(data, 0)], 0, 0
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
    """The first of a checkpoint's weights, statistics, averages and moments of the optimizer that is not finite: a model with
    such hears nothing, and training it goes nowhere."""
    for part in ("state_dict", "current_model_state", "optimizer_states"):
        for names, value in tree_flatten_with_path(checkpoint.get(part))[0]:
            if (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and not value.float().isfinite().all()
            ):
                return shown(part + keystr(names), 200)
    return None


def write_folder(checkpoint: dict, folder: str) -> None:
    """FILES of a checkpoint, into a folder that exists. Raises OSError."""
    weights = {name: value.contiguous() for name, value in checkpoint["state_dict"].items()}
    try:
        safetensors.torch.save_file(
            weights, os.path.join(folder, WEIGHTS), metadata={"format": "pt"}
        )
    except SafetensorError as error:  # which a full disk is to it, too
        raise OSError(f"{WEIGHTS}: {error}") from error
    config = {"library_name": "lightning-u2", **{part: checkpoint[part] for part in CONFIG_PARTS}}
    for name, data in ((CONFIG, config), (TOKENIZER, checkpoint["tokenizer"])):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(data, file, ensure_ascii=False, indent=1)


def read_folder(folder: str) -> dict:
    """What write_folder was given, its tensors on the CPU. Raises UserError where a file is missing or damaged."""
    for name in FILES:
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(
                f"{folder}: a folder without {name}, so not one that export.py --hub_dir wrote; name such a "
                "folder, or a .ckpt"
            )
    try:
        config, tokenizer = (read_json(os.path.join(folder, name)) for name in (CONFIG, TOKENIZER))
        weights = safetensors.torch.load_file(os.path.join(folder, WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged ({shown(str(error), 200)}); get it again") from error
    return {
        "state_dict": weights,
        "tokenizer": tokenizer,
        **{part: config[part] for part in CONFIG_PARTS if part in config},
    }
