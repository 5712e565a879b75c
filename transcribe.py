"""Transcribes recordings: python transcribe.py --checkpoint runs/demo/best.ckpt PATH ...

A PATH is an audio file, a folder (every audio file in it, however deep), a pattern such as
'talks/**/*.flac' (quote it), or - for standard input. Files may have any format that soundfile
decodes, any rate, any number of channels and any length: a long one is cut where it is quietest.
The command prints a line per file: its path, a tab, and the text that was heard. --format adds the
times of the words, and --output_dir makes a file for each recording. A file that cannot be read
gets a line on stderr; the others are transcribed all the same, and the exit status is 2.

With --stream a recording is heard as if it were being spoken: the text so far appears on stderr as
it grows, behind the seconds of audio heard. A pause ends an utterance, which is then rescored.
Ctrl-C ends standard input, and all sound that came before is still heard. From a microphone or
anything else that ffmpeg reads:

  ffmpeg -loglevel error -i INPUT -f wav - |
    python transcribe.py --checkpoint runs/demo/best.ckpt --stream -
"""

import contextlib
import functools
import glob
import math
import os
import re
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

from audio import EXTENSIONS, cut_at_pauses, is_pipe, read_blocks
from context import HotwordOptions
from decode import MODES, STREAM_MODES, SearchOptions, Turns, check_used, columns_of, overlapped
from files import FULL, follows, identity, walk, write_whole
from frames import to_device
from model import load_checkpoint
from ngram import LmOptions, favour
from recovery import leave_terminal
from sampler import eval_batches
from stream import Heard, frame_ms, listen
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
    columns,
    frame_times,
    join,
    join_words,
)

LINGER = 1.0  # seconds for which a pipe is read after Ctrl-C: its writer gets Ctrl-C, too, and ends
POOL = 8  # batches that are read ahead, so that the pieces of a batch have similar lengths
# Endings of recordings that need a conversion first, as a line says for each of them in a folder.
FOREIGN = set("3gp aac amr ape m4a m4b mka mkv mov mp4 tta webm wma wv".split())
FORMATS = {"txt": as_txt, "json": as_json, "srt": as_srt, "vtt": as_vtt, "ctm": as_ctm}


@options_class
class TranscribeOptions:
    checkpoint: str = option("runs/demo/best.ckpt", "a .ckpt, a folder for the hub, or org/name")
    mode: str = option(
        "attention_rescoring", f"search; with --stream {' or '.join(STREAM_MODES)}", choices=MODES
    )
    stream: bool = option(False, "hear piece by piece, in chunks of --chunk_size, 16 unless given")
    format: str = option("txt", "text alone, or with the times of words", choices=tuple(FORMATS))
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
        "most seconds of audio in a batch, padding and tails included; memory grows with it",
        at_least=1.0,
        at_most=1e6,
    )
    delay: float = option(
        0.0,
        "seconds to take off all times; python -m tools.align measures how late a checkpoint is",
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
    """Names a file to transcribe, or standard input, whose path is -."""

    path: str
    name: str  # of its output, without extension: its path below the PATH of the command line


class Piece(NamedTuple):
    """Holds a part of a recording, short enough to be heard at once."""

    recording: int  # the recording's number
    offset: float  # seconds into the recording
    samples: np.ndarray  # (n,)


class HeardPiece(NamedTuple):
    """Holds the text and the words that were heard in a piece."""

    text: str
    words: list[Word]
    seconds: float  # how long the piece is


class Job(NamedTuple):
    """Holds the model and the options by which all recordings are heard."""

    model: object  # a model.U2
    options: TranscribeOptions
    search: SearchOptions
    context: object | None  # what ngram.favour makes of hotwords and a language model

    @property
    def shows_words(self) -> bool:
        """True for a format that has words, which CTC's log-probabilities time."""
        return self.options.format != "txt"


def main(argv: list[str]) -> None:
    parser = make_parser(__doc__, TranscribeOptions, SearchOptions, HotwordOptions, LmOptions)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="audio files, folders, quoted patterns, - for standard input",
    )
    given = vars(parser.parse_args(argv))
    options = build(TranscribeOptions, given)
    check_given(given, options)
    search = build(SearchOptions, given, **({"chunk_size": 16} if options.stream else {}))
    hotwords = build(HotwordOptions, given)
    lm = build(LmOptions, given)
    recordings = [recording for path in given["paths"] for recording in recordings_at(path)]
    inputs = options.checkpoint, hotwords.hotwords or "", lm.lm or "", lm.graph or ""
    outputs = output_paths(recordings, options, inputs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, _ = load_checkpoint(options.checkpoint, device)
    job = Job(model, options, search, favour(lm, hotwords, tokenizer, options.stream))
    failed = transcribe_all(job, recordings, outputs)
    if failed:
        sys.exit(max(failed.values()))


def transcribe_all(
    job: Job, recordings: list[Recording], outputs: list[str | None]
) -> dict[int, int]:
    """Transcribes each recording to its output -> {number: exit status} of those that failed."""
    failed = {}
    with tqdm(
        total=total_seconds(recordings),
        disable=job.options.stream or None,
        bar_format="{percentage:3.0f} %|{bar}| {n:.0f} of {total_fmt} s{postfix}",
    ) as bar:
        if job.options.stream:
            transcripts = transcribe_streams(job, recordings, failed)
        else:
            transcripts = transcribe_pieces(job, recordings, failed, bar)
        for number, transcript in transcripts:
            try:
                deliver(transcript, outputs[number], job.options.format, job.options.overwrite)
            except UserError as error:
                # A full disk is full for all recordings that come after, too.
                if getattr(error.__cause__, "errno", None) in FULL:
                    raise
                failed[number] = 2
                tell("error", recordings[number], f"{error}; its text is on standard output")
                deliver(transcript, None, job.options.format)
    return failed


def check_given(given: dict, options: TranscribeOptions) -> None:
    """Raises UserError for flags that have no effect beside the others."""
    check_used(given, (options.mode,))
    for name in ("max_seconds", "batch_seconds"):
        if options.stream and name in given:
            raise UserError(f"--{name} has no effect with --stream; leave one of them out")
    if options.stream and options.mode not in STREAM_MODES:
        raise UserError(
            f"--mode {options.mode}: --stream hears by {' or '.join(STREAM_MODES)} only; leave "
            "one of them out"
        )
    if options.format == "txt" and "delay" in given:
        raise UserError(
            "--delay has no effect on --format txt, which has no times; leave one of them out"
        )
    if options.raw and given["paths"] != ["-"]:
        raise UserError("--raw is for standard input; give - as the only PATH, or leave it out")


# ---- Input and output


def recordings_at(path: str) -> list[Recording]:
    """Lists the audio files that a PATH of the command line means, in order.

    A PATH that means no file stays in the list as it is, and so does a folder that cannot be
    opened: reading it will say why. A pattern without ** means the files in its folders, too.
    """
    if os.path.isdir(path):
        return named(sorted(files_below(path)), path) or [Recording(path, path)]
    if os.path.exists(path) or not any(sign in path for sign in "*?["):
        return named([path], os.path.dirname(path))
    if anywhere := re.search(r"(^|/)\*\*(/|$)", path):
        matches = matches_below(path[: anywhere.end(1)], path[anywhere.end(1) :])
    else:
        matches = []
        for match in sorted(glob.glob(path)):
            matches += [match] if os.path.isfile(match) else sorted(files_below(match))
    above = path  # the folder above all signs of the pattern
    while any(sign in above for sign in "*?["):
        above = os.path.dirname(above)
    return named(matches, above) or [Recording(path, path)]


def matches_below(top: str, pattern: str) -> list[str]:
    """Lists the files that match a pattern with ** below the folders `top`, a pattern itself.

    Folders below them that cannot be opened are in the list, too.
    """
    found, unread = [], []
    steps = tuple(pattern.split("/"))
    for folder in sorted(glob.glob(top)) if top else [top]:
        paths = (
            os.path.relpath(path, folder or None) for path in walk(folder or ".", unread.append)
        )
        found += [
            os.path.join(folder, path) for path in paths if follows(tuple(path.split("/")), steps)
        ]
    # Where links lead to a folder, too, its files are those of the first path to it.
    real = functools.cache(os.path.realpath)
    first = {}
    return unread + [
        path
        for path in found
        if first.setdefault(real(folder := os.path.dirname(path)), folder) == folder
    ]


def files_below(path: str) -> list[str]:
    """Lists the recordings in a folder and below, and folders that cannot be opened.

    Files of the kinds that cannot be heard count, so that each has a line that says why, unless its
    conversion lies beside it.
    """
    unread = []
    parts = list(map(os.path.splitext, walk(path, unread.append, again=False)))
    heard = {stem for stem, end in parts if end[1:].lower() in EXTENSIONS}
    return unread + [
        stem + end
        for stem, end in parts
        if end[1:].lower() in (EXTENSIONS if stem in heard else FOREIGN)
    ]


def named(paths: Iterable[str], folder: str) -> list[Recording]:
    """Makes recordings of the paths, each named by its path from the folder."""
    recordings = []
    for path in paths:
        name = os.path.splitext(os.path.relpath(path, folder or "."))[0]
        recordings.append(Recording(path, "stdin" if path == "-" else name))
    return recordings


def output_paths(
    recordings: list[Recording], options: TranscribeOptions, inputs: tuple[str, ...]
) -> list[str | None]:
    """Names the file for the transcript of each recording, None for stdout.

    Raises UserError where a transcript would replace another one or a file that is read (`inputs`
    and the recordings), or would leave --output_dir.
    """
    if not options.output_dir:
        if options.format in ("srt", "vtt") and len(recordings) > 1:
            raise UserError(
                f"--format {options.format} makes one file per recording; give --output_dir for "
                "them"
            )
        return [None] * len(recordings)
    owners = {}  # file -> the recording whose transcript it gets
    outputs = []
    top = os.path.realpath(options.output_dir)
    read = (*inputs, *(recording.path for recording in recordings))
    taken = {identity(path) for path in (*read, 1, 2)} - {None}
    for recording in recordings:
        name = os.path.normpath(f"/{recording.name}").lstrip("/")  # .. does not lead up from /
        output = os.path.join(options.output_dir, f"{name}.{options.format}")
        outputs.append(output)
        target = os.path.realpath(output)
        other = owners.setdefault(target, recording)
        if other is not recording:
            raise UserError(
                f"{other.path} and {recording.path} would both be written to {output}; transcribe "
                "them apart"
            )
        if os.path.commonpath([top, target]) != top:
            raise UserError(f"{output} leads to {target}, outside of --output_dir; choose another")
        check_new(output, options.overwrite)
        if identity(output) in taken:
            raise UserError(
                f"{output} is what this command reads, or where it prints; choose "
                "another --output_dir"
            )
    make_output_dir(options.output_dir)
    return outputs


def check_new(output: str, overwrite: bool) -> None:
    """Raises UserError where a file is there already and may not be replaced."""
    if os.path.lexists(output) and not overwrite:
        raise UserError(f"{output} exists; give --overwrite to replace it, or another --output_dir")


def make_output_dir(folder: str) -> None:
    """Makes the folder before hours of hearing. Raises UserError where it cannot be written."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder} cannot be made ({error.strerror}); choose another"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder} cannot be written; choose another")


def deliver(
    transcript: Transcript, output: str | None, format: str, overwrite: bool = False
) -> None:
    """Writes a transcript to its file, or to stdout. Raises UserError where writing fails."""
    text = FORMATS[format](transcript)
    if format == "txt" and output:  # The file's name already names the recording.
        text = text.split("\t")[1]
    if output is None:
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, end="", flush=True)
        return
    # Another command may have written the file in the hours since the start.
    check_new(output, overwrite)
    try:
        os.makedirs(os.path.dirname(output), exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{output}: its folder cannot be made ({error.strerror}); choose another --output_dir"
        ) from error
    write_whole(output, text.encode())


def total_seconds(recordings: list[Recording]) -> float | None:
    """Sums the recordings' seconds for the progress bar; None if unknown or without a terminal."""
    if not sys.stderr.isatty() or any(recording.path == "-" for recording in recordings):
        return None
    total = 0.0
    for recording in recordings:
        if not os.path.isfile(recording.path):  # A named pipe would block.
            continue
        with contextlib.suppress(OSError, RuntimeError):  # Reading the file will say what is wrong.
            info = soundfile.info(recording.path)
            # A FLAC file that does not know its length has a number of 2**62 or more here.
            total += info.duration if info.frames < 2**62 else 0
    return round(total)


# ---- Piece by piece


def transcribe_pieces(
    job: Job, recordings: list[Recording], failed: dict[int, int], bar: tqdm
) -> Iterator[tuple[int, Transcript]]:
    """Yields (number, transcript) of each recording that can be read, in order.

    `failed` gets the number of each other recording, with its exit status.
    """
    heard = defaultdict(list)  # number -> what was heard in the recording's pieces so far
    pool_size = POOL * job.options.batch_seconds * job.model.frontend.sample_rate
    for pool in pools(read_pieces(job, recordings, failed), pool_size):
        for piece, result in zip(pool, recognize_pool(job, pool, bar)):
            heard[piece.recording].append(result)
        # More of the pool's last recording may come; those before it are complete.
        for number in [number for number in heard if number < pool[-1].recording]:
            yield from assemble(number, recordings[number], heard.pop(number), failed)
    for number in list(heard):
        yield from assemble(number, recordings[number], heard.pop(number), failed)


def assemble(
    number: int, recording: Recording, heard: list[HeardPiece], failed: dict[int, int]
) -> Iterator[tuple[int, Transcript]]:
    """Yields (number, transcript) of the recording; nothing where reading a file has failed.

    A file can be mended and heard again; sound that came from a pipe cannot.
    """
    if number in failed and recording.path != "-":
        return
    text = join(part.text for part in heard)
    words = join_words(part.words for part in heard)
    yield number, Transcript(recording.path, text, sum(part.seconds for part in heard), words)


def read_pieces(job: Job, recordings: list[Recording], failed: dict[int, int]) -> Iterator[Piece]:
    """Yields the pieces of all recordings, one after the other, as far as they can be read."""
    rate = job.model.frontend.sample_rate
    for number, recording in enumerate(recordings):
        offset = 0
        blocks = readable(job, number, recording, failed)
        for samples in cut_at_pauses(blocks, rate, job.options.max_seconds):
            yield Piece(number, offset / rate, samples)
            offset += len(samples)


def recorded(job: Job, recording: Recording) -> Iterator[np.ndarray]:
    """Yields the recording's samples in blocks; where some are lost, a line on stderr says so."""
    if os.path.isdir(recording.path):
        try:
            os.listdir(recording.path)
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})") from error
        raise UserError("a folder without audio files")
    told = functools.partial(tell, "note", recording)
    rate = job.model.frontend.sample_rate
    yield from read_blocks(recording.path, rate, job.options.raw, told)


def tell(kind: str, recording: Recording, what: str) -> None:
    """Prints a line about a recording to stderr, above the progress bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        print(shown(f"transcribe.py: {kind}: {recording.path}: {one_line(what)}"), file=sys.stderr)


def readable(
    job: Job, number: int, recording: Recording, failed: dict[int, int]
) -> Iterator[np.ndarray]:
    """Yields the samples up to an error, prints the error, and notes it in `failed`.

    A pipe also ends at a signal: one from a microphone has no other end.
    """
    pipe = recording.path == "-" and is_pipe(job.options.raw)
    try:
        with ended_by_signals() if pipe else contextlib.nullcontext([]) as signals:
            yield from recorded(job, recording)
    except KeyboardInterrupt:
        if not pipe or signals:
            raise
    except UserError as error:
        failed[number] = 2
        tell("error", recording, str(error))
    if signals and signals[0] != signal.SIGINT:
        failed[number] = 128 + signals[0]
        tell("note", recording, f"interrupted ({signal.Signals(signals[0]).name})")


@contextlib.contextmanager
def ended_by_signals():
    """Lets the first signal end the pipe of standard input, not the command: all sound is heard.

    The context manager gives a list, which gets the signal's number. A second signal ends the
    command.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    signals = []

    def end(number, _):
        signals.append(number)
        restore()
        if number == signal.SIGHUP:
            leave_terminal()
        rest = os.dup(0)
        out, into = os.pipe()
        os.dup2(out, 0)  # A read that waits goes on in the new pipe, and finds its end.
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
    """Copies the bytes that `source` gives within LINGER seconds to the pipe `into`; closes it."""
    ends = time.monotonic() + LINGER
    while (left := ends - time.monotonic()) > 0 and select.select([source], [], [], left)[0]:
        if not (content := os.read(source, 2**16)):
            break
        os.write(into, content)
    os.close(into)


def pools(pieces: Iterable[Piece], size: float) -> Iterator[list[Piece]]:
    """Collects the pieces in lists of `size` samples or a little more."""
    pool = []
    for piece in pieces:
        pool.append(piece)
        if sum(len(piece.samples) for piece in pool) >= size:
            yield pool
            pool = []
    if pool:
        yield pool


def recognize_pool(job: Job, pool: list[Piece], bar: tqdm) -> list[HeardPiece]:
    """Hears each piece of the pool, in batches of pieces of similar lengths."""
    model = job.model
    rate = model.frontend.sample_rate
    features_of = extract(model.frontend)
    results = [None] * len(pool)
    lengths = [len(piece.samples) + model.frontend.tail_samples for piece in pool]
    keys = eval_batches(lengths, math.inf, max_batch=job.options.batch_seconds * rate)
    batches = [[row for _, row in batch] for batch in keys]
    searches = (
        recognize_batch(job, [features_of(torch.from_numpy(pool[row].samples)) for row in rows])
        for rows in batches
    )
    for rows, found in zip(batches, overlapped(searches)):
        for row, (tokens, *timing) in zip(rows, found):
            offset = pool[row].offset
            seconds = len(pool[row].samples) / rate
            words = timed(job, tokens, offset, offset + seconds, *timing)
            results[row] = HeardPiece(model.tokenizer.decode(tokens), words, seconds)
        bar.update(sum(results[row].seconds for row in rows))
        speed = bar.n / max(bar.format_dict["elapsed"], 0.001)
        bar.set_postfix_str(f"{speed:.0f} x real time", refresh=False)
    return results


@torch.no_grad()
def recognize_batch(job: Job, features: list[torch.Tensor]) -> Turns:
    """Hears features (T,F) of pieces, in turns -> for each piece (tokens, *what `timed` reads).

    For a format that shows words, these are CTC's log-probabilities (T',C) of some columns, and the
    columns (decode.columns_of). Raises UserError where the batch does not fit the memory.
    """
    model = job.model
    lengths = torch.tensor([len(frames) for frames in features])
    inputs = (to_device(part, model.device) for part in (pad_sequence(features, True), lengths))
    try:
        encoded, lengths = model.encode(*inputs, job.search.chunk_size, job.search.left_chunks)
        found = yield from model.searching(
            encoded, lengths, job.options.mode, job.search, job.context
        )
        tokens = [hypothesis.tokens for hypothesis in found]
        if not job.shows_words:
            return [(row,) for row in tokens]
        nbests = [[row] for row in tokens]
        blank_id = model.tokenizer.blank_id
        log_probs, columns = columns_of(model.ctc_log_probs(encoded), nbests, blank_id)
        log_probs, lengths = yield log_probs, lengths
    except torch.OutOfMemoryError:
        raise UserError(
            f"--batch_seconds {job.options.batch_seconds:g} does not fit the memory; give fewer"
        ) from None
    rows = zip(tokens, log_probs, lengths.tolist(), columns)
    return [(row, of_row[:length], used) for row, of_row, length, used in rows]


def timed(
    job: Job,
    tokens: list[int],
    offset: float,
    until: float,
    log_probs: torch.Tensor | None = None,
    columns: list[int] | None = None,
) -> list[Word]:
    """Finds the words of tokens in log_probs (T',V), or (T',C) of the columns; none without.

    The piece begins at `offset` and ends at `until`, in seconds.
    """
    if log_probs is None:
        return []
    model = job.model
    times = frame_times(model.options.input_layer, model.frontend)
    where = offset, job.options.delay
    return align_words(tokens, log_probs, model.tokenizer, times, *where, columns, until)


# ---- As a stream


def transcribe_streams(
    job: Job, recordings: list[Recording], failed: dict[int, int]
) -> Iterator[tuple[int, Transcript]]:
    """Yields what transcribe_pieces yields, but hears each recording as a stream."""
    for number, recording in enumerate(recordings):
        blocks = readable(job, number, recording, failed)
        transcript = transcribe_stream(job, recording.path, blocks)
        if number not in failed or transcript.duration:  # Text that was shown is not lost.
            yield number, transcript


def transcribe_stream(job: Job, path: str, blocks: Iterator[np.ndarray]) -> Transcript:
    """Transcribes a stream; the text so far goes to stderr whenever it changes."""
    model = job.model
    texts = []
    words = []
    before = ""
    seconds = 0.0
    how = {"context": job.context, "mode": job.options.mode}
    for heard in listen(model, map(torch.from_numpy, blocks), job.search, **how):
        text = model.tokenizer.decode(heard.hypothesis.tokens)
        seconds = heard.seconds
        if heard.final:
            texts.append(text)
            words.append(words_of(job, heard) if job.shows_words else [])
        if text and (heard.final or text != before):
            show_heard(text, seconds, heard.final)
        before = text
    return Transcript(path, join(texts), seconds, join_words(words))


def words_of(job: Job, heard: Heard) -> list[Word]:
    """Finds the words of an utterance that has ended, in seconds since the stream began."""
    log_probs = job.model.ctc_log_probs(heard.encoded)[0].cpu()  # (T',V)
    offset = heard.first_frame * frame_ms(job.model) / 1000
    return timed(job, heard.hypothesis.tokens, offset, heard.seconds, log_probs)


def show_heard(text: str, seconds: float, final: bool) -> None:
    """Prints a line to stderr; on a terminal the next call replaces it, unless it is final."""
    line = f"{seconds:8.2f} s {'=' if final else ' '} {shown(text, math.inf)}"
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
        return
    room = shutil.get_terminal_size().columns - 1
    # A line that wraps could not be replaced. Its newest words matter most.
    if not final and columns(line) > room:
        said = line[13:][-max(room - 16, 1) :]
        while said and columns(said) > room - 16:
            said = said[1:]
        line = f"{line[:13]}...{said}"
    print(f"\r\033[K{line}", end="\n" if final else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
