"""Searches: from CTC log-probabilities, and from attention decoders given as callables, to token sequences.

Nothing here knows the model: CTC searches take log-probabilities, attention searches a function that scores tokens.
Axes: B batch, T encoder frames, V vocabulary, N beam, U tokens of a hypothesis, L = U + 1 with the leading <sos>,
M all hypotheses of all utterances. Scores are natural logarithms.

Sources: CTC prefix beam search, Hannun et al. 2014 (arXiv:1408.2873), with the two prunings and the Viterbi times of
WeNet; attention rescoring, U2 (arXiv:2012.05481, section 3.3) and its right-to-left half, U2++ (arXiv:2106.05642, 3.1).
"""

import math
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torchaudio

from cli import UserError, option

MODES = ("ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring")


@dataclass(frozen=True)
class SearchOptions:
    """How an utterance is decoded, whatever the mode; the fields are arguments of model.decode. Raises UserError."""

    beam_size: int = option(10, "hypotheses that a beam search keeps")
    chunk_size: int = option(-1, "encoder frames (40 ms each with conv2d) in a chunk; -1: full context")
    left_chunks: int = option(-1, "chunks before its own that a frame sees; -1: all")
    ctc_weight: float = option(0.5, "weight of the CTC score in attention_rescoring")
    reverse_weight: float = option(0.3, "share of the right-to-left decoder in attention_rescoring")

    def __post_init__(self):
        if self.beam_size < 1:
            raise UserError(f"--beam_size {self.beam_size}: a beam keeps at least 1 hypothesis")
        if self.chunk_size < 1 and self.chunk_size != -1:
            raise UserError(f"--chunk_size {self.chunk_size}: give at least 1 encoder frame, or -1 for full context")
        if self.left_chunks < -1:
            raise UserError(f"--left_chunks {self.left_chunks}: give at least 0 chunks, or -1 for all")
        if self.left_chunks >= 0 and self.chunk_size == -1:
            raise UserError(f"--left_chunks {self.left_chunks} means nothing at full context; give --chunk_size too")
        if not 0 <= self.reverse_weight <= 1:
            raise UserError(f"--reverse_weight {self.reverse_weight}: it is a share, from 0 to 1")


class Hypothesis(NamedTuple):
    """What was heard in one utterance. The fields without `nbest` are those of the best hypothesis, nbest[0]."""

    tokens: list[int]
    score: float  # log-probability, or the search's weighted sum of log-probabilities; higher is better
    times: list[int]  # encoder frame of each token; empty where the search has no alignment (attention)
    nbest: list[list[int]]  # best first
    nbest_scores: list[float]
    nbest_times: list[list[int]]


def _from_nbest(nbest: list[list[int]], scores: list[float], times: list[list[int]]) -> Hypothesis:
    return Hypothesis(nbest[0], scores[0], times[0], nbest, scores, times)


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)), exact for -inf."""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


# ---------------------------------------------------------------------------------------------------------------- CTC


def ctc_greedy_search(log_probs: torch.Tensor, lengths: torch.Tensor, blank_id: int = 0) -> list[Hypothesis]:
    """The best path: the likeliest token of each frame, repeats merged, blanks dropped.

    log_probs (B,T,V), lengths (B,) frames -> one Hypothesis per utterance. score is the path's log-probability, a
    token's time the frame of its run where it is likeliest. Frames beyond an utterance's length are never looked at.
    """
    best_log_probs, best_tokens = log_probs.max(dim=-1)  # (B,T) each
    rows = zip(best_log_probs.tolist(), best_tokens.tolist(), lengths.tolist())
    return [_collapse(row_log_probs[:length], row_tokens[:length], blank_id)
            for row_log_probs, row_tokens, length in rows]


def _collapse(log_probs: list[float], path: list[int], blank_id: int) -> Hypothesis:
    tokens, times = [], []
    for token, run in groupby(range(len(path)), key=path.__getitem__):
        if token != blank_id:
            tokens.append(token)
            times.append(max(run, key=log_probs.__getitem__))
    return _from_nbest([tokens], [math.fsum(log_probs)], [times])


def align(hypothesis: Hypothesis, log_probs: torch.Tensor, length: int, blank_id: int = 0) -> Hypothesis:
    """The hypothesis with times for its whole n-best: the likeliest frame of each token on the best CTC path of it.

    log_probs (T,V), of which `length` frames count. Tokens without a CTC path (too many for the frames, a blank among
    them) get no times.
    """
    times = [_align(tokens, log_probs[:length], blank_id) for tokens in hypothesis.nbest]
    return hypothesis._replace(times=times[0], nbest_times=times)


def _align(tokens: list[int], log_probs: torch.Tensor, blank_id: int) -> list[int]:
    repeats = sum(a == b for a, b in zip(tokens, tokens[1:]))
    if not tokens or len(tokens) + repeats > len(log_probs) or blank_id in tokens:
        return []
    targets = torch.tensor([tokens], device=log_probs.device)
    path, scores = torchaudio.functional.forced_align(log_probs[None].contiguous(), targets, blank=blank_id)  # (1,T) each
    return _collapse(scores[0].tolist(), path[0].tolist(), blank_id).times


class _Prefix:
    """Scores of one prefix at one frame: all paths that end in blank, and all that end in the prefix's last token.

    The Viterbi halves follow the single best path, for the times only. Times are linked lists (earlier, frame), so that
    an extension costs no copy.
    """

    __slots__ = ("blank", "token", "viterbi_blank", "viterbi_token", "times_blank", "times_token")

    def __init__(self, blank=-math.inf, viterbi=-math.inf):
        self.blank, self.token = blank, -math.inf
        self.viterbi_blank, self.viterbi_token = viterbi, viterbi
        self.times_blank = self.times_token = None

    def score(self) -> float:
        return _log_add(self.blank, self.token)

    def viterbi(self):
        """(score, times) of the best single path; the path that ends in the token wins a tie, as in WeNet."""
        if self.viterbi_blank > self.viterbi_token:
            return self.viterbi_blank, self.times_blank
        return self.viterbi_token, self.times_token

    def extend(self, log_prob: float, viterbi: float, times, frame: int) -> None:
        """Adds paths that emit the prefix's last token anew at `frame`."""
        self.token = _log_add(self.token, log_prob)
        if self.viterbi_token < viterbi:
            self.viterbi_token, self.times_token = viterbi, (times, frame)


def ctc_prefix_beam_search(log_probs: torch.Tensor, lengths: torch.Tensor, beam_size: int,
                           blank_id: int = 0) -> list[Hypothesis]:
    """The likeliest token sequences, each summed over its paths, kept to `beam_size` prefixes at every frame.

    log_probs (B,T,V), lengths (B,) frames -> one Hypothesis per utterance with at most beam_size nbest. A frame offers
    only its beam_size likeliest tokens (first pruning). score is the log-probability of the sequence, exact when the
    beam holds every prefix; a token's time is the last frame of its run on the best single path.
    """
    return [prefix_result(prefix_advance(prefix_start(), row[:length], 0, beam_size, blank_id))
            for row, length in zip(log_probs, lengths.tolist())]


# The same search in pieces, for a stream. A beam is a value: nothing changes it.


def prefix_start() -> list:
    """The beam before the first frame: the empty prefix. Items are (prefix, score, its halves)."""
    return [((), 0.0, _Prefix(blank=0.0, viterbi=0.0))]


def prefix_advance(beam: list, log_probs: torch.Tensor, first_frame: int, beam_size: int, blank_id: int = 0) -> list:
    """The beam after the frames log_probs (T,V), which are number first_frame and on of the utterance; T may be 0."""
    values, tokens = log_probs.topk(min(beam_size, log_probs.shape[-1]), dim=-1)  # (T,N) each, best first
    for frame, offers in enumerate(zip(tokens.tolist(), values.tolist()), first_frame):
        scored = [(prefix, entry.score(), entry) for prefix, entry in _advance(beam, frame, offers, blank_id).items()]
        beam = sorted(scored, key=lambda item: item[1], reverse=True)[:beam_size]
    return beam


def prefix_result(beam: list) -> Hypothesis:
    """What the beam holds, best first."""
    # A beam wider than the number of possible sequences also holds impossible ones (log-probability -inf).
    beam = [item for item in beam if item[1] > -math.inf] or beam[:1]
    return _from_nbest([list(prefix) for prefix, _, _ in beam], [score for _, score, _ in beam],
                       [_unlink(entry.viterbi()[1]) for _, _, entry in beam])


def _advance(beam: list, frame: int, offers: tuple[list[int], list[float]], blank_id: int) -> dict[tuple, _Prefix]:
    """All prefixes reachable from `beam` by one of the frame's offered tokens."""
    reached: dict[tuple, _Prefix] = {}
    # In WeNet's order (token, then prefix), which decides ties. A prefix is entered by its first path.
    sources = [(prefix, prefix[-1] if prefix else None, score, entry, *entry.viterbi())
               for prefix, score, entry in beam]
    for token, log_prob in zip(*offers):
        for prefix, last, score, entry, viterbi, times in sources:
            if token == blank_id:
                target = reached.get(prefix) or reached.setdefault(prefix, _Prefix())
                target.blank = _log_add(target.blank, score + log_prob)
                target.viterbi_blank, target.times_blank = viterbi + log_prob, times
                continue
            if token == last:
                target = reached.get(prefix) or reached.setdefault(prefix, _Prefix())
                _stay(target, entry, log_prob, frame)
                # Only a blank between them makes a second, equal token.
                score, viterbi, times = entry.blank, entry.viterbi_blank, entry.times_blank
            longer = prefix + (token,)
            target = reached.get(longer) or reached.setdefault(longer, _Prefix())
            target.extend(score + log_prob, viterbi + log_prob, times, frame)
    return reached


def _stay(target: _Prefix, source: _Prefix, log_prob: float, frame: int) -> None:
    """Adds the paths that repeat the prefix's last token: the sequence stays, the token's time moves on."""
    target.token = _log_add(target.token, source.token + log_prob)
    if target.viterbi_token < source.viterbi_token + log_prob:
        target.viterbi_token = source.viterbi_token + log_prob
        # WeNet keeps the times of a path that entered the prefix at this very frame, even if this one is likelier.
        if target.times_token is None:
            target.times_token = (source.times_token[0], frame)


def _unlink(times) -> list[int]:
    frames = []
    while times is not None:
        times, frame = times
        frames.append(frame)
    return frames[::-1]


# ---------------------------------------------------------------------------------------------------------- attention


def attention_beam_search(step, batch_size: int, max_length: int, beam_size: int, sos_id: int, eos_id: int,
                          device=None, length_penalty: float = 0.0) -> list[Hypothesis]:
    """Beam search with an autoregressive decoder, all utterances and beams in one call per token.

    step(prefixes (B*N,L), state, parents (B*N,) | None) -> (log-probabilities of the next token (B*N,V), new state).
    `state` is the caller's own (None at first); parents[i] is the row of the previous call that prefix i continues, so
    that a cache can follow (None at first). Row b*N+n is beam n of utterance b. A search ends when every beam of every
    utterance ended in eos_id, or after max_length tokens (WeNet: the number of encoder frames).
    score is the sum of log-probabilities over length**length_penalty; times are empty: attention has no alignment.
    """
    prefixes = torch.full((batch_size * beam_size, 1), sos_id, dtype=torch.long, device=device)
    # All beams are alike before the first token: all but one wait at -inf.
    scores = torch.full((batch_size, beam_size), -math.inf, device=device)
    scores[:, 0] = 0.0
    ended = torch.zeros(batch_size * beam_size, dtype=torch.bool, device=device)
    first_row = torch.arange(batch_size, device=device)[:, None] * beam_size  # (B,1)
    state, parents = None, None
    for _ in range(max_length):
        log_probs, state = step(prefixes, state, parents)
        offers, tokens = _offer(log_probs, ended, beam_size, eos_id)  # (B*N,K) each
        totals = (scores.view(-1, 1) + offers).view(batch_size, -1)  # (B,N*K)
        scores, choice = totals.topk(beam_size, dim=-1)  # (B,N)
        parents = (first_row + choice // tokens.shape[1]).view(-1)
        chosen = tokens.view(batch_size, -1).gather(1, choice).view(-1, 1)
        prefixes = torch.cat([prefixes[parents], chosen], dim=1)
        ended = chosen[:, 0] == eos_id
        if bool(ended.all()):
            break
    return _rank(prefixes, scores, eos_id, length_penalty)


def _offer(log_probs: torch.Tensor, ended: torch.Tensor, beam_size: int, eos_id: int):
    """The likeliest next tokens (B*N,K) and their log-probabilities. An ended row offers eos at no cost, once."""
    offers, tokens = log_probs.float().topk(min(beam_size, log_probs.shape[-1]), dim=-1)
    at_no_cost = torch.full_like(offers, -math.inf)
    at_no_cost[:, 0] = 0.0
    return torch.where(ended[:, None], at_no_cost, offers), tokens.masked_fill(ended[:, None], eos_id)


def _rank(prefixes: torch.Tensor, scores: torch.Tensor, eos_id: int, length_penalty: float) -> list[Hypothesis]:
    """prefixes (B*N,L), scores (B,N) -> hypotheses, best first, without sos and eos."""
    lengths = (prefixes != eos_id).sum(dim=1).clamp(min=1).view(scores.shape)
    scores, order = (scores / lengths**length_penalty).sort(dim=-1, descending=True, stable=True)
    beams = prefixes.view(*scores.shape, -1)[:, :, 1:].tolist()
    results = []
    for beam, row_scores, row_order in zip(beams, scores.tolist(), order.tolist()):
        possible = sum(score > -math.inf for score in row_scores) or 1
        nbest = [[token for token in beam[n] if token != eos_id] for n in row_order[:possible]]
        results.append(_from_nbest(nbest, row_scores[:possible], [[] for _ in nbest]))
    return results


def attention_rescoring(hypotheses: list[Hypothesis], score, sos_id: int, eos_id: int, ctc_weight: float = 0.5,
                        reverse_weight: float = 0.3, device=None) -> list[Hypothesis]:
    """Sorts each utterance's CTC n-best anew by what the attention decoders think of them.

    score(tokens_in (M,L), lengths (M,), rows (M,), reverse: bool) -> log-probabilities (M,L,V): teacher forcing, where
    tokens_in is sos and the hypothesis (reversed for the right-to-left decoder), padded with eos_id behind its length;
    rows says which utterance each belongs to. Called once per direction (once in all if reverse_weight is 0).
    A score is (1 - reverse_weight) left-to-right + reverse_weight right-to-left + ctc_weight CTC, each a sum of
    log-probabilities, the decoders' with eos. Times are those of the CTC search.
    """
    nbest = [tokens for hypothesis in hypotheses for tokens in hypothesis.nbest]
    counts = torch.tensor([len(hypothesis.nbest) for hypothesis in hypotheses])
    rows = torch.repeat_interleave(torch.arange(len(hypotheses)), counts).to(device)
    totals = _teacher_forced(nbest, rows, score, sos_id, eos_id, reverse=False)
    if reverse_weight > 0:
        backward = _teacher_forced(nbest, rows, score, sos_id, eos_id, reverse=True)
        totals = (1 - reverse_weight) * totals + reverse_weight * backward
    return [_resort(hypothesis, row_totals.tolist(), ctc_weight)
            for hypothesis, row_totals in zip(hypotheses, totals.split(counts.tolist()))]


def _teacher_forced(nbest: list[list[int]], rows: torch.Tensor, score, sos_id: int, eos_id: int,
                    reverse: bool) -> torch.Tensor:
    """Sum of the decoder's log-probabilities of each sequence and its eos: (M,)."""
    sequences = [torch.tensor([sos_id, *(tokens[::-1] if reverse else tokens), eos_id]) for tokens in nbest]
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=eos_id).to(rows.device)
    lengths = torch.tensor([len(tokens) + 1 for tokens in nbest], device=rows.device)
    # The input of a shorter sequence ends with its eos, which only padded positions see.
    log_probs = score(padded[:, :-1], lengths, rows, reverse)  # (M,L,V)
    picked = log_probs.gather(2, padded[:, 1:, None])[:, :, 0].double()  # (M,L)
    valid = torch.arange(picked.shape[1], device=rows.device) < lengths[:, None]
    return picked.masked_fill(~valid, 0.0).sum(dim=1)


def _resort(hypothesis: Hypothesis, totals: list[float], ctc_weight: float) -> Hypothesis:
    scores = [total + ctc_weight * ctc for total, ctc in zip(totals, hypothesis.nbest_scores)]
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    return _from_nbest([hypothesis.nbest[n] for n in order], [scores[n] for n in order],
                       [hypothesis.nbest_times[n] for n in order])
