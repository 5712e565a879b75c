"""Scores a checkpoint on a split: python score.py --checkpoint runs/demo/best.ckpt --data_root data/demo

Prints one JSON line per mode, the last line of stdout being the last mode; progress goes to stderr. wer and cer are
fractions over the whole split, as torchmetrics counts them. rtf is the time for features, encoder and search, reading
of the data excluded, over the duration of the audio.
"""

import contextlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

from cli import UserError, build, make_parser, option, options_class, run, shown

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.text import char_error_rate, word_error_rate
from tqdm import tqdm

from context import HotwordOptions, load_hotwords
from datamodule import EVAL_SECONDS, audio_lengths, get_concat_dataset, load_split, rows_rate
from decode import CONTEXT_MODES, MODES, SearchOptions
from files import identity, json_text, write_whole
from model import load_checkpoint
from sampler import eval_batches
from stream import cut, listen
from tokenizer import check_maker, most_frequent, normalize_text
from transforms import check_samples, extract
from words import join


@options_class
class ScoreOptions:
    checkpoint: str = option("runs/demo/best.ckpt", "a .ckpt, a folder for the hub, or org/name")
    data_root: str = option("data/demo", "data that prepare.py wrote")
    split: str = option("eval_clean", "split of the data")
    mode: str = option(
        "attention_rescoring", "search, or all of them one after the other", choices=(*MODES, "all")
    )
    stream: bool = option(
        False, "hear every row piece by piece, in chunks of --chunk_size, 16 unless given"
    )
    concatenate: bool = option(
        False, "with --stream: all rows are one long recording, with endpoints where they fall"
    )
    batch_size: int = option(
        16,
        "most utterances decoded together, of like lengths; fewer where they would be more than "
        f"{EVAL_SECONDS:g} s",
        at_least=1,
        at_most=2**16,
    )
    examples: int = option(
        0,
        "print so many utterances, what was said above what was heard in the last mode",
        at_least=0,
        at_most=10**9,
    )
    details: str | None = option(
        None, "file to write: a JSON line per utterance, what was said, heard and wrong"
    )

    def __post_init__(self):
        if self.stream and self.mode != "attention_rescoring":
            raise UserError(
                f"--mode {self.mode}: --stream hears by attention_rescoring only; leave one of them out"
            )
        if self.concatenate and not self.stream:
            raise UserError("--concatenate has no effect without --stream; give both or neither")
        folder = self.details and (os.path.dirname(self.details) or ".")
        if folder and not os.path.isdir(folder):
            raise UserError(f"--details {self.details}: no such folder; make it first")
        if folder and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"--details {self.details}: its folder cannot be written; name another file"
            )


def main(argv: list[str]) -> None:
    given = vars(make_parser(__doc__, ScoreOptions, SearchOptions, HotwordOptions).parse_args(argv))
    options, words = build(ScoreOptions, given), build(HotwordOptions, given)
    if words.hotwords and options.mode not in (*CONTEXT_MODES, "all"):
        raise UserError(
            f"--mode {options.mode} cannot favour --hotwords; choose one of {', '.join(CONTEXT_MODES)}"
        )
    check_details(options, words)
    search = build(SearchOptions, given, **({"chunk_size": 16} if options.stream else {}))
    model, tokenizer, frontend = load_checkpoint(
        options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu"
    )
    graph = (
        load_hotwords(words.hotwords, tokenizer, words.context_score) if words.hotwords else None
    )
    dataset, references = load_data(tokenizer, frontend, options)
    if hint := unspelled(tokenizer, references):
        print(shown(f"score.py: note: {hint}"), file=sys.stderr)
    duration = audio_lengths(dataset).sum() / frontend.sample_rate
    scores, details = [], []
    for mode in MODES if options.mode == "all" else (options.mode,):
        context = graph if mode in CONTEXT_MODES else None
        if options.concatenate:
            hypotheses, seconds = recognize_long(model, dataset, search, context)
            references = [join(references)]
        elif options.stream:
            hypotheses, seconds = recognize_stream(model, dataset, search, context)
        else:
            hypotheses, seconds = recognize(
                model, tokenizer, frontend, dataset, mode, options, search, context
            )
        scores.append(
            {
                "checkpoint": options.checkpoint,
                "data_root": options.data_root,
                "split": options.split,
                "mode": mode,
                "stream": options.stream,
                "concatenate": options.concatenate,
                **asdict(search),
                **(asdict(words) if context else {}),
                "utterances": len(references),
                "wer": float(word_error_rate(hypotheses, references)),
                "cer": float(char_error_rate(hypotheses, references)),
                "rtf": round(seconds / duration, 5),
            }
        )
        details += [
            describe(mode, row, *pair) for row, pair in enumerate(zip(references, hypotheses))
        ]
    try:
        if options.details:
            lines = "".join(json_text(detail, ensure_ascii=False) + "\n" for detail in details)
            write_whole(options.details, lines.encode())
    finally:  # whichever of the two cannot be written, the other is
        for reference, hypothesis in zip(references[: options.examples], hypotheses):
            print(f"said   {shown(reference, math.inf)}\nheard  {shown(hypothesis, math.inf)}")
        for score in scores:
            print(json_text(score))


def load_data(tokenizer, frontend, options: ScoreOptions) -> tuple[datasets.Dataset, list[str]]:
    """The split and what was said, per row: the column `text`, else the labels as the tokenizer spells them.

    Raises UserError when there is nothing to compare with, or when rates or labels without text belong to another model.
    """
    roots, place = [options.data_root], f"{options.data_root}, split {options.split}"
    dataset = get_concat_dataset(roots, options.split)
    rows_rate(roots, frontend)
    if "text" in dataset.column_names:
        kind = dataset.data.schema.field("text").type
        if str(kind) not in ("string", "large_string", "string_view", "null"):
            raise UserError(
                f"{place}: column text is {shown(str(kind), 100)}, not text; prepare it again"
            )
        references = [normalize_text(text or "") for text in dataset["text"]]
    else:
        check_maker(
            tokenizer,
            f"{place} has no column text, and the tokenizer of {options.checkpoint}",
            options.data_root,
        )
        dataset = load_split(
            roots, options.split, tokenizer
        )  # which checks the range of the labels
        labels = (row["input_ids"] if isinstance(row, dict) else row for row in dataset["labels"])
        references = [tokenizer.decode(ids) for ids in labels]
    if not any(references):
        raise UserError(
            f"{place}: no row has any text to compare with; prepare it with transcripts"
        )
    return dataset, references


def unspelled(tokenizer, references: list[str]) -> str:
    """Which words of the references nothing that is heard can equal, because the tokenizer spells them
    otherwise, and what to do about it; "" where there are none."""

    def lost(change=str) -> Counter:
        said = [change(text) for text in references]
        heard = [tokenizer.decode(tokenizer.encode(text)) for text in said]
        return Counter(" ".join(said).split()) - Counter(" ".join(heard).split())

    words = lost()
    if not words:
        return ""
    flags = [
        flag
        for flag, change in (("--lowercase", str.lower), ("--uppercase", str.upper))
        if 2 * lost(change).total() < words.total()
    ]
    flags = flags or ["--lowercase", "--uppercase or --remove_punctuation"]
    unknown = Counter(piece for text in references for piece in tokenizer.unknown(text))
    return (
        f"{words.total()} of {sum(len(text.split()) for text in references)} words of the references "
        "count as errors whatever is heard: the checkpoint's tokenizer cannot write "
        f"{most_frequent(unknown or words)}; prepare the data again as the training data was, with "
        f"{' or '.join(flags)}"
    )


def recognize(
    model,
    tokenizer,
    frontend,
    dataset,
    mode: str,
    options: ScoreOptions,
    search: SearchOptions,
    context,
) -> tuple[list[str], float]:
    """(what was heard, per row; seconds it took). context: a ContextGraph or None."""
    features_of, texts, seconds = extract(frontend), [""] * len(dataset), 0.0
    waveforms = dataset.select_columns(["input_values"]).with_format("numpy")
    batches = eval_batches(
        audio_lengths(dataset), options.batch_size, max_batch=EVAL_SECONDS * frontend.sample_rate
    )
    for keys in tqdm(
        batches, desc=mode, unit=" batches"
    ):  # longest first: memory runs out early or never
        rows = [row for _, row in keys]
        batch = [waveform_of(row, waveforms[row]) for row in rows]
        began = time.perf_counter()
        features = [features_of(waveform) for waveform in batch]
        lengths = torch.tensor([len(frames) for frames in features])
        padded = pad_sequence(features, batch_first=True)  # (B,T,F)
        found = model.decode(
            padded.to(model.device),
            lengths.to(model.device),
            mode,
            **asdict(search),
            context=context,
        )
        seconds += (
            time.perf_counter() - began
        )  # hypotheses are Python lists: the device has finished
        for row, hypothesis in zip(rows, found):
            texts[row] = tokenizer.decode(hypothesis.tokens)
    return texts, seconds


def recognize_stream(model, dataset, search: SearchOptions, context) -> tuple[list[str], float]:
    """The same, every row an utterance fed in pieces, from samples on."""
    texts, seconds = [], 0.0
    for waveform in tqdm(waveforms_of(dataset), desc="stream", total=len(dataset), unit=" rows"):
        began = time.perf_counter()
        *_, heard = listen(
            model, cut(model, waveform, search.chunk_size), search, endpoints=False, context=context
        )
        seconds += time.perf_counter() - began
        texts.append(model.tokenizer.decode(heard.hypothesis.tokens))
    return texts, seconds


def recognize_long(model, dataset, search: SearchOptions, context) -> tuple[list[str], float]:
    """The same, all rows one behind the other: one text of all utterances that the endpoints make of them."""
    began = time.perf_counter()
    pieces = (
        piece
        for waveform in tqdm(waveforms_of(dataset), desc="stream", total=len(dataset), unit=" rows")
        for piece in cut(model, waveform, search.chunk_size)
    )
    texts = [
        model.tokenizer.decode(heard.hypothesis.tokens)
        for heard in listen(model, pieces, search, context=context)
        if heard.final
    ]
    return [join(texts)], time.perf_counter() - began


def waveforms_of(dataset) -> Iterator[torch.Tensor]:
    """The rows' samples, (N,) float32."""
    for row, values in enumerate(dataset.select_columns(["input_values"]).with_format("numpy")):
        yield waveform_of(row, values)


def waveform_of(row: int, values: dict) -> torch.Tensor:
    """The samples (N,) float32 of a row. Raises UserError for what no microphone gives."""
    samples = values["input_values"].astype(np.float32)
    if reason := check_samples(samples)[1]:
        raise UserError(
            f"row {row} of the split: {reason}; mend the recording and prepare it "
            "again, or leave it out"
        )
    return torch.from_numpy(samples)


DETAIL = b'{"row": 0, "mode": "'  # how a file of details begins


def check_details(options: ScoreOptions, words: HotwordOptions) -> None:
    """UserError where --details would overwrite anything but details."""
    path = options.details
    if not path or not os.path.exists(path):
        return
    if identity(path) in map(identity, (options.checkpoint, words.hotwords or "", 1, 2)):
        raise UserError(
            f"--details {path} is what this command reads, or where it prints; name another file"
        )
    if not os.path.isfile(path) or beginning(path) not in (b"", DETAIL):
        raise UserError(
            f"--details {path} exists and is no file of details, which alone is "
            "replaced; name another file"
        )


def beginning(path: str) -> bytes | None:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(DETAIL))


def describe(mode: str, row: int, reference: str, hypothesis: str) -> dict:
    """One utterance of --details."""
    return {
        "row": row,
        "mode": mode,
        "reference": reference,
        "hypothesis": hypothesis,
        "word_errors": count_errors(word_error_rate, hypothesis, reference, len(reference.split())),
        "char_errors": count_errors(char_error_rate, hypothesis, reference, len(reference)),
    }


def count_errors(error_rate, hypothesis: str, reference: str, length: int) -> int:
    """The edit distance that torchmetrics divides by the reference's length."""
    if length == 0:  # everything heard is an insertion
        return len(hypothesis.split()) if error_rate is word_error_rate else len(hypothesis)
    return round(float(error_rate([hypothesis], [reference])) * length)


if __name__ == "__main__":
    run(main)
