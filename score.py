"""Scores a checkpoint on a split: python score.py --checkpoint runs/demo/best.ckpt --data_root data/demo

Prints one JSON line per mode, the last line of stdout being the last mode; progress goes to stderr. wer and cer are
fractions over the whole split, as torchmetrics counts them. rtf is the time for features, encoder and search, reading
of the data excluded, over the duration of the audio.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.text import char_error_rate, word_error_rate
from tqdm import tqdm

import datamodule
from cli import UserError, add_options, build, option, run
from decode import MODES, SearchOptions
from model import load_checkpoint
from tokenizer import load_tokenizer, normalize_text
from transforms import extract


@dataclass(frozen=True)
class ScoreOptions:
    checkpoint: str = option("runs/demo/best.ckpt", "checkpoint that train.py wrote")
    data_root: str = option("data/demo", "data that prepare.py wrote")
    split: str = option("eval_clean", "split of the data")
    mode: str = option("attention_rescoring", "search, or all of them one after the other", choices=(*MODES, "all"))
    batch_size: int = option(16, "utterances decoded together, of like lengths; memory grows with it")
    details: str | None = option(None, "file to write with a JSON line per utterance and mode: what was said, heard, wrong")

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: it must be at least 1")
        if self.details and not os.path.isdir(os.path.dirname(self.details) or "."):
            raise UserError(f"--details {self.details}: no such folder; make it first")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for cls in (ScoreOptions, SearchOptions):
        add_options(parser, cls)
    given = vars(parser.parse_args(argv))
    options, search = build(ScoreOptions, given), build(SearchOptions, given)
    model, tokenizer, frontend = load_checkpoint(options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    dataset = datamodule.get_concat_dataset([options.data_root], options.split)
    references = read_references(dataset, tokenizer, options)
    details = []
    for mode in MODES if options.mode == "all" else (options.mode,):
        hypotheses, seconds = recognize(model, tokenizer, frontend, dataset, mode, options, search)
        duration = float(np.sum(datamodule.lengths(dataset))) / frontend.sample_rate
        print(json.dumps({"split": options.split, "mode": mode, **asdict(search), "utterances": len(references),
                          "wer": float(word_error_rate(hypotheses, references)),
                          "cer": float(char_error_rate(hypotheses, references)),
                          "rtf": round(seconds / duration, 5)}), flush=True)
        details += [describe(mode, row, *pair) for row, pair in enumerate(zip(references, hypotheses))]
    if options.details:
        write_lines(options.details, details)


def read_references(dataset, tokenizer, options: ScoreOptions) -> list[str]:
    """What was said, per row: the column `text`, else the labels as the tokenizer spells them.

    Raises UserError when there is nothing to compare with, or when labels without text belong to another tokenizer.
    """
    place = f"{options.data_root}, split {options.split}"
    if "text" in dataset.column_names:
        references = [normalize_text(text or "") for text in dataset["text"]]
    else:
        check_labels(dataset, tokenizer, options.data_root, place)
        references = [tokenizer.decode(label_ids(labels)) for labels in dataset["labels"]]
    if not any(references):
        raise UserError(f"{place}: no row has any text to compare with; prepare it with transcripts")
    return references


def label_ids(labels) -> list[int]:
    return labels["input_ids"] if isinstance(labels, dict) else labels


def check_labels(dataset, tokenizer, data_root: str, place: str) -> None:
    """Raises UserError when the labels mean something else to the checkpoint than to those who wrote them."""
    path = os.path.join(data_root, "tokenizer.json")
    if os.path.exists(path) and load_tokenizer(path).to_dict() != tokenizer.to_dict():
        raise UserError(f"{place}: there is no column text, and the labels belong to another tokenizer ({path}) than the "
                        "checkpoint's; score with a checkpoint trained on it, or prepare the data with text")
    for row, labels in enumerate(dataset["labels"]):
        if any(not 0 <= token < tokenizer.vocab_size for token in label_ids(labels)):
            raise UserError(f"{place}, row {row}: a token id lies outside the checkpoint's vocabulary of "
                            f"{tokenizer.vocab_size}; prepare the data with --tokenizer CHECKPOINT")


def recognize(model, tokenizer, frontend, dataset, mode: str, options: ScoreOptions,
              search: SearchOptions) -> tuple[list[str], float]:
    """(what was heard, per row; seconds it took)."""
    features_of, texts, seconds = extract(frontend), [""] * len(dataset), 0.0
    waveforms = dataset.select_columns(["input_values"]).with_format("numpy")
    order = np.argsort(-datamodule.lengths(dataset), kind="stable")  # longest first: memory runs out early or never
    for start in tqdm(range(0, len(order), options.batch_size), desc=mode, unit=" batches"):
        rows = order[start:start + options.batch_size].tolist()
        batch = [torch.from_numpy(waveforms[row]["input_values"].astype(np.float32)) for row in rows]
        began = time.perf_counter()
        features = [features_of(waveform) for waveform in batch]
        lengths = torch.tensor([len(frames) for frames in features])
        padded = pad_sequence(features, batch_first=True)  # (B,T,F)
        found = model.decode(padded.to(model.device), lengths.to(model.device), mode, **asdict(search))
        seconds += time.perf_counter() - began  # hypotheses are Python lists: the device has finished
        for row, hypothesis in zip(rows, found):
            texts[row] = tokenizer.decode(hypothesis.tokens)
    return texts, seconds


def describe(mode: str, row: int, reference: str, hypothesis: str) -> dict:
    """One utterance of --details."""
    return {"row": row, "mode": mode, "reference": reference, "hypothesis": hypothesis,
            "word_errors": count_errors(word_error_rate, hypothesis, reference, len(reference.split())),
            "char_errors": count_errors(char_error_rate, hypothesis, reference, len(reference))}


def count_errors(error_rate, hypothesis: str, reference: str, length: int) -> int:
    """The edit distance that torchmetrics divides by the reference's length."""
    if length == 0:  # everything heard is an insertion
        return len(hypothesis.split()) if error_rate is word_error_rate else len(hypothesis)
    return round(float(error_rate([hypothesis], [reference])) * length)


def write_lines(path: str, records: list[dict]) -> None:
    """Writes JSON lines, whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    run(main)
