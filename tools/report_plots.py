"""Draws the figures of tools/report.py by matplotlib, and packs pictures and sounds into the page.

Axes: T feature frames, T' encoder frames, F mel bins, N samples.
"""

import base64
import io
import logging
import warnings
from contextlib import contextmanager
from itertools import cycle

import matplotlib
import matplotlib.ticker
import numpy as np
import soundfile
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure  # which needs no screen, unlike pyplot
from PIL import Image

from audio import resample
from words import FrameTimes, Word

RATE = 16000  # samples per second of the sounds, which MP3 has, unlike some rates of models
LONGEST = 30.0  # seconds of a sound in the page
MOST_TOKENS = 60  # along an axis, beyond which they could not be read
WIDTH = 10.0  # inches of a figure, DPI points each
DPI = 110
BINS = 10  # of confidences
# Powers of ten would be written as formulas, which `quiet_fonts` switches off.
PLAIN = matplotlib.ticker.StrMethodFormatter("{x:g}")
# The first of these that is installed has the characters that matplotlib's own font lacks.
CJK = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Source Han Sans SC")


# ---- Data URIs


def sound(samples: np.ndarray, sample_rate: int) -> str:
    """Returns the first LONGEST seconds of samples (N,), at most full scale, as MP3's data URI."""
    samples = samples[: int(LONGEST * sample_rate)]
    samples = resample(samples, sample_rate, RATE)
    peak = np.abs(samples).max(initial=1e-9)
    file = io.BytesIO()
    soundfile.write(file, 0.9 * samples / peak, RATE, format="MP3", compression_level=0.9)
    return uri("audio/mpeg", file)


def picture(figure: Figure) -> str:
    """Returns a figure as PNG's data URI, in 256 colours, which take a third of the bytes."""
    drawn = io.BytesIO()
    with quiet_fonts():
        figure.savefig(drawn, dpi=DPI)
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return uri("image/png", small)


def uri(kind: str, file: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@contextmanager
def quiet_fonts():
    """Takes text from data as it is, and says nothing of characters that no font has."""
    there = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in CJK if name in there)]
    with matplotlib.rc_context({"font.family": fonts, "text.parse_math": False}):
        with warnings.catch_warnings(action="ignore"):
            yield


def panels(height: float, *shape: int, **options) -> tuple[Figure, np.ndarray]:
    """Makes a figure of rows and columns of axes, (rows, columns)."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with quiet_fonts():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots(*shape, squeeze=False, **options)


# ---- Figures


def draw_curves(runs: dict[str, dict]) -> str:
    """Draws the losses and errors of runs, {name: {tag: [(step, value), ...]}}."""
    figure, ((training, loss, errors),) = panels(3.6, 1, 3)
    colours = cycle(matplotlib.color_sequences["tab10"])
    for (name, curves), colour in zip(runs.items(), colours):
        points = curves.get("loss")
        # A run without losses is named, too, for its colour in the other panels.
        training.plot(*(smooth(points) if points else ((), ())), color=colour, label=name)
        for tag, axis, style in (
            ("val_loss", loss, "o-"),
            ("val_cer", errors, "o-"),
            ("val_cer_chunk16", errors, "s--"),
        ):
            if points := curves.get(tag):
                axis.plot(*zip(*points), style, color=colour, markersize=3)
    training.set(title="training loss, smoothed", yscale="log")
    few = matplotlib.ticker.LogLocator(subs=(1, 2, 5))
    training.yaxis.set(major_locator=few, major_formatter=PLAIN)
    training.yaxis.set(minor_formatter=matplotlib.ticker.NullFormatter())
    loss.set(title="loss on dev")
    errors.set(title="CER on dev (dashed: chunks of 16)", ylim=0)
    for axis in (training, loss, errors):
        axis.set_xlabel("update", fontsize=8)
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8, which="both")
    training.legend(fontsize=7)
    return picture(figure)


def smooth(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Returns steps and values of the medians of at most 100 pieces of the points."""
    pieces = np.array_split(np.array(points, float), min(100, len(points)))
    return tuple(zip(*(np.median(piece, axis=0).tolist() for piece in pieces)))


def show_features(axis, features, seconds: float) -> None:
    """Draws features (T,F) over time, low frequencies below."""
    features = np.asarray(features)
    low, high = np.quantile(features, (0.02, 0.995)) if features.size else (0, 1)
    extent = (0, seconds, 0, features.shape[1])
    axis.imshow(
        features.T,
        origin="lower",
        aspect="auto",
        extent=extent,
        cmap="magma",
        vmin=low,
        vmax=max(high, low + 1e-6),
        interpolation="nearest",
    )
    axis.tick_params(labelsize=7)
    axis.set_yticks([])


def draw_features(views: dict[str, np.ndarray], shift: float) -> str:
    """Draws features (T,F) by title one below the other, on one time axis; shift in seconds."""
    figure, axes = panels(1.35 * len(views), len(views), 1, sharex=True)
    for axis, (title, features) in zip(axes[:, 0], views.items()):
        axis.set_facecolor("0.9")
        show_features(axis, features, len(features) * shift)
        axis.set_ylabel(title, fontsize=8)
    axes[-1, 0].set_xlim(0, shift * max(map(len, views.values())))
    return picture(figure)


def draw_posteriors(
    seen, words: list[Word], tokens: list[str], times: FrameTimes, shift: float, blank_id: int
) -> str:
    """Draws CTC's probabilities over the spectrogram; tokens: the text of each one that was heard.

    `seen` is a report_heard.Seen; shift: seconds between its feature frames.
    """
    seconds = len(seen.features) * shift
    figure, axes = panels(4.2, 2, 1, sharex=True)
    above, below = axes[:, 0]
    show_features(above, seen.features, seconds)
    for number, word in enumerate(words):
        above.axvline(word.start, color="white", linewidth=0.8)
        above.axvline(word.end, color="white", linewidth=0.8, linestyle=":")
        height = seen.features.size(1) * (0.88 if number % 2 else 0.76)
        above.text(
            word.start,
            height,
            f" {word.text}",
            color="white",
            fontsize=9,
            clip_on=True,
            bbox={"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 1},
        )
    probabilities = seen.log_probs.exp().numpy()
    middle = np.arange(len(probabilities)) * times.shift + times.field / 2
    below.fill_between(middle, probabilities[:, blank_id], color="0.9", label="blank")
    colours = dict(zip(dict.fromkeys(seen.tokens), cycle(matplotlib.color_sequences["tab20"])))
    for token, colour in colours.items():
        below.plot(middle, probabilities[:, token], color=colour, linewidth=1.2)
    for token, text, frame in zip(seen.tokens, tokens, seen.frames):
        height = probabilities[frame, token]
        below.text(middle[frame], height, text, ha="center", va="bottom", fontsize=7, clip_on=True)
    below.set(ylim=(0, 1.12), xlabel="seconds (grey: the blank)", xlim=(0, seconds))
    below.tick_params(labelsize=7)
    below.set_ylabel("probability", fontsize=8)
    return picture(figure)


def draw_attention(maps: dict[str, torch.Tensor], tokens: list[str], seconds: float) -> str:
    """Draws the attention maps (blocks,U+1,T') of each decoder, at most its last two blocks."""
    drawn = [
        (name, number, len(blocks), weights)
        for name, blocks in maps.items()
        for number, weights in list(enumerate(blocks.numpy(), 1))[-2:]
    ]
    figure, (axes,) = panels(min(1.6 + 0.1 * len(tokens), 6), 1, len(drawn))
    for axis, (name, number, count, weights) in zip(axes, drawn):
        ends = [*tokens, "<eos>"] if name == "left to right" else ["<eos>", *tokens]
        extent = (0, seconds, len(weights) - 0.5, -0.5)
        axis.imshow(weights, aspect="auto", extent=extent, cmap="viridis", interpolation="nearest")
        axis.set_title(f"{name}, block {number} of {count}", fontsize=8)
        axis.set_xlabel("seconds", fontsize=8)
        axis.tick_params(labelsize=7)
        if len(ends) <= MOST_TOKENS:
            axis.set_yticks(range(len(ends)), ends, fontsize=6)
    return picture(figure)


def draw_calibration(points: np.ndarray) -> str:
    """Draws how many words are right by their confidence; points (words, 2): confidence, right."""
    figure, ((right, counts),) = panels(3.2, 1, 2)
    bins = np.minimum((points[:, 0] * BINS).astype(int), BINS - 1)
    right.plot((0, 1), (0, 1), "--", color="0.6")
    size = np.bincount(bins, minlength=BINS)
    there = size > 0
    mean = [np.bincount(bins, points[:, k], BINS)[there] / size[there] for k in (0, 1)]
    right.plot(*mean, "o-")
    right.set(xlabel="confidence", ylabel="share of right words", xlim=(0, 1.02), ylim=(0, 1.05))
    middle = (np.arange(BINS) + 0.5) / BINS
    wrong = np.bincount(bins, 1 - points[:, 1], BINS)
    counts.bar(middle, size - wrong, 0.09, label="right")
    counts.bar(middle, wrong, 0.09, bottom=size - wrong, label="wrong", color="tab:red")
    counts.set(xlabel="confidence", ylabel="words", yscale="symlog")
    counts.yaxis.set(major_formatter=PLAIN)
    counts.legend(fontsize=8)
    for axis in (right, counts):
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    return picture(figure)
