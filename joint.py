"""Searches by CTC and an attention decoder in one pass, which score every hypothesis together.

Axes are those of decode.py: B batch, T encoder frames, V vocabulary, N beam, L = U + 1 tokens of a
hypothesis with the leading <sos>, M hypotheses of all utterances that go on.

Sources: Hori et al. 2017 (arXiv:1706.02737, section 2.3) and Watanabe et al. 2017 (hybrid
CTC/attention, doi:10.1109/JSTSP.2017.2763455), whose algorithm 2 sums the CTC paths token by token.
ESPnet lets the decoder choose 1.5 beams of tokens and gives these alone a CTC score, by a loop over
the frames. Here all tokens get one, by a product of matrices, and scans take the place of loops.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from decode import Hypothesis, SearchOptions, Turns, rank_beams, read, silence
from frames import to_device, valid_mask

# A probability of 0 would be -inf, and the sums of a scan would subtract it from itself. So it
# counts as ZERO, and what stays below LEAST is impossible.
ZERO = -1e7
LEAST = -1e6


class Frames(NamedTuple):
    """Holds what CTC says in each frame. Behind an utterance's end come certain blanks."""

    log_probs: torch.Tensor  # (B,T,V)
    probs: torch.Tensor  # (B,T,V) float64
    blank_id: int


class Paths(NamedTuple):
    """Sums the CTC paths by which a hypothesis is written in the first t = 0 .. T frames.

    Log-probabilities (B,N,T+1), float64: paths that end in the hypothesis's last token, and in a
    blank.
    """

    token: torch.Tensor
    blank: torch.Tensor

    @property
    def all(self) -> torch.Tensor:
        return torch.logaddexp(self.token, self.blank)


def read_frames(log_probs: torch.Tensor, lengths: torch.Tensor, blank_id: int) -> Frames:
    """Makes Frames of log_probs (B,T,V), of which the first lengths (B,) frames count."""
    log_probs = silence(log_probs, ~valid_mask(lengths, log_probs.shape[1]), blank_id)
    return Frames(log_probs, log_probs.double().exp(), blank_id)


def first_paths(frames: Frames) -> Paths:
    """Sums the paths of the empty hypothesis, (B,1,T+1), which have blanks alone."""
    blank = F.pad(frames.log_probs[:, None, :, frames.blank_id].double().cumsum(-1), (1, 0))
    return Paths(torch.full_like(blank, -math.inf), blank)


def columns(frames: Frames, tokens: torch.Tensor) -> torch.Tensor:
    """Picks the log-probabilities (B,N,T), float64, of each hypothesis's token (B,N)."""
    index = tokens[:, None].expand(-1, frames.log_probs.shape[1], -1)
    return frames.log_probs.gather(2, index).transpose(1, 2).double()


def next_scores(frames: Frames, paths: Paths, last: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Gives the CTC log-probability (B,N,V) of each hypothesis with each token behind it.

    `last` (B,N) are the last tokens. A longer hypothesis has its prefix probability: that of all
    sequences that begin with it. With eos it has its probability as a whole sequence; with the
    blank none. A hypothesis becomes longer in exactly one frame, so the prefix probability is a sum
    over frames: of the paths to the hypothesis before the frame, times the token in the frame.
    """
    before = paths.all[..., :-1]  # (B,N,T)
    most = before.amax(-1, keepdim=True)
    most = most.masked_fill(most == -math.inf, 0.0)
    scores = ((before - most).exp() @ frames.probs).log() + most  # (B,N,V)
    # A token that repeats the last one is a second token behind a blank only.
    again = (paths.blank[..., :-1] + columns(frames, last)).logsumexp(-1, keepdim=True)
    scores = scores.scatter(2, last[..., None], again)
    scores[..., frames.blank_id] = -math.inf
    scores[..., eos_id] = paths.all[..., -1]
    return scores


def advance(
    frames: Frames, paths: Paths, last: torch.Tensor, parents: torch.Tensor, tokens: torch.Tensor
) -> Paths:
    """Sums the paths of new hypotheses: hypothesis parents (B,N) with the token (B,N) behind it."""
    index = parents[..., None].expand(-1, -1, paths.token.shape[2])
    token, blank = (part.gather(1, index) for part in paths)
    repeats = (tokens == last.gather(1, parents))[..., None]
    before = torch.where(repeats, blank, torch.logaddexp(token, blank))
    token = scan(before[..., :-1], columns(frames, tokens))
    of_blank = frames.log_probs[:, None, :, frames.blank_id].double()
    return Paths(token, scan(token[..., :-1], of_blank))


def scan(entering: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Sums the paths that enter a symbol in some frame and stay in it up to each later frame.

    entering (...,T) are paths before each frame, log_probs (...,T) those of the symbol; both
    broadcast -> (...,T+1), with no path before the first frame. It is the recursion
    paths[t + 1] = (paths[t] + entering[t]) * probability[t] without a loop: divided by the product
    of the probabilities so far, a path keeps its value in all later frames.
    """
    products = log_probs.clamp(min=ZERO).cumsum(-1)
    sums = products + (entering - F.pad(products[..., :-1], (1, 0))).logcumsumexp(-1)
    return F.pad(sums.masked_fill(sums < LEAST, -math.inf), (1, 0), value=-math.inf)


class _Beam(NamedTuple):
    """Holds the N best hypotheses of each utterance.

    With a context there are 2 N: the N best that have ended, then the N best that go on. A context
    may add more than the next words cost, so those that have ended must not take others' places.
    """

    prefixes: torch.Tensor  # (B,N,L)
    scores: torch.Tensor  # (B,N) float64, the weighted sum
    written: torch.Tensor  # (B,N) float64, the decoder's part
    ended: torch.Tensor  # (B,N) bool: the hypothesis stays as it is
    parents: torch.Tensor | None  # (B,N) place in the beam before of what a hypothesis continues
    earned: torch.Tensor  # (B,N) float64, the context's part
    states: np.ndarray  # (B,N) int64, the context's states


def joint_beam_search(
    step,
    log_probs: torch.Tensor,
    lengths: torch.Tensor,
    search: SearchOptions,
    blank_id: int,
    sos_id: int,
    eos_id: int,
    context=None,
) -> tuple[list[Hypothesis], list[list[float]]]:
    """Finds what CTC and the decoder together find likeliest; for each also the score without it.

    log_probs (B,T,V) of CTC, lengths (B,) frames. step(prefixes (M,L), state, parents (M,) | None,
    utterances (M,)) -> (log-probabilities of the next token (M,V), new state), as for
    decode.attention_beam_search, except that the rows are only those hypotheses that go on, ordered
    by utterance. The score is joint_ctc_weight * CTC + (1 - joint_ctc_weight) * decoder, sums of
    log-probabilities, CTC's those of next_scores, plus what `context` adds, as in
    decode.ctc_prefix_beam_search. What has no weight is not computed, so weight 0 is attention
    search. An utterance ends when all its beams have ended, in eos or with as many tokens as
    frames. Without a context no score ever grows, so no hypothesis that was left could come to be
    better than these; with one, _drop_hopeless ends them. Times are empty.
    """
    size = search.beam_size * (1 if context is None else 2)
    beam = _first_beam(lengths, size, sos_id)
    frames = paths = None
    if search.joint_ctc_weight > 0:
        frames = read_frames(log_probs, lengths, blank_id)
        paths = Paths(*(part.expand(-1, size, -1) for part in first_paths(frames)))
    asked = None
    left = lengths
    while not bool(beam.ended.all()):
        left = left - 1
        written = beam.written[..., None]
        totals = 0.0
        if search.joint_ctc_weight < 1:
            following, asked = _ask(step, beam, asked, log_probs.shape[2])
            written = written + following  # (B,N,V)
            totals = (1 - search.joint_ctc_weight) * written
        last = beam.prefixes[..., -1]
        if frames is not None:
            scores = next_scores(frames, paths, last, eos_id)
            totals = totals + search.joint_ctc_weight * scores
        beam = _choose(beam, totals, written, eos_id, left, context)
        if frames is not None:
            paths = advance(frames, paths, last, beam.parents, beam.prefixes[..., -1])
    return _results(beam, search, eos_id)


def joint_rescoring(
    hypotheses: list[Hypothesis], others: list[list[float]], rescore, search: SearchOptions
) -> Turns:
    """Sorts what joint_beam_search has found by the attention decoders of both directions.

    In the scores, (1 - reverse_weight) left-to-right + reverse_weight right-to-left takes the place
    of the decoder; `others` are the scores without it. rescore(hypotheses, search) is
    decode.attention_rescoring, which adds ctc_weight times the scores to the decoders'.
    """
    share = 1 - search.joint_ctc_weight
    alone = [
        hypothesis._replace(nbest_scores=[score / share for score in scores])
        for hypothesis, scores in zip(hypotheses, others)
    ]
    found = yield from rescore(alone, replace(search, ctc_weight=1.0))
    return [
        row._replace(score=share * row.score, nbest_scores=[share * s for s in row.nbest_scores])
        for row in found
    ]


def _first_beam(lengths: torch.Tensor, beam_size: int, sos_id: int) -> _Beam:
    """Makes the beam before the first token: all hypotheses are alike, and all but one at -inf."""
    shape = len(lengths), beam_size
    scores = torch.full(shape, -math.inf, dtype=torch.float64, device=lengths.device)
    scores[:, 0] = 0.0
    ended = (scores == -math.inf) | (lengths <= 0)[:, None]
    prefixes = torch.full((*shape, 1), sos_id, device=lengths.device)
    zeros = torch.zeros_like(scores)
    return _Beam(prefixes, scores, zeros, ended, None, zeros, np.zeros(shape, np.int64))


def _choose(
    beam: _Beam,
    totals: torch.Tensor,
    written: torch.Tensor,
    eos_id: int,
    left: torch.Tensor,
    context,
) -> _Beam:
    """Keeps the best of totals (B,N,V), to which the context's part is added here.

    `written` (B,N,V or 1) is the decoder's part, `left` (B,) how many tokens may come behind these.
    """
    if context is None:
        return _keep(beam, totals, written, eos_id, left <= 0, 1)[0]
    earned = _favour(context, beam, totals.shape[2], eos_id, left <= 0)
    before = beam.states
    beam, choice = _keep(beam, totals + earned, written, eos_id, left <= 0, 2)
    parents, tokens, left = read(beam.parents, beam.prefixes[..., -1], left[:, None])
    states, _ = context.step(np.take_along_axis(before, parents.numpy(), 1), tokens.numpy())
    hope = torch.from_numpy(context.hope(states, left.numpy()))
    beam = beam._replace(earned=earned.flatten(1).gather(1, choice), states=states)
    return _drop_hopeless(beam, to_device(hope, totals.device))


def _keep(
    beam: _Beam,
    totals: torch.Tensor,
    written: torch.Tensor,
    eos_id: int,
    over: torch.Tensor,
    kinds: int,
) -> tuple[_Beam, torch.Tensor]:
    """Keeps the N best of totals (B,N,V), and gives their places (B,N) among the N*V, too.

    A hypothesis that has ended only offers eos, at no cost. In the rows `over` (B,) all end. Of 2
    kinds, one ends in eos, and the other does not; each gets half of the N.
    """
    is_eos = torch.arange(totals.shape[2], device=totals.device) == eos_id
    as_they_are = torch.where(is_eos, beam.scores[..., None], -math.inf)
    totals = torch.where(beam.ended[..., None], as_they_are, totals)
    offers = [totals]
    if kinds == 2:
        offers = [totals.masked_fill(others, -math.inf) for others in (~is_eos, is_eos)]
    size = beam.scores.shape[1] // kinds
    best = (offer.flatten(1).topk(size, dim=-1) for offer in offers)
    scores, choice = (torch.cat(part, dim=1) for part in zip(*best))  # (B,N) each
    parents = choice // totals.shape[2]
    tokens = choice % totals.shape[2]
    before = beam.prefixes.gather(1, parents[..., None].expand_as(beam.prefixes))
    beam = beam._replace(
        prefixes=torch.cat((before, tokens[..., None]), dim=2),
        scores=scores,
        written=written.expand_as(totals).flatten(1).gather(1, choice),
        ended=(tokens == eos_id) | (scores == -math.inf) | over[:, None],
        parents=parents,
    )
    return beam, choice


def _favour(context, beam: _Beam, vocabulary: int, eos_id: int, over: torch.Tensor) -> torch.Tensor:
    """Asks the context for its part (B,N,V) of the scores with each next token.

    Where a hypothesis ends, in eos or in the rows `over` (B,), what is pending is taken back. The
    context is asked for hypotheses that go on; the others keep what they have.
    """
    goes_on, over = (part.numpy() for part in read(~beam.ended, over[:, None] & ~beam.ended))
    states = beam.states[goes_on]  # (M,)
    behind, gains = context.step(states[:, None], np.arange(vocabulary))  # (M,V) each
    last = over[goes_on]
    gains[last] -= context.pending(behind[last])
    gains[:, eos_id] = -context.pending(states)
    earned = beam.earned[..., None].repeat(1, 1, vocabulary)
    earned[~beam.ended] += to_device(torch.from_numpy(gains), earned.device)
    return earned


def _results(
    beam: _Beam, search: SearchOptions, eos_id: int
) -> tuple[list[Hypothesis], list[list[float]]]:
    """Lists the beam_size best hypotheses, and their scores without the decoder's part."""
    order = beam.scores.argsort(stable=True, dim=-1, descending=True)[:, : search.beam_size]
    prefixes = beam.prefixes.gather(1, order[..., None].expand(-1, -1, beam.prefixes.shape[2]))
    scores, written = (part.gather(1, order) for part in (beam.scores, beam.written))
    others = scores - (1 - search.joint_ctc_weight) * written
    return rank_beams(prefixes.flatten(0, 1), scores, eos_id), others.tolist()


def _drop_hopeless(beam: _Beam, hope: torch.Tensor) -> _Beam:
    """Drops the hypotheses that go on but will not come to be among the N best that have ended.

    hope (B,2*N) is the most that a context may add to the score of each; nothing else adds.
    """
    worst = beam.scores[:, beam.scores.shape[1] // 2 - 1, None]
    hopeless = ~beam.ended & (beam.scores + hope < worst)
    scores = beam.scores.masked_fill(hopeless, -math.inf)
    return beam._replace(scores=scores, ended=beam.ended | hopeless)


def _ask(step, beam: _Beam, asked, vocabulary: int):
    """Asks the decoder for the next tokens (B,N,V) of the hypotheses that go on; 0 for the others.

    `asked` is what this function has returned besides: the decoder's state, and the rows of the
    last call among all B*N.
    """
    rows = (~beam.ended).view(-1).nonzero()[:, 0]  # (M,)
    size = beam.ended.shape[1]
    state = parents = None
    if asked:
        state, before = asked
        places = torch.zeros_like(beam.ended.view(-1), dtype=torch.long)
        places[before] = torch.arange(len(before), device=before.device)
        parents = places[rows // size * size + beam.parents.view(-1)[rows]]
    prefixes = beam.prefixes.flatten(0, 1)[rows]
    log_probs, state = step(prefixes, state, parents, rows // size)
    following = log_probs.new_zeros(beam.ended.numel(), vocabulary, dtype=torch.float64)
    following[rows] = log_probs.double()
    return following.view(*beam.ended.shape, vocabulary), (state, rows)
