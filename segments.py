"""Long recordings and pipes: samples as they come, in bounded memory, and pieces that are short enough for the model.

Everything is an iterator of blocks (n,) float32, mono, in [-1, 1]. An hour of audio never lies in memory at once.
"""

import os
from collections.abc import Callable, Iterator

import numpy as np
import soundfile
import torch
import torchaudio

from cli import UserError
from transforms import usable_rate

EXTENSIONS = {name.lower() for name in soundfile.available_formats()} - {"raw"} | {"aif", "aifc", "oga", "opus", "sph"}
BLOCK = 0.2  # seconds that are read at a time: what a pipe waits for
QUIET = 0.2  # seconds over which loudness is measured to find a pause


def read_blocks(path: str, sample_rate: int, raw: bool = False,
                damaged: Callable[[str], None] | None = None) -> Iterator[np.ndarray]:
    """The samples of an audio file, of standard input where path is "-", at `sample_rate`.

    Any format that soundfile decodes; on a pipe wav, whose header need not know the length, and others that need no
    seeking (flac and mp3 do). raw: no header, 16-bit little-endian mono at `sample_rate`. damaged: told why, where a file that
    has begun cannot be read on; its sound ends there. Raises UserError with the reason alone (no file name), at the start or
    after some blocks, for what is missing, undecodable, empty or not finite, and for rates beyond transforms.RATES.
    """
    if path != "-" and not os.path.isfile(path):
        raise UserError("a folder without audio files" if os.path.isdir(path) else "file missing")
    how = {"format": "RAW", "subtype": "PCM_16", "endian": "LITTLE", "samplerate": sample_rate, "channels": 1} if raw else {}
    try:
        with soundfile.SoundFile(0 if path == "-" else path, closefd=False, **how) as file:
            yield from resampled(mono(file, damaged), file.samplerate, sample_rate)
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # soundfile's errors are RuntimeErrors
        advice = "; pipe wav, as `ffmpeg -i INPUT -f wav -` writes it" if path == "-" else ""
        raise UserError(f"cannot be decoded: {error}{advice}") from None


def mono(file: soundfile.SoundFile, damaged: Callable[[str], None] | None = None) -> Iterator[np.ndarray]:
    """Blocks of BLOCK seconds, the last one shorter; the channels' mean."""
    size, count = max(int(BLOCK * file.samplerate), 1), 0
    while True:
        try:
            samples = file.read(size, dtype="float32", always_2d=True)  # (n, channels)
        except soundfile.LibsndfileError as error:
            if not count or damaged is None:
                raise
            damaged(f"{count / file.samplerate:.1f} s: {error}")
            return
        if not len(samples):
            break
        if not np.isfinite(samples).all():
            raise UserError("samples are not finite")
        count += len(samples)
        yield samples.mean(axis=1)
    if not count:
        raise UserError("no samples")


def resampled(blocks: Iterator[np.ndarray], rate: int, sample_rate: int) -> Iterator[np.ndarray]:
    """The same at `sample_rate`: what transforms.resample makes of the whole, to rounding."""
    if rate == sample_rate:
        yield from blocks
        return
    rate = round(usable_rate(rate) / 25) * 25  # as transforms.resample does
    margin, step = rate // 25, rate // 5  # whole numbers of samples at either rate: nothing drifts
    resampler = torchaudio.transforms.Resample(rate, sample_rate)
    waiting = np.zeros(margin, np.float32)
    for block in blocks:
        waiting = np.concatenate((waiting, block))
        while len(waiting) >= step + 2 * margin:
            out = resampler(torch.from_numpy(waiting[:step + 2 * margin])).numpy()
            yield out[sample_rate // 25:][:sample_rate // 5]
            waiting = waiting[step:]
    length = -(-(len(waiting) - margin) * sample_rate // rate)
    out = resampler(torch.from_numpy(np.pad(waiting, (0, margin)))).numpy()
    yield out[sample_rate // 25:][:length]


def regroup(blocks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same samples in blocks of `size`, the last one shorter; in a single one where size is below 1."""
    waiting = []
    for block in blocks:
        waiting.append(block)
        while 0 < size <= sum(map(len, waiting)):
            samples = np.concatenate(waiting)
            yield samples[:size]
            waiting = [samples[size:]]
    if any(map(len, waiting)):
        yield np.concatenate(waiting)


def cut_at_pauses(blocks: Iterator[np.ndarray], sample_rate: int, max_seconds: float) -> Iterator[np.ndarray]:
    """The same samples in pieces of at most max_seconds.

    Where there are more, the cut falls where the recording is quietest, between half of max_seconds and all of it.
    """
    longest, waiting, count = int(max_seconds * sample_rate), [], 0
    for block in blocks:
        waiting.append(block)
        count += len(block)
        while count > longest:
            samples = np.concatenate(waiting)
            cut = longest // 2 + quietest(samples[longest // 2:longest], sample_rate)
            yield samples[:cut]
            waiting, count = [samples[cut:]], count - cut
    if count:
        yield np.concatenate(waiting)


def quietest(samples: np.ndarray, sample_rate: int) -> int:
    """The middle of the QUIET seconds of (n,) samples whose frames of 10 ms vary least."""
    size = sample_rate // 100
    frames = samples[:len(samples) // size * size].reshape(-1, size)
    width = min(int(QUIET * 100), len(frames))
    if not width:
        return len(samples)
    loudness = np.convolve(frames.var(axis=1), np.ones(width), mode="valid")
    return (int(loudness.argmin()) + width // 2) * size
