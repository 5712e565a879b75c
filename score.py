"""Scores a checkpoint on a split:

  python score.py --checkpoint runs/demo/best.ckpt --data_root data/demo

The command prints one JSON line per mode to stdout; progress goes to stderr. wer and cer are
fractions over the whole split, as torchmetrics counts them. wer_95 and cer_95 are their 95 %
intervals over other utterances like these (bootstrap.py). rtf is the time for features, encoder and
search, without reading the data, over the duration of the audio.
"""

import contextlib
import hashlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from cli import UserError, build, make_parser, option, options_class, run, shown

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from bootstrap import interval
from checkpoint import is_of_hub
from context import HotwordOptions
from datamodule import (
    EVAL_SECONDS,
    DataOptions,
    audio_lengths,
    eval_plan,
    get_concat_dataset,
    load_split,
    rows_rate,
)
from decode import (
    CONTEXT_MODES,
    GRAPH_MODES,
    MODES,
    STREAM_MODES,
    SearchOptions,
    check_used,
    modes_for,
    overlapped,
)
from files import cannot_write, check_replaced, json_text, write_whole
from model import load_checkpoint
from ngram import LmOptions, favour
from stream import listen
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
    keep: bool = option(
        False,
        "add the scores, with each utterance's errors, to scores.jsonl beside the checkpoint, "
        "where tools.compare reads them",
    )

    def __post_init__(self):
        if self.stream and self.mode not in STREAM_MODES:
            raise UserError(
                f"--mode {self.mode}: --stream hears by {' or '.join(STREAM_MODES)} only; leave "
                "one of them out"
            )
        if self.stream and self.batch_size != type(self).batch_size:
            raise UserError("--batch_size has no effect with --stream; leave one of them out")
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
    parser = make_parser(__doc__, ScoreOptions, SearchOptions, HotwordOptions, LmOptions)
    given = vars(parser.parse_args(argv))
    options = build(ScoreOptions, given)
    modes = MODES if options.mode == "all" else (options.mode,)
    check_used(given, modes)
    hotwords = build(HotwordOptions, given)
    lm = build(LmOptions, given)
    paths = {"--hotwords": hotwords.hotwords, "--lm": lm.lm, "--graph": lm.graph}
    check_favoured(options, paths)
    check_details(options, paths.values())
    check_keep(options)
    search = build(SearchOptions, given, **({"chunk_size": 16} if options.stream else {}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, frontend = load_checkpoint(options.checkpoint, device)
    # A training may replace the checkpoint before all is heard.
    digest = digest_of(options.checkpoint) if options.keep else ""
    favours = favour(lm, hotwords, tokenizer, options.stream)
    dataset, references = load_data(tokenizer, frontend, options)
    if hint := unspelled(tokenizer, references):
        print(shown(f"score.py: note: {hint}"), file=sys.stderr)
    duration = audio_lengths(dataset).sum() / frontend.sample_rate
    if options.concatenate:
        references = [join(references)]
    scores = []
    counts = []
    details = []
    for mode in modes:
        context = favours if mode in modes_for(favours) else None
        hypotheses, seconds = recognize(model, dataset, mode, options, search, context)
        settings = asdict(search)
        if context:
            settings |= (asdict(hotwords) if hotwords.hotwords else {}) | lm.used()
        rows = enumerate(zip(references, hypotheses))
        described = [describe(mode, row, *texts) for row, texts in rows]
        rates = error_rates(references, described) | {"rtf": round(seconds / duration, 5)}
        scores.append(what_was_scored(options, mode) | settings | rates)
        counts.append(counts_of(references, described))
        details += described
    with contextlib.ExitStack() as stack:  # Where one of these fails, the others still happen.
        stack.callback(print_results, scores, references[: options.examples], hypotheses)
        if options.keep:
            stack.callback(keep_scores, options.checkpoint, digest, scores, counts)
        if options.details:
            lines = "".join(json_text(detail, ensure_ascii=False) + "\n" for detail in details)
            write_whole(options.details, lines.encode())


def what_was_scored(options: ScoreOptions, mode: str) -> dict:
    """Makes the first fields of a score."""
    names = ("checkpoint", "data_root", "split", "mode", "stream", "concatenate")
    return {name: getattr(options, name) for name in names} | {"mode": mode}


def error_rates(references: list[str], errors: list[dict]) -> dict:
    """Sums errors over the length of the references, in float32, as torchmetrics does."""
    counts = counts_of(references, errors)
    rates = {"utterances": len(references)}
    for name, wrong, said in (("wer", "word_errors", "words"), ("cer", "char_errors", "chars")):
        rates[name] = float(np.float32(sum(counts[wrong])) / np.float32(sum(counts[said])))
        rates[f"{name}_95"] = interval(counts[wrong], counts[said])
    return rates


def counts_of(references: list[str], errors: list[dict]) -> dict:
    """Lists what each utterance had of errors, words and characters, for tools.compare.

    The digest tells whether two runs heard the same utterances.
    """
    digest = hashlib.sha256("\n".join(references).encode(errors="replace")).hexdigest()
    return {
        "references": digest[:16],
        "word_errors": [row["word_errors"] for row in errors],
        "words": [len(reference.split()) for reference in references],
        "char_errors": [row["char_errors"] for row in errors],
        "chars": [len(reference) for reference in references],
    }


def print_results(scores: list[dict], references: list[str], hypotheses: list[str]) -> None:
    """Prints the references, each above what was heard, then the scores."""
    for reference, hypothesis in zip(references, hypotheses):
        print(f"said   {shown(reference, math.inf)}\nheard  {shown(hypothesis, math.inf)}")
    for score in scores:
        print(json_text(score))


def load_data(tokenizer, frontend, options: ScoreOptions) -> tuple[datasets.Dataset, list[str]]:
    """Loads the split, and each row's reference: its text, else its labels, spelled out.

    Raises UserError where no row has any text, and where the sample rate, or the labels that stand
    for missing text, belong to another model.
    """
    roots = [options.data_root]
    where = f"{options.data_root}, split {options.split}"
    dataset = get_concat_dataset(roots, options.split)
    rows_rate(roots, frontend)
    if "text" in dataset.column_names:
        kind = dataset.data.schema.field("text").type
        if str(kind) not in ("string", "large_string", "string_view", "null"):
            raise UserError(
                f"{where}: column text is {shown(str(kind), 100)}, not text; prepare it again"
            )
    else:
        check_maker(
            tokenizer,
            f"{where} has no column text, and the tokenizer of {options.checkpoint}",
            options.data_root,
        )
        # load_split checks that the tokenizer has all labels.
        dataset = load_split(roots, options.split, tokenizer)
    references = references_of(dataset, tokenizer)
    if not any(references):
        raise UserError(
            f"{where}: no row has any text to compare with; prepare it with transcripts"
        )
    return dataset, references


def references_of(dataset, tokenizer) -> list[str]:
    """Returns the text of each row or, where the split has none, its labels, spelled out."""
    if "text" in dataset.column_names:
        return [normalize_text(str(text or "")) for text in dataset["text"]]
    labels = (row["input_ids"] if isinstance(row, dict) else row for row in dataset["labels"])
    return [tokenizer.decode(ids) for ids in labels]


def unspelled(tokenizer, references: list[str]) -> str:
    """Gives a hint where the tokenizer cannot spell words of the references, else "".

    Such words count as errors whatever is heard. The hint says how many there are, and which flags
    of prepare.py make them less than half as many.
    """

    def lost(change=str) -> Counter:
        """Counts the words that the tokenizer spells otherwise, after a change of all texts."""
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
        f"{words.total()} of {sum(len(text.split()) for text in references)} words of the "
        "references count as errors whatever is heard: the checkpoint's tokenizer cannot write "
        f"{most_frequent(unknown or words)}; prepare the data again as the training data was, with "
        f"{' or '.join(flags)}"
    )


def recognize(
    model,
    dataset: datasets.Dataset,
    mode: str,
    options: ScoreOptions,
    search: SearchOptions,
    context,
) -> tuple[list[str], float]:
    """Hears all rows -> (a text per row, with --concatenate one text in all; the seconds taken)."""
    if options.concatenate:
        return recognize_as_one(model, dataset, mode, search, context)
    if options.stream:
        return recognize_streams(model, dataset, mode, search, context)
    return recognize_batches(model, dataset, mode, options, search, context)


def recognize_batches(
    model, dataset, mode: str, options: ScoreOptions, search: SearchOptions, context
) -> tuple[list[str], float]:
    """Hears rows in batches, the longest first, so that memory runs out early or never."""
    features_of = extract(model.frontend)
    batches = eval_plan(dataset, model.frontend, DataOptions(batch_size=options.batch_size))
    samples = dataset.select_columns(["input_values"]).with_format("numpy")
    batches = [[row for _, row in keys] for keys in batches]
    texts = [""] * len(dataset)
    reading = 0.0  # seconds

    def searches():
        nonlocal reading
        for rows in batches:
            began = time.perf_counter()
            waveforms = [checked_waveform(row, samples[row]) for row in rows]
            reading += time.perf_counter() - began
            features = [features_of(waveform) for waveform in waveforms]
            lengths = torch.tensor([len(frames) for frames in features])
            padded = pad_sequence(features, batch_first=True)  # (B,T,F)
            yield model.decoding(padded, lengths, mode, search, context)

    began = time.perf_counter()
    results = overlapped(searches())
    for rows, found in zip(batches, tqdm(results, mode, len(batches), unit=" batches")):
        for row, hypothesis in zip(rows, found):
            texts[row] = model.tokenizer.decode(hypothesis.tokens)
    return texts, time.perf_counter() - began - reading


def recognize_streams(
    model, dataset, mode: str, search: SearchOptions, context
) -> tuple[list[str], float]:
    """Hears each row as a stream of one utterance."""
    texts = []
    seconds = 0.0
    for waveform in tqdm(waveforms_of(dataset), desc="stream", total=len(dataset), unit=" rows"):
        began = time.perf_counter()
        *_, heard = listen(model, [waveform], search, endpoints=False, context=context, mode=mode)
        seconds += time.perf_counter() - began
        texts.append(model.tokenizer.decode(heard.hypothesis.tokens))
    return texts, seconds


def recognize_as_one(
    model, dataset, mode: str, search: SearchOptions, context
) -> tuple[list[str], float]:
    """Hears all rows as one stream that is cut at its endpoints, and gives one text in all."""
    reading = 0.0  # seconds

    def pieces():
        nonlocal reading
        began = time.perf_counter()
        for row in tqdm(waveforms_of(dataset), desc="stream", total=len(dataset), unit=" rows"):
            reading += time.perf_counter() - began
            yield row
            began = time.perf_counter()

    began = time.perf_counter()
    texts = [
        model.tokenizer.decode(heard.hypothesis.tokens)
        for heard in listen(model, pieces(), search, context=context, mode=mode)
        if heard.final
    ]
    return [join(texts)], time.perf_counter() - began - reading


def waveforms_of(dataset: datasets.Dataset) -> Iterator[torch.Tensor]:
    """Yields the samples (N,) float32 of each row."""
    for row, values in enumerate(dataset.select_columns(["input_values"]).with_format("numpy")):
        yield checked_waveform(row, values)


def checked_waveform(row: int, values: dict) -> torch.Tensor:
    """Returns a row's samples (N,) float32. Raises UserError where no microphone gives such."""
    samples = values["input_values"].astype(np.float32)
    if reason := check_samples(samples)[1]:
        raise UserError(
            f"row {row} of the split: {reason}; mend the recording and prepare it "
            "again, or leave it out"
        )
    return torch.from_numpy(samples)


KEPT = "scores.jsonl"  # where --keep adds


def check_favoured(options: ScoreOptions, paths: dict[str, str | None]) -> None:
    """Raises UserError where the mode cannot favour what the flags of `paths` name."""
    favoured = [flag for flag, path in paths.items() if path]
    modes = GRAPH_MODES if "--graph" in favoured else CONTEXT_MODES
    if favoured and options.mode not in (*modes, "all"):
        raise UserError(
            f"--mode {options.mode} cannot favour {' and '.join(favoured)}; choose one of "
            f"{', '.join(modes)}"
        )


DETAIL = b'{"row": 0, "mode": "'  # how a file of details begins


def check_details(options: ScoreOptions, inputs: Iterable[str | None]) -> None:
    """Raises UserError where --details would overwrite `inputs`, or anything but details."""
    if options.details:
        inputs = options.checkpoint, *filter(None, inputs)
        check_replaced(options.details, "--details", inputs, DETAIL, "file of details")


def check_keep(options: ScoreOptions) -> None:
    """Raises UserError where --keep could not add to scores.jsonl beside the checkpoint."""
    if not options.keep:
        return
    if not os.path.lexists(options.checkpoint) and not is_of_hub(options.checkpoint):
        return  # load_checkpoint says that there is none
    folder = os.path.dirname(options.checkpoint) or "."
    path = os.path.join(folder, KEPT)
    if not os.path.isfile(options.checkpoint):
        raise UserError(f"--keep: {options.checkpoint} is no file of a run; leave it out")
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
        raise UserError(f"--keep: {path} is no file; move it away, or leave --keep out")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UserError(f"--keep: {path} cannot be written; change that, or leave --keep out")
    if options.details and os.path.realpath(options.details) == os.path.realpath(path):
        raise UserError(f"--details {options.details} is where --keep adds; name another file")


def digest_of(path: str) -> str:
    """Returns what tells a checkpoint from others. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def keep_scores(checkpoint: str, digest: str, scores: list[dict], counts: list[dict]) -> None:
    """Adds scores, each with the counts of its utterances, to scores.jsonl beside the checkpoint.

    The digest of the checkpoint tells tools.compare which scores are of an earlier one of its name.
    Raises UserError where the scores cannot be written.
    """
    path = os.path.join(os.path.dirname(checkpoint), KEPT)
    rows = (score | count | {"model": digest} for score, count in zip(scores, counts))
    lines = [json_text(row) + "\n" for row in rows]
    try:
        with open(path, "ab+") as file:
            file.seek(max(0, file.tell() - 1))
            cut = file.read() not in (b"", b"\n")  # the line that a killed command had begun
            file.write("".join(["\n" * cut, *lines]).encode())
    except OSError as error:
        raise cannot_write(path, error) from error


def describe(mode: str, row: int, reference: str, hypothesis: str) -> dict:
    """Makes a line of --details for one utterance."""
    return {
        "row": row,
        "mode": mode,
        "reference": reference,
        "hypothesis": hypothesis,
        "word_errors": edit_distance(hypothesis.split(), reference.split()),
        "char_errors": edit_distance(hypothesis, reference),
    }


def edit_distance(heard: Sequence[str], said: Sequence[str]) -> int:
    """Counts the fewest insertions, deletions and substitutions from one sequence to the other.

    NumPy takes a row of the table at once; torchmetrics, which counts the same, takes a cell.
    """
    numbers = {item: number for number, item in enumerate({*heard, *said})}
    said = np.array([numbers[item] for item in said], np.int64)
    places = np.arange(len(said) + 1)
    row = places  # row[j] is the distance from what was heard so far to said[:j]
    for count, item in enumerate(heard, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (said != numbers[item]))
        # What is missing of `said` costs 1 a place: row[j] = min(row[j], row[i] + j - i) for i < j.
        row = np.minimum.accumulate(np.concatenate(([count], best)) - places) + places
    return int(row[-1])


if __name__ == "__main__":
    run(main)
