"""Transcribes recordings: python transcribe.py --checkpoint runs/demo/best.ckpt PATH ...

A PATH is an audio file, a folder (every audio file in it, however deep), a pattern such as 'talks/**/*.flac' (quote it), or
- for standard input. Files may have any format that soundfile decodes, any rate, any number of channels and any length: a
long one is cut where it is quietest. Prints a line per file, its path and what was heard, with a tab between; --format
gives the times of the words, --output_dir a file for each. A file that cannot be read gets a line on stderr, the others
are transcribed all the same, and the exit status is 2.

With --stream a recording is heard as if it were being spoken: what was heard so far appears on stderr as it grows, after
the seconds of audio that it took; a pause ends an utterance, which is then rescored. Ctrl-C ends standard input, and what
came is heard to its end. From a microphone or anything else that ffmpeg reads:

  ffmpeg -loglevel error -i INPUT -f wav - | python transcribe.py --checkpoint runs/demo/best.ckpt --stream -
"""

import contextlib
import functools
import glob
import math
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cli import SIGNALS, UserError, build, make_parser, one_line, option, options_class, run, shown

import numpy as np
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from audio import EXTENSIONS, cut_at_pauses, read_blocks, regroup
from context import ContextGraph, HotwordOptions, load_hotwords
from decode import MODES, SearchOptions
from files import FULL, identity, write_whole
from model import load_checkpoint
from recovery import leave_terminal
from stream import frame_ms, listen
from transforms import extract
from words import (
    Transcript,
    Word,
    align_words,
    as_ctm,
    as_json,
    as_srt,
    as_txt,
    as_vtt,
    frame_times,
    join,
    join_words,
)

LINGER = 1.0  # seconds for which standard input is heard after Ctrl-C, which its writer gets, too
POOL = 8  # batches that are read ahead, so that each can be of pieces alike in length


@options_class
class TranscribeOptions:
    checkpoint: str = option("runs/demo/best.ckpt", "a .ckpt, a folder for the hub, or org/name")
    mode: str = option(
        "attention_rescoring", "search; --stream is always attention_rescoring", choices=MODES
    )
    stream: bool = option(False, "hear piece by piece, in chunks of --chunk_size, 16 unless given")
    format: str = option(
        "txt",
        "text alone, or with the times of words",
        choices=("txt", "json", "srt", "vtt", "ctm"),
    )
    output_dir: str | None = option(
        None, "folder for a file per recording, named as it is below the PATH; else stdout"
    )
    overwrite: bool = option(False, "replace files in --output_dir that exist")
    max_seconds: float = option(
        20.0,
        "longest piece that is heard at once; best what the model was trained on",
        at_least=1.0,
        at_most=3600.0,
    )
    batch_seconds: float = option(
        200.0,
        "most seconds of audio in a batch, padding included; memory grows with it",
        at_least=1.0,
        at_most=1e6,
    )
    delay: float = option(
        0.0,
        "seconds to take off all times; align.py measures how late a checkpoint is",
        at_least=-60.0,
        at_most=60.0,
    )
    raw: bool = option(
        False,
        "standard input is samples without a header: 16-bit little-endian mono at the model's rate",
    )

    def __post_init__(self):
        if self.overwrite and not self.output_dir:
            raise UserError("--overwrite has no effect without --output_dir; give both or neither")


class Recording(NamedTuple):
    path: str
    name: str  # of what is written about it, without extension: the path below the folder or the pattern's fixed part


class Piece(NamedTuple):
    recording: int  # its number
    offset: float  # seconds into it
    samples: np.ndarray  # (n,)


class Search(NamedTuple):
    mode: str
    options: SearchOptions
    context: ContextGraph | None  # hotwords


class Heard(NamedTuple):
    text: str
    words: list[Word]
    seconds: float  # how long the piece is


def main(argv: list[str]) -> None:
    parser = make_parser(__doc__, TranscribeOptions, SearchOptions, HotwordOptions)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="audio files, folders, quoted patterns, - for standard input",
    )
    given = vars(parser.parse_args(argv))
    options = build(TranscribeOptions, given)
    check_given(given, options)
    searching = build(SearchOptions, given, **({"chunk_size": 16} if options.stream else {}))
    hotwords = build(HotwordOptions, given)
    recordings = [recording for path in given["paths"] for recording in find(path)]
    outputs = place(recordings, options, (options.checkpoint, hotwords.hotwords or ""))
    model, tokenizer, _ = load_checkpoint(
        options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu"
    )
    context = (
        load_hotwords(hotwords.hotwords, tokenizer, hotwords.context_score)
        if hotwords.hotwords
        else None
    )
    search = Search(options.mode, searching, context)
    failed = {}
    with tqdm(
        total=total_seconds(recordings),
        disable=options.stream or None,
        bar_format=("{percentage:3.0f} %|{bar}| {n:.0f} of {total_fmt} s{postfix}"),
    ) as bar:
        transcribe = streamed if options.stream else whole
        for number, transcript in transcribe(model, recordings, options, search, failed, bar):
            try:
                deliver(transcript, outputs[number], options.format)
            except UserError as error:
                if getattr(error.__cause__, "errno", None) in FULL:  # as for all that come after
                    raise
                failed[number] = 2
                tell("error", recordings[number], str(error))
    if failed:
        sys.exit(max(failed.values()))


def check_given(given: dict, options: TranscribeOptions) -> None:
    for name in ("mode", "max_seconds", "batch_seconds"):
        if options.stream and name in given:
            why = ", which is always attention_rescoring" if name == "mode" else ""
            raise UserError(f"--{name} has no effect with --stream{why}; leave one of them out")
    if options.format == "txt" and "delay" in given:
        raise UserError(
            "--delay has no effect on --format txt, which has no times; leave one of them out"
        )
    if options.raw and given["paths"] != ["-"]:
        raise UserError("--raw is for standard input; give - as the only PATH, or leave it out")


# ------------------------------------------------------------------------------------------------- what comes and goes


def find(path: str) -> list[Recording]:
    """The audio files that a PATH of the command line means, in order; what means none, as it is: reading it will say why."""
    if os.path.isdir(path):
        closed = []  # folders, which are named, too: reading them will say why
        walk = os.walk(path, onerror=lambda error: closed.append(error.filename))
        inside = [
            os.path.join(folder, name)
            for folder, _, names in walk
            for name in names
            if os.path.splitext(name)[1][1:].lower() in EXTENSIONS and not name.startswith(".")
        ]
        return named(sorted(inside + closed), path) or [Recording(path, path)]
    if os.path.exists(path) or not any(sign in path for sign in "*?["):
        return named([path], os.path.dirname(path))
    fixed = path
    while any(sign in fixed for sign in "*?["):
        fixed = os.path.dirname(fixed)
    matches = filter(os.path.isfile, sorted(glob.glob(path, recursive=True)))
    return named(matches, fixed) or [Recording(path, path)]


def named(paths: Iterable[str], folder: str) -> list[Recording]:
    return [
        Recording(
            path,
            "stdin" if path == "-" else os.path.splitext(os.path.relpath(path, folder or "."))[0],
        )
        for path in paths
    ]


def place(
    recordings: list[Recording], options: TranscribeOptions, inputs: tuple[str, ...]
) -> list[str | None]:
    """Where the transcript of each goes; None: stdout. Raises UserError where one would end up on
    top of another or of what is read, which `inputs` and the recordings are, or outside of
    --output_dir."""
    if not options.output_dir:
        if options.format in ("srt", "vtt") and len(recordings) > 1:
            raise UserError(
                f"--format {options.format} makes one file per recording; give --output_dir for them"
            )
        return [None] * len(recordings)
    owners, outputs, top = {}, [], os.path.realpath(options.output_dir)
    read = (*inputs, *(recording.path for recording in recordings))
    taken = {identity(path) for path in (*read, 1, 2)} - {None}
    for recording in recordings:
        name = os.path.normpath(f"/{recording.name}").lstrip("/")  # which leads nowhere up
        outputs.append(output := os.path.join(options.output_dir, f"{name}.{options.format}"))
        target = os.path.realpath(output)
        other = owners.setdefault(target, recording)
        if other is not recording:
            raise UserError(
                f"{other.path} and {recording.path} would both be written to {output}; transcribe them apart"
            )
        if os.path.commonpath([top, target]) != top:
            raise UserError(f"{output} leads to {target}, outside of --output_dir; choose another")
        if os.path.lexists(output) and not options.overwrite:
            raise UserError(
                f"{output} exists; give --overwrite to replace it, or another --output_dir"
            )
        if identity(output) in taken:
            raise UserError(
                f"{output} is what this command reads, or where it prints; choose "
                "another --output_dir"
            )
    try:
        os.makedirs(options.output_dir, exist_ok=True)  # now: what is heard is worth hours
    except OSError as error:
        raise UserError(
            f"--output_dir {options.output_dir} cannot be made ({error.strerror}); choose another"
        ) from None
    if not os.access(options.output_dir, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {options.output_dir} cannot be written; choose another")
    return outputs


def deliver(transcript: Transcript, output: str | None, format: str) -> None:
    spell = {"txt": as_txt, "json": as_json, "ctm": as_ctm, "srt": as_srt, "vtt": as_vtt}[format]
    text = spell(transcript)
    if format == "txt" and output:  # the name of which says what it is of
        text = text.split("\t")[1]
    if output is None:
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, end="", flush=True)
        return
    try:
        os.makedirs(os.path.dirname(output), exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{output}: its folder cannot be made ({error.strerror}); choose another --output_dir"
        ) from error
    write_whole(output, text.encode())


def total_seconds(recordings: list[Recording]) -> float | None:
    """For the progress bar; None where it is not known or where nobody looks."""
    if not sys.stderr.isatty() or any(recording.path == "-" for recording in recordings):
        return None
    total = 0.0
    for recording in recordings:
        if not os.path.isfile(recording.path):  # a pipe would be waited for
            continue
        try:
            info = soundfile.info(recording.path)
            total += info.duration if info.frames < 2**62 else 0  # a FLAC file that does not know
        except (OSError, RuntimeError):  # reading it will say what is wrong
            continue
    return round(total)


# ------------------------------------------------------------------------------------------------------ piece by piece


def whole(
    model,
    recordings: list[Recording],
    options: TranscribeOptions,
    search: Search,
    failed: dict[int, int],
    bar: tqdm,
) -> Iterator[tuple[int, Transcript]]:
    """(number, transcript) of each recording that can be read, in order; `failed` gets the numbers
    of the others, each with the exit status."""
    heard = defaultdict(list)  # number -> what was heard in its pieces, as far as they are known
    rate = model.frontend.sample_rate
    for pool in pools(
        read_pieces(recordings, options, rate, failed), POOL * options.batch_seconds * rate
    ):
        for piece, result in zip(pool, recognize(model, pool, options, search, bar)):
            heard[piece.recording].append(result)
        for number in [
            number for number in heard if number < pool[-1].recording
        ]:  # of the last one, more may come
            yield from assemble(number, recordings, heard.pop(number), failed)
    for number in list(heard):
        yield from assemble(number, recordings, heard.pop(number), failed)


def assemble(
    number: int, recordings: list[Recording], heard: list[Heard], failed: dict[int, int]
) -> Iterator[tuple[int, Transcript]]:
    """(number, transcript) of the recording, or nothing where a file failed, which can be mended
    and heard again, as a pipe cannot."""
    if number not in failed or recordings[number].path == "-":
        yield (
            number,
            Transcript(
                recordings[number].path,
                join(part.text for part in heard),
                sum(part.seconds for part in heard),
                join_words(part.words for part in heard),
            ),
        )


def read_pieces(
    recordings: list[Recording], options: TranscribeOptions, rate: int, failed: dict[int, int]
) -> Iterator[Piece]:
    """What can be read of all recordings, one after the other."""
    for number, recording in enumerate(recordings):
        offset = 0
        blocks = readable(blocks_of(recording, options, rate), number, recording, failed)
        for samples in cut_at_pauses(blocks, rate, options.max_seconds):
            yield Piece(number, offset / rate, samples)
            offset += len(samples)


def blocks_of(recording: Recording, options: TranscribeOptions, rate: int) -> Iterator[np.ndarray]:
    """The recording's samples; where some are lost, those that are there, and a line on stderr."""
    if os.path.isdir(recording.path):
        try:
            os.listdir(recording.path)
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})") from error
        raise UserError("a folder without audio files")
    told = functools.partial(tell, "note", recording)
    yield from read_blocks(recording.path, rate, options.raw, told)


def tell(kind: str, recording: Recording, what: str) -> None:
    with tqdm.external_write_mode(file=sys.stderr):
        print(shown(f"transcribe.py: {kind}: {recording.path}: {one_line(what)}"), file=sys.stderr)


def readable(
    blocks: Iterator[np.ndarray], number: int, recording: Recording, failed: dict[int, int]
) -> Iterator[np.ndarray]:
    """The blocks up to an error, which is told, or, of standard input, up to a signal: a pipe may
    have no other end."""
    try:
        with ended_by_signals() if recording.path == "-" else contextlib.nullcontext([]) as signals:
            yield from blocks
    except KeyboardInterrupt:
        if recording.path != "-" or signals:
            raise
    except UserError as error:
        failed[number] = 2
        tell("error", recording, str(error))
    if signals and signals[0] != signal.SIGINT:
        failed[number] = 128 + signals[0]
        tell("note", recording, f"interrupted ({signal.Signals(signals[0]).name})")


@contextlib.contextmanager
def ended_by_signals():
    """Within it the first signal that asks the command to end ends standard input instead, so that
    all that came is heard. Gives a list that will hold the signal's number. A second one ends the
    command."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    signals = []

    def end(number, _):
        signals.append(number)
        restore()
        if number == signal.SIGHUP:
            leave_terminal()
        rest, (out, into) = os.dup(0), os.pipe()
        os.dup2(out, 0)  # a read that waits goes on there, too, and finds the end
        os.close(out)
        threading.Thread(target=pour, args=(rest, into), daemon=True).start()

    def restore():
        for number, handler in handlers.items():
            signal.signal(number, handler)

    try:
        for number in handlers:
            signal.signal(number, end)
        yield signals
    finally:
        restore()


def pour(source: int, into: int) -> None:
    """Copies what is in a pipe and comes within LINGER seconds to another, and closes that one."""
    ends = time.monotonic() + LINGER
    while (left := ends - time.monotonic()) > 0 and select.select([source], [], [], left)[0]:
        if not (content := os.read(source, 2**16)):
            break
        os.write(into, content)
    os.close(into)


def pools(pieces: Iterable[Piece], size: float) -> Iterator[list[Piece]]:
    """The pieces in lists of `size` samples or a little more."""
    pool = []
    for piece in pieces:
        pool.append(piece)
        if sum(len(piece.samples) for piece in pool) >= size:
            yield pool
            pool = []
    if pool:
        yield pool


def batches(lengths: list[int], max_batch: float) -> Iterator[list[int]]:
    """Row numbers, longest rows first; rows * longest is at most max_batch, or the row is alone."""
    batch = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_batch:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def recognize(
    model, pool: list[Piece], options: TranscribeOptions, search: Search, bar: tqdm
) -> list[Heard]:
    features_of, results, rate = (
        extract(model.frontend),
        [None] * len(pool),
        model.frontend.sample_rate,
    )
    for rows in batches([len(piece.samples) for piece in pool], options.batch_seconds * rate):
        features = [features_of(torch.from_numpy(pool[row].samples)) for row in rows]
        lengths = torch.tensor([len(frames) for frames in features], device=model.device)
        try:
            found = hear(
                model, pad_sequence(features, batch_first=True).to(model.device), lengths, search
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"--batch_seconds {options.batch_seconds:g} does not fit the memory; give fewer"
            ) from None
        for row, (hypothesis, log_probs, length) in zip(rows, found):
            words = timed(model, hypothesis.tokens, log_probs[:length], pool[row].offset, options)
            results[row] = Heard(
                model.tokenizer.decode(hypothesis.tokens), words, len(pool[row].samples) / rate
            )
        bar.update(sum(results[row].seconds for row in rows))
        bar.set_postfix_str(
            f"{bar.n / max(bar.format_dict['elapsed'], 0.001):.0f} x real time", refresh=False
        )
    return results


@torch.no_grad()
def hear(model, features: torch.Tensor, lengths: torch.Tensor, search: Search):
    """features (B,T,F), lengths (B,) -> per piece its hypothesis, CTC's log-probabilities (T,V) and how many of them count."""
    o = search.options
    memory, lengths = model.encode(features, lengths, o.chunk_size, o.left_chunks)
    found = model.search(memory, lengths, search.mode, o, search.context)
    return zip(found, model.ctc_log_probs(memory).cpu(), lengths.tolist())


def timed(
    model, tokens: list[int], log_probs: torch.Tensor, offset: float, options: TranscribeOptions
) -> list[Word]:
    """The words of what was heard in log_probs (T,V), where the format has any."""
    if options.format == "txt":
        return []
    times = frame_times(model.options.input_layer, model.frontend)
    return align_words(tokens, log_probs, model.tokenizer, times, offset, options.delay)


# --------------------------------------------------------------------------------------------------------- as a stream


def streamed(
    model,
    recordings: list[Recording],
    options: TranscribeOptions,
    search: Search,
    failed: dict[int, int],
    bar: tqdm,
) -> Iterator[tuple[int, Transcript]]:
    """The same, heard as it comes; of each utterance, what is heard so far goes to stderr whenever it changes."""
    rate = model.frontend.sample_rate
    size = max(search.options.chunk_size, 0) * frame_ms(model) * rate // 1000
    for number, recording in enumerate(recordings):
        texts, words, shown, seconds = [], [], "", 0.0
        blocks = readable(blocks_of(recording, options, rate), number, recording, failed)
        blocks = regroup(blocks, size)
        for heard in listen(
            model, map(torch.from_numpy, blocks), search.options, context=search.context
        ):
            text, seconds = model.tokenizer.decode(heard.hypothesis.tokens), heard.seconds
            if heard.final:
                texts.append(text)
                log_probs = model.ctc_log_probs(heard.memory)[0].cpu()  # (T,V)
                offset = heard.first_frame * frame_ms(model) / 1000
                words.append(timed(model, heard.hypothesis.tokens, log_probs, offset, options))
            if text and (heard.final or text != shown):
                show(text, heard.seconds, heard.final)
            shown = text
        if number not in failed or seconds:  # what was shown is not lost
            yield number, Transcript(recording.path, join(texts), seconds, join_words(words))


def show(text: str, seconds: float, final: bool) -> None:
    """A line on stderr; on a terminal, one that what is heard next replaces until it is final."""
    line = f"{seconds:8.2f} s {'=' if final else ' '} {shown(text, math.inf)}"
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
        return
    room = shutil.get_terminal_size().columns - 1
    if (
        not final and len(line) > room
    ):  # a line that wraps could not be replaced; the newest words matter
        line = f"{line[:13]}...{line[13 + 3 + len(line) - room :]}"
    print(f"\r\033[K{line}", end="\n" if final else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
