"""decode.py against definitions: all paths, all sequences, WeNet's results, and what must never change a result."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import decode
from decode import Hypothesis, attention_beam_search, attention_rescoring, ctc_greedy_search, ctc_prefix_beam_search

GOLDEN = Path(__file__).resolve().parents[2] / "shared/golden/u2pp_conformer/expect.pt"
SOS, EOS = 0, 1  # of the attention tests


def random_log_probs(*shape, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(*shape, generator=generator)).log_softmax(dim=-1)


def collapse(path, blank_id):
    return tuple(token for token, _ in itertools.groupby(path) if token != blank_id)


def all_sequences(log_probs, blank_id):
    """Every token sequence and its exact probability: the sum over all V^T paths."""
    frames, vocabulary = log_probs.shape
    sums = {}
    for path in itertools.product(range(vocabulary), repeat=frames):
        sequence = collapse(path, blank_id)
        sums[sequence] = sums.get(sequence, 0.0) + math.exp(sum(log_probs[t, v].item() for t, v in enumerate(path)))
    return sums


@pytest.mark.parametrize("frames, vocabulary, blank_id, seed", [
    (1, 2, 0, 0), (1, 4, 3, 1), (2, 3, 0, 2), (3, 3, 1, 3), (4, 3, 2, 4), (5, 3, 0, 5), (4, 4, 0, 6), (6, 2, 0, 7)])
def test_prefix_beam_search_is_the_sum_over_all_paths_when_the_beam_holds_every_prefix(frames, vocabulary, blank_id,
                                                                                       seed):
    log_probs = random_log_probs(1, frames, vocabulary, seed=seed)
    expected = all_sequences(log_probs[0], blank_id)
    found, = ctc_prefix_beam_search(log_probs, torch.tensor([frames]), beam_size=1000, blank_id=blank_id)
    assert sorted(map(tuple, found.nbest)) == sorted(expected)  # each sequence once, none impossible
    for tokens, score in zip(found.nbest, found.nbest_scores):
        assert score == pytest.approx(math.log(expected[tuple(tokens)]), abs=1e-5)
    assert tuple(found.tokens) == max(expected, key=expected.get)
    assert math.fsum(map(math.exp, found.nbest_scores)) == pytest.approx(1.0, abs=1e-5)


def test_prefix_beam_search_score_is_minus_the_ctc_loss():
    log_probs = random_log_probs(1, 12, 4, seed=8)
    found, = ctc_prefix_beam_search(log_probs, torch.tensor([12]), beam_size=3000)
    for tokens, score in zip(found.nbest[:20], found.nbest_scores):
        loss = torch.nn.functional.ctc_loss(log_probs.transpose(0, 1).double(), torch.tensor([tokens]), [12],
                                            [len(tokens)], reduction="sum")
        assert score == pytest.approx(-loss.item(), abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_narrow_beam_never_overestimates_and_a_wider_one_never_finds_less(seed):
    log_probs = random_log_probs(1, 5, 4, seed=seed)
    exact = all_sequences(log_probs[0], 0)
    for beam_size in (1, 2, 3, 5):
        found, = ctc_prefix_beam_search(log_probs, torch.tensor([5]), beam_size)
        assert 1 <= len(found.nbest) <= beam_size
        assert found.nbest_scores == sorted(found.nbest_scores, reverse=True)
        for tokens, score in zip(found.nbest, found.nbest_scores):
            assert score <= math.log(exact[tuple(tokens)]) + 1e-5


def test_prefix_beam_search_prefers_the_likelier_sequence_to_the_likelier_path():
    # Best path: blank, blank (0.36). Sequence "a": 0.4*0.4 + 2*0.6*0.4 = 0.64.
    log_probs = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()
    assert ctc_greedy_search(log_probs, torch.tensor([2]))[0].tokens == []
    found, = ctc_prefix_beam_search(log_probs, torch.tensor([2]), beam_size=2)
    assert found.tokens == [1] and found.score == pytest.approx(math.log(0.64), abs=1e-6)


@pytest.mark.parametrize("blank_id", [0, 2])
def test_greedy_search_collapses_the_best_path(blank_id):
    log_probs = random_log_probs(4, 30, 3, seed=9)
    lengths = torch.tensor([30, 17, 1, 0])
    for row, length, found in zip(log_probs, lengths, ctc_greedy_search(log_probs, lengths, blank_id)):
        best = row[:length].max(dim=-1)
        assert tuple(found.tokens) == collapse(best.indices.tolist(), blank_id)
        assert found.score == pytest.approx(best.values.sum().item(), abs=1e-4)
        assert found.nbest == [found.tokens] and found.nbest_scores == [found.score]


def test_times_are_frames_that_hold_the_token_and_peak_in_greedy_search():
    path = [0, 1, 1, 1, 0, 1, 2, 2, 0]
    peak = [.9, .6, .8, .7, .9, .6, .7, .9, .9]
    probabilities = torch.tensor([[(1 - p) / 2] * 3 for p in peak])
    probabilities[range(9), path] = torch.tensor(peak)
    log_probs, lengths = probabilities.log()[None], torch.tensor([9])
    greedy, = ctc_greedy_search(log_probs, lengths)
    assert (greedy.tokens, greedy.times) == ([1, 1, 2], [2, 5, 7])
    beam, = ctc_prefix_beam_search(log_probs, lengths, beam_size=5)
    assert (beam.tokens, beam.times) == ([1, 1, 2], [3, 5, 7])  # WeNet: the last frame of the run


@pytest.mark.parametrize("seed", range(5))
def test_times_rise_and_number_the_tokens(seed):
    log_probs = random_log_probs(1, 40, 6, seed=seed)
    for found in (ctc_greedy_search(log_probs, torch.tensor([40])),
                  ctc_prefix_beam_search(log_probs, torch.tensor([40]), beam_size=8)):
        for tokens, times in zip(found[0].nbest, found[0].nbest_times):
            assert len(tokens) == len(times) and times == sorted(set(times))
            assert all(0 <= time < 40 for time in times)
            assert all(times[i + 1] - times[i] >= 2 for i in range(len(tokens) - 1) if tokens[i] == tokens[i + 1])


@pytest.mark.parametrize("search", [ctc_greedy_search, lambda p, n: ctc_prefix_beam_search(p, n, beam_size=4)])
def test_padding_and_neighbours_change_nothing(search):
    log_probs, lengths = random_log_probs(3, 20, 5, seed=10), torch.tensor([20, 11, 0])
    together = search(log_probs, lengths)
    for row, length, found in zip(log_probs, lengths, together):
        assert search(row[None, :length], length[None])[0] == found
    padded = torch.cat([log_probs, torch.full((3, 7, 5), math.nan)], dim=1)
    assert search(padded, lengths) == together
    assert together[2].tokens == [] and together[2].score == 0.0


def test_a_beam_wider_than_the_vocabulary_and_impossible_tokens_are_fine():
    log_probs = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]).log()
    found, = ctc_prefix_beam_search(log_probs, torch.tensor([2]), beam_size=50)
    assert found.nbest == [[], [1]] or found.nbest == [[1], []]
    assert found.nbest_scores == pytest.approx([math.log(0.5)] * 2)


# ---------------------------------------------------------------------------------------------------------- attention


def next_token_log_probs(prefix, vocabulary, salt=0):
    """A language model without structure: every prefix has its own random distribution."""
    seed = hash((salt, *prefix)) % 2**31
    return random_log_probs(vocabulary, seed=seed, sharpness=1.5)


def make_step(vocabulary, beam_size, salts=(0,)):
    """A decoder for attention_beam_search whose state is what each row has been given so far: it checks `parents`."""
    def step(prefixes, state, parents):
        rows = prefixes.tolist()
        if parents is None:
            assert state is None and all(row == [SOS] for row in rows)
        else:
            assert [state[parent] for parent in parents.tolist()] == [row[:-1] for row in rows]
            assert (parents // beam_size).tolist() == [i // beam_size for i in range(len(rows))]
        scores = [next_token_log_probs(row[1:], vocabulary, salts[i // beam_size]) for i, row in enumerate(rows)]
        return torch.stack(scores), rows
    return step


def all_endings(vocabulary, max_length, salt):
    """Score of every token sequence that ends in EOS or at max_length."""
    open_ends, endings = {(): 0.0}, {}
    for _ in range(max_length):
        longer = {}
        for prefix, score in open_ends.items():
            for token, log_prob in enumerate(next_token_log_probs(prefix, vocabulary, salt).tolist()):
                (endings if token == EOS else longer)[prefix + (token,)] = score + log_prob
        open_ends = longer
    return {**endings, **open_ends}


def test_attention_beam_search_with_a_beam_that_holds_everything_is_exhaustive_search():
    vocabulary, max_length, beam_size = 4, 3, 64
    found = attention_beam_search(make_step(vocabulary, beam_size, (1, 2, 3)), 3, max_length, beam_size, SOS, EOS)
    for salt, hypothesis in zip((1, 2, 3), found):
        expected = all_endings(vocabulary, max_length, salt)
        best = max(expected, key=expected.get)
        assert hypothesis.tokens == [token for token in best if token != EOS]
        assert hypothesis.nbest_scores == pytest.approx(sorted(expected.values(), reverse=True), abs=1e-4)


def test_attention_beam_of_one_is_greedy():
    found, = attention_beam_search(make_step(6, 1), 1, 8, 1, SOS, EOS)
    prefix, score = [], 0.0
    while len(prefix) < 8:
        log_probs = next_token_log_probs(prefix, 6)
        score += log_probs.max().item()
        if log_probs.argmax().item() == EOS:
            break
        prefix.append(log_probs.argmax().item())
    assert found.tokens == prefix and found.score == pytest.approx(score, abs=1e-4)


def test_attention_beam_search_batched_equals_one_by_one():
    together = attention_beam_search(make_step(7, 4, (5, 6, 7)), 3, 6, 4, SOS, EOS)
    for salt, hypothesis in zip((5, 6, 7), together):
        assert attention_beam_search(make_step(7, 4, (salt,)), 1, 6, 4, SOS, EOS) == [hypothesis]


def test_attention_length_penalty_favours_longer_hypotheses():
    def step(prefixes, state, parents):  # "2 2 2 eos" is less likely than "eos" but likelier per token
        ends = torch.tensor([[0.0, 0.4, 0.6]] if prefixes.shape[1] < 4 else [[0.0, 0.9, 0.1]])
        return ends.log().expand(prefixes.shape[0], -1), None
    assert attention_beam_search(step, 1, 10, 3, SOS, EOS)[0].tokens == []
    assert attention_beam_search(step, 1, 10, 3, SOS, EOS, length_penalty=1.0)[0].tokens == [2, 2, 2]


def make_scorer(vocabulary, calls):
    """Teacher forcing of next_token_log_probs, another one per direction and utterance; NaN behind each length."""
    def score(tokens_in, lengths, rows, reverse):
        calls.append(reverse)
        log_probs = torch.full((*tokens_in.shape, vocabulary), math.nan)
        for m, (tokens, length, row) in enumerate(zip(tokens_in.tolist(), lengths.tolist(), rows.tolist())):
            assert tokens[0] == SOS and set(tokens[length:]) <= {EOS}
            for i in range(length):
                log_probs[m, i] = next_token_log_probs(tokens[1:i + 1], vocabulary, salt=10 * row + reverse)
        return log_probs
    return score


def sequence_log_prob(tokens, vocabulary, salt):
    return sum(next_token_log_probs(tokens[:i], vocabulary, salt)[token].item()
               for i, token in enumerate([*tokens, EOS]))


@pytest.mark.parametrize("ctc_weight, reverse_weight", [(0.5, 0.3), (0.0, 0.0), (1.0, 1.0)])
def test_attention_rescoring_is_the_weighted_sum_over_both_directions(ctc_weight, reverse_weight):
    vocabulary, calls = 6, []
    ctc = ctc_prefix_beam_search(random_log_probs(3, 9, vocabulary, seed=11), torch.tensor([9, 5, 0]), beam_size=5)
    found = attention_rescoring(ctc, make_scorer(vocabulary, calls), SOS, EOS, ctc_weight, reverse_weight)
    assert calls == ([False, True] if reverse_weight else [False])  # the whole batch in one call per direction
    for row, (before, after) in enumerate(zip(ctc, found)):
        expected = {tuple(tokens): ctc_weight * score + (1 - reverse_weight) * sequence_log_prob(tokens, vocabulary,
                                                                                              10 * row)
                    + reverse_weight * sequence_log_prob(tokens[::-1], vocabulary, 10 * row + 1)
                    for tokens, score in zip(before.nbest, before.nbest_scores)}
        assert {tuple(tokens): score for tokens, score in zip(after.nbest, after.nbest_scores)} == pytest.approx(
            expected, abs=1e-4)
        assert after.nbest_scores == sorted(after.nbest_scores, reverse=True)
        assert (after.tokens, after.score, after.times) == (after.nbest[0], after.nbest_scores[0],
                                                            after.nbest_times[0])
        assert after.times == before.nbest_times[before.nbest.index(after.tokens)]


# -------------------------------------------------------------------------------------------------------------- golden


@pytest.mark.skipif(not GOLDEN.exists(), reason="WeNet's results (../shared/golden) are not here")
def test_ctc_searches_return_what_wenet_returns():
    golden = torch.load(GOLDEN, weights_only=True)
    expected = json.loads(golden["decode"])
    log_probs, lengths = golden["ctc_log_probs_full"], golden["encoder_lengths"]
    for found, wanted in zip(ctc_greedy_search(log_probs, lengths), expected["ctc_greedy_search"], strict=True):
        assert found.tokens == wanted["tokens"]
    beams = ctc_prefix_beam_search(log_probs, lengths, beam_size=5)
    for found, wanted in zip(beams, expected["ctc_prefix_beam_search"], strict=True):
        assert (found.tokens, found.times, found.nbest) == (wanted["tokens"], wanted["times"], wanted["nbest"])
        assert found.score == pytest.approx(wanted["score"], abs=1e-9)
        assert found.nbest_scores == pytest.approx(wanted["nbest_scores"], abs=1e-9)


def test_alignment_takes_the_best_ctc_path_of_the_tokens():
    torch.manual_seed(0)
    log_probs = torch.randn(7, 4).log_softmax(-1)
    tokens = [1, 1, 2]
    paths = [path for path in itertools.product(range(4), repeat=7)
             if [token for token, _ in itertools.groupby(path) if token] == tokens]
    best = max(paths, key=lambda path: sum(float(log_probs[t, token]) for t, token in enumerate(path)))
    runs = [list(run) for token, run in itertools.groupby(range(7), key=best.__getitem__) if token]
    expected = [max(run, key=lambda t: float(log_probs[t, best[t]])) for run in runs]
    hypothesis = Hypothesis(tokens, 0.0, [], [tokens, [3] * 5], [0.0, 0.0], [[], []])
    aligned = decode.align(hypothesis, log_probs, 7)
    assert aligned.times == expected and aligned.nbest_times == [expected, []]  # five threes have no path in 7 frames
