"""Searches for token sequences: in CTC log-probabilities, and with attention decoders.

Nothing here knows the model: a CTC search takes log-probabilities, an attention search takes a
function that scores tokens. Axes: B batch, T encoder frames, V vocabulary, N beam, K tokens that a
frame offers, U tokens of a hypothesis, L = U + 1 with the leading <sos>, P nodes of a tree of
hypotheses, M all hypotheses of all utterances. Scores are natural logarithms.

Sources: CTC prefix beam search, Hannun et al. 2014 (arXiv:1408.2873), with WeNet's two prunings
and Viterbi times; attention rescoring, U2 (arXiv:2012.05481, section 3.3) and its right-to-left
half, U2++ (arXiv:2106.05642, 3.1).

What runs on a GPU and what runs on the CPU take turns. A search in turns is a generator (Turns): it
yields the tensors that it has to read, and goes on when it is sent copies of them on the CPU. So
`answered` runs one search to its end, and `overlapped` lets the GPU compute for several meanwhile.
"""

import math
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

from cli import UserError, option, options_class

import numpy as np
import torch
import torchaudio

from frames import to_device

MODES = ("ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring", "joint")
GRAPH_MODES = ("ctc_prefix_beam_search", "attention_rescoring")  # those that can search a graph
CONTEXT_MODES = (*GRAPH_MODES, "joint")  # those that can favour hotwords or a language model
STREAM_MODES = ("attention_rescoring", "joint")  # those that a stream's second pass can take


def check_mode(mode: str, context=None) -> None:
    """Raises UserError for a mode that is none of MODES, or that is not for the context."""
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if mode not in (modes := modes_for(context)):
        what = "hotwords or a language model" if modes == CONTEXT_MODES else "a graph"
        raise UserError(f"mode {mode} cannot favour {what}; choose one of {', '.join(modes)}")


def modes_for(context) -> tuple[str, ...]:
    """Lists the modes that a context may go with; `step` sets an automaton apart from a graph."""
    if context is None:
        return MODES
    return CONTEXT_MODES if hasattr(context, "step") else GRAPH_MODES


@options_class
class SearchOptions:
    """How an utterance is decoded, in any mode; model.decode takes the fields as keywords.

    A new option needs a field here and its use below, because the code in between hands the
    options on whole. Raises UserError.
    """

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
        0.3,
        "share of the right-to-left decoder in attention_rescoring and joint",
        at_least=0.0,
        at_most=1.0,
    )
    joint_ctc_weight: float = option(
        0.75, "share of the CTC score in mode joint", at_least=0.0, at_most=1.0
    )
    length_penalty: float = option(
        0.0,
        "in mode attention: a score is divided by its number of tokens to this power; above 0 "
        "favours long hypotheses",
        at_least=0.0,
        at_most=5.0,
    )

    def __post_init__(self):
        if self.chunk_size == 0:
            raise UserError("--chunk_size 0: give at least 1 encoder frame, or -1 for full context")
        if self.left_chunks >= 0 and self.chunk_size == -1:
            raise UserError(
                f"--left_chunks {self.left_chunks} means nothing at full context; give "
                "--chunk_size too"
            )


# The modes that use an option which not all use.
USED_IN = {
    "beam_size": MODES[1:],
    "ctc_weight": ("attention_rescoring",),
    "reverse_weight": ("attention_rescoring", "joint"),
    "joint_ctc_weight": ("joint",),
    "length_penalty": ("attention",),
}


def check_used(given: dict, modes: tuple[str, ...]) -> None:
    """Raises UserError for an option that was given although none of the modes uses it."""
    for name, users in USED_IN.items():
        if name in given and not set(modes) & set(users):
            raise UserError(f"--{name} has no effect on --mode {modes[0]}; leave one of them out")


class Hypothesis(NamedTuple):
    """Holds one utterance's results. `tokens`, `score` and `times` are those of nbest[0]."""

    tokens: list[int]
    score: float  # log-probability, or the search's weighted sum of them; higher is better
    times: list[int]  # encoder frame of each token; empty where a search has none (attention)
    nbest: list[list[int]]  # best first
    nbest_scores: list[float]
    nbest_times: list[list[int]]


def _from_nbest(nbest: list[list[int]], scores: list[float], times: list[list[int]]) -> Hypothesis:
    return Hypothesis(nbest[0], scores[0], times[0], nbest, scores, times)


# ---- Turns of the device and the CPU

# A search in turns: it yields tensors of the device, is sent copies of them, and returns a result.
Turns = Generator[tuple[torch.Tensor, ...], list[torch.Tensor], object]


def fetch(parts: tuple[torch.Tensor, ...]) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
    """Begins to copy tensors to the CPU -> the copies, and the event by which a GPU has made them.

    Without a GPU the copies are there at once, and the event is None.
    """
    on_gpu = parts[0].is_cuda
    copies = [part.detach().to("cpu", non_blocking=on_gpu) for part in parts]
    stream = torch.cuda.current_stream(parts[0].device) if on_gpu else None
    return copies, stream and stream.record_event()


def read(*parts: torch.Tensor) -> list[torch.Tensor]:
    """Copies tensors to the CPU, all of them for one wait."""
    copies, event = fetch(parts)
    if event is not None:
        event.synchronize()
    return copies


class _Turn:
    """Runs a search in turns. State: what it has asked for, and its result once it is `over`."""

    def __init__(self, search: Turns):
        self.search = search
        self.over = False
        self.result = None
        self._go_on(None)

    def take(self, wait: bool = True) -> None:
        """Takes the turns up to one whose tensors have to be waited for.

        With `wait` the first turn is waited for.
        """
        while not self.over and (wait or self.event is None):
            if self.event is not None:
                self.event.synchronize()
            self._go_on(self.copies)
            wait = False

    def _go_on(self, copies: list[torch.Tensor] | None) -> None:
        try:
            self.copies, self.event = fetch(self.search.send(copies))
        except StopIteration as stop:
            self.over = True
            self.result = stop.value


def answered(search: Turns):
    """Runs a search in turns to its end -> what it returns."""
    turn = _Turn(search)
    while not turn.over:
        turn.take()
    return turn.result


def overlapped(searches: Iterable[Turns]) -> Iterator:
    """Runs searches in turns, and yields what they return, in their order.

    While a GPU computes for the newest search, the older ones take one turn each, and the next
    search is begun. So the CPU rarely waits, and as many searches are under way as one has turns.
    On a CPU each search ends before the next one begins.
    """
    running = deque()
    for search in searches:
        turn = _Turn(search)
        turn.take(wait=False)
        for older in running:
            older.take()
        running.append(turn)
        while running and running[0].over:
            yield running.popleft().result
    for turn in running:
        while not turn.over:
            turn.take()
        yield turn.result


# ---- CTC prefix beam search: the plain definition


@dataclass
class _Paths:
    """Holds two kinds of CTC paths to a prefix: to a blank, and to the prefix's last token.

    Each kind has the log-probability of all its paths, the log-probability of its likeliest single
    path (Viterbi), and the frames at which this path has the prefix's tokens.
    """

    blank: float = -math.inf
    token: float = -math.inf
    viterbi_blank: float = -math.inf
    viterbi_token: float = -math.inf
    times_blank: tuple[int, ...] = ()
    times_token: tuple[int, ...] = ()

    @property
    def total(self) -> float:
        return _log_add(self.blank, self.token)

    @property
    def viterbi(self) -> tuple[float, tuple[int, ...]]:
        """Finds the likeliest path's log-probability and times; in a tie, token wins (WeNet)."""
        if self.viterbi_blank > self.viterbi_token:
            return self.viterbi_blank, self.times_blank
        return self.viterbi_token, self.times_token


def _log_add(a: float, b: float) -> float:
    """Computes log(exp(a) + exp(b)), rounded as NumPy's logaddexp."""
    return max(a, b) if min(a, b) == -math.inf else max(a, b) + math.log1p(math.exp(-abs(a - b)))


def plain_prefix_beam_search(
    log_probs: torch.Tensor, beam_size: int, blank_id: int = 0
) -> Hypothesis:
    """Searches one utterance (T,V) by CTC prefix beam search, prefix by prefix in WeNet's order.

    This function is the definition: ctc_prefix_beam_search finds the same for a whole batch, to the
    bit and with ties in the same order. Read this function to know the search.
    """
    beam = {(): _Paths(blank=0.0, viterbi_blank=0.0)}
    for frame, row in enumerate(log_probs):
        reached = defaultdict(_Paths)
        for log_prob, token in zip(*(part.tolist() for part in row.topk(min(beam_size, len(row))))):
            for prefix, paths in beam.items():
                total = paths.total
                viterbi, times = paths.viterbi
                if token == blank_id:  # The prefix stays.
                    same = reached[prefix]
                    same.blank = _log_add(same.blank, total + log_prob)
                    same.viterbi_blank = viterbi + log_prob
                    same.times_blank = times
                    continue
                if prefix[-1:] == (token,):  # The last token goes on: the prefix stays.
                    same = reached[prefix]
                    same.token = _log_add(same.token, paths.token + log_prob)
                    if same.viterbi_token < paths.viterbi_token + log_prob:
                        same.viterbi_token = paths.viterbi_token + log_prob
                        # WeNet keeps the times of a path that entered the prefix in this frame.
                        same.times_token = same.times_token or (*paths.times_token[:-1], frame)
                    # Only paths with a blank in between get a second, equal token.
                    total = paths.blank
                    viterbi = paths.viterbi_blank
                    times = paths.times_blank
                longer = reached[*prefix, token]
                longer.token = _log_add(longer.token, total + log_prob)
                if longer.viterbi_token < viterbi + log_prob:
                    longer.viterbi_token = viterbi + log_prob
                    longer.times_token = (*times, frame)
        best = sorted(reached.items(), key=lambda item: item[1].total, reverse=True)
        beam = dict(best[:beam_size])
    # A beam wider than the number of possible sequences also holds impossible ones.
    found = [item for item in beam.items() if item[1].total > -math.inf] or list(beam.items())[:1]
    return _from_nbest(
        [list(prefix) for prefix, _ in found],
        [paths.total for _, paths in found],
        [list(paths.viterbi[1]) for _, paths in found],
    )


# ---- CTC prefix beam search: the same for a batch

# Rows of Beam.numbers: the prefix, the prefix without its last token, its last token, and the state
# of the context (hotwords); then the times of the likeliest path to a blank, of the likeliest path
# to the last token, and of the latter path without its last time.
PREFIX, PARENT, LAST, STATE, TIMES_BLANK, TIMES_TOKEN, TIMES_BEFORE = range(7)
# Rows of Beam.scores, as in _Paths: all paths; those to a blank; those to the last token; the
# likeliest one to a blank; the likeliest one to the last token; and the bonus of the context.
TOTAL, BLANK, TOKEN, VITERBI_BLANK, VITERBI_TOKEN, BONUS = range(6)


class Beam(NamedTuple):
    """Holds the N likeliest prefixes of each utterance, best first, for the next frame.

    A beam is a value. Prefixes and times are linked lists. Each list is known by its number, equal
    lists have the same number, and the empty list has 0. N is at most beam_size. Where an utterance
    has fewer prefixes, the prefix's number is -1 and its scores are nan.
    """

    lists: dict[int, int]  # 2**32 * number of the list without its last item + that item -> number
    context: object | None  # the automaton of context.py (hotwords) or of ngram.py (words)
    frames: int  # how many have been searched
    numbers: np.ndarray  # (7,B,N) int64
    scores: np.ndarray  # (6,B,N) float64


class _Offers(NamedTuple):
    """Holds the K likeliest tokens of a frame for each utterance, best first."""

    tokens: np.ndarray  # (B,K) int64
    log_probs: np.ndarray  # (B,K) float64; nan for the blank
    best: np.ndarray  # (B,1) log-probability of the likeliest token, -inf where there is none
    blank: np.ndarray  # (B,1) log-probability of the blank, -inf where it is not offered
    blank_rank: np.ndarray  # (B,1) the blank's place in tokens, K where it is not offered


class _Entries(NamedTuple):
    """Tells how a prefix's last token leads again to the prefix, for all prefixes (B,N).

    Either the token goes on, or it extends the prefix's parent, if the parent is in the beam, too.
    """

    offered: np.ndarray  # bool: the frame offers the prefix's last token
    rank: np.ndarray  # the token's place among the offers, where it is offered
    source: np.ndarray  # the parent's place in the beam, where the parent is in it
    merges: np.ndarray  # bool: the token is offered and the parent is in the beam


class _Candidates(NamedTuple):
    """Holds prefixes for the next beam, in Beam's rows; `...` is (N,), for longer ones (K,N)."""

    numbers: np.ndarray  # (7,B,...); PREFIX is -1 and TIMES_TOKEN 0 where there is no number yet
    scores: np.ndarray  # (6,B,...); TOTAL is nan where there is no such prefix


def ctc_prefix_beam_search(
    log_probs: torch.Tensor,
    lengths: torch.Tensor,
    search: SearchOptions,
    blank_id: int = 0,
    context=None,
) -> list[Hypothesis]:
    """Finds the likeliest token sequences; a sequence has the probability of all its paths.

    log_probs (B,T,V), lengths (B,) frames -> one Hypothesis per utterance, with at most
    search.beam_size nbest. A frame offers only its beam_size likeliest tokens (first pruning), and
    only the beam_size likeliest prefixes go on (second pruning). A score is the log-probability of
    the sequence, exact when the beam holds every prefix; a token's time is the last frame of its
    run on the likeliest single path. `context`, a context.ContextGraph or ngram.LanguageModel, adds
    a bonus to the scores of what it favours, in the search and in the result. The offers are found
    on the device of log_probs; the search runs in NumPy on the CPU, in float64.
    """
    beam = prefix_start(len(log_probs), context)
    return prefix_result(prefix_advance(beam, log_probs, search, blank_id, lengths))


def prefix_start(batch_size: int = 1, context=None) -> Beam:
    """Makes the beam before the first frame, which holds the empty prefix."""
    numbers = np.zeros((7, batch_size, 1), np.int64)
    numbers[[PARENT, LAST]] = -2  # no prefix and no token has this number
    scores = np.zeros((6, batch_size, 1))
    scores[[TOKEN, VITERBI_TOKEN]] = -math.inf
    return Beam(lists={-1: 0}, context=context, frames=0, numbers=numbers, scores=scores)


def prefix_advance(
    beam: Beam,
    log_probs: torch.Tensor,
    search: SearchOptions,
    blank_id: int = 0,
    lengths: torch.Tensor | None = None,
) -> Beam:
    """Searches the next frames, log_probs (B,T,V) with T >= 0, and returns the beam after them.

    Of each utterance the first lengths (B,) frames count; all frames where lengths is None.
    """
    offers = find_offers(log_probs, search, blank_id, lengths)
    return prefix_follow(beam, offers.cpu(), search, blank_id)


def prefix_follow(
    beam: Beam, offers: torch.Tensor, search: SearchOptions, blank_id: int = 0
) -> Beam:
    """Does what prefix_advance does, with the frames' offers of find_offers, on the CPU."""
    size = search.beam_size
    beam = beam._replace(lists=dict(beam.lists))  # The frames below add to it.
    with np.errstate(invalid="ignore"):  # nan stands for what does not exist
        for offered in _read_offers(offers, blank_id):
            beam = _advance_by_blank(beam, offered, size) or _advance(beam, offered, size)
    return beam


def prefix_result(beam: Beam) -> list[Hypothesis]:
    """Lists the beam's hypotheses of each utterance, best first."""
    prefixes = beam.numbers[PREFIX]
    totals = beam.scores[TOTAL] + beam.scores[BONUS]
    _, times = _viterbi(beam)
    if beam.context is not None:
        totals = totals - beam.context.pending(beam.numbers[STATE])
        rows = np.arange(len(totals))[:, None]
        order = np.argsort(-totals, axis=1, kind="stable")
        prefixes, totals, times = (part[rows, order] for part in (prefixes, totals, times))
    keys = list(beam.lists)
    results = []
    for row_prefixes, scores, row_times in zip(prefixes.tolist(), totals.tolist(), times.tolist()):
        # A beam wider than the number of possible sequences also holds impossible ones, at -inf.
        possible = sum(score > -math.inf for score in scores) or 1
        nbest = [_unlink(keys, number) for number in row_prefixes[:possible]]
        nbest_times = [_unlink(keys, number) for number in row_times[:possible]]
        results.append(_from_nbest(nbest, scores[:possible], nbest_times))
    return results


def _unlink(keys: list[int], number: int) -> list[int]:
    """Reads the items of the list with this number."""
    items = []
    while number > 0:
        number, item = divmod(keys[number], 2**32)
        items.append(item)
    return items[::-1]


def _link(lists: dict[int, int], earlier: np.ndarray, items: np.ndarray) -> list[int]:
    """Puts `items` behind the lists with the numbers `earlier` -> the numbers of the new lists."""
    return [lists.setdefault(key, len(lists)) for key in (earlier * 2**32 + items).tolist()]


def find_offers(
    log_probs: torch.Tensor,
    search: SearchOptions,
    blank_id: int = 0,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Finds the K likeliest tokens of each frame, and their log-probabilities: (2,T,B,K) float64.

    They are all that prefix beam search reads, and are found where log_probs (B,T,V) are: nothing
    of the vocabulary's size leaves the device. An utterance that has ended (`lengths` as in
    prefix_advance) is offered one certain blank, which changes nothing.
    """
    size = min(search.beam_size, log_probs.shape[-1])
    values, tokens = log_probs.detach().topk(size, dim=-1)  # (B,T,K) each
    both = torch.stack((tokens.double(), values.double()))  # (2,B,T,K)
    if lengths is not None:
        frames = torch.arange(values.shape[1], device=values.device)
        ended = frames >= to_device(lengths, values.device)[:, None]  # (B,T)
        # Token -1 at -inf stands for no offer.
        likeliest = torch.arange(size, device=values.device) == 0
        certain = torch.where(likeliest, 0.0, -math.inf)
        silence = torch.stack((torch.where(likeliest, float(blank_id), -1.0), certain))  # (2,K)
        both = torch.where(ended[..., None], silence[:, None, None], both)
    return both.transpose(1, 2)


def _read_offers(offers: torch.Tensor, blank_id: int) -> Iterator[_Offers]:
    """Yields the offers of each frame of (2,T,B,K)."""
    tokens, values = offers.numpy()  # (T,B,K) each
    is_blank = tokens == blank_id
    ranks = np.arange(tokens.shape[2])
    log_probs = np.where(is_blank | (tokens < 0), math.nan, values)
    best = np.fmax.reduce(log_probs, axis=-1, keepdims=True, initial=-math.inf)
    blank = np.where(is_blank, values, -math.inf).max(-1, keepdims=True)
    blank_rank = np.where(is_blank, ranks, len(ranks)).min(-1, keepdims=True)
    return map(_Offers._make, zip(tokens.astype(np.int64), log_probs, best, blank, blank_rank))


def _viterbi(beam: Beam) -> tuple[np.ndarray, np.ndarray]:
    """Finds score and times (B,N) of the likeliest path; in a tie, token wins, as in _Paths."""
    blank, token = beam.scores[[VITERBI_BLANK, VITERBI_TOKEN]]
    by_blank = blank > token
    times = np.where(by_blank, beam.numbers[TIMES_BLANK], beam.numbers[TIMES_TOKEN])
    return np.where(by_blank, blank, token), times


def _advance_by_blank(beam: Beam, offers: _Offers, beam_size: int) -> Beam | None:
    """Returns the beam after a frame in which only the blank matters, as in most frames, else None.

    Two conditions must hold in every utterance. No offered token is the last one of a prefix, so
    no token leads to a prefix of the beam. And the blank keeps even the worst prefix above every
    longer one, because a longer one scores at most the best prefix plus the best token. Then all
    totals change by the blank's log-probability, and their order stays.
    """
    total = beam.scores[TOTAL]
    if (
        beam.context is not None
        or total.shape[1] < beam_size
        or (beam.numbers[LAST][:, None] == offers.tokens[..., None]).any()
        or not (total[:, -1:] + offers.blank > total[:, :1] + offers.best).all()
    ):
        return None
    viterbi, times = _viterbi(beam)
    numbers = beam.numbers.copy()
    numbers[TIMES_BLANK] = times
    numbers[TIMES_TOKEN] = 0
    scores = np.full(beam.scores.shape, -math.inf)
    scores[[TOTAL, BLANK]] = total + offers.blank
    scores[VITERBI_BLANK] = viterbi + offers.blank
    scores[BONUS] = beam.scores[BONUS]
    return beam._replace(frames=beam.frames + 1, numbers=numbers, scores=scores)


def _advance(beam: Beam, offers: _Offers, beam_size: int) -> Beam:
    """Returns the beam after a frame: the best of the prefixes that stay and of the longer ones."""
    # True where the offered token (K) is the last one of the prefix (N).
    repeats = beam.numbers[LAST][:, None] == offers.tokens[..., None]  # (B,K,N)
    viterbi = _viterbi(beam)
    entries = _find_entries(beam, repeats)
    longer = _extend(beam, offers, repeats, viterbi)
    stay = _stay(beam, offers, entries, viterbi, longer)
    # A longer prefix that the beam holds already is counted in `stay`, so it leaves `longer`.
    row, place = entries.merges.nonzero()
    longer.scores[TOTAL, row, entries.rank[row, place], entries.source[row, place]] = math.nan
    numbers, scores = (
        np.concatenate((few, many.reshape(*few.shape[:2], -1)), axis=2)  # (7 or 6,B,N+K*N)
        for few, many in zip(stay, longer)
    )
    totals = scores[TOTAL] + scores[BONUS]
    best = np.lexsort((_order(offers, entries), -totals))[:, :beam_size]  # (B,N'), nan last
    rows = np.arange(len(best))[:, None]
    return _next_beam(beam, numbers[:, rows, best], scores[:, rows, best])


def _find_entries(beam: Beam, repeats: np.ndarray) -> _Entries:
    """Finds _Entries; repeats (B,K,N) is True where an offered token is the last of a prefix."""
    offered = repeats.any(1)
    is_parent = beam.numbers[PREFIX][:, :, None] == beam.numbers[PARENT][:, None]  # (B,N,N)
    merges = is_parent.any(1) & offered
    return _Entries(offered, repeats.argmax(1), is_parent.argmax(1), merges)


def _extend(
    beam: Beam, offers: _Offers, repeats: np.ndarray, viterbi: tuple[np.ndarray, np.ndarray]
) -> _Candidates:
    """Puts every offered token behind every prefix, (K,N); nan where the token is the blank.

    Where the token repeats the prefix's last one, only the paths that end in a blank count: without
    a blank in between there would be one token, not two.
    """
    total, blank, _, viterbi_blank, _, bonus = beam.scores[:, :, None]  # (B,1,N) each
    best, best_times = (part[:, None] for part in viterbi)  # (B,1,N) each
    log_probs = offers.log_probs[..., None]  # (B,K,1)
    states = beam.numbers[STATE][:, None]
    gain = 0.0
    if beam.context is not None:
        states, gain = beam.context.step(states, offers.tokens[..., None])  # (B,K,N) each
    scores = np.full((len(beam.scores), *repeats.shape), -math.inf)
    scores[TOTAL] = scores[TOKEN] = np.where(repeats, blank, total) + log_probs
    scores[VITERBI_TOKEN] = np.where(repeats, viterbi_blank, best) + log_probs
    scores[BONUS] = bonus + gain
    numbers = np.zeros((len(beam.numbers), *repeats.shape), np.int64)
    numbers[PREFIX] = -1
    numbers[PARENT] = beam.numbers[PREFIX][:, None]
    numbers[LAST] = offers.tokens[..., None]
    numbers[STATE] = states
    numbers[TIMES_BEFORE] = np.where(repeats, beam.numbers[TIMES_BLANK][:, None], best_times)
    return _Candidates(numbers, scores)


def _stay(
    beam: Beam,
    offers: _Offers,
    entries: _Entries,
    viterbi: tuple[np.ndarray, np.ndarray],
    longer: _Candidates,
) -> _Candidates:
    """Sums for each prefix of the beam, (N,), all paths that lead to it in this frame.

    A path gets there by a blank, by the prefix's last token, which goes on, or from the parent, as
    one of the `longer` candidates. TOTAL is nan where the frame offers neither blank nor token.
    """
    total, _, token, _, viterbi_token, bonus = beam.scores
    rows = np.arange(len(total))[:, None]
    own = np.where(entries.offered, offers.log_probs[rows, entries.rank], -math.inf)
    by_parent = (rows, entries.rank, entries.source)
    entered = np.where(entries.merges, longer.scores[:, *by_parent], -math.inf)  # (6,B,N)
    blank = total + offers.blank
    token = np.logaddexp(token + own, entered[TOKEN])
    exists = entries.offered | (offers.blank_rank < offers.tokens.shape[1])
    goes_on = viterbi_token + own
    enters = entered[VITERBI_TOKEN]
    scores = (
        np.where(exists, np.logaddexp(blank, token), math.nan),
        blank,
        token,
        viterbi[0] + offers.blank,
        np.maximum(enters, goes_on),
        bonus,
    )
    # WeNet keeps the times of a path that enters in this frame if it comes upon this path first,
    # because the parent stands before the prefix, even if the path that goes on is likelier.
    first = (entries.source < np.arange(total.shape[1])) & (enters > -math.inf)
    numbers = beam.numbers.copy()
    numbers[TIMES_BLANK] = viterbi[1]
    numbers[TIMES_TOKEN] = 0
    numbers[TIMES_BEFORE] = np.where(
        first | (enters > goes_on), longer.numbers[TIMES_BEFORE][by_parent], numbers[TIMES_BEFORE]
    )
    return _Candidates(numbers, np.array(scores))


def _order(offers: _Offers, entries: _Entries) -> np.ndarray:
    """Numbers the candidates (B,N+K*N) in WeNet's order; of candidates that tie, the first wins.

    WeNet goes through the tokens, and for each token through the prefixes. With token k, prefix n
    has the number 2 * (k * N + n) where it stays, and one more where it gets longer.
    """
    size = offers.tokens.shape[1]
    count = entries.rank.shape[1]
    places = np.arange(count)
    last_token = np.where(entries.offered, entries.rank, size)
    by_itself = 2 * (np.minimum(offers.blank_rank, last_token) * count + places)
    from_parent = 2 * (entries.rank * count + entries.source) + 1
    order = np.empty((len(by_itself), count + size * count), np.int64)
    order[:, :count] = np.where(entries.merges, np.minimum(by_itself, from_parent), by_itself)
    order[:, count:] = np.arange(1, 2 * size * count, 2)
    return order


def _next_beam(beam: Beam, numbers: np.ndarray, scores: np.ndarray) -> Beam:
    """Makes a beam of the chosen candidates, (7,B,N') and (6,B,N'); new lists get their numbers."""
    exists = ~np.isnan(scores[TOTAL])
    new = exists & (numbers[PREFIX] < 0)
    numbers[PREFIX, new] = _link(beam.lists, numbers[PARENT, new], numbers[LAST, new])
    numbers[PREFIX, ~exists] = -1
    numbers[PARENT, ~exists] = -2
    scores[:, ~exists] = math.nan
    reached = scores[VITERBI_TOKEN] > -math.inf
    numbers[TIMES_TOKEN, reached] = _link(
        beam.lists, numbers[TIMES_BEFORE, reached], np.array(beam.frames)
    )
    return beam._replace(frames=beam.frames + 1, numbers=numbers, scores=scores)


# ---- CTC's best path and alignment


def ctc_greedy_search(
    log_probs: torch.Tensor, lengths: torch.Tensor, blank_id: int = 0
) -> list[Hypothesis]:
    """Finds the best path: the likeliest token of each frame, repeats merged, blanks dropped.

    log_probs (B,T,V), lengths (B,) frames -> one Hypothesis per utterance. Its score is the path's
    log-probability. A token's time is the frame of its run where the token is likeliest. Frames
    beyond an utterance's length are not read.
    """
    return best_paths(*log_probs.max(dim=-1), lengths, blank_id)


def best_paths(
    log_probs: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor, blank_id: int = 0
) -> list[Hypothesis]:
    """Does what ctc_greedy_search does, with the best log-probabilities and tokens, (B,T) each."""
    rows = zip(log_probs.tolist(), tokens.tolist(), lengths.tolist())
    return [
        _collapse(row_log_probs[:length], row_tokens[:length], blank_id)
        for row_log_probs, row_tokens, length in rows
    ]


def _collapse(log_probs: list[float], path: list[int], blank_id: int) -> Hypothesis:
    """Makes a hypothesis of a path, which has a token and its log-probability for each frame."""
    tokens = []
    times = []
    for token, run in groupby(range(len(path)), key=path.__getitem__):
        if token != blank_id:
            tokens.append(token)
            times.append(max(run, key=log_probs.__getitem__))
    return _from_nbest([tokens], [math.fsum(log_probs)], [times])


def blank_wins(log_probs: torch.Tensor, blank_id: int = 0) -> torch.Tensor:
    """log_probs (...,V) -> (...) bool: True where no token is likelier than the blank."""
    return log_probs[..., blank_id] >= log_probs.amax(dim=-1)


def silence(log_probs: torch.Tensor, where: torch.Tensor, blank_id: int = 0) -> torch.Tensor:
    """Makes the blank certain in the frames of log_probs (B,T,V) that `where` (B,T) marks."""
    is_blank = torch.arange(log_probs.shape[-1], device=log_probs.device) == blank_id
    certain = torch.where(is_blank, 0.0, -math.inf).to(log_probs.dtype)
    return torch.where(where[..., None], certain, log_probs)


def without_text(hypothesis: Hypothesis) -> Hypothesis:
    """Empties the hypothesis of an utterance in which the blank wins every frame.

    WeNet finds text in such an utterance: many unlikely paths add up, and an attention decoder
    hears words in noise.
    """
    return _from_nbest([[]], hypothesis.nbest_scores[:1], [[]])


def columns_of(
    log_probs: torch.Tensor, nbests: list[list[list[int]]], blank_id: int = 0
) -> tuple[torch.Tensor, list[list[int]]]:
    """Picks what `align` reads: log_probs (B,T,V), sequences of each utterance -> (B,T,C), columns.

    The columns of an utterance are the blank, then each token of its sequences; behind them comes
    the blank again, up to the number C of the utterance with the most tokens.
    """
    columns = [[blank_id, *sorted(set().union(*nbest) - {blank_id})] for nbest in nbests]
    size = max(map(len, columns))
    places = torch.tensor([row + [blank_id] * (size - len(row)) for row in columns])  # (B,C)
    places = to_device(places, log_probs.device)[:, None].expand(-1, log_probs.shape[1], -1)
    return log_probs.gather(2, places), columns


def align(
    hypothesis: Hypothesis,
    log_probs: torch.Tensor,
    length: int,
    blank_id: int = 0,
    columns: list[int] | None = None,
) -> Hypothesis:
    """Gives times to the n-best: a token's likeliest frame on the best CTC path of its sequence.

    log_probs (T,V), of which `length` frames count, or (T,C) with the columns of columns_of. A
    sequence without a CTC path (too many tokens for the frames, or a blank among them) gets no
    times.
    """
    nbest = hypothesis.nbest
    if columns is not None:
        nbest = [[columns.index(token) for token in tokens] for tokens in nbest]
        blank_id = 0
    times = [_align(tokens, log_probs[:length], blank_id) for tokens in nbest]
    return hypothesis._replace(times=times[0], nbest_times=times)


def _align(tokens: list[int], log_probs: torch.Tensor, blank_id: int) -> list[int]:
    repeats = sum(a == b for a, b in zip(tokens, tokens[1:]))
    if not tokens or len(tokens) + repeats > len(log_probs) or blank_id in tokens:
        return []
    labels = torch.tensor([tokens], device=log_probs.device)
    path, scores = torchaudio.functional.forced_align(
        log_probs[None].contiguous(), labels, blank=blank_id
    )  # (1,T) each
    return _collapse(scores[0].tolist(), path[0].tolist(), blank_id).times


# ---- Attention decoders


def attention_beam_search(
    step, batch_size: int, max_length, search: SearchOptions, sos_id: int, eos_id: int, device=None
) -> list[Hypothesis]:
    """Beam search with an autoregressive decoder, all utterances and beams in one call per token.

    step(prefixes (B*N,L), state, parents (B*N,) | None) -> (log-probabilities of the next token
    (B*N,V), new state). Row b*N+n is beam n of utterance b. `state` is the caller's own. parents[i]
    is the row of the previous call that prefix i continues, so that a cache can follow. At first
    both are None. An utterance ends when all its beams have ended in eos_id, or
    after max_length tokens, one number or one for each utterance (B,). (WeNet takes the encoder
    frames of the longest utterance; here each utterance has its own number, so that its neighbours
    change nothing.) A score is the sum of log-probabilities over length**length_penalty. Times are
    empty, because attention has no alignment.
    """
    beam_size = search.beam_size
    prefixes = torch.full((batch_size * beam_size, 1), sos_id, dtype=torch.long, device=device)
    # All beams are alike before the first token: all but one wait at -inf.
    scores = torch.full((batch_size, beam_size), -math.inf, device=device)
    scores[:, 0] = 0.0
    ended = torch.zeros(batch_size * beam_size, dtype=torch.bool, device=device)
    first_row = torch.arange(batch_size, device=device)[:, None] * beam_size  # (B,1)
    max_length = torch.as_tensor(max_length, device=device).expand(batch_size)
    over = max_length <= 0  # (B,)
    state = None
    parents = None
    length = 0
    while not bool(over.all()):
        log_probs, state = step(prefixes, state, parents)
        ended |= over.repeat_interleave(beam_size)
        offers, tokens = _offer(log_probs, ended, beam_size, eos_id)  # (B*N,K) each
        totals = (scores.view(-1, 1) + offers).view(batch_size, -1)  # (B,N*K)
        as_they_are = torch.arange(beam_size, device=device) * tokens.shape[1]  # (N,)
        best = totals.topk(beam_size, dim=-1).indices
        choice = torch.where(over[:, None], as_they_are, best)  # (B,N)
        scores = totals.gather(1, choice)
        parents = (first_row + choice // tokens.shape[1]).view(-1)
        chosen = tokens.view(batch_size, -1).gather(1, choice).view(-1, 1)
        prefixes = torch.cat([prefixes[parents], chosen], dim=1)
        ended = chosen[:, 0] == eos_id
        length += 1
        over = (max_length <= length) | ended.view(batch_size, -1).all(dim=1)
    return rank_beams(prefixes, scores, eos_id, search.length_penalty)


def _offer(log_probs: torch.Tensor, ended: torch.Tensor, beam_size: int, eos_id: int):
    """The likeliest next tokens (B*N,K) and their log-probabilities.

    A beam that has ended offers eos once, at no cost, so that it stays as it is.
    """
    offers, tokens = log_probs.float().topk(min(beam_size, log_probs.shape[-1]), dim=-1)
    at_no_cost = torch.full_like(offers, -math.inf)
    at_no_cost[:, 0] = 0.0
    offers = torch.where(ended[:, None], at_no_cost, offers)
    return offers, tokens.masked_fill(ended[:, None], eos_id)


def rank_beams(
    prefixes: torch.Tensor, scores: torch.Tensor, eos_id: int, length_penalty: float = 0.0
) -> list[Hypothesis]:
    """prefixes (B*N,L), scores (B,N) -> hypotheses, best first, without sos and eos."""
    lengths = (prefixes[:, 1:] != eos_id).sum(dim=1).clamp(min=1).view(scores.shape)
    scores, order = (scores / lengths**length_penalty).sort(dim=-1, descending=True, stable=True)
    beams = prefixes.view(*scores.shape, -1)[:, :, 1:].tolist()
    results = []
    for beam, row_scores, row_order in zip(beams, scores.tolist(), order.tolist()):
        possible = sum(score > -math.inf for score in row_scores) or 1
        nbest = [[token for token in beam[n] if token != eos_id] for n in row_order[:possible]]
        results.append(_from_nbest(nbest, row_scores[:possible], [[] for _ in nbest]))
    return results


class Tree(NamedTuple):
    """Holds each utterance's hypotheses as a tree of P nodes, with a common beginning only once.

    The first node is <sos>. The nodes behind an utterance's last one are <eos> and see only
    themselves.
    """

    tokens: torch.Tensor  # (B,P)
    positions: torch.Tensor  # (B,P) place of the token in its hypotheses; <sos> has place 0
    sees: torch.Tensor  # (B,P,P) bool: a node sees itself and the nodes that lead to it


def attention_rescoring(
    hypotheses: list[Hypothesis],
    score,
    search: SearchOptions,
    sos_id: int,
    eos_id: int,
    device: torch.device = torch.device("cpu"),
) -> Turns:
    """Sorts each utterance's CTC n-best anew, by the scores of CTC and of the attention decoders.

    score(tree, reverse: bool) -> log-probabilities (B,P,V) of the token behind each node of a Tree,
    by teacher forcing; `reverse` asks the right-to-left decoder, for a tree of the reversed
    hypotheses. `score` is called once per direction, or only once where reverse_weight is 0. A new
    score is (1 - reverse_weight) left-to-right + reverse_weight right-to-left + ctc_weight CTC.
    Each part is a sum of log-probabilities, with eos in the decoders'. Times stay those of CTC.
    """
    nbests = [hypothesis.nbest for hypothesis in hypotheses]
    picked = [_teacher_forced(nbests, partial(score, reverse=False), sos_id, eos_id, device)]
    if search.reverse_weight > 0:
        nbests = [[tokens[::-1] for tokens in nbest] for nbest in nbests]
        picked.append(_teacher_forced(nbests, partial(score, reverse=True), sos_id, eos_id, device))
    picked = yield tuple(picked)
    return _sort_anew(hypotheses, picked, search)


def _sort_anew(
    hypotheses: list[Hypothesis], picked: list[torch.Tensor], search: SearchOptions
) -> list[Hypothesis]:
    """Sorts each n-best by what _teacher_forced has picked, one or two directions."""
    nbests = [hypothesis.nbest for hypothesis in hypotheses]
    lengths = [len(tokens) + 1 for nbest in nbests for tokens in nbest]  # with eos
    totals, *backward = (
        torch.stack([part.sum() for part in of_tokens.split(lengths)]) for of_tokens in picked
    )  # (M,) each
    if backward:
        totals = (1 - search.reverse_weight) * totals + search.reverse_weight * backward[0]
    rows = totals.split([len(nbest) for nbest in nbests])
    return [
        _resort(hypothesis, row.tolist(), search.ctc_weight)
        for hypothesis, row in zip(hypotheses, rows)
    ]


def _teacher_forced(
    nbests: list[list[list[int]]], score, sos_id: int, eos_id: int, device: torch.device
) -> torch.Tensor:
    """Picks the decoder's log-probabilities of all sequences' tokens, each with its eos, float64.

    They lie on the device, one sequence behind the other.
    """
    tree, paths = _make_tree(nbests, sos_id, eos_id)
    log_probs = score(Tree(*(to_device(part, device) for part in tree)))  # (B,P,V)
    steps = [
        (row, node, token)
        for row, (nbest, row_paths) in enumerate(zip(nbests, paths))
        for tokens, path in zip(nbest, row_paths)
        for node, token in zip(path, [*tokens, eos_id])
    ]
    return log_probs[tuple(to_device(torch.tensor(steps).T, device))].double()


def _make_tree(
    nbests: list[list[list[int]]], sos_id: int, eos_id: int
) -> tuple[Tree, list[list[list[int]]]]:
    """Makes the tree, and lists for each sequence of each utterance its nodes, <sos> first."""
    nodes, paths = zip(*map(_grow, nbests))
    batch_size = len(nbests)
    size = 1 + max(map(len, nodes))
    tokens = np.full((batch_size, size), eos_id)
    positions = np.zeros((batch_size, size), np.int64)
    sees = np.eye(size, dtype=np.bool_)[None].repeat(batch_size, axis=0)
    for row, row_paths in enumerate(paths):
        tokens[row, : 1 + len(nodes[row])] = [sos_id, *(token for _, token in nodes[row])]
        for path in row_paths:
            positions[row, path] = np.arange(len(path))
            sees[row][np.ix_(path, path)] = np.tri(len(path), dtype=np.bool_)
    return Tree(*map(torch.from_numpy, (tokens, positions, sees))), paths


def _grow(nbest: list[list[int]]) -> tuple[dict[tuple[int, int], int], list[list[int]]]:
    """Grows a tree -> ({(node before, token): node}, the nodes of each sequence, 0 for <sos>)."""
    nodes = {}
    paths = []
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
