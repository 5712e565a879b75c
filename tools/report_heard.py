"""Computes what tools/report.py shows of a model: what it heard and saw, and what training heard.

Axes: N samples, T feature frames, T' encoder frames, U labels, D width, H heads, F mel bins,
V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from datamodule import SpeechDataModule, SpeechDataset, row_values
from decode import SearchOptions, align
from sampler import Shaped
from score import references_of
from transcribe import POOL, Job, Piece, TranscribeOptions, pools, recognize_pool
from transforms import eval_transform, extract
from words import Word, split_words

Pair = tuple[str | None, str | None]  # (said, heard); None where one side has no word


class Heard(NamedTuple):
    """Holds what was said and heard in a row of the split."""

    row: int
    seconds: float
    speaker: str | None
    said: str
    words: list[Word]
    pairs: list[Pair]  # the words of both sides, aligned

    @property
    def errors(self) -> int:
        return sum(said != heard for said, heard in self.pairs)

    @property
    def length(self) -> int:
        """Returns how many words were said."""
        return sum(said is not None for said, _ in self.pairs)


class Seen(NamedTuple):
    """Holds what the network makes of one utterance."""

    features: torch.Tensor  # (T,F)
    log_probs: torch.Tensor  # (T',V) of CTC
    tokens: list[int]  # that were heard
    frames: list[int]  # the encoder frame of each; empty where CTC has no path
    maps: dict[str, torch.Tensor]  # of each decoder: (blocks,U+1,T'), in the order of speech


class Example(NamedTuple):
    """Holds a row of train before and after augmentation."""

    epoch: int
    row: int
    plain: torch.Tensor  # (T,F)
    features: torch.Tensor  # (T,F), or (2,T,F) of two views
    before: np.ndarray  # (N,)
    after: np.ndarray  # (N,)


# ---- What was heard


def samples_of(dataset, row: int) -> np.ndarray:
    """Returns the samples (N,) float32 of a row."""
    return row_values(dataset, "input_values", row).astype(np.float32)


def hear(model, dataset, mode: str) -> list[Heard]:
    """Hears all rows with full context, and aligns what was heard to what was said."""
    job = Job(model, TranscribeOptions(mode=mode, format="json"), SearchOptions(), None)
    pieces = (Piece(row, 0.0, samples_of(dataset, row)) for row in range(len(dataset)))
    size = POOL * job.options.batch_seconds * model.frontend.sample_rate
    with tqdm(disable=True) as bar:
        found = [each for pool in pools(pieces, size) for each in recognize_pool(job, pool, bar)]
    speakers = dataset["speaker"] if "speaker" in dataset.column_names else [None] * len(dataset)
    said = references_of(dataset, model.tokenizer)
    results = []
    for row, (heard, speaker, text) in enumerate(zip(found, speakers, said)):
        pairs = aligned(
            [word.text for word in split_words(text)], [word.text for word in heard.words]
        )
        speaker = None if speaker is None else str(speaker)
        results.append(Heard(row, heard.seconds, speaker, text, heard.words, pairs))
    return results


def aligned(said: list[str], heard: list[str]) -> list[Pair]:
    """Pairs two lists of words with the fewest insertions, deletions and substitutions."""
    costs = np.zeros((len(said) + 1, len(heard) + 1), np.int64)
    costs[:, 0] = range(len(said) + 1)
    costs[0] = range(len(heard) + 1)
    for i, one in enumerate(said, 1):
        for j, other in enumerate(heard, 1):
            costs[i, j] = min(
                costs[i - 1, j - 1] + (one != other), costs[i - 1, j] + 1, costs[i, j - 1] + 1
            )
    pairs = []
    i, j = len(said), len(heard)
    while i or j:
        if i and j and costs[i, j] == costs[i - 1, j - 1] + (said[i - 1] != heard[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((said[i], heard[j]))
        elif i and costs[i, j] == costs[i - 1, j] + 1:
            i -= 1
            pairs.append((said[i], None))
        else:
            j -= 1
            pairs.append((None, heard[j]))
    return pairs[::-1]


def count_errors(heard: list[Heard]) -> tuple[Counter, Counter, Counter]:
    """Counts the pairs of words that were confused, the words inserted, and the words deleted."""
    wrong = [pair for each in heard for pair in each.pairs if pair[0] != pair[1]]
    return (
        Counter(pair for pair in wrong if None not in pair),
        Counter(word for said, word in wrong if said is None),
        Counter(word for word, other in wrong if other is None),
    )


def confidences(heard: list[Heard]) -> np.ndarray:
    """Returns of every word that was heard its confidence and whether it is right, (words, 2)."""
    rows = []
    for each in heard:
        right = [said == other for said, other in each.pairs if other is not None]
        rows += [(word.confidence, ok) for word, ok in zip(each.words, right)]
    return np.array(rows, float).reshape(-1, 2)


# ---- What the network sees


@torch.no_grad()
def see(model, samples: np.ndarray, mode: str) -> Seen:
    """Hears samples (N,), and keeps what the network computes on the way."""
    features = extract(model.frontend)(torch.from_numpy(samples))
    inputs = features[None].to(model.device), torch.tensor([len(features)], device=model.device)
    encoded, lengths = model.encode(*inputs)
    (hypothesis,) = model.search(encoded, lengths, mode)
    log_probs = model.ctc_log_probs(encoded)[0, : int(lengths)].cpu()
    maps = {}
    if int(lengths):  # else the one frame is padding
        maps["left to right"] = attention_maps(
            model.net.decoder, [model.net.sos_id, *hypothesis.tokens], encoded
        )
        if model.net.right_decoder is not None and model.net.right_decoder.blocks:
            backwards = [model.net.sos_id, *reversed(hypothesis.tokens)]
            seen = attention_maps(model.net.right_decoder, backwards, encoded)
            maps["right to left"] = seen.flip(1)
    blank_id = model.tokenizer.blank_id
    frames = align(hypothesis, log_probs, len(log_probs), blank_id).times
    return Seen(features, log_probs, hypothesis.tokens, frames, maps)


def attention_maps(decoder, tokens: list[int], encoded: torch.Tensor) -> torch.Tensor:
    """Returns where each block looks, the mean over its heads: tokens (U,) -> (blocks,U,T').

    The decoder predicts the token behind each of `tokens` from encoded (1,T',D), as in rescoring.
    """
    maps = []
    hooks = [
        block.src_attn.register_forward_pre_hook(
            lambda layer, inputs: maps.append(attention_weights(layer, *inputs[:2])[0].mean(0))
        )
        for block in decoder.blocks
    ]
    try:
        lengths = torch.tensor([encoded.size(1)], device=encoded.device)
        decoder(torch.tensor([tokens], device=encoded.device), encoded, lengths)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps).float().cpu()


def attention_weights(layer, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns the weights (B,H,U,T') with which x (B,U,D) attends to keys (B,H,T',D/H)."""
    scale = (layer.linear_out.in_features // layer.heads) ** -0.5
    return (layer.split(layer.linear_q(x)) * scale @ keys.transpose(2, 3)).softmax(-1)


# ---- What training heard


def training_examples(data: SpeechDataModule, epoch: int, count: int) -> Iterator[Example]:
    """Yields the first rows of an epoch as training hears them.

    `data` comes after setup("fit"), and --few_shapes is on or off as in the run.
    """
    train = data.splits["train"]
    augmented = SpeechDataset(train, data.make_train_transform, data.seed)
    plain = SpeechDataset(train, partial(eval_transform, data.frontend), data.seed)
    for key in first_keys(data, epoch, count):
        example = augmented.example(*key)
        after = example["input_values"].numpy()
        before = samples_of(train, key[1])
        features = plain.example(*key[:2])["features"]
        yield Example(*key[:2], features, example["features"], before, after)


def first_keys(data: SpeechDataModule, epoch: int, count: int) -> list[tuple]:
    """Returns the first of each of the first batches of an epoch, then the second, and so on."""
    keys = []
    batches = list(data.sampler(0, 1).batches(epoch))
    batches = [batch.keys if isinstance(batch, Shaped) else batch for batch in batches]
    for place in range(max(map(len, batches))):
        keys += [batch[place] for batch in batches if place < len(batch)]
        if len(keys) >= count:
            break
    return keys[:count]
