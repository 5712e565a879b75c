"""Turns waveforms into features, the same way in training and hearing, and augments training rows.

A transform is a pure function (example, generator) -> new example. It never changes the tensors it
is given. All of its randomness comes from `generator`, which make_generator derives from (seed,
epoch, row), never from a loader process or a rank. An example is a dict: "input_values" (N,) holds
samples, "features" is (F,T) from log_mel or fbank on, and (T,F) after transpose. "speed" is there
where the plan of batches has drawn the speed.
Axes: N samples, T frames, F mel bins.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import NamedTuple

from cli import UserError, option, options_class

import numpy as np
import torch
import torchaudio
import torchaudio.compliance.kaldi as kaldi

from files import parse_json, read_text

RATES = (4000, 384_000)  # samples per second; a resampling filter of others may take gigabytes
WINDOWS = {"hamming": torch.hamming_window, "hann": torch.hann_window}
LOW_FREQ = 20.0  # Hz, where Kaldi's mel filters begin
FFT_LEAST = 2**13  # samples of the shortest FFT that convolves
LOUDEST = 2.0**31  # float files may hold steps of integers; squares of larger samples overflow


@options_class
class Frontend:
    """Says how samples become features; every checkpoint holds one.

    Raises UserError for values that make no frame.
    """

    frontend: str = option(
        "log_mel",
        "log_mel, or Kaldi's fbank with global CMVN, as WeNet trains on",
        choices=("log_mel", "fbank"),
    )
    sample_rate: int = option(
        16000,
        "samples per second of input_values; train.py takes DATA_ROOT's",
        at_least=RATES[0],
        at_most=RATES[1],
    )
    num_mel_bins: int = option(
        80, "mel filters, the width of the features", at_least=1, at_most=512
    )
    frame_length: int = option(
        25, "window of a frame in ms; also the FFT's length", at_least=1, at_most=200
    )
    frame_shift: int = option(10, "distance between frames in ms", at_least=1, at_most=200)
    window: str = option(
        "hamming", "window function of log_mel (fbank's is povey)", choices=tuple(WINDOWS)
    )
    mean_var_norm: bool = option(
        True, "give every waveform zero mean and unit variance; log_mel only"
    )
    high_freq: float = option(
        0.0,
        "upper end of fbank's filters in Hz, or, 0 or less, how far from half the sample rate; "
        "WeNet's is 0, sherpa-onnx's own -400",
        at_least=-RATES[1] / 2,
        at_most=RATES[1] / 2,
    )
    tail_padding: int = option(
        0,
        "ms of silence put behind every utterance, so that its end is heard; sherpa's examples "
        "give 660",
        at_least=0,
        at_most=5000,
    )

    def __post_init__(self):
        if self.frontend == "fbank" and self.num_mel_bins < 4:
            raise UserError(
                f"--num_mel_bins {self.num_mel_bins}: --frontend fbank needs at least 4"
            )
        half = self.sample_rate / 2
        if not LOW_FREQ < self.high_freq + (self.high_freq <= 0) * half <= half:
            raise UserError(
                f"--high_freq {self.high_freq:g}: it must be within {LOW_FREQ:g} and {half:g} Hz, "
                "or at most 0 to count from there"
            )

    @property
    def is_wenets(self) -> bool:
        """Returns whether WeNet and its runtime compute the same features."""
        return self.frontend == "fbank" and self.high_freq == 0

    @property
    def window_samples(self) -> int:
        return self.sample_rate * self.frame_length // 1000

    @property
    def shift_samples(self) -> int:
        return self.sample_rate * self.frame_shift // 1000

    @property
    def shift_ms(self) -> float:
        """Returns the ms between frames: frame_shift itself where it is whole samples, or less."""
        whole = self.sample_rate * self.frame_shift % 1000 == 0
        return self.frame_shift if whole else 1000 * self.shift_samples / self.sample_rate

    @property
    def tail_samples(self) -> int:
        return self.sample_rate * self.tail_padding // 1000

    @property
    def without_tail(self) -> "Frontend":
        return dataclasses.replace(self, tail_padding=0)


@options_class
class Augment:
    """Says how training examples are augmented; the numbers mean what they mean in WeNet."""

    speeds: tuple[float, ...] = option(
        (0.9, 1.0, 1.1), "speeds to choose from, per example; none: off", at_least=0.1, at_most=10.0
    )
    num_freq_masks: int = option(2, "frequency masks per example; 0: off", at_least=0, at_most=100)
    max_freq_mask: int = option(10, "widest frequency mask in mel bins", at_least=0, at_most=512)
    num_time_masks: int = option(2, "time masks per example; 0: off", at_least=0, at_most=100)
    max_time_mask: int = option(50, "longest time mask in frames", at_least=0, at_most=10000)
    max_time_mask_share: float = option(
        1.0,
        "longest time mask as a share of the example's frames (NeMo's time_width is 0.05)",
        above=0.0,
        at_most=1.0,
    )
    num_subs: int = option(
        3,
        "stretches replaced by earlier frames (spec_sub) per example; 0: off",
        at_least=0,
        at_most=100,
    )
    max_sub: int = option(30, "longest replaced stretch in frames", at_least=0, at_most=10000)
    max_trim: int = option(
        0,
        "most frames cut from the end (spec_trim; 50 is usual); 0: off",
        at_least=0,
        at_most=10000,
    )
    dither: float = option(
        1.0,
        "deviation of the noise added before fbank, in steps of 16-bit samples; 0: off",
        at_least=0.0,
        at_most=32768.0,
    )
    rir: tuple[str, ...] = option(
        (), "folders of room impulse responses, of prepare.py --rir; none: off"
    )
    rir_prob: float = option(0.5, "share of examples with a room", above=0.0, at_most=1.0)
    noise: tuple[str, ...] = option(
        (), "folders of recorded noise, of prepare.py --noise; none: off"
    )
    noise_prob: float = option(0.5, "share of examples with noise", above=0.0, at_most=1.0)
    snr: tuple[float, ...] = option(
        (5.0, 20.0),
        "least and most dB by which an example is louder than its noise",
        at_least=-50.0,
        at_most=100.0,
    )

    def __post_init__(self):
        if len(self.speeds) > 100:
            raise UserError(f"--speeds: {len(self.speeds)} of them; give at most 100")
        if len(self.snr) != 2 or self.snr[0] > self.snr[1]:
            given = " ".join(f"{value:g}" for value in self.snr)
            raise UserError(f"--snr {given}: give two numbers, the least and the most dB")
        for count, size in (
            ("num_freq_masks", "max_freq_mask"),
            ("num_time_masks", "max_time_mask"),
            ("num_subs", "max_sub"),
        ):
            if getattr(self, count) and not getattr(self, size):
                raise UserError(f"--{size} 0: it must be at least 1, unless --{count} is 0")


def check_samples(samples: np.ndarray) -> tuple[int, str]:
    """Finds the first of the samples (N,) or (N, channels) that no microphone gives.

    Returns how many samples come before it, and what is wrong with it; (N, "") where all are sound.
    """
    # nan fails this comparison, too.
    if max(samples.max(initial=0), -samples.min(initial=0)) <= LOUDEST:
        return len(samples), ""
    first = int((~(np.abs(samples) <= LOUDEST)).reshape(len(samples), -1).any(axis=1).argmax())
    loudest = np.abs(samples[first]).max()
    if not np.isfinite(loudest):
        return first, "samples are not finite"
    return first, f"samples as large as {loudest:.0e}; full scale is 1"


# ---- Lengths, known before any audio is read. These functions take Python ints and NumPy arrays.


def num_frames(num_samples, frontend: Frontend):
    """Returns the frames of an utterance of `num_samples` samples and its tail.

    Nothing else is padded, so that there are 0 for less than a window.
    """
    window, shift = frontend.window_samples, frontend.shift_samples
    num_samples = num_samples + frontend.tail_samples
    return (num_samples >= window) * (1 + (num_samples - window) // shift)


def _speed_ratio(speed: float) -> tuple[int, int]:
    """Returns (from, to) of the resampling: (9, 10) at speed 0.9, where 9 samples become 10."""
    ratio = Fraction(speed).limit_denominator(100)
    return ratio.numerator, ratio.denominator


def speed_length(num_samples, speed: float):
    """Returns how many samples speed_perturb makes: exactly ceil(num_samples / speed)."""
    orig, new = _speed_ratio(speed)
    return -(-num_samples * new // orig)


def shortest_frames(num_samples, frontend: Frontend, augment: Augment):
    """Returns the fewest frames that augmentation can leave: fastest speed, largest trim."""
    if augment.speeds:
        num_samples = speed_length(num_samples, max(augment.speeds))
    frames = num_frames(num_samples, frontend)
    # spec_trim cuts at most (T-1) // 2 frames: it leaves an example alone where half would go.
    return frames - np.clip((frames - 1) // 2, 0, augment.max_trim)


# ---- Randomness


def make_generator(seed: int, epoch: int, row: int) -> torch.Generator:
    """Makes the generator of one example in one epoch.

    SeedSequence mixes the three numbers, so neighbouring rows and epochs share no draws.
    """
    state = np.random.SeedSequence((seed, epoch, row)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    """Draws a uniform integer, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


# ---- Waveform -> waveform


def speed_perturb(speeds: tuple[float, ...]):
    """Plays the example at a speed drawn from `speeds`, which changes its pitch, too.

    An example that has "speed", the number of one of the speeds, is played at that one.
    """
    ratios = [_speed_ratio(speed) for speed in speeds]
    resamplers = [None if orig == new else _resampler(orig, new) for orig, new in ratios]

    def transform(example: dict, generator: torch.Generator) -> dict:
        choice = example["speed"] if "speed" in example else _draw(0, len(speeds) - 1, generator)
        waveform = example["input_values"]
        length = speed_length(len(waveform), speeds[choice])
        if resamplers[choice] is None or length == 0:
            return example
        return {**example, "input_values": resamplers[choice](waveform)[:length]}

    return transform


def _resampler(orig: int, new: int):
    """Makes torchaudio's Resample(orig, new), orig != new: (N,) -> (n,), n at least N * new / orig.

    A matrix product takes two thirds of the time of torchaudio's convolution, if the matrix has at
    least 16 columns. So a row of it makes several periods of `new` samples at once.
    """
    original = torchaudio.transforms.Resample(orig, new)
    kernel = original.kernel[:, 0]  # (new, taps)
    width = original.width
    taps = kernel.shape[1]
    periods = -(-16 // new)
    matrix = torch.zeros((periods - 1) * orig + taps, periods * new)
    for period in range(periods):
        matrix[period * orig : period * orig + taps, period * new : (period + 1) * new] = kernel.T

    def resampler(waveform: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(waveform, (width, width + periods * orig))
        return (padded.unfold(0, len(matrix), periods * orig) @ matrix).flatten()

    return resampler


def reverberate(rirs: Sequence[np.ndarray], share: float):
    """Plays a share of the examples in rooms: each is convolved with one of the `rirs`, (n,) each.

    The largest sample of an impulse response, the direct path, stays where the sound was. So words
    keep their times, as CTC needs them, and the example keeps its length and its energy.
    """

    def transform(example: dict, generator: torch.Generator) -> dict:
        if torch.rand((), generator=generator) >= share:
            return example
        waveform = example["input_values"]
        rir = _one_of(rirs, generator)
        peak = int(np.abs(rir).argmax())
        if not rir[peak]:
            return example
        heard = _convolved(waveform, torch.from_numpy(rir / np.abs(rir[peak])), peak)
        return {**example, "input_values": heard * _gain(heard, waveform)}

    return transform


def mix_noise(noises: Sequence[np.ndarray], augment: Augment):
    """Adds to a share of the examples a piece of one of the `noises`, (n,) each.

    The ratio of the example's energy to the noise's is drawn between the two numbers of augment.snr
    in dB. Silence stays silence.
    """
    least, most = augment.snr

    def transform(example: dict, generator: torch.Generator) -> dict:
        if torch.rand((), generator=generator) >= augment.noise_prob:
            return example
        waveform = example["input_values"]
        noise = _piece(_one_of(noises, generator), len(waveform), generator)
        snr = least + (most - least) * float(torch.rand((), generator=generator))
        gain = _gain(noise, waveform) * 10 ** (-snr / 20)
        return {**example, "input_values": torch.add(waveform, noise, alpha=gain)}

    return transform


def _one_of(sounds: Sequence[np.ndarray], generator: torch.Generator) -> np.ndarray:
    return sounds[_draw(0, len(sounds) - 1, generator)]


def _piece(sound: np.ndarray, length: int, generator: torch.Generator) -> torch.Tensor:
    """Returns `length` samples of a sound (n,) from a random place on, repeated where n is less.

    They are a copy: the sound is a map of a file, and only the piece is read.
    """
    spare = len(sound) - length
    start = _draw(0, spare if spare > 0 else len(sound) - 1, generator)
    if spare <= 0:
        return torch.from_numpy(np.resize(np.roll(sound, -start), length))
    return torch.from_numpy(sound[start : start + length].copy())


def _convolved(waveform: torch.Tensor, rir: torch.Tensor, peak: int) -> torch.Tensor:
    """Returns samples [peak, peak + N) of the convolution of a waveform (N,) with `rir` (n,).

    The waveform is transformed in blocks (overlap-save), which stay in the processor's cache: one
    FFT of the whole takes four times as long.
    """
    size = max(FFT_LEAST, 1 << (2 * len(rir) - 1).bit_length())
    good = size - len(rir) + 1  # samples of a block that do not depend on the block's ends
    length = max(1, -(-len(waveform) // good)) * good
    ends = (len(rir) - 1 - peak, length + peak - len(waveform))
    blocks = torch.nn.functional.pad(waveform, ends).unfold(0, size, good)
    products = torch.fft.rfft(blocks) * torch.fft.rfft(rir, size)
    return torch.fft.irfft(products, size)[:, -good:].flatten()[: len(waveform)]


def _gain(waveform: torch.Tensor, model: torch.Tensor) -> float:
    """Returns the factor that gives a waveform (N,) the energy of `model` (N,); 0 for silence."""
    energy = float(torch.dot(waveform, waveform))
    return energy and math.sqrt(float(torch.dot(model, model)) / energy)


def mean_var_norm(example: dict, generator: torch.Generator | None) -> dict:
    """Gives the waveform zero mean and unit variance, as transformers' Wav2Vec2FeatureExtractor."""
    waveform = example["input_values"]
    if not len(waveform):
        return example
    centred = waveform - waveform.mean()
    variance = torch.dot(centred, centred) / len(centred)  # six times as fast as torch.var
    return {**example, "input_values": centred.mul_(torch.rsqrt(variance + 1e-7))}


def tail_padding(frontend: Frontend):
    """Puts the frontend's silence behind the waveform (N,).

    A causal network writes a token some frames after the token's sound, so where a recording ends
    with its last word, the end of that word is lost ("SEVEN" becomes "SEV").
    """

    def transform(example: dict, generator: torch.Generator | None) -> dict:
        waveform = example["input_values"]
        padded = torch.nn.functional.pad(waveform, (0, frontend.tail_samples))
        return {**example, "input_values": padded}

    return transform


# ---- Waveform -> features


def frames_of(waveform: torch.Tensor, frontend: Frontend) -> torch.Tensor:
    """Cuts a waveform (N,) into windows (T, window), a view.

    Less than one window is padded with zeros to one, so T >= 1.
    """
    short = frontend.window_samples - len(waveform)
    if short > 0:
        waveform = torch.nn.functional.pad(waveform, (0, short))
    return waveform.unfold(0, frontend.window_samples, frontend.shift_samples)


def power_of(spectrum: torch.Tensor) -> torch.Tensor:
    """Returns |spectrum|^2, of the same shape."""
    squares = torch.view_as_real(spectrum).square()  # eight times as fast as abs().square()
    return squares[..., 0] + squares[..., 1]


FRAMES_AT_ONCE = 512  # frames a step of mel_power: their spectra stay in the processor's cache
BAND = 16  # mel filters a product: most weights are zeros, and narrow bands leave most zeros out


def mel_power(waveform: torch.Tensor, frontend: Frontend, filters, spectrum) -> torch.Tensor:
    """Returns the mel power (T,F) of a waveform (N,).

    `filters` is log_mel_filters or fbank_filters. `spectrum` is a function of frames (T, window)
    and window (window,), and gives (T, bins).
    """
    window, bands = mel_bands(filters, frontend)
    frames = frames_of(waveform, frontend)  # (T, window)
    made = frames.new_empty(len(frames), frontend.num_mel_bins)
    for block, out in zip(frames.split(FRAMES_AT_ONCE), made.split(FRAMES_AT_ONCE)):
        power = power_of(spectrum(block, window))  # (FRAMES_AT_ONCE, bins)
        for bins, columns, weights in bands:
            torch.mm(power[:, bins], weights, out=out[:, columns])
    return made


@cache
def mel_bands(filters, frontend: Frontend):
    """Returns the window (window,) of filters(frontend), and its mel filters in bands of BAND.

    A band is (bins, columns, weights): these bins of the power spectrum times the weights are
    these columns of the features.
    """
    window, mel = filters(frontend)
    bands = []
    for first in range(0, mel.shape[1], BAND):
        columns = slice(first, first + BAND)
        # Narrow filters may meet no bin at all; then bin 0 stands in, with a weight of 0.
        used = mel[:, columns].any(dim=1).nonzero().flatten().tolist() or [0]
        bins = slice(used[0], used[-1] + 1)
        bands.append((bins, columns, mel[bins, columns].contiguous()))
    return window, bands


def log_mel_filters(frontend: Frontend) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the window (window,) and the mel filters (bins, F) of log_mel."""
    window = WINDOWS[frontend.window](frontend.window_samples, periodic=False)
    mel = torchaudio.functional.melscale_fbanks(
        frontend.window_samples // 2 + 1,
        0.0,
        frontend.sample_rate / 2,
        frontend.num_mel_bins,
        frontend.sample_rate,
    )
    return window, mel


def log_mel(frontend: Frontend):
    """Makes "features" (F,T), log(1 + mel power spectrum), of "input_values" (N,).

    Frame t covers samples [t * shift, t * shift + window), without centring. Audio shorter than a
    window is padded with zeros to one frame, so T >= 1. log1p keeps silence at 0, the value that
    spec_aug's masks write.
    """

    def transform(example: dict, generator: torch.Generator | None) -> dict:
        power = mel_power(example["input_values"], frontend, log_mel_filters, spectrum)
        return {**example, "features": power.log1p_().T}

    def spectrum(frames, window):  # (T, window) -> (T, bins)
        return torch.fft.rfft(frames * window)

    return transform


def fbank_fft(frontend: Frontend) -> int:
    """Returns the length of fbank's FFT: Kaldi's takes powers of two."""
    return 1 << (frontend.window_samples - 1).bit_length()


def fbank_filters(frontend: Frontend) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the window (window,), povey, and the mel filters (bins, F) of fbank."""
    size = fbank_fft(frontend)
    mel, _ = kaldi.get_mel_banks(
        frontend.num_mel_bins,
        size,
        frontend.sample_rate,
        LOW_FREQ,
        frontend.high_freq,
        vtln_low=100.0,
        vtln_high=-500.0,
        vtln_warp_factor=1.0,
    )
    mel = torch.nn.functional.pad(mel, (0, 1)).T.contiguous()  # the Nyquist bin has no weight
    return torch.hann_window(frontend.window_samples, periodic=False).pow(0.85), mel


def dithered(amount: float):
    """Makes the transform that adds normal noise to the waveform, in steps of 16-bit samples.

    Kaldi draws noise for each frame; this draws for each sample, 2.5 times fewer numbers. Nothing
    is added where there is no generator.
    """

    def transform(example: dict, generator: torch.Generator | None) -> dict:
        waveform = example["input_values"]
        if generator is None:
            return example
        noise = torch.randn(len(waveform), generator=generator)
        return {**example, "input_values": waveform.add(noise, alpha=amount / 32768)}

    return transform


def fbank(frontend: Frontend):
    """Makes "features" (F,T), Kaldi's log mel filter bank, natural log, of "input_values" (N,).

    The features equal torchaudio.compliance.kaldi.fbank (povey window, snip_edges) of samples x
    32768. Less than a window of samples, of which Kaldi makes no frame, is padded with zeros to one
    frame.
    """
    floor = torch.finfo(torch.float32).eps

    def transform(example: dict, generator: torch.Generator | None) -> dict:
        samples = example["input_values"] * 32768
        power = mel_power(samples, frontend, fbank_filters, spectrum)
        return {**example, "features": power.clamp_(min=floor).log_().T}

    def spectrum(frames, window):  # (T, window) -> (T, bins)
        frames = frames - frames.mean(dim=1, keepdim=True)
        # Kaldi's preemphasis: the first sample has itself before it.
        before = 0.97 * torch.cat((frames[:, :1], frames[:, :-1]), dim=1)
        # Kaldi rounds after each of these steps. One fused step would move quiet bands by 0.03.
        frames = (frames - before) * window
        return torch.fft.rfft(frames, n=fbank_fft(frontend))

    return transform


def parse_cmvn(text: str):
    """Returns (sums (F,), sums of squares (F,), frames) of WeNet's JSON or Kaldi's text matrix.

    Kaldi's matrix is [ sums .. frames, new line, sums of squares .. 0 ].
    """
    if text.lstrip().startswith("{"):
        sums = parse_json(text)
        return np.array(sums["mean_stat"]), np.array(sums["var_stat"]), sums["frame_num"]
    numbers = np.array(text.replace("[", " ").replace("]", " ").split(), np.float64)
    total, squares = numbers.reshape(2, -1)
    return total[:-1], squares[:-1], total[-1]


def read_cmvn(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (mean, 1 / standard deviation), each (F,) float32, of a global_cmvn file.

    Raises UserError where the file is neither WeNet's JSON nor Kaldi's text, or has no frames.
    """
    try:
        with np.errstate(all="ignore"):
            total, squares, count = parse_cmvn(read_text(path))
            mean = total / count
            istd = 1 / np.sqrt(np.maximum(squares / count - mean**2, 1e-20))
            mean, istd = mean.astype(np.float32), istd.astype(np.float32)
        if not count > 0 or mean.ndim != 1 or mean.shape != istd.shape:
            raise ValueError
        if not np.isfinite([mean, istd]).all():
            raise ValueError
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; name a global_cmvn file, or leave it out"
        ) from None
    # The texts of these errors quote the file, which may hold a secret, so they are left out.
    except (ValueError, LookupError, TypeError, ArithmeticError):
        raise UserError(
            f"{path}: no global CMVN, sums over at least one frame in JSON or Kaldi's text; name a "
            "global_cmvn file, or leave it out"
        ) from None
    return torch.from_numpy(mean), torch.from_numpy(istd)


# ---- Features -> features


def spec_aug(augment: Augment):
    """Zeroes bands of time and of frequency (SpecAugment, arXiv:1904.08779, without warping)."""

    def transform(example: dict, generator: torch.Generator) -> dict:
        features = example["features"].clone()  # (F, T)
        longest = augment.max_time_mask
        if augment.max_time_mask_share < 1:
            share = math.ceil(augment.max_time_mask_share * features.shape[1])
            longest = min(longest, share)
        for axis, count, widest in (
            (1, augment.num_time_masks, longest),
            (0, augment.num_freq_masks, augment.max_freq_mask),
        ):
            for _ in range(count):
                start = _draw(0, features.shape[axis] - 1, generator)
                width = min(_draw(1, widest, generator), features.shape[axis] - start)
                features.narrow(axis, start, width).zero_()
        return {**example, "features": features}

    return transform


def spec_sub(augment: Augment):
    """Replaces stretches of time by earlier frames (U2++, arXiv:2106.05642, section 3.2.3)."""

    def transform(example: dict, generator: torch.Generator) -> dict:
        # (F, T). Every stretch is copied from here, never from an earlier replacement.
        before = example["features"]
        features = before.clone()
        for _ in range(augment.num_subs):
            start = _draw(0, before.shape[1] - 1, generator)
            length = min(_draw(1, augment.max_sub, generator), before.shape[1] - start)
            source = start - _draw(0, start, generator)
            features[:, start : start + length] = before[:, source : source + length]
        return {**example, "features": features}

    return transform


def spec_trim(augment: Augment):
    """Cuts up to max_trim frames off the end, but not half of them (TrimTail, arXiv:2211.00522)."""

    def transform(example: dict, generator: torch.Generator) -> dict:
        features = example["features"]  # (F, T)
        length = _draw(1, augment.max_trim, generator)
        if 2 * length >= features.shape[1]:
            return example
        return {**example, "features": features[:, : features.shape[1] - length]}

    return transform


def two_views(transforms: list):
    """Makes two examples' "features" (2,F,T) of one: each view has draws of its own.

    No transform may move speech to other times, because CR-CTC compares the views' frames.
    """
    masks = Compose(transforms)

    def transform(example: dict, generator: torch.Generator) -> dict:
        views = [masks(example, generator)["features"] for _ in range(2)]
        return {**example, "features": torch.stack(views)}

    return transform


def transpose(example: dict, generator: torch.Generator | None) -> dict:
    """Turns features (...,F,T) into (...,T,F), the order in which batches are padded."""
    return {**example, "features": example["features"].mT.contiguous()}


# ---- Chains


class Compose:
    """Calls the transforms of a list in order."""

    def __init__(self, transforms: list):
        self.transforms = transforms

    def __call__(self, example: dict, generator: torch.Generator | None) -> dict:
        for transform in self.transforms:
            example = transform(example, generator)
        return example


def features_chain(frontend: Frontend, dither: float = 0.0) -> list:
    """Lists the transforms from waveform to features that the frontend asks for.

    The tail comes behind what changes the waveform, so that it is the same silence everywhere.
    """
    tail = [tail_padding(frontend)] if frontend.tail_padding else []
    if frontend.frontend == "fbank":
        return ([dithered(dither)] if dither else []) + [*tail, fbank(frontend)]
    return ([mean_var_norm] if frontend.mean_var_norm else []) + [*tail, log_mel(frontend)]


def train_transform(
    frontend: Frontend,
    augment: Augment,
    rirs: Sequence[np.ndarray] = (),
    noises: Sequence[np.ndarray] = (),
    views: int = 1,
) -> Compose:
    """Makes the chain of training: speed, room and noise before the frontend, masks after it.

    rirs, noises: recordings (n,) float32 of the folders that `augment` names. A part that is
    switched off is left out. Two `views` differ in the masks of spec_aug alone, which come last.
    """
    chain = [speed_perturb(augment.speeds)] if augment.speeds else []
    chain += [reverberate(rirs, augment.rir_prob)] if len(rirs) else []
    chain += [mix_noise(noises, augment)] if len(noises) else []
    chain += features_chain(frontend, augment.dither)
    masks = [spec_aug(augment)] if augment.num_freq_masks or augment.num_time_masks else []
    cuts = [spec_sub(augment)] if augment.num_subs else []
    cuts += [spec_trim(augment)] if augment.max_trim else []
    chain += masks + cuts if views == 1 else [*cuts, two_views(masks)]
    return Compose(chain + [transpose])


def eval_transform(frontend: Frontend) -> Compose:
    """Makes the chain of evaluation, normalisation and features only. It needs no generator."""
    return Compose([*features_chain(frontend), transpose])


def extract(frontend: Frontend):
    """Makes a function of eval_transform: waveform (N,) float32, within +-1, -> (T,F) float32."""
    transform = eval_transform(frontend)
    return lambda waveform: transform({"input_values": waveform}, None)["features"]


# ---- Streams

# Seconds over which the mean and variance of a stream are taken; docs/numbers.md has what this
# window costs. Checkpoints do not hold this number, so every model streams with it.
STREAM_WINDOW = 5.0
# The most that a sample of a stream counts: full scale is 1, and lossy formats overshoot a little.
PEAK = 2.0


def bounded(samples: torch.Tensor) -> torch.Tensor:
    """Clamps samples (n,) to +-LOUDEST, nan to 0, so that none can spoil the rest of its stream."""
    return samples.nan_to_num(0.0).clamp(-LOUDEST, LOUDEST)


def peak_of(samples: torch.Tensor) -> torch.Tensor:
    """Returns the most, () float64, that one of the samples (n,) counts in a stream's statistics.

    It is PEAK, or 100 times the median level where this is more. So a click is clipped, while
    samples in steps of 16-bit integers pass. The median is taken over every 16th sample.
    """
    levels = torch.cat((samples.new_zeros(1), samples[::16].abs())).sort().values
    return (100 * levels[levels.size(0) // 2]).double().clamp(min=PEAK)


def moments(samples: torch.Tensor, past: torch.Tensor, window: float, peak) -> torch.Tensor:
    """Returns the statistics (3,) float64 of a waveform: number, sum and sum of squares of samples.

    `past` (3,) has the statistics of the samples before `samples` (n,), which are clipped to
    [-peak, peak]. The first `window` samples weigh the same. From then on each new sample scales
    all sums so far, its own part included, by window / (window + 1), so their number stays
    `window`. A waveform cut into pieces of any length gives the same statistics.
    """
    wide = samples.double().clamp(-peak, peak)
    # (n+1,), before each sample and behind the last: samples, and how often the past was scaled.
    count = past[0] + torch.arange(samples.size(0) + 1)
    over = (count - window).clamp(min=0)
    weights = ((over - over[-1]) * math.log1p(1 / window)).exp()
    weighted = weights[:-1] * wide
    sums = torch.stack((weighted.sum(), (weighted * wide).sum()))
    return torch.cat((count[-1:].clamp(max=window), weights[:1] * past[1:] + sums))


def normalize(samples: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
    """Scales samples (n,) by `statistics` (3,) to zero mean and unit variance, as mean_var_norm."""
    mean = statistics[1] / statistics[0]
    variance = (statistics[2] / statistics[0] - mean * mean).clamp(min=0)
    return (samples - mean.float()) * (variance + 1e-7).rsqrt().float()


class FeatureState(NamedTuple):
    """Holds what later frames of a stream need of its samples so far."""

    samples: torch.Tensor  # (n,) float32, less than a window and a shift
    statistics: torch.Tensor  # (3,) float64, of `moments`


def feature_state() -> FeatureState:
    """Returns the state before the first sample."""
    return FeatureState(torch.zeros(0), torch.zeros(3, dtype=torch.float64))


def stream_features(frontend: Frontend):
    """Makes a function (samples (n,), state) -> (features (T,F), new state), n >= 0.

    The features are of the frames that are now complete. The caller puts the tail behind the last
    samples. fbank gives the frames of `extract`, to rounding. mean_var_norm needs the whole
    utterance; here it takes the last STREAM_WINDOW seconds up to the end of `samples`. So fewer
    samples scale the first frames of a log_mel stream than later frames, above all where the first
    piece is short.
    """
    normalised = frontend.frontend == "log_mel" and frontend.mean_var_norm
    window = STREAM_WINDOW * frontend.sample_rate
    frontend = frontend.without_tail
    chain = eval_transform(dataclasses.replace(frontend, mean_var_norm=False))

    def advance(samples: torch.Tensor, state: FeatureState) -> tuple[torch.Tensor, FeatureState]:
        samples = bounded(samples)
        waiting = torch.cat((state.samples, samples))
        statistics = moments(samples, state.statistics, window, peak_of(samples))
        frames = int(num_frames(len(waiting), frontend))
        if not frames:
            return torch.zeros(0, frontend.num_mel_bins), FeatureState(waiting, statistics)
        ready = waiting[: (frames - 1) * frontend.shift_samples + frontend.window_samples]
        ready = normalize(ready, statistics) if normalised else ready
        features = chain({"input_values": ready}, None)["features"]
        return features, FeatureState(waiting[frames * frontend.shift_samples :], statistics)

    return advance
