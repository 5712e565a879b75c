"""A model as a folder for the Hugging Face hub: tensors and JSON, nothing that could run when it is read.

model.safetensors has the weights, config.json the options and the frontend, tokenizer.json the tokenizer. export.py puts a
model card and the ONNX files beside them. What a resumed training would need besides stays in the .ckpt.
"""

import json
import os
import re
import warnings

import huggingface_hub
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.utils._pytree import keystr, tree_flatten_with_path

from cli import UserError

WEIGHTS, CONFIG, TOKENIZER = FILES = "model.safetensors", "config.json", "tokenizer.json"
CONFIG_PARTS = ("model_options", "optim_options", "frontend")  # of a checkpoint
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
        raise UserError(f"{name}: no such file or folder, and nothing comes from the hub ({reason[:200]}); "
                        "check the name and the network") from error


def read_weights_only(path: str, mmap: bool = False):
    """What torch.save wrote, tensors on the CPU, without running any code that is in it. Raises UserError, with the reason alone,
    where it is something else."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a TorchScript archive, which is refused anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what is damaged makes torch.load raise nearly anything
        reason = getattr(error, "strerror", None) or f"damaged, or something else ({type(error).__name__})"
        raise UserError(reason) from error


def not_finite(checkpoint: dict) -> str | None:
    """The first of a checkpoint's weights, statistics, averages and moments of the optimizer that is not finite: a model with
    such hears nothing, and training it goes nowhere."""
    for part in ("state_dict", "current_model_state", "optimizer_states"):
        for names, value in tree_flatten_with_path(checkpoint.get(part))[0]:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
                return f"{part}{keystr(names)}"
    return None


def write_model(checkpoint: dict, folder: str) -> None:
    """FILES of a checkpoint, into a folder that exists. Raises OSError."""
    weights = {name: value.contiguous() for name, value in checkpoint["state_dict"].items()}
    try:
        safetensors.torch.save_file(weights, os.path.join(folder, WEIGHTS),
                                    metadata={"format": "pt"})
    except SafetensorError as error:  # which a full disk is to it, too
        raise OSError(f"{WEIGHTS}: {error}") from error
    config = {"library_name": "lightning-u2", **{part: checkpoint[part] for part in CONFIG_PARTS}}
    for name, data in ((CONFIG, config), (TOKENIZER, checkpoint["tokenizer"])):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(data, file, ensure_ascii=False, indent=1)


def read_model(folder: str) -> dict:
    """What write_model was given, its tensors on the CPU. Raises UserError where a file is missing or damaged."""
    for name in FILES:
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(f"{folder}: a folder without {name}, so not one that export.py --hub_dir wrote; name such a "
                            "folder, or a .ckpt")
    try:
        config, tokenizer = (read_json(os.path.join(folder, name)) for name in (CONFIG, TOKENIZER))
        weights = safetensors.torch.load_file(os.path.join(folder, WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged ({error}); get it again") from error
    return {"state_dict": weights, "tokenizer": tokenizer, **{part: config[part] for part in CONFIG_PARTS if part in config}}


def read_json(path: str) -> dict:
    """Raises OSError, or ValueError for what is no JSON object."""
    with open(path, encoding="utf-8") as file:
        data = json.load(file)
    if not isinstance(data, dict):
        raise ValueError(f"{os.path.basename(path)} holds no JSON object")
    return data
