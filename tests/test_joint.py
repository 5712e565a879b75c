"""joint.py equals its definition: CTC's sum over all paths plus the decoder's sum over all tokens.

Batches and padding change nothing, and only what goes on costs the decoder a step. The context is
ngram.Both, which stands for a language model, for hotwords, and for any automaton.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from context import make_graph
from decode import SearchOptions, attention_beam_search
from helpers import all_sequences, earned, random_log_probs
from helpers_model import tiny_model
from joint import advance, first_paths, joint_beam_search, next_scores, read_frames
from ngram import Both, load_lm
from tokenizer import train_char
from tools.lm import arpa_text, train

BLANK, SOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """An automaton over the tokens 4 to 6 (space, a, b), which may add more than words cost."""
    path = tmp_path_factory.mktemp("lm") / "lm"
    path.write_text(arpa_text(*train([["a", "b", "ab"], ["ab", "a"]], 2)))
    return Both(load_lm(str(path), train_char(["a b"]), 0.7, 3.0), make_graph([([5, 6], 1.5)]))


def says(prefix, salt, vocabulary):
    """A decoder's log-probabilities of the next token, some of them -inf."""
    log_probs = random_log_probs(vocabulary, seed=hash((salt, *prefix)) % 2**31)
    log_probs[[BLANK, SOS]] = -math.inf
    return log_probs.log_softmax(-1)


def make_step(vocabulary, salts, calls=None):
    """A decoder with a distribution of its own for each utterance and prefix.

    Its state are the prefixes, so that a wrong row of parents is found.
    """

    def step(prefixes, state, parents, utterances):
        if parents is not None:
            assert torch.equal(state[0][parents], prefixes[:, :-1])
            assert torch.equal(state[1][parents], utterances)
        if calls is not None:
            calls.append(utterances.tolist())
        rows = zip(prefixes[:, 1:].tolist(), utterances.tolist())
        log_probs = [says(prefix, salts[row], vocabulary) for prefix, row in rows]
        return torch.stack(log_probs), (prefixes, utterances)

    return step


def ctc_frames(frames, vocabulary, seed):
    """CTC's log-probabilities (T,V); it never writes a special token."""
    log_probs = random_log_probs(frames, vocabulary, seed=seed)
    log_probs[:, [SOS, EOS]] = -math.inf
    return log_probs.log_softmax(-1)


def search_of(weight, beam_size=4):
    search = SearchOptions(joint_ctc_weight=weight)
    object.__setattr__(search, "beam_size", beam_size)
    return search


def search_rows(rows, salts, search, calls=None, context=None):
    """Searches rows of CTC log-probabilities (T,V), padded to one length by nonsense."""
    log_probs = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=-0.5)
    lengths = torch.tensor([len(row) for row in rows])
    step = make_step(log_probs.shape[2], salts, calls)
    return joint_beam_search(step, log_probs, lengths, search, BLANK, SOS, EOS, context)[0]


def define(log_probs, weight, salt, context=None):
    """The score of every sequence that is not impossible, by the definition.

    After as many tokens as frames the end is certain, so that eos costs nothing.
    """
    frames, vocabulary = log_probs.shape
    ctc = all_sequences(log_probs, BLANK)
    scores = {}
    for size in range(frames + 1):
        for tokens in itertools.product(range(EOS + 1, vocabulary), repeat=size):
            said = [*tokens, EOS][:frames]
            attention = sum(says(tokens[:i], salt, vocabulary)[t] for i, t in enumerate(said))
            probability = ctc.get(tokens, 0.0)
            ctc_score = math.log(probability) if probability else -math.inf
            parts = ((weight, ctc_score), (1 - weight, float(attention)))
            scores[tokens] = sum(share * part for share, part in parts if share)
            if context is not None:
                scores[tokens] += earned(context, tokens)
    return {tokens: score for tokens, score in scores.items() if score > -math.inf}


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])
def test_a_wide_beam_finds_every_sequence_with_the_score_of_the_definition(weight):
    sizes = [(0, 5), (1, 4), (2, 6), (3, 5), (4, 5)]
    for seed, (frames, vocabulary) in enumerate(sizes):
        log_probs = ctc_frames(frames, vocabulary, seed)
        if frames == 4:
            log_probs[1, BLANK] = -math.inf  # and what is impossible is not found
        expected = define(log_probs, weight, seed)
        (found,) = search_rows([log_probs], [seed], search_of(weight, 200))
        heard = dict(zip(map(tuple, found.nbest), found.nbest_scores))
        assert heard == pytest.approx(expected, abs=1e-5) and len(found.nbest) == len(heard)
        assert found.nbest_scores == sorted(found.nbest_scores, reverse=True)
        assert found.tokens == list(max(expected, key=expected.get))


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_a_wide_beam_finds_what_the_definition_favours_with_a_context(weight, context):
    for seed, frames in enumerate((1, 2, 3)):
        log_probs = ctc_frames(frames, 7, seed)
        expected = define(log_probs, weight, seed, context)
        (found,) = search_rows([log_probs], [seed], search_of(weight, 100), context=context)
        heard = dict(zip(map(tuple, found.nbest), found.nbest_scores))
        assert heard == pytest.approx(expected, abs=1e-5) and len(found.nbest) == len(heard)
        assert found.nbest_scores == sorted(found.nbest_scores, reverse=True)


class Hopeful:
    """A context of which all is hoped, so that no hypothesis is dropped before the last frame."""

    def __init__(self, context):
        self.step = context.step
        self.pending = context.pending

    def hope(self, states, tokens):
        return np.full(states.shape, math.inf)


@pytest.mark.parametrize("beam_size", [1, 2, 4])
def test_hypotheses_end_when_a_context_cannot_make_them_the_best(beam_size, context):
    search = search_of(0.2, beam_size)
    rows = [ctc_frames(frames, 7, frames) for frames in (7, 9, 12, 13, 14)]
    rows[-1][4:, BLANK] += 100.0  # CTC is sure that nothing comes there
    rows[-1] = rows[-1].log_softmax(-1)
    asked = [[], []]
    early, late = (
        search_rows(rows, range(5), search, calls, automaton)
        for calls, automaton in zip(asked, (context, Hopeful(context)))
    )
    assert early == late and all(len(found.nbest) == beam_size for found in early)
    assert sum(map(len, asked[0])) < sum(map(len, asked[1]))


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("favours", [False, True])
def test_a_row_is_heard_alike_alone_and_among_longer_and_shorter_rows(
    weight, beam_size, favours, context
):
    context = context if favours else None
    search = search_of(weight, beam_size)
    salts = range(6)
    rows = [ctc_frames(frames, 6, salt) for salt, frames in enumerate((5, 0, 17, 1, 9, 30))]
    for salt, row, heard in zip(salts, rows, search_rows(rows, salts, search, context=context)):
        (alone,) = search_rows([row], [salt], search, context=context)
        assert heard.nbest == alone.nbest and 1 <= len(alone.nbest) <= beam_size
        assert heard.nbest_scores == pytest.approx(alone.nbest_scores, abs=1e-9)


def test_weight_0_is_attention_search_and_weight_1_ctc_without_a_decoder():
    rows = [ctc_frames(frames, 7, frames) for frames in (4, 12, 8)]
    search = search_of(0.0)
    decode_step = make_step(7, range(3))

    def step(prefixes, state, parents):
        return decode_step(prefixes, None, None, torch.arange(3).repeat_interleave(4))[0], None

    expected = attention_beam_search(step, 3, torch.tensor([4, 12, 8]), search, SOS, EOS)
    for heard, written in zip(search_rows(rows, range(3), search), expected):
        assert heard.nbest == written.nbest
        assert heard.nbest_scores == pytest.approx(written.nbest_scores, abs=1e-5)
    rows = [ctc_frames(5, 5, seed) for seed in range(5)]
    calls = []
    for row, heard in zip(rows, search_rows(rows, None, search_of(1.0, 30), calls)):
        exact = all_sequences(row, BLANK)
        assert tuple(heard.tokens) == max(exact, key=exact.get)
        assert heard.score == pytest.approx(math.log(exact[tuple(heard.tokens)]), abs=1e-5)
    assert not calls


def test_the_decoder_is_asked_for_hypotheses_that_go_on_alone():
    calls = []
    rows = [ctc_frames(frames, 6, frames) for frames in (2, 0, 20)]
    search_rows(rows, range(3), search_of(0.3, 3), calls)
    assert calls[0] == [0, 2]  # one hypothesis each, and none where there is no frame
    assert 0 in calls[1] and all(set(rows) == {2} for rows in calls[2:])
    assert all(sum(row == 2 for row in rows) <= 3 for rows in calls)


def test_prefix_scores_of_long_unsure_and_impossible_frames_are_exact():
    """The definition is a loop over the frames (Watanabe et al. 2017, algorithm 2)."""
    vocabulary, frames = 6, 400
    log_probs = 8 * torch.randn(2, frames, vocabulary, generator=torch.Generator().manual_seed(0))
    log_probs[0, 50:60, 4] = log_probs[0, 100:102, BLANK] = -math.inf
    log_probs = log_probs.log_softmax(-1)
    lengths = torch.tensor([frames, 333])
    read = read_frames(log_probs, lengths, BLANK)
    paths = first_paths(read)
    last = torch.full((2, 1), SOS)
    place = torch.zeros(2, 1, dtype=torch.long)
    tokens = (3, 4, 4, 5, 3, 3)
    for size in range(len(tokens) + 1):
        found = next_scores(read, paths, last, EOS)
        assert not found.isnan().any() and (found[..., BLANK] == -math.inf).all()
        for row in range(2):
            expected = by_frames(log_probs[row, : lengths[row]], tokens[:size])
            assert found[row, 0, 3:].tolist() == pytest.approx(expected[3:], rel=1e-6)
            assert found[row, 0, EOS].item() == pytest.approx(expected[EOS], rel=1e-6)
        if size < len(tokens):
            now = torch.full((2, 1), tokens[size])
            paths = advance(read, paths, last, place, now)
            last = now


def by_frames(log_probs, tokens):
    """Prefix scores of `tokens` with each next token, and, at EOS, of the tokens alone."""
    add = torch.logaddexp
    none = torch.tensor(-math.inf, dtype=torch.float64)
    ends_token = [none] * len(tokens) + [none]
    ends_blank = [none.new_zeros(())] + [none] * len(tokens)
    scores = [none] * log_probs.shape[1]
    for row in log_probs.double():
        for token in range(len(row)):
            before = ends_blank[-1]
            if tokens[-1:] != (token,):
                before = add(before, ends_token[-1])
            scores[token] = add(scores[token], before + row[token])
        new_token = [none]
        for place, token in enumerate(tokens, 1):
            before = ends_blank[place - 1]
            if tokens[place - 2 : place - 1] != (token,):
                before = add(before, ends_token[place - 1])
            new_token.append(add(ends_token[place], before) + row[token])
        ends_blank = [add(t, b) + row[BLANK] for t, b in zip(ends_token, ends_blank)]
        ends_token = new_token
    scores[EOS] = add(ends_token[-1], ends_blank[-1])
    return [score.item() for score in scores]


@pytest.mark.parametrize(
    "weight, reverse_weight, favours",
    [(0.6, 0.0, 0), (0.6, 0.4, 0), (0.2, 1.0, 0), (1.0, 0.4, 0), (0.6, 0.0, 1), (0.6, 0.4, 1)],
)
def test_a_model_hears_by_ctc_and_its_decoders_in_both_directions(
    weight, reverse_weight, favours, context
):
    model = tiny_model(train_char(["a b" if favours else "one two three"]), sharpness=2)
    model = model.double().eval()
    encoded = torch.randn(3, 30, 16, generator=torch.Generator().manual_seed(2)).double()
    lengths = torch.tensor([30, 22, 0])
    search = SearchOptions(joint_ctc_weight=weight, reverse_weight=reverse_weight, ctc_weight=0.0)
    context = context if favours else None
    *heard, nothing = model.search(encoded, lengths, "joint", search, context)
    assert nothing.tokens == []
    log_probs = model.ctc_log_probs(encoded).detach().transpose(0, 1)
    for row, found in enumerate(heard):
        only = slice(row, row + 1)
        assert len(found.nbest) == 10 and found.nbest_scores == sorted(found.nbest_scores)[::-1]
        (decoded,) = model.rescore([found], encoded[only], lengths[only], search)
        decoders = dict(zip(map(tuple, decoded.nbest), decoded.nbest_scores))
        for tokens, score, times in zip(found.nbest, found.nbest_scores, found.nbest_times):
            labels = torch.tensor([tokens])
            sizes = lengths[only], torch.tensor([len(tokens)])
            loss = torch.nn.functional.ctc_loss(log_probs[:, only], labels, *sizes, reduction="sum")
            expected = (1 - weight) * decoders[tuple(tokens)] - weight * loss.item()
            expected += earned(context, tokens) if favours else 0.0
            assert score == pytest.approx(expected, abs=1e-4)
            assert len(times) == len(tokens) and times == sorted(times)
