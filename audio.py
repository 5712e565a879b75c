"""Files and pipes to waveforms: one reader for preparing, transcribing and exporting, in blocks, so
in bounded memory.

A block is (n,) float32, mono. An hour of audio lies in memory at once only where read_audio is
asked for it. All of a file is decoded, whatever its header says (containers.py); what was there and
is lost is an error or is told, with the seconds.
"""

import bisect
import contextlib
import io
import itertools
import math
import os
import re
import select
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from cli import SIGNALS, UserError

import numpy as np
import soundfile
import torch
import torchaudio

from containers import METADATA, UNKNOWN, Part, at, header, parts
from transforms import RATES, check_samples

EXTENSIONS = {name.lower() for name in soundfile.available_formats()} - {"raw"} | {
    "aif",
    "aifc",
    "mp2",
    "oga",
    "opus",
    "sph",
}
BLOCK = 0.2  # seconds that are read at a time: what a pipe waits for
SECONDS = 60  # seconds to resample at a time: what that takes is several times as large
LONGEST = 3600  # seconds of a recording that is read whole: no row is as long, and ten hours that
# say nothing may lie in a file of 2 MB and take gigabytes
QUIET = 0.2  # seconds over which loudness is measured to find a pause
CANCELLED = 0.01  # of the loudest channel's power: a mean with less is of channels that cancel out
WIDTHS = {
    "PCM_U8": 1,
    "PCM_S8": 1,
    "PCM_16": 2,
    "PCM_24": 3,
    "PCM_32": 4,
    "FLOAT": 4,
    "DOUBLE": 8,
    "ULAW": 1,
    "ALAW": 1,
}  # bytes
# Of libsndfile's log
NO_END = re.compile("^Ogg ?: (?:Last page lacks|Junk after|File ended)", re.MULTILINE)
ERRORS = (OSError, RuntimeError, TypeError, ValueError, MemoryError)  # soundfile's too


# Reading


def read_audio(audio: str | bytes, sample_rate: int = 16000) -> np.ndarray:
    """Waveform (N,) float32, mono, at `sample_rate`, of a path or of a file's bytes: read_blocks'
    blocks, all of them.

    Raises UserError with the reason alone (no file name) where read_blocks would, where sound is
    lost, and for a recording longer than LONGEST, of which no more is decoded.
    """
    samples = bytearray()
    for block in within(read_blocks(audio, sample_rate, longest=LONGEST), LONGEST, sample_rate):
        samples += block.tobytes()
    return np.frombuffer(samples, np.float32)


def within(blocks: Iterable[np.ndarray], seconds: float, rate: int) -> Iterator[np.ndarray]:
    """The same blocks. Raises UserError at the first sample beyond so many seconds."""
    left = seconds * rate
    for block in blocks:
        left -= len(block)
        if left < 0:
            raise UserError(f"longer than {seconds} s; cut it into utterances")
        yield block


def read_blocks(
    audio: str | bytes,
    sample_rate: int,
    raw: bool = False,
    damaged: Callable[[str], None] | None = None,
    longest: float = math.inf,
) -> Iterator[np.ndarray]:
    """The samples of a file, given as its path, as its bytes, or as "-" for standard input, at
    `sample_rate`.

    Any format that soundfile decodes; on a pipe wav, aiff, au, caf and w64, whose header need not
    know the length, of samples that are not compressed. raw: no header, 16-bit little-endian mono
    at `sample_rate`. damaged: told why, where a file that has begun cannot be read on or ends too
    early; without it that is an error. longest: seconds that the levels of several channels may
    take, which are heard before anything is given. Raises UserError with the reason alone (no file
    name), at the start or after some blocks, for what is missing, undecodable, empty, not finite or
    louder than any sound, and for rates beyond RATES.
    """
    if not isinstance(audio, bytes) and audio != "-" and not os.path.isfile(audio):
        raise UserError("file missing")
    blocks, advice = file_blocks(audio, sample_rate, damaged, longest), ""
    if audio == "-" and (raw or not is_file(0)):
        blocks = pipe_blocks(sample_rate, raw, damaged)
        advice = "; pipe wav, as `ffmpeg -i INPUT -f wav -` writes it"
    try:
        first = next(filter(len, blocks), None)
        if first is None:
            raise UserError("no samples")
        yield from itertools.chain([first], blocks)
    except ERRORS as error:
        reason = getattr(error, "error_string", error)
        raise UserError(f"cannot be decoded: {reason}{advice}") from None


def is_file(descriptor: int) -> bool:
    try:
        return os.lseek(descriptor, 0, os.SEEK_CUR) >= 0
    except OSError:
        return False


def pipe_blocks(sample_rate: int, raw: bool, damaged) -> Iterator[np.ndarray]:
    """Standard input as it comes."""
    head, promised = (b"", 0) if raw else header(pipe_bytes)
    if not (raw or head):
        raise ValueError("it does not begin as wav, aiff, au, caf or w64")
    how = (
        {
            "format": "RAW",
            "subtype": "PCM_16",
            "endian": "LITTLE",
            "samplerate": sample_rate,
            "channels": 1,
        }
        if raw
        else {}
    )
    with Forward(io.BytesIO(head), **how) as sound:
        width = WIDTHS.get(sound.subtype, 0) * sound.channels  # bytes of a sample of all channels
        if not width:
            raise ValueError(f"its samples are {sound.subtype}")
        promised = promised if promised < UNKNOWN[4] else 0
        blocks = pcm_blocks(sound, width, promised)
        blocks = mono(sound, blocks, Part([], promised // width), None, damaged)
        yield from resampled(blocks, sound.samplerate, sample_rate, at_once=True)


def pcm_blocks(sound: soundfile.SoundFile, width: int, promised: int) -> Iterator[np.ndarray]:
    """The samples behind the header `sound`, also those after the bytes promised: more, where that
    says 0 or was never written anew.

    Not the chunks that may follow.
    """
    order = "BIG" if sound.format in ("AIFF", "AU", "CAF") else "LITTLE"
    how = {
        "format": "RAW",
        "subtype": sound.subtype,
        "samplerate": sound.samplerate,
        "endian": order if sound.endian == "FILE" else sound.endian,
        "channels": sound.channels,
    }
    place, size = 0, block_size(sound) * width
    while content := pipe_bytes(min(size, promised - place) if place < promised else size):
        if place == promised and content[:4] in METADATA:
            return
        yield soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True, **how)[0]
        place += len(content)


def pipe_bytes(size: int) -> bytes:
    """So many bytes of standard input, fewer at its end."""
    content = bytearray()
    while len(content) < size:
        select.select([0], [], [])  # a pipe may have been set not to wait
        if not (more := os.read(0, min(size - len(content), 2**16))):
            break
        content += more
    return bytes(content)


def file_blocks(
    audio: str | bytes, sample_rate: int, damaged, longest: float
) -> Iterator[np.ndarray]:
    """The parts of a file, one after the other. Of several channels the levels are known before the
    first is mixed.
    """
    if isinstance(audio, bytes):
        file = io.BytesIO(audio)
    else:
        file = open(0 if audio == "-" else audio, "rb", closefd=audio != "-")
    with file:
        if not file.seek(0, os.SEEK_END):
            raise UserError("cannot be decoded: it has 0 bytes")
        for part in parts(file):
            source = Joined(file, part.pieces)
            with opened(source) as sound:
                levels, rate = Levels(sound.channels), usable_rate(sound.samplerate)
                blocks = blocks_of(sound, signals_wait) if sound.channels > 1 else ()
                with contextlib.suppress(soundfile.LibsndfileError):  # which comes again
                    for block in within(blocks, longest, rate):
                        levels.add(block)
            with opened(source) as sound:
                blocks = mono(sound, blocks_of(sound, signals_wait), part, levels, damaged)
                yield from resampled(blocks, sound.samplerate, sample_rate)
            if source.error:
                raise source.error


def opened(source: "Joined") -> "Forward":
    source.seek(0)
    with signals_wait():
        return Forward(source)


class Forward(soundfile.SoundFile):
    """Read from its start to its end, whatever number of frames its header promises; soundfile
    would seek after every read.
    """

    def seekable(self) -> bool:
        return False


class Joined(io.RawIOBase):
    """Pieces of a file, and bytes, as one file. State: the place in it, and what went wrong.

    Of a damaged file libsndfile seeks places before its start. Nothing is raised here: it could not
    pass that on.
    """

    def __init__(self, file: BinaryIO, pieces: list[bytes | tuple[int, int]]):
        self.file, self.pieces, self.place, self.error = file, pieces, 0, None
        sizes = (len(p) if isinstance(p, bytes) else p[1] - p[0] for p in pieces)
        self.ends = list(itertools.accumulate(sizes))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = max(offset + (0, self.place, self.ends[-1])[whence], 0)
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer) -> int:
        buffer, count = memoryview(buffer), 0
        while count < len(buffer) and self.place < self.ends[-1]:
            number = bisect.bisect(self.ends, self.place)
            piece, left = self.pieces[number], self.ends[number] - self.place
            size = min(left, len(buffer) - count)
            if isinstance(piece, bytes):
                content = piece[len(piece) - left :][:size]
            else:
                try:
                    content = at(self.file, piece[1] - left, size)
                except OSError as error:
                    content, self.error = b"", error
            if not content:
                break
            buffer[count : count + len(content)] = content
            count, self.place = count + len(content), self.place + len(content)
        return count


@contextlib.contextmanager
def signals_wait():
    """What their handlers raise would be lost in a callback of libsndfile's, as in which Joined is
    read; so they run afterwards.
    """
    waiting, handlers = [], {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handlers:
            signal.signal(number, lambda *call: waiting.append(call))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for call in waiting:
            handlers[call[0]](*call)


def blocks_of(sound: soundfile.SoundFile, guard=contextlib.nullcontext) -> Iterator[np.ndarray]:
    """(n, channels), BLOCK seconds each, the last one shorter. Raises LibsndfileError after what
    could be decoded.
    """
    size, left = block_size(sound), sound.frames
    while left > 0:  # of a pipe, more than is left would be read and lost
        block = np.full((size, sound.channels), np.nan, np.float32)
        try:
            with guard():
                count = len(sound.read(min(size, left), out=block))
        except soundfile.LibsndfileError:
            if count := np.append(np.isnan(block).any(axis=1), True).argmax():
                yield block[:count]
            raise
        if not count:
            return
        left -= count
        yield block[:count]


def block_size(sound: soundfile.SoundFile) -> int:
    return max(min(int(BLOCK * sound.samplerate), 2**20 // sound.channels), 1)


def mono(
    sound: soundfile.SoundFile,
    blocks: Iterable[np.ndarray],
    part: Part,
    levels: "Levels | None",
    damaged,
) -> Iterator[np.ndarray]:
    """Blocks of one channel; where they end too early, `damaged` is told. Without levels they are
    those so far.
    """
    count, rate, error = 0, sound.samplerate, ""
    known, levels = levels is not None, levels or Levels(sound.channels)
    try:
        for block in blocks:
            good, reason = check_samples(block)
            block = block[:good]
            if not known:
                levels.add(block)
            count += len(block)
            if len(block):
                yield levels.mix(block)
            if reason:
                raise UserError(f"{reason} after {count / rate:.1f} s" if damaged else reason)
    except soundfile.LibsndfileError as failure:
        error = "" if 0 < count == part.frames else failure.error_string  # what follows is no sound
    promised = part.frames or (sound.frames if part.pieces and sound.frames < 2**62 else 0)
    promised, there, reason = max(promised, count / part.share), f"{count / rate:.1f} s", ""
    flaw = part.flaw or NO_END.search(sound.extra_info) and "its Ogg stream has no end mark"
    in_blocks = part.share < 1 and sound.subtype not in WIDTHS  # a byte less is a block less
    if lost := promised - count > (0 if in_blocks else rate / 10):  # some miscount by a frame
        there = f"{there} of {promised / rate:.1f} s"
    if error:
        reason = f"damaged after {there}: {error}"
    elif lost or flaw:
        reason = f"cut short: {there}" if lost else f"cut short: {flaw}, after {there}"
    if reason and (damaged is None or error and not count):
        raise UserError(f"cannot be decoded: {reason}" if error else reason)
    if reason:
        damaged(reason)


class Levels:
    """Which of the channels is heard: their mean, or, where they cancel each other out in it, the
    loudest alone.

    State: sums over the samples of the channels and of their products, which also tell the power of
    the mean.
    """

    def __init__(self, channels: int):
        self.count, self.sums, self.products = 0, np.zeros(channels), np.zeros((channels, channels))

    def add(self, block: np.ndarray) -> None:
        with np.errstate(all="ignore"):  # what is not finite is found later
            wide = block.astype(np.float64)
            self.count += len(wide)
            self.sums += np.ones(len(wide)) @ wide
            self.products += wide.T @ wide

    def mix(self, block: np.ndarray) -> np.ndarray:
        """(n, channels) -> (n,)"""
        if block.shape[1] == 1:
            return block[:, 0]
        means = self.sums / self.count
        covariance = self.products / self.count - np.outer(means, means)
        loudest = covariance.diagonal().argmax()
        cancelled = covariance.mean() < CANCELLED * covariance[loudest, loudest]
        return block[:, loudest] if cancelled else block.mean(axis=1)


# Resampling


def usable_rate(rate: int) -> int:
    """`rate` itself. Raises UserError for a rate beyond RATES."""
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"sample rate {rate}: it must be {RATES[0]} to {RATES[1]}")
    return rate


def resample(samples: np.ndarray, rate: int, sample_rate: int = 16000) -> np.ndarray:
    """(N,) float32 at `rate` Hz to `sample_rate`. Raises UserError for a rate beyond RATES."""
    if rate == sample_rate:
        return samples
    return np.concatenate(list(resampled([samples], rate, sample_rate)))


def resampled(
    blocks: Iterable[np.ndarray], rate: int, sample_rate: int, at_once: bool = False
) -> Iterator[np.ndarray]:
    """The same at `sample_rate`, SECONDS at a time, without a seam. Raises UserError for a rate
    beyond RATES.

    The samples are the same to the bit, whatever the blocks are. at_once: nothing waits until there
    are so many seconds, as a pipe needs; then a sample may differ by 1.5e-7.
    """
    if rate == sample_rate:
        yield from blocks
        return
    # A rate such as 22254 would need a filter of gigabytes; this is 0.02 % off.
    rate = round(usable_rate(rate) / 25) * 25
    # 0.04 and 0.2 seconds: whole numbers of samples at either rate, so nothing drifts.
    margin = rate // 25
    step = rate // 5
    resampler = torchaudio.transforms.Resample(rate, sample_rate)

    def steps_of(samples: np.ndarray, least: int) -> Iterator[np.ndarray]:
        """Yields what `least` steps or more become, and returns the samples that are left."""
        while (steps := min((len(samples) - 2 * margin) // step, 5 * SECONDS)) >= least:
            out = resampler(torch.from_numpy(samples[: steps * step + 2 * margin])).numpy()
            yield out[sample_rate // 25 :][: steps * (sample_rate // 5)]
            samples = samples[steps * step :]
        return samples

    waiting = [np.zeros(margin, np.float32)]
    count = margin
    least = 1 if at_once else 5 * SECONDS
    error = None
    try:
        for block in blocks:
            waiting.append(block)
            count += len(block)
            if count >= least * step + 2 * margin:
                waiting = [(yield from steps_of(np.concatenate(waiting), least))]
                count = len(waiting[0])
    except UserError as failure:  # what came before it is heard to its end
        error = failure
    rest = yield from steps_of(np.concatenate(waiting), 1)
    length = -(-(len(rest) - margin) * sample_rate // rate)
    out = resampler(torch.from_numpy(np.pad(rest, (0, margin)))).numpy()
    yield out[sample_rate // 25 :][:length]
    if error:
        raise error


# Pieces


def regroup(blocks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of `size`, the last one shorter; in a single one where size is
    below 1.
    """
    waiting = []
    for block in blocks:
        waiting.append(block)
        while 0 < size <= sum(map(len, waiting)):
            samples = np.concatenate(waiting)
            yield samples[:size]
            waiting = [samples[size:]]
    if any(map(len, waiting)):
        yield np.concatenate(waiting)


def cut_at_pauses(
    blocks: Iterator[np.ndarray], sample_rate: int, max_seconds: float
) -> Iterator[np.ndarray]:
    """The same samples in pieces of at most max_seconds.

    Where there are more, the cut falls where the recording is quietest, between half of max_seconds
    and all of it.
    """
    longest, waiting, count = int(max_seconds * sample_rate), [], 0
    for block in blocks:
        waiting.append(block)
        count += len(block)
        while count > longest:
            samples = np.concatenate(waiting)
            cut = longest // 2 + quietest(samples[longest // 2 : longest], sample_rate)
            yield samples[:cut]
            waiting, count = [samples[cut:]], count - cut
    if count:
        yield np.concatenate(waiting)


def quietest(samples: np.ndarray, sample_rate: int) -> int:
    """The middle of the QUIET seconds of (n,) samples whose frames of 10 ms vary least."""
    size = sample_rate // 100
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    width = min(int(QUIET * 100), len(frames))
    if not width:
        return len(samples)
    loudness = np.convolve(frames.var(axis=1), np.ones(width), mode="valid")
    return (int(loudness.argmin()) + width // 2) * size
