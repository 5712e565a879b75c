"""Files and pipes to waveforms, in blocks, so in bounded memory.

All commands read with read_blocks; read_audio joins its blocks. A block is (n,) float32, mono.
`mono` makes one channel of several, and `resampled` changes the rate, for files and pipes alike.
All of a file is decoded, whatever its header says (containers.py). Where sound is lost, that is an
error or the caller is told how many seconds are left.
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

# Files with one of these endings are taken for recordings.
EXTENSIONS = {name.lower() for name in soundfile.available_formats()} - {"raw"}
EXTENSIONS |= {"aif", "aifc", "mp2", "oga", "opus", "sph"}
# So many seconds are read at a time; on a pipe it waits for as many.
BLOCK = 0.2
# So many seconds are resampled at a time, which takes several times their memory.
SECONDS = 60
# A recording that is read whole has at most so many seconds. No row is as long, and ten hours of
# silence, which are 2 MB as a file, would take gigabytes.
LONGEST = 3600
# Loudness is measured over so many seconds to find a pause.
QUIET = 0.2
# Channels cancel each other out where their mean has less than this share of the loudest's power.
CANCELLED = 0.01
# Bytes of a sample, where samples are not compressed.
WIDTHS = {"PCM_U8": 1, "PCM_S8": 1, "ULAW": 1, "ALAW": 1}
WIDTHS |= {"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
# libsndfile's log says so of an Ogg stream without an end.
NO_END = re.compile("^Ogg ?: (?:Last page lacks|Junk after|File ended)", re.MULTILINE)
# These errors mean that a file cannot be decoded; soundfile's are among them.
ERRORS = (OSError, RuntimeError, TypeError, ValueError, MemoryError)


# ---- Reading


def read_audio(audio: str | bytes, sample_rate: int = 16000) -> np.ndarray:
    """Waveform (N,) float32, mono, at `sample_rate`, of a path or of a file's bytes: the blocks of
    read_blocks, joined.

    Raises UserError with the reason alone (no file name) where read_blocks raises it, where sound
    is lost, and where the recording is longer than LONGEST seconds, of which no more is decoded.
    """
    samples = bytearray()
    for block in within(read_blocks(audio, sample_rate, longest=LONGEST), LONGEST, sample_rate):
        samples += block.tobytes()
    return np.frombuffer(samples, np.float32)


def within(blocks: Iterable[np.ndarray], seconds: float, rate: int) -> Iterator[np.ndarray]:
    """The blocks as they are. Raises UserError at the first sample beyond so many seconds."""
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
    """Blocks (n,) float32, mono, at `sample_rate`, of a file, which is given as its path, as its
    bytes, or as "-" for standard input.

    A file may have any format that soundfile decodes. A pipe may have wav, aiff, au, caf or w64,
    without compression; its header need not know the length.
    raw: standard input has no header, and 16-bit little-endian mono samples at `sample_rate`.
    damaged: a function, called with the reason where a file that has begun cannot be read on or
    ends too early; without it that is an error.
    longest: a file of several channels may have so many seconds, because it is decoded once before
    its first block to know the levels.

    Raises UserError with the reason alone (no file name), at the start or after some blocks, where
    a file is missing, undecodable or empty, a sample is not finite or louder than any sound, or the
    rate lies beyond RATES.
    """
    if not isinstance(audio, bytes) and audio != "-" and not os.path.isfile(audio):
        raise UserError("file missing")
    if audio == "-" and (raw or not is_file(0)):
        blocks = pipe_blocks(sample_rate, raw, damaged)
        advice = "; pipe wav, as `ffmpeg -i INPUT -f wav -` writes it"
    else:
        blocks = file_blocks(audio, sample_rate, damaged, longest)
        advice = ""
    try:
        first = next(filter(len, blocks), None)
        if first is None:
            raise UserError("no samples")
        yield from itertools.chain([first], blocks)
    except ERRORS as error:
        reason = getattr(error, "error_string", error)
        raise UserError(f"cannot be decoded: {reason}{advice}") from None


def is_file(descriptor: int) -> bool:
    """True for the descriptor of an open file in which one can seek, so not for a pipe's."""
    try:
        return os.lseek(descriptor, 0, os.SEEK_CUR) >= 0
    except OSError:
        return False


def pipe_blocks(sample_rate: int, raw: bool, damaged) -> Iterator[np.ndarray]:
    """The samples of standard input as they come."""
    if raw:
        head, promised = b"", 0
        how = {"format": "RAW", "subtype": "PCM_16", "endian": "LITTLE"}
        how |= {"samplerate": sample_rate, "channels": 1}
    else:
        head, promised = header(pipe_bytes)
        how = {}
        if not head:
            raise ValueError("it does not begin as wav, aiff, au, caf or w64")
    with Forward(io.BytesIO(head), **how) as sound:
        width = WIDTHS.get(sound.subtype, 0) * sound.channels  # bytes of a sample of all channels
        if not width:
            raise ValueError(f"its samples are {sound.subtype}")
        if promised >= UNKNOWN[4]:
            promised = 0
        blocks = pcm_blocks(sound, width, promised)
        blocks = mono(sound, blocks, Part([], promised // width), None, damaged)
        yield from resampled(blocks, sound.samplerate, sample_rate, at_once=True)


def pcm_blocks(sound: soundfile.SoundFile, width: int, promised: int) -> Iterator[np.ndarray]:
    """Blocks (n, channels) of the samples that follow the header `sound` on standard input.

    width: bytes of a sample of all channels. promised: bytes of samples, by the header. Samples may
    follow them where the header says 0 or was never written anew; chunks of metadata are left out.
    """
    order = "BIG" if sound.format in ("AIFF", "AU", "CAF") else "LITTLE"
    how = {
        "format": "RAW",
        "subtype": sound.subtype,
        "samplerate": sound.samplerate,
        "endian": order if sound.endian == "FILE" else sound.endian,
        "channels": sound.channels,
    }
    place = 0
    size = block_size(sound) * width
    while content := pipe_bytes(min(size, promised - place) if place < promised else size):
        if place == promised and content[:4] in METADATA:
            return
        yield soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True, **how)[0]
        place += len(content)


def pipe_bytes(size: int) -> bytes:
    """The next `size` bytes of standard input, fewer at its end."""
    content = bytearray()
    while len(content) < size:
        select.select([0], [], [])  # the pipe may have been set not to wait
        if not (more := os.read(0, min(size - len(content), 2**16))):
            break
        content += more
    return bytes(content)


def file_blocks(
    audio: str | bytes, sample_rate: int, damaged, longest: float
) -> Iterator[np.ndarray]:
    """The samples of a file, one part after the other. A part of several channels is decoded twice:
    first for its levels, then to mix it by them.
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
                rate = usable_rate(sound.samplerate)
                levels = Levels(sound.channels)
                blocks = blocks_of(sound, signals_wait) if sound.channels > 1 else ()
                with contextlib.suppress(soundfile.LibsndfileError):  # it comes again below
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
    """A file that is read from its start to its end, whatever number of frames its header promises.
    soundfile would seek after every read of a seekable one.
    """

    def seekable(self) -> bool:
        return False


class Joined(io.RawIOBase):
    """Pieces of a file, and bytes, as one file. State: the place in it, and the error of the disk.

    libsndfile reads it, and could not pass an error on, so nothing is raised here. In a damaged
    file it seeks places before the start.
    """

    def __init__(self, file: BinaryIO, pieces: list[bytes | tuple[int, int]]):
        self.file = file
        self.pieces = pieces
        self.place = 0
        self.error = None
        sizes = (len(p) if isinstance(p, bytes) else p[1] - p[0] for p in pieces)
        self.ends = list(itertools.accumulate(sizes))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = max(offset + (0, self.place, self.ends[-1])[whence], 0)
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer) -> int:
        buffer = memoryview(buffer)
        count = 0
        while count < len(buffer) and self.place < self.ends[-1]:
            number = bisect.bisect(self.ends, self.place)
            piece = self.pieces[number]
            left = self.ends[number] - self.place
            size = min(left, len(buffer) - count)
            if isinstance(piece, bytes):
                content = piece[len(piece) - left :][:size]
            else:
                try:
                    content = at(self.file, piece[1] - left, size)
                except OSError as error:
                    content = b""
                    self.error = error
            if not content:
                break
            buffer[count : count + len(content)] = content
            count += len(content)
            self.place += len(content)
        return count


@contextlib.contextmanager
def signals_wait():
    """A context: within the block signals wait, and their handlers run after it. libsndfile reads
    Joined in a callback, in which whatever a handler raises would be lost.
    """
    waiting = []
    handlers = {}
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
    """Blocks (n, channels) of BLOCK seconds each, the last one shorter, each read in the context
    `guard`. Raises LibsndfileError after the samples that could be decoded.
    """
    size = block_size(sound)
    left = sound.frames
    while left > 0:  # reading more than is left would lose the start of what follows on a pipe
        block = np.full((size, sound.channels), np.nan, np.float32)
        try:
            with guard():
                count = len(sound.read(min(size, left), out=block))
        except soundfile.LibsndfileError:
            # The samples that were decoded are no longer nan.
            if count := np.append(np.isnan(block).any(axis=1), True).argmax():
                yield block[:count]
            raise
        if not count:
            return
        left -= count
        yield block[:count]


def block_size(sound: soundfile.SoundFile) -> int:
    """Samples of a block: BLOCK seconds, or fewer where there are very many channels."""
    return max(min(int(BLOCK * sound.samplerate), 2**20 // sound.channels), 1)


def mono(
    sound: soundfile.SoundFile,
    blocks: Iterable[np.ndarray],
    part: Part,
    levels: "Levels | None",
    damaged: Callable[[str], None] | None,
) -> Iterator[np.ndarray]:
    """Blocks (n, channels) of a part as blocks (n,) of one channel, checked.

    levels: of the whole part, or None on a pipe, where they are not known yet; then each block is
    mixed by the levels so far. Where the blocks end too early, `damaged` is called with the reason;
    without `damaged`, UserError is raised.
    """
    known = levels is not None
    levels = levels or Levels(sound.channels)
    count = 0
    error = ""
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
                after = f" after {count / sound.samplerate:.1f} s" if damaged else ""
                raise UserError(reason + after)
    except soundfile.LibsndfileError as failure:
        if not 0 < count == part.frames:  # else all are there, and no sound follows them
            error = failure.error_string
    reason = loss(sound, part, count, error)
    if reason and (damaged is None or error and not count):
        raise UserError(f"cannot be decoded: {reason}" if error else reason)
    if reason:
        damaged(reason)


def loss(sound: soundfile.SoundFile, part: Part, count: int, error: str) -> str:
    """What is lost of a part of which `count` samples were read, and then perhaps `error` came. ""
    where nothing is lost."""
    rate = sound.samplerate
    promised = part.frames or (sound.frames if part.pieces and sound.frames < 2**62 else 0)
    promised = max(promised, count / part.share)
    # A compressed file that lacks a byte lacks a block; else some decoders miscount by a frame.
    in_blocks = part.share < 1 and sound.subtype not in WIDTHS
    there = f"{count / rate:.1f} s"
    lost = promised - count > (0 if in_blocks else rate / 10)
    if lost:
        there = f"{there} of {promised / rate:.1f} s"
    if error:
        return f"damaged after {there}: {error}"
    if lost:
        return f"cut short: {there}"
    flaw = part.flaw or NO_END.search(sound.extra_info) and "its Ogg stream has no end mark"
    return f"cut short: {flaw}, after {there}" if flaw else ""


class Levels:
    """Makes one channel of several: their mean, or the loudest alone where the channels cancel each
    other out in the mean.

    State: how many samples there were, their sum in each channel, and the sum of the products of
    each two channels, which also give the power of the mean.
    """

    def __init__(self, channels: int):
        self.count = 0
        self.sums = np.zeros(channels)
        self.products = np.zeros((channels, channels))

    def add(self, block: np.ndarray) -> None:
        """Counts a block (n, channels)."""
        with np.errstate(all="ignore"):  # `mono` finds samples that are not finite later
            wide = block.astype(np.float64)
            self.count += len(wide)
            self.sums += np.ones(len(wide)) @ wide
            self.products += wide.T @ wide

    def mix(self, block: np.ndarray) -> np.ndarray:
        """A block (n, channels) as (n,), by the levels of all blocks that were counted."""
        if block.shape[1] == 1:
            return block[:, 0]
        means = self.sums / self.count
        covariance = self.products / self.count - np.outer(means, means)
        loudest = covariance.diagonal().argmax()
        cancelled = covariance.mean() < CANCELLED * covariance[loudest, loudest]
        return block[:, loudest] if cancelled else block.mean(axis=1)


# ---- Resampling


def usable_rate(rate: int) -> int:
    """`rate` itself. Raises UserError for a rate beyond RATES."""
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"sample rate {rate}: it must be {RATES[0]} to {RATES[1]}")
    return rate


def resample(samples: np.ndarray, rate: int, sample_rate: int = 16000) -> np.ndarray:
    """(N,) float32 samples at `rate` Hz, as `resampled` makes them at `sample_rate` Hz. Raises
    UserError for a rate beyond RATES."""
    if rate == sample_rate:
        return samples
    return np.concatenate(list(resampled([samples], rate, sample_rate)))


def resampled(
    blocks: Iterable[np.ndarray], rate: int, sample_rate: int, at_once: bool = False
) -> Iterator[np.ndarray]:
    """Blocks (n,) at `rate` Hz, of any sizes, as blocks at `sample_rate` Hz of at most SECONDS,
    without a seam. Raises UserError for a rate beyond RATES.

    torchaudio resamples windows that overlap by 0.04 s on both sides, where its filter is shorter.
    The samples are the same to the bit, however the sound was cut into blocks. With at_once, which
    a pipe needs, no sample waits for SECONDS of sound, and a sample may differ by 1.5e-7.
    """
    if rate == sample_rate:
        yield from blocks
        return
    # A rate such as 22254 would need a filter of gigabytes; a multiple of 25 is 0.02 % off.
    rate = round(usable_rate(rate) / 25) * 25
    # 1/25 s and 1/5 s are whole numbers of samples at either rate, so nothing drifts.
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
    except UserError as failure:  # the samples that came before it are heard to their end
        error = failure
    rest = yield from steps_of(np.concatenate(waiting), 1)
    length = -(-(len(rest) - margin) * sample_rate // rate)
    out = resampler(torch.from_numpy(np.pad(rest, (0, margin)))).numpy()
    yield out[sample_rate // 25 :][:length]
    if error:
        raise error


# ---- Pieces


def regroup(blocks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The samples of the blocks (n,) in blocks of `size`, the last one shorter. There is a single
    block where size is below 1.
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
    """The samples of the blocks (n,) in pieces of at most max_seconds.

    A cut falls where the recording is quietest between half of max_seconds and all of it.
    """
    longest = int(max_seconds * sample_rate)
    waiting = []
    count = 0
    for block in blocks:
        waiting.append(block)
        count += len(block)
        while count > longest:
            samples = np.concatenate(waiting)
            cut = longest // 2 + quietest(samples[longest // 2 : longest], sample_rate)
            yield samples[:cut]
            waiting = [samples[cut:]]
            count -= cut
    if count:
        yield np.concatenate(waiting)


def quietest(samples: np.ndarray, sample_rate: int) -> int:
    """The place in (n,) samples that is the middle of the quietest QUIET seconds: there the frames
    of 10 ms vary least. n where there is no whole frame."""
    size = sample_rate // 100
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    width = min(int(QUIET * 100), len(frames))
    if not width:
        return len(samples)
    loudness = np.convolve(frames.var(axis=1), np.ones(width), mode="valid")
    return (int(loudness.argmin()) + width // 2) * size
