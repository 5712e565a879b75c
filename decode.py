"""Searches: from CTC log-probabilities, and from attention decoders given as callables, to token sequences.

Nothing here knows the model: CTC searches take log-probabilities, attention searches a function that scores tokens.
Axes: B batch, T encoder frames, V vocabulary, N beam, K tokens that a frame offers, U tokens of a hypothesis, L = U + 1 with
the leading <sos>, P nodes of a tree of hypotheses, M all hypotheses of all utterances. Scores are natural logarithms.

Sources: CTC prefix beam search, Hannun et al. 2014 (arXiv:1408.2873), with the two prunings and the Viterbi times of
WeNet; attention rescoring, U2 (arXiv:2012.05481, section 3.3) and its right-to-left half, U2++ (arXiv:2106.05642, 3.1).
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import NamedTuple

from cli import UserError, option, options_class

import numpy as np
import torch
import torchaudio

MODES = ("ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring")
CONTEXT_MODES = ("ctc_prefix_beam_search", "attention_rescoring")  # those that can favour hotwords


@options_class
class SearchOptions:
    """How an utterance is decoded, whatever the mode; the fields are arguments of model.decode. Raises UserError."""

    beam_size: int = option(10, "hypotheses that a beam search keeps", at_least=1, at_most=100)
    chunk_size: int = option(
        -1,
        "encoder frames (40 ms each with conv2d) in a chunk; -1: full context",
        at_least=-1,
        at_most=5000,
    )
    left_chunks: int = option(
        -1, "chunks before its own that a frame sees; -1: all", at_least=-1, at_most=5000
    )
    ctc_weight: float = option(
        0.5, "weight of the CTC score in attention_rescoring", at_least=0.0, at_most=5.0
    )
    reverse_weight: float = option(
        0.3, "share of the right-to-left decoder in attention_rescoring", at_least=0.0, at_most=1.0
    )

    def __post_init__(self):
        if self.chunk_size == 0:
            raise UserError("--chunk_size 0: give at least 1 encoder frame, or -1 for full context")
        if self.left_chunks >= 0 and self.chunk_size == -1:
            raise UserError(
                f"--left_chunks {self.left_chunks} means nothing at full context; give --chunk_size too"
            )


class Hypothesis(NamedTuple):
    """What was heard in one utterance. The fields without `nbest` are those of the best hypothesis, nbest[0]."""

    tokens: list[int]
    score: float  # log-probability, or the search's weighted sum of log-probabilities; higher is better
    times: list[
        int
    ]  # encoder frame of each token; empty where the search has no alignment (attention)
    nbest: list[list[int]]  # best first
    nbest_scores: list[float]
    nbest_times: list[list[int]]


def _from_nbest(nbest: list[list[int]], scores: list[float], times: list[list[int]]) -> Hypothesis:
    return Hypothesis(nbest[0], scores[0], times[0], nbest, scores, times)


# ---------------------------------------------------------------------------------------------------------------- CTC


def ctc_greedy_search(
    log_probs: torch.Tensor, lengths: torch.Tensor, blank_id: int = 0
) -> list[Hypothesis]:
    """The best path: the likeliest token of each frame, repeats merged, blanks dropped.

    log_probs (B,T,V), lengths (B,) frames -> one Hypothesis per utterance. score is the path's log-probability, a
    token's time the frame of its run where it is likeliest. Frames beyond an utterance's length are never looked at.
    """
    best_log_probs, best_tokens = log_probs.max(dim=-1)  # (B,T) each
    rows = zip(best_log_probs.tolist(), best_tokens.tolist(), lengths.tolist())
    return [
        _collapse(row_log_probs[:length], row_tokens[:length], blank_id)
        for row_log_probs, row_tokens, length in rows
    ]


def _collapse(log_probs: list[float], path: list[int], blank_id: int) -> Hypothesis:
    tokens, times = [], []
    for token, run in groupby(range(len(path)), key=path.__getitem__):
        if token != blank_id:
            tokens.append(token)
            times.append(max(run, key=log_probs.__getitem__))
    return _from_nbest([tokens], [math.fsum(log_probs)], [times])


def blank_wins(log_probs: torch.Tensor, blank_id: int = 0) -> torch.Tensor:
    """log_probs (...,V) -> (...) bool: whether no token is likelier than the blank."""
    return log_probs[..., blank_id] >= log_probs.amax(dim=-1)


def without_text(hypothesis: Hypothesis) -> Hypothesis:
    """What is heard where the blank wins in every frame: nothing, whatever many unlikely paths add
    up to and an attention decoder makes of it. (WeNet hears words in noise there.)"""
    return _from_nbest([[]], hypothesis.nbest_scores[:1], [[]])


def align(
    hypothesis: Hypothesis, log_probs: torch.Tensor, length: int, blank_id: int = 0
) -> Hypothesis:
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
    path, scores = torchaudio.functional.forced_align(
        log_probs[None].contiguous(), targets, blank=blank_id
    )  # (1,T) each
    return _collapse(scores[0].tolist(), path[0].tolist(), blank_id).times


# The rows of Beam.prefixes and Beam.scores.
PREFIX, PARENT, LAST, STATE = range(
    4
)  # the prefix, the prefix without its last token, its last token, the context's state
# All paths; those that end in a blank, in the last token; of each the likeliest single one (Viterbi); the context's bonus.
TOTAL, BLANK, TOKEN, VITERBI_BLANK, VITERBI_TOKEN, BONUS = range(6)


class Beam(NamedTuple):
    """The N likeliest prefixes of each utterance, best first; a value: only `lists` grows, whatever is in it stays.

    Prefixes and times are linked lists and known by numbers, equal lists by the same; 0 is the empty one. N is at most
    beam_size; where an utterance has fewer prefixes, their number is -1 and their scores are nan. Viterbi is for times only.
    """

    lists: dict[int, int]  # 2**32 * number of the list without its last item + that item -> number
    context: object | None  # what favours phrases, see ctc_prefix_beam_search
    frames: int  # how many there have been
    prefixes: np.ndarray  # (4,B,N) int64
    scores: np.ndarray  # (6,B,N) float64, log-probabilities
    times: np.ndarray  # (3,B,N) int64, of Viterbi's path to a blank, to the last token, and of the latter without its last


class _Offers(NamedTuple):
    """What a frame offers, K tokens an utterance, best first."""

    tokens: np.ndarray  # (B,K) int64
    log_probs: np.ndarray  # (B,K) float64; nan for the blank
    best: np.ndarray  # (B,1) highest of them, -inf where there is none
    blank: np.ndarray  # (B,1) the blank's, -inf where it is not offered
    blank_rank: np.ndarray  # (B,1) its place in tokens, K where it is not offered


def ctc_prefix_beam_search(
    log_probs: torch.Tensor, lengths: torch.Tensor, beam_size: int, blank_id: int = 0, context=None
) -> list[Hypothesis]:
    """The likeliest token sequences, each summed over its paths, kept to `beam_size` prefixes at every frame.

    log_probs (B,T,V), lengths (B,) frames -> one Hypothesis per utterance with at most beam_size nbest. A frame offers
    only its beam_size likeliest tokens (first pruning). score is the log-probability of the sequence, exact when the
    beam holds every prefix; a token's time is the last frame of its run on the best single path.
    context, a context.ContextGraph, adds a bonus to the score of sequences with its phrases, in the search and in the result.
    The offers are found where log_probs are, the search is NumPy's on the CPU, in float64.
    """
    return prefix_result(
        prefix_advance(
            prefix_start(len(log_probs), context), log_probs, beam_size, blank_id, lengths
        )
    )


# The same search in pieces, for a stream.


def prefix_start(batch_size: int = 1, context=None) -> Beam:
    """The beam before the first frame: the empty prefix."""
    number, score = np.zeros((batch_size, 1), np.int64), np.zeros((batch_size, 1))
    impossible, none = score - math.inf, number - 2  # -2: no prefix, no token
    return Beam(
        {-1: 0},
        context,
        0,
        np.stack((number, none, none, number)),
        np.stack((score, score, impossible, score, impossible, score)),
        np.stack((number,) * 3),
    )


def prefix_advance(
    beam: Beam,
    log_probs: torch.Tensor,
    beam_size: int,
    blank_id: int = 0,
    lengths: torch.Tensor | None = None,
) -> Beam:
    """The beam after the next frames log_probs (B,T,V), of which lengths (B,) count (None: all); T may be 0."""
    with np.errstate(invalid="ignore"):  # nan is what does not exist
        for offers in _read_offers(log_probs, beam_size, blank_id, lengths):
            beam = _advance_by_blank(beam, offers, beam_size) or _advance(beam, offers, beam_size)
    return beam


def prefix_result(beam: Beam) -> list[Hypothesis]:
    """What the beam holds of each utterance, best first."""
    prefixes, totals, (_, times) = (
        beam.prefixes[PREFIX],
        beam.scores[TOTAL] + beam.scores[BONUS],
        _viterbi(beam),
    )
    if beam.context is not None:
        totals = totals - beam.context.pending(beam.prefixes[STATE])
        rows, order = np.arange(len(totals))[:, None], np.argsort(-totals, axis=1, kind="stable")
        prefixes, totals, times = prefixes[rows, order], totals[rows, order], times[rows, order]
    keys, results = list(beam.lists), []
    for row_prefixes, scores, row_times in zip(prefixes.tolist(), totals.tolist(), times.tolist()):
        # A beam wider than the number of possible sequences also holds impossible ones (log-probability -inf).
        possible = sum(score > -math.inf for score in scores) or 1
        results.append(
            _from_nbest(
                [_unlink(keys, prefix) for prefix in row_prefixes[:possible]],
                scores[:possible],
                [_unlink(keys, number) for number in row_times[:possible]],
            )
        )
    return results


def _unlink(keys: list[int], number: int) -> list[int]:
    items = []
    while number > 0:
        number, item = divmod(keys[number], 2**32)
        items.append(item)
    return items[::-1]


def _link(lists: dict[int, int], earlier: np.ndarray, items: np.ndarray) -> list[int]:
    """Numbers of the lists that continue those numbered `earlier`."""
    return [lists.setdefault(key, len(lists)) for key in (earlier * 2**32 + items).tolist()]


def _read_offers(
    log_probs: torch.Tensor, beam_size: int, blank_id: int, lengths: torch.Tensor | None
) -> Iterator[_Offers]:
    """Frame by frame. Behind its end an utterance is offered one certain blank, which changes nothing."""
    values, tokens = log_probs.topk(min(beam_size, log_probs.shape[-1]), dim=-1)  # (B,T,K) each
    both = torch.stack((tokens.double(), values.double()))  # (2,B,T,K)
    if lengths is not None:
        ended = (
            torch.arange(values.shape[1], device=values.device)
            >= lengths.to(values.device)[:, None]
        )  # (B,T)
        silence = both.new_tensor(
            [[-1.0] * values.shape[2], [-math.inf] * values.shape[2]]
        )  # (2,K), no token's offer
        silence[:, 0] = both.new_tensor([blank_id, 0.0])
        both = torch.where(ended[..., None], silence[:, None, None], both)
    tokens, values = both.detach().transpose(1, 2).cpu().numpy()  # (T,B,K) each: one transfer
    is_blank, rank = tokens == blank_id, np.arange(tokens.shape[2])
    log_probs = np.where(is_blank | (tokens < 0), math.nan, values)
    of_blank = np.where(is_blank, values, -math.inf).max(-1, keepdims=True)
    best = np.fmax.reduce(log_probs, axis=-1, keepdims=True, initial=-math.inf)
    blank_rank = np.where(is_blank, rank, len(rank)).min(-1, keepdims=True)
    return map(_Offers._make, zip(tokens.astype(np.int64), log_probs, best, of_blank, blank_rank))


def _viterbi(beam: Beam) -> tuple[np.ndarray, np.ndarray]:
    """(B,N) score and times of the best single path; the path that ends in the token wins a tie, as in WeNet."""
    blank, token = beam.scores[[VITERBI_BLANK, VITERBI_TOKEN]]
    by_blank = blank > token
    return np.where(by_blank, blank, token), np.where(by_blank, beam.times[0], beam.times[1])


def _advance_by_blank(beam: Beam, offers: _Offers, beam_size: int) -> Beam | None:
    """The beam after a frame where no utterance's offers but the blank can matter, as most frames are; else None.

    No token repeats the last of a prefix, so none enters a prefix that is there already; and no new one can push out even
    the least prefix: it scores at most what the best prefix and the best token give. All prefixes change by the same number,
    which keeps their order.
    """
    score, last = beam.scores[TOTAL], beam.prefixes[LAST]
    if (
        beam.context is not None
        or score.shape[1] < beam_size
        or (last[:, None] == offers.tokens[..., None]).any()
        or not (score[:, -1:] + offers.blank > score[:, :1] + offers.best).all()
    ):
        return None
    (viterbi, times), impossible = _viterbi(beam), np.full_like(score, -math.inf)
    score = score + offers.blank
    scores = np.array(
        (score, score, impossible, viterbi + offers.blank, impossible, beam.scores[BONUS])
    )
    return beam._replace(
        frames=beam.frames + 1,
        scores=scores,
        times=np.array((times, np.zeros_like(times), beam.times[2])),
    )


def _advance(beam: Beam, offers: _Offers, beam_size: int) -> Beam:
    """The beam after a frame: the best of the prefixes that stay and of those that an offered token extends."""
    repeats = (
        beam.prefixes[LAST][:, None] == offers.tokens[..., None]
    )  # (B,K,N): the token is the prefix's last
    viterbi, viterbi_times = _viterbi(beam)
    longer, longer_ids = _extend(beam, offers, repeats, viterbi, viterbi_times)
    stay, stay_ids, order = _stay(beam, offers, repeats, viterbi, longer, longer_ids[0])
    candidates, ids = (
        np.concatenate((few, many.reshape(*few.shape[:2], -1)), axis=2)  # (6,B,N+K*N), (2,B,N+K*N)
        for few, many in ((stay, longer), (stay_ids, longer_ids))
    )
    totals = candidates[TOTAL] + candidates[BONUS]
    best = np.lexsort((order, -totals))[:, :beam_size]  # (B,N'), nan last
    rows, (rank, source) = np.arange(len(best))[:, None], np.divmod(best, stay.shape[2])
    scores, (earlier, state) = candidates[:, rows, best], ids[:, rows, best]
    exists, extended = ~np.isnan(totals[rows, best]), rank > 0
    number, parent, last, _ = beam.prefixes[:, rows, source]
    parent, last = (
        np.where(extended, number, parent),
        np.where(extended, offers.tokens[rows, rank - 1], last),
    )
    extended &= exists
    number[extended] = _link(beam.lists, parent[extended], last[extended])
    number[~exists], parent[~exists], scores[:, ~exists] = -1, -2, math.nan
    times, entered = np.zeros_like(number), scores[VITERBI_TOKEN] > -math.inf
    times[entered] = _link(beam.lists, earlier[entered], np.array(beam.frames))
    return beam._replace(
        frames=beam.frames + 1,
        prefixes=np.array((number, parent, last, state)),
        scores=scores,
        times=np.array((viterbi_times[rows, source], times, earlier)),
    )


def _extend(
    beam: Beam, offers: _Offers, repeats: np.ndarray, viterbi: np.ndarray, viterbi_times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Every prefix with every offered token behind it: scores (6,B,K,N), nan where the token is a blank, and (2,B,K,N), times
    before this frame and states of the context. Only a blank between them makes a second, equal token."""
    score, blank, _, viterbi_blank, _, bonus = beam.scores[:, :, None]  # (B,1,N) each
    state, gain = beam.prefixes[STATE][:, None], 0.0
    if beam.context is not None:
        state, gain = beam.context.step(state, offers.tokens[..., None])  # (B,K,N) each
    scores = np.full((len(beam.scores), *repeats.shape), -math.inf)
    scores[TOTAL] = scores[TOKEN] = np.where(repeats, blank, score) + offers.log_probs[..., None]
    scores[VITERBI_TOKEN] = (
        np.where(repeats, viterbi_blank, viterbi[:, None]) + offers.log_probs[..., None]
    )
    scores[BONUS] = bonus + gain
    ids = np.empty((2, *repeats.shape), np.int64)
    ids[0], ids[1] = np.where(repeats, beam.times[0][:, None], viterbi_times[:, None]), state
    return scores, ids


def _stay(
    beam: Beam,
    offers: _Offers,
    repeats: np.ndarray,
    viterbi: np.ndarray,
    longer: np.ndarray,
    longer_times: np.ndarray,
):
    """The prefixes that stay, by a blank, by their last token or by the extension of another prefix, which is taken out of
    `longer`: scores (6,B,N), nan where no offer is one of these; (2,B,N), times before the last and states of the context; and
    the order (B,N+K*N) in which WeNet comes upon these and the longer ones, by token, then by prefix, which decides ties."""
    number, parent, *_ = beam.prefixes
    score, _, token, _, viterbi_token, bonus = beam.scores
    (_, K, N), slots = repeats.shape, np.arange(repeats.shape[2])
    rows, rank, offered = np.arange(len(repeats))[:, None], repeats.argmax(1), repeats.any(1)
    is_parent = number[:, :, None] == parent[:, None]  # (B,N,N)
    source, merges = is_parent.argmax(1), is_parent.any(1) & offered
    own = np.where(offered, offers.log_probs[rows, rank], -math.inf)
    entered = np.where(merges, longer[:, rows, rank, source], -math.inf)  # (6,B,N)
    b, n = merges.nonzero()
    longer[TOTAL, b, rank[b, n], source[b, n]] = math.nan
    blank, token, viterbi_stays = (
        score + offers.blank,
        np.logaddexp(token + own, entered[TOKEN]),
        viterbi_token + own,
    )
    score = np.where(offered | (offers.blank_rank < K), np.logaddexp(blank, token), math.nan)
    # WeNet keeps the times of a path that entered the prefix at this very frame, even if staying is likelier.
    viterbi_enters = entered[VITERBI_TOKEN]
    by_parent = (viterbi_enters > viterbi_stays) | (source < slots) & (viterbi_enters > -math.inf)
    ids = np.array(
        (np.where(by_parent, longer_times[rows, rank, source], beam.times[2]), beam.prefixes[STATE])
    )
    first = 2 * (np.minimum(offers.blank_rank, np.where(offered, rank, K)) * N + slots)
    order = np.empty((len(first), N + K * N), np.int64)
    order[:, :N] = np.minimum(first, np.where(merges, 2 * (rank * N + source) + 1, first))
    order[:, N:] = np.arange(1, 2 * K * N, 2)
    scores = np.array(
        (
            score,
            blank,
            token,
            viterbi + offers.blank,
            np.maximum(viterbi_enters, viterbi_stays),
            bonus,
        )
    )
    return scores, ids, order


# ---------------------------------------------------------------------------------------------------------- attention


def attention_beam_search(
    step,
    batch_size: int,
    max_length,
    beam_size: int,
    sos_id: int,
    eos_id: int,
    device=None,
    length_penalty: float = 0.0,
) -> list[Hypothesis]:
    """Beam search with an autoregressive decoder, all utterances and beams in one call per token.

    step(prefixes (B*N,L), state, parents (B*N,) | None) -> (log-probabilities of the next token (B*N,V), new state).
    `state` is the caller's own (None at first); parents[i] is the row of the previous call that prefix i continues, so
    that a cache can follow (None at first). Row b*N+n is beam n of utterance b. An utterance's search ends when each of its
    beams ended in eos_id, or after max_length tokens, a number for all or one for each (B,) (WeNet: the encoder frames of the
    longest utterance; here each has its own, so that neighbours change nothing). Until all have ended it stays as it is.
    score is the sum of log-probabilities over length**length_penalty; times are empty: attention has no alignment.
    """
    prefixes = torch.full((batch_size * beam_size, 1), sos_id, dtype=torch.long, device=device)
    # All beams are alike before the first token: all but one wait at -inf.
    scores = torch.full((batch_size, beam_size), -math.inf, device=device)
    scores[:, 0] = 0.0
    ended = torch.zeros(batch_size * beam_size, dtype=torch.bool, device=device)
    first_row = torch.arange(batch_size, device=device)[:, None] * beam_size  # (B,1)
    max_length = torch.as_tensor(max_length, device=device).expand(batch_size)
    over = max_length <= 0  # (B,)
    state, parents, length = None, None, 0
    while not bool(over.all()):
        log_probs, state = step(prefixes, state, parents)
        ended |= over.repeat_interleave(beam_size)
        offers, tokens = _offer(log_probs, ended, beam_size, eos_id)  # (B*N,K) each
        totals = (scores.view(-1, 1) + offers).view(batch_size, -1)  # (B,N*K)
        as_they_are = torch.arange(beam_size, device=device) * tokens.shape[1]  # (N,)
        choice = torch.where(
            over[:, None], as_they_are, totals.topk(beam_size, dim=-1).indices
        )  # (B,N)
        scores = totals.gather(1, choice)
        parents = (first_row + choice // tokens.shape[1]).view(-1)
        chosen = tokens.view(batch_size, -1).gather(1, choice).view(-1, 1)
        prefixes = torch.cat([prefixes[parents], chosen], dim=1)
        ended, length = chosen[:, 0] == eos_id, length + 1
        over = (max_length <= length) | ended.view(batch_size, -1).all(dim=1)
    return _rank(prefixes, scores, eos_id, length_penalty)


def _offer(log_probs: torch.Tensor, ended: torch.Tensor, beam_size: int, eos_id: int):
    """The likeliest next tokens (B*N,K) and their log-probabilities. An ended row offers eos at no cost, once."""
    offers, tokens = log_probs.float().topk(min(beam_size, log_probs.shape[-1]), dim=-1)
    at_no_cost = torch.full_like(offers, -math.inf)
    at_no_cost[:, 0] = 0.0
    return torch.where(ended[:, None], at_no_cost, offers), tokens.masked_fill(
        ended[:, None], eos_id
    )


def _rank(
    prefixes: torch.Tensor, scores: torch.Tensor, eos_id: int, length_penalty: float
) -> list[Hypothesis]:
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


class Tree(NamedTuple):
    """The hypotheses of each utterance as a tree of P nodes: what they begin with in common is there once.

    The first node is <sos>; those behind an utterance's last are <eos> and see themselves only.
    """

    tokens: torch.Tensor  # (B,P)
    positions: torch.Tensor  # (B,P) of the token in its hypotheses, that of <sos> being 0
    sees: torch.Tensor  # (B,P,P) bool: itself and what leads to it


def attention_rescoring(
    hypotheses: list[Hypothesis],
    score,
    sos_id: int,
    eos_id: int,
    ctc_weight: float = 0.5,
    reverse_weight: float = 0.3,
    device=None,
) -> list[Hypothesis]:
    """Sorts each utterance's CTC n-best anew by what the attention decoders think of them.

    score(tree, reverse: bool) -> log-probabilities (B,P,V) of the token behind each node of a Tree: teacher forcing, with the
    hypotheses reversed for the right-to-left decoder. Called once per direction (once in all if reverse_weight is 0).
    A score is (1 - reverse_weight) left-to-right + reverse_weight right-to-left + ctc_weight CTC, each a sum of
    log-probabilities, the decoders' with eos. Times are those of the CTC search.
    """
    nbests = [hypothesis.nbest for hypothesis in hypotheses]
    totals = _teacher_forced(nbests, partial(score, reverse=False), sos_id, eos_id, device)
    if reverse_weight > 0:
        nbests = [[tokens[::-1] for tokens in nbest] for nbest in nbests]
        backward = _teacher_forced(nbests, partial(score, reverse=True), sos_id, eos_id, device)
        totals = (1 - reverse_weight) * totals + reverse_weight * backward
    return [
        _resort(hypothesis, row_totals.tolist(), ctc_weight)
        for hypothesis, row_totals in zip(
            hypotheses, totals.split([len(nbest) for nbest in nbests])
        )
    ]


def _teacher_forced(
    nbests: list[list[list[int]]], score, sos_id: int, eos_id: int, device
) -> torch.Tensor:
    """Sum of the decoder's log-probabilities of each sequence and its eos: (M,) float64 on the CPU."""
    tree, paths = _make_tree(nbests, sos_id, eos_id)
    log_probs = score(Tree(*(part.to(device) for part in tree)))  # (B,P,V)
    steps = [
        (row, node, token)
        for row, (nbest, row_paths) in enumerate(zip(nbests, paths))
        for tokens, path in zip(nbest, row_paths)
        for node, token in zip(path, [*tokens, eos_id])
    ]
    picked = log_probs[tuple(torch.tensor(steps, device=device).T)].double().cpu()
    return torch.stack(
        [
            part.sum()
            for part in picked.split([len(path) for row_paths in paths for path in row_paths])
        ]
    )


def _make_tree(
    nbests: list[list[list[int]]], sos_id: int, eos_id: int
) -> tuple[Tree, list[list[list[int]]]]:
    """The tree, and of each sequence of each utterance the nodes, from that of <sos> on."""
    nodes, paths = zip(*map(_grow, nbests))
    batch_size, size = len(nbests), 1 + max(map(len, nodes))
    tokens, positions = np.full((batch_size, size), eos_id), np.zeros((batch_size, size), np.int64)
    sees = np.eye(size, dtype=bool)[None].repeat(batch_size, axis=0)
    for row, row_paths in enumerate(paths):
        tokens[row, : 1 + len(nodes[row])] = [sos_id, *(token for _, token in nodes[row])]
        for path in row_paths:
            positions[row, path] = np.arange(len(path))
            sees[row][np.ix_(path, path)] = np.tri(len(path), dtype=bool)
    return Tree(*map(torch.from_numpy, (tokens, positions, sees))), paths


def _grow(nbest: list[list[int]]) -> tuple[dict[tuple[int, int], int], list[list[int]]]:
    """({(node before, token): node}, the nodes of each sequence, from 0 for <sos> on)."""
    nodes, paths = {}, []
    for tokens in nbest:
        path = [0]
        for token in tokens:
            path.append(nodes.setdefault((path[-1], token), len(nodes) + 1))
        paths.append(path)
    return nodes, paths


def _resort(hypothesis: Hypothesis, totals: list[float], ctc_weight: float) -> Hypothesis:
    scores = [total + ctc_weight * ctc for total, ctc in zip(totals, hypothesis.nbest_scores)]
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    return _from_nbest(
        [hypothesis.nbest[n] for n in order],
        [scores[n] for n in order],
        [hypothesis.nbest_times[n] for n in order],
    )
