"""Turns files and pipes into waveforms, block by block, so that memory stays bounded.

All commands read with read_blocks; read_audio joins its blocks. A block is (n,) float32, mono.
`mono` makes one channel of several, and `resampled` changes the rate, for files and pipes alike.
All of a file is decoded, whatever its header says (containers.py). Lost sound is an error, or the
caller is told how many seconds are left.
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

from containers import UNKNOWN, WALKS, Part, at, header, name_behind, parts
from transforms import RATES, check_samples

# Files with one of these endings are taken for recordings.
EXTENSIONS = {name.lower() for name in soundfile.available_formats()} - {"raw"}
EXTENSIONS |= {"aif", "aifc", "bwf", "mp2", "mpga", "oga", "opus", "snd", "sph", "wave"}
# Seconds that are read of a file at a time; shorter blocks take more time.
BLOCK = 1.0
# Seconds that are read of a pipe at a time. A block comes when it has as many.
PIPE_BLOCK = 0.2
# Seconds that are resampled at a time. Resampling takes several times their memory.
SECONDS = 60
# The most seconds of a recording that is read whole. No training row is as long, and ten hours of
# silence, a file of 2 MB, would take gigabytes.
LONGEST = 3600
# Seconds over which loudness is measured to find a pause.
QUIET = 0.2
# Channels cancel each other out where their mean has less than this share of the power of the
# loudest channel.
CANCELLED = 0.01
# Bytes of a sample in the encodings that do not compress.
WIDTHS = {"PCM_U8": 1, "PCM_S8": 1, "ULAW": 1, "ALAW": 1}
WIDTHS |= {"PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
# libsndfile's log has one of these lines for an Ogg stream without an end mark.
NO_END = re.compile("^Ogg ?: (?:Last page lacks|Junk after|File ended)", re.MULTILINE)
# These errors mean that a file cannot be decoded; soundfile's are among them.
ERRORS = (OSError, RuntimeError, TypeError, ValueError, MemoryError)


# ---- Reading


def read_audio(audio: str | bytes, sample_rate: int = 16000) -> np.ndarray:
    """Returns the waveform (N,) float32, mono, at `sample_rate`, of a path or of a file's bytes.

    Raises UserError with the reason alone (no file name) where read_blocks raises it, where sound
    is lost, and where the recording is longer than LONGEST seconds; the rest is not decoded.
    """
    samples = bytearray()
    for block in within(read_blocks(audio, sample_rate, longest=LONGEST), LONGEST, sample_rate):
        samples += block.tobytes()
    return np.frombuffer(samples, np.float32)


def within(blocks: Iterable[np.ndarray], seconds: float, rate: int) -> Iterator[np.ndarray]:
    """Yields the blocks. Raises UserError at the first sample beyond `seconds`."""
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
    """Yields the samples of a file as blocks (n,) float32, mono, at `sample_rate`.

    audio: the path of the file, its bytes, or "-" for standard input. A file may have any format
    that soundfile decodes. A pipe may have wav, aiff, au, caf or w64, without compression; its
    header need not know the length.
    raw: standard input has no header, and 16-bit little-endian mono samples at `sample_rate`.
    damaged: a function that is called with the reason where a file that has begun cannot be read on
    or ends too early; without this function such a file is an error.
    longest: the most seconds of a file of several channels, which is decoded once before its first
    block to measure the levels.

    Raises UserError with the reason alone (no file name), at the start or after some blocks, where
    a file is missing, undecodable or empty, a sample is not finite or louder than any sound, or the
    rate lies beyond RATES.
    """
    if not isinstance(audio, bytes) and audio != "-" and not os.path.isfile(audio):
        there = os.path.exists(audio)  # a pipe or a device
        raise UserError("no file; make a file of its sound" if there else "file missing")
    if audio == "-" and is_pipe(raw):
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


def is_pipe(raw: bool) -> bool:
    """Returns whether standard input is read as it comes: `raw`, or where one cannot seek in it."""
    try:
        return raw or os.lseek(0, 0, os.SEEK_CUR) < 0
    except OSError:
        return True


def pipe_blocks(sample_rate: int, raw: bool, damaged) -> Iterator[np.ndarray]:
    """Yields the samples of standard input as they come."""
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
        blocks = pcm_blocks(sound, width, promised, head[:4])
        blocks = mono(sound, blocks, Part([], promised // width), None, damaged)
        yield from resampled(blocks, sound.samplerate, sample_rate, at_once=True)


def pcm_blocks(
    sound: soundfile.SoundFile, width: int, promised: int, magic: bytes
) -> Iterator[np.ndarray]:
    """Yields blocks (n, channels) of the samples that follow the header `sound` on standard input.

    width: bytes of a sample of all channels. promised: bytes of samples, by the header. More may
    come where the header says 0 or was never written anew; chunks of metadata are left out. magic:
    how the header begins. Raises UserError where another file follows.
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
    part = b""
    size = block_size(sound, PIPE_BLOCK) * width
    while content := pipe_bytes(min(size, promised - place) if place < promised else size):
        if place == promised and (name := name_behind(magic, promised, content)):
            if name in WALKS:
                after = place / width / sound.samplerate
                raise UserError(f"another file begins after {after:.1f} s; pipe one at a time")
            return
        place += len(content)
        content = part + content
        part = content[len(content) // width * width :]  # of a sample, where the header is odd
        yield soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True, **how)[0]


def pipe_bytes(size: int) -> bytes:
    """Returns the next `size` bytes of standard input, fewer at its end."""
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
    """Yields the samples of a file, one part after the other.

    A part of several channels is decoded twice: first to measure its levels, then to mix it.
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
                blocks = blocks_of(sound) if sound.channels > 1 else ()
                # Mixing meets the same error again.
                with contextlib.suppress(soundfile.LibsndfileError):
                    for block in within(blocks, longest, rate):
                        levels.add(block)
            with opened(source) as sound:
                blocks = mono(sound, blocks_of(sound), part, levels, damaged)
                yield from resampled(blocks, sound.samplerate, sample_rate)
            if source.error:
                raise source.error


def opened(source: "Joined") -> "Forward":
    source.seek(0)
    with signals_wait():
        return Forward(source)


class Forward(soundfile.SoundFile):
    """Reads a file from its start to its end, however many frames its header promises.

    In a file that says it is seekable, soundfile would seek after every read.
    """

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Closes the file, while signals wait.

        A signal between the closing and soundfile's note of it had the file closed twice, which
        ends Python.
        """
        if not self.closed:
            with signals_wait():
                super().close()


class Joined(io.RawIOBase):
    """Joins pieces of a file, and bytes, to one file. State: the place in it, the disk's error.

    libsndfile reads the joined file and could not pass an error on, so nothing is raised here. In a
    damaged file libsndfile seeks places before the start.
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
    """Makes signals wait within a `with` block; their handlers run after the block.

    libsndfile reads Joined in a callback, where an exception of a handler would be lost.
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


def blocks_of(sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Yields blocks (n, channels) of BLOCK seconds each, the last one shorter.

    Raises LibsndfileError after the samples that could be decoded.
    """
    size = block_size(sound, BLOCK)
    left = sound.frames
    while left > 0:
        block = np.full((size, sound.channels), np.nan, np.float32)
        try:
            with signals_wait():
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


def block_size(sound: soundfile.SoundFile, seconds: float) -> int:
    """Returns the samples of a block of `seconds`, or fewer where channels are very many."""
    return max(min(int(seconds * sound.samplerate), 2**20 // sound.channels), 1)


def mono(
    sound: soundfile.SoundFile,
    blocks: Iterable[np.ndarray],
    part: Part,
    levels: "Levels | None",
    damaged: Callable[[str], None] | None,
) -> Iterator[np.ndarray]:
    """Checks the blocks (n, channels) of a part, and yields blocks (n,) of one channel.

    levels: of the whole part, or None on a pipe, which cannot know them; then each block is mixed
    by the levels so far. Where the blocks end too early, `damaged` is called with the reason;
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
        if not 0 < count == part.frames:  # else all samples are there
            error = failure.error_string
    reason = loss(sound, part, count, error)
    if reason and (damaged is None or error and not count):
        raise UserError(f"cannot be decoded: {reason}" if error else reason)
    if reason:
        damaged(reason)


def loss(sound: soundfile.SoundFile, part: Part, count: int, error: str) -> str:
    """Says what is lost of a part where `error`, or "", came after `count` samples; "": nothing."""
    rate = sound.samplerate
    promised = part.frames or (sound.frames if part.pieces and sound.frames < 2**62 else 0)
    promised = max(promised, count / part.share)
    # A compressed file that lacks a byte lacks a block. In whole files some decoders miscount by a
    # frame, so there 0.1 s may be missing.
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
    """Makes one channel of several: their mean, or the loudest where the mean cancels them out.

    State: how many samples were counted, their sum in each channel, and the sum of the products of
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
        """Returns a block (n, channels) as (n,), by the levels of all blocks counted so far."""
        if block.shape[1] == 1:
            return block[:, 0]
        means = self.sums / self.count
        covariance = self.products / self.count - np.outer(means, means)
        loudest = covariance.diagonal().argmax()
        cancelled = covariance.mean() < CANCELLED * covariance[loudest, loudest]
        return block[:, loudest] if cancelled else block.mean(axis=1)


# ---- Resampling


def usable_rate(rate: int) -> int:
    """Returns `rate`. Raises UserError for a rate beyond RATES."""
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(f"sample rate {rate}: it must be {RATES[0]} to {RATES[1]}")
    return rate


def resample(samples: np.ndarray, rate: int, sample_rate: int = 16000) -> np.ndarray:
    """Returns samples (N,) float32 at `rate` Hz as samples at `sample_rate` Hz, by `resampled`."""
    if rate == sample_rate:
        return samples
    return np.concatenate(list(resampled([samples], rate, sample_rate)))


def resampled(
    blocks: Iterable[np.ndarray], rate: int, sample_rate: int, at_once: bool = False
) -> Iterator[np.ndarray]:
    """Yields blocks (n,) at `rate` Hz, of any sizes, as blocks at `sample_rate` Hz.

    The blocks have at most SECONDS and no seam: the samples are the same to the bit, however the
    sound was cut into blocks. With at_once, which a pipe needs, no sample waits for SECONDS of
    sound, and a sample may differ by 1.5e-7. Raises UserError for a rate beyond RATES.
    """
    if rate == sample_rate:
        yield from blocks
        return
    # A rate such as 22254 would need a filter of gigabytes; a multiple of 25 is 0.02 % off.
    rate = round(usable_rate(rate) / 25) * 25
    resampler = torchaudio.transforms.Resample(rate, sample_rate)
    margin = rate // 25
    waiting = [np.zeros(margin, np.float32)]
    count = margin
    least = 1 if at_once else 5 * SECONDS
    error = None
    try:
        for block in blocks:
            waiting.append(block)
            count += len(block)
            if count >= least * (rate // 5) + 2 * margin:
                waiting = [(yield from resampled_steps(resampler, np.concatenate(waiting), least))]
                count = len(waiting[0])
    except UserError as failure:  # the samples that came before the error are heard to their end
        error = failure
    rest = yield from resampled_steps(resampler, np.concatenate(waiting), 1)
    length = -(-(len(rest) - margin) * sample_rate // rate)
    out = resampler(torch.from_numpy(np.pad(rest, (0, margin)))).numpy()
    yield out[sample_rate // 25 :][:length]
    if error:
        raise error


def resampled_steps(
    resampler: torchaudio.transforms.Resample, samples: np.ndarray, least: int
) -> Iterator[np.ndarray]:
    """Yields steps of 0.2 s, resampled, while there are `least`. Returns the samples left over.

    A step needs the 0.04 s before and behind it, which is more than the filter's length. 0.2 s and
    0.04 s are whole numbers of samples at either rate, so nothing drifts.
    """
    rate = resampler.orig_freq
    sample_rate = resampler.new_freq
    margin = rate // 25
    step = rate // 5
    while (steps := min((len(samples) - 2 * margin) // step, 5 * SECONDS)) >= least:
        out = resampler(torch.from_numpy(samples[: steps * step + 2 * margin])).numpy()
        yield out[sample_rate // 25 :][: steps * (sample_rate // 5)]
        samples = samples[steps * step :]
    return samples


# ---- Pieces


def cut_at_pauses(
    blocks: Iterator[np.ndarray], sample_rate: int, max_seconds: float
) -> Iterator[np.ndarray]:
    """Yields the samples of the blocks (n,) in pieces of at most max_seconds.

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
    """Returns the middle of the quietest QUIET seconds of samples (n,), or n if n is below 10 ms.

    These are the seconds in which the frames of 10 ms vary least.
    """
    size = sample_rate // 100
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    width = min(int(QUIET * 100), len(frames))
    if not width:
        return len(samples)
    loudness = np.convolve(frames.var(axis=1), np.ones(width), mode="valid")
    return (int(loudness.argmin()) + width // 2) * size
