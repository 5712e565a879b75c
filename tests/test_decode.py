"""decode.py equals its definitions: the sum over all paths, the best of all sequences, WeNet.

Padding, neighbours in the batch and the pieces of a stream change nothing.
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import decode
from conformer import U2Conformer
from decode import (
    Hypothesis,
    SearchOptions,
    answered,
    attention_beam_search,
    attention_rescoring,
    ctc_greedy_search,
    ctc_prefix_beam_search,
    overlapped,
    plain_prefix_beam_search,
    rank_beams,
)
from helpers import all_sequences, beams, collapse, random_log_probs
from presets import PRESETS, ModelOptions

GOLDEN = Path(__file__).resolve().parents[2] / "shared/golden/u2pp_conformer/expect.pt"
# Special tokens of the attention tests.
SOS = 0
EOS = 1


@pytest.mark.parametrize(
    "frames, vocabulary, blank_id, seed",
    [
        (1, 2, 0, 0),
        (1, 4, 3, 1),
        (2, 3, 0, 2),
        (3, 3, 1, 3),
        (4, 3, 2, 4),
        (5, 3, 0, 5),
        (4, 4, 0, 6),
        (6, 2, 0, 7),
    ],
)
def test_prefix_beam_search_is_the_sum_over_all_paths_when_the_beam_holds_every_prefix(
    frames, vocabulary, blank_id, seed
):
    log_probs = random_log_probs(1, frames, vocabulary, seed=seed)
    expected = all_sequences(log_probs[0], blank_id)
    (found,) = ctc_prefix_beam_search(log_probs, torch.tensor([frames]), beams(1000), blank_id)
    # Each possible sequence is found once, and no impossible one.
    assert sorted(map(tuple, found.nbest)) == sorted(expected)
    for tokens, score in zip(found.nbest, found.nbest_scores):
        assert score == pytest.approx(math.log(expected[tuple(tokens)]), abs=1e-5)
    assert tuple(found.tokens) == max(expected, key=expected.get)
    assert math.fsum(map(math.exp, found.nbest_scores)) == pytest.approx(1.0, abs=1e-5)


def test_prefix_beam_search_score_is_minus_the_ctc_loss():
    log_probs = random_log_probs(1, 12, 4, seed=8)
    (found,) = ctc_prefix_beam_search(log_probs, torch.tensor([12]), beams(3000))
    for tokens, score in zip(found.nbest[:20], found.nbest_scores):
        loss = torch.nn.functional.ctc_loss(
            log_probs.transpose(0, 1).double(),
            torch.tensor([tokens]),
            [12],
            [len(tokens)],
            reduction="sum",
        )
        assert score == pytest.approx(-loss.item(), abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_narrow_beam_never_overestimates_and_a_wider_one_never_finds_less(seed):
    log_probs = random_log_probs(1, 5, 4, seed=seed)
    exact = all_sequences(log_probs[0], 0)
    for beam_size in (1, 2, 3, 5):
        (found,) = ctc_prefix_beam_search(log_probs, torch.tensor([5]), beams(beam_size))
        assert 1 <= len(found.nbest) <= beam_size
        assert found.nbest_scores == sorted(found.nbest_scores, reverse=True)
        for tokens, score in zip(found.nbest, found.nbest_scores):
            assert score <= math.log(exact[tuple(tokens)]) + 1e-5


def test_prefix_beam_search_prefers_the_likelier_sequence_to_the_likelier_path():
    # Best path: blank, blank (0.36). Sequence "a": 0.4*0.4 + 2*0.6*0.4 = 0.64.
    log_probs = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()
    assert ctc_greedy_search(log_probs, torch.tensor([2]))[0].tokens == []
    (found,) = ctc_prefix_beam_search(log_probs, torch.tensor([2]), beams(2))
    assert found.tokens == [1]
    assert found.score == pytest.approx(math.log(0.64), abs=1e-6)


@pytest.mark.parametrize("blank_id", [0, 2])
def test_greedy_search_collapses_the_best_path(blank_id):
    log_probs = random_log_probs(4, 30, 3, seed=9)
    lengths = torch.tensor([30, 17, 1, 0])
    for row, length, found in zip(
        log_probs, lengths, ctc_greedy_search(log_probs, lengths, blank_id)
    ):
        best = row[:length].max(dim=-1)
        assert tuple(found.tokens) == collapse(best.indices.tolist(), blank_id)
        assert found.score == pytest.approx(best.values.sum().item(), abs=1e-4)
        assert found.nbest == [found.tokens] and found.nbest_scores == [found.score]


def test_times_are_frames_that_hold_the_token_and_peak_in_greedy_search():
    path = [0, 1, 1, 1, 0, 1, 2, 2, 0]
    peak = [0.9, 0.6, 0.8, 0.7, 0.9, 0.6, 0.7, 0.9, 0.9]
    probabilities = torch.tensor([[(1 - p) / 2] * 3 for p in peak])
    probabilities[range(9), path] = torch.tensor(peak)
    log_probs = probabilities.log()[None]
    lengths = torch.tensor([9])
    (greedy,) = ctc_greedy_search(log_probs, lengths)
    assert (greedy.tokens, greedy.times) == ([1, 1, 2], [2, 5, 7])
    (beam,) = ctc_prefix_beam_search(log_probs, lengths, beams(5))
    assert (beam.tokens, beam.times) == ([1, 1, 2], [3, 5, 7])  # WeNet: the last frame of the run


@pytest.mark.parametrize("seed", range(5))
def test_times_rise_and_number_the_tokens(seed):
    log_probs = random_log_probs(1, 40, 6, seed=seed)
    for found in (
        ctc_greedy_search(log_probs, torch.tensor([40])),
        ctc_prefix_beam_search(log_probs, torch.tensor([40]), beams(8)),
    ):
        for tokens, times in zip(found[0].nbest, found[0].nbest_times):
            assert len(tokens) == len(times) and times == sorted(set(times))
            assert all(0 <= time < 40 for time in times)
            assert all(
                times[i + 1] - times[i] >= 2
                for i in range(len(tokens) - 1)
                if tokens[i] == tokens[i + 1]
            )


@pytest.mark.parametrize(
    "search", [ctc_greedy_search, lambda p, n: ctc_prefix_beam_search(p, n, beams(4))]
)
def test_padding_and_neighbours_change_nothing(search):
    log_probs = random_log_probs(3, 20, 5, seed=10)
    lengths = torch.tensor([20, 11, 0])
    together = search(log_probs, lengths)
    for row, length, found in zip(log_probs, lengths, together):
        assert search(row[None, :length], length[None])[0] == found
    padded = torch.cat([log_probs, torch.full((3, 7, 5), math.nan)], dim=1)
    assert search(padded, lengths) == together
    assert together[2].tokens == [] and together[2].score == 0.0


def peaky_log_probs(*shape, blank_id, seed):
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    logits[..., blank_id] += 9
    logits[:, ::5, seed % shape[-1]] += 10
    logits[:, 2::7, (seed + 1) % shape[-1]] += 8
    return logits.log_softmax(-1)


KINDS = {
    "flat": lambda shape, blank_id, seed: random_log_probs(*shape, seed=seed, sharpness=1.0),
    "peaky": lambda shape, blank_id, seed: peaky_log_probs(*shape, blank_id=blank_id, seed=seed),
    "tied": lambda shape, blank_id, seed: random_log_probs(*shape, seed=seed).round(),
    "alike": lambda shape, blank_id, seed: torch.full(shape, -1.0),
    "impossible": lambda shape, blank_id, seed: random_log_probs(*shape, seed=seed).where(
        random_log_probs(*shape, seed=seed + 1) > -3, -math.inf
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_at_once_and_prefix_by_prefix_are_the_same_to_the_bit_ties_included(kind):
    for seed in range(60):
        vocabulary = 2 + seed % 11
        frames = seed % 23
        beam_size = 1 + seed % 12
        blank_id = seed % 3 % vocabulary
        log_probs = KINDS[kind]((3, frames, vocabulary), blank_id, seed)
        lengths = torch.tensor([frames, frames // 2, max(frames - 1, 0)])
        found = ctc_prefix_beam_search(log_probs, lengths, beams(beam_size), blank_id)
        for row, length, hypothesis in zip(log_probs, lengths, found, strict=True):
            assert plain_prefix_beam_search(row[:length], beam_size, blank_id) == hypothesis
            assert hypothesis[:3] == tuple(part[0] for part in hypothesis[3:])


def test_frames_of_blanks_take_the_short_way_to_the_same(monkeypatch):
    log_probs = peaky_log_probs(2, 120, 60, blank_id=0, seed=5)
    lengths = torch.tensor([120, 90])
    short = decode._advance_by_blank
    taken = []
    monkeypatch.setattr(
        decode, "_advance_by_blank", lambda *args: taken.append(short(*args)) or taken[-1]
    )
    found = ctc_prefix_beam_search(log_probs, lengths, beams(6))
    assert len(taken) == 120 and sum(beam is not None for beam in taken) > 30
    for row, length, hypothesis in zip(log_probs, lengths, found):
        assert plain_prefix_beam_search(row[:length], 6) == hypothesis


def test_a_beam_is_a_value_that_goes_on_in_pieces_of_any_length():
    log_probs = random_log_probs(2, 30, 6, seed=12)
    search = beams(4)
    whole = str(ctc_prefix_beam_search(log_probs, torch.tensor([30, 30]), search))
    beam = decode.prefix_start(2)
    for piece in log_probs.split([7, 0, 1, 22], dim=1):
        before, kept = beam, dict(beam.lists)
        beam = decode.prefix_advance(before, piece, search)
        decode.prefix_advance(before, -piece, search)  # another future changes nothing
        again = decode.prefix_advance(before, piece, search)
        assert str(decode.prefix_result(again)) == str(decode.prefix_result(beam))
        assert before.lists == kept
    assert str(decode.prefix_result(beam)) == whole


def test_a_beam_wider_than_the_vocabulary_and_impossible_tokens_are_fine():
    log_probs = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]).log()
    (found,) = ctc_prefix_beam_search(log_probs, torch.tensor([2]), beams(50))
    assert found.nbest == [[], [1]] or found.nbest == [[1], []]
    assert found.nbest_scores == pytest.approx([math.log(0.5)] * 2)


# Attention


def next_token_log_probs(prefix, vocabulary, salt=0):
    """A language model in which every prefix has a random distribution of its own."""
    seed = hash((salt, *prefix)) % 2**31
    return random_log_probs(vocabulary, seed=seed, sharpness=1.5)


def make_step(vocabulary, beam_size, salts=(0,)):
    """A decoder that checks `parents`: its state holds the prefix that each row was given."""

    def step(prefixes, state, parents):
        rows = prefixes.tolist()
        if parents is None:
            assert state is None and all(row == [SOS] for row in rows)
        else:
            assert [state[parent] for parent in parents.tolist()] == [row[:-1] for row in rows]
            assert (parents // beam_size).tolist() == [i // beam_size for i in range(len(rows))]
        scores = [
            next_token_log_probs(row[1:], vocabulary, salts[i // beam_size])
            for i, row in enumerate(rows)
        ]
        return torch.stack(scores), rows

    return step


def all_endings(vocabulary, max_length, salt):
    """The score of every token sequence that ends in EOS or at max_length."""
    open_ends = {(): 0.0}
    endings = {}
    for _ in range(max_length):
        longer = {}
        for prefix, score in open_ends.items():
            for token, log_prob in enumerate(
                next_token_log_probs(prefix, vocabulary, salt).tolist()
            ):
                (endings if token == EOS else longer)[prefix + (token,)] = score + log_prob
        open_ends = longer
    return {**endings, **open_ends}


def test_attention_beam_search_with_a_beam_that_holds_everything_is_exhaustive_search():
    vocabulary = 4
    max_length = 3
    beam_size = 64
    found = attention_beam_search(
        make_step(vocabulary, beam_size, (1, 2, 3)), 3, max_length, beams(beam_size), SOS, EOS
    )
    for salt, hypothesis in zip((1, 2, 3), found):
        expected = all_endings(vocabulary, max_length, salt)
        best = max(expected, key=expected.get)
        assert hypothesis.tokens == [token for token in best if token != EOS]
        assert hypothesis.nbest_scores == pytest.approx(
            sorted(expected.values(), reverse=True), abs=1e-4
        )


def test_attention_beam_of_one_is_greedy():
    (found,) = attention_beam_search(make_step(6, 1), 1, 8, beams(1), SOS, EOS)
    prefix = []
    score = 0.0
    while len(prefix) < 8:
        log_probs = next_token_log_probs(prefix, 6)
        score += log_probs.max().item()
        if log_probs.argmax().item() == EOS:
            break
        prefix.append(log_probs.argmax().item())
    assert found.tokens == prefix and found.score == pytest.approx(score, abs=1e-4)


def test_attention_beam_search_batched_equals_one_by_one():
    search = beams(4)
    together = attention_beam_search(make_step(7, 4, (5, 6, 7)), 3, 6, search, SOS, EOS)
    for salt, hypothesis in zip((5, 6, 7), together):
        alone = attention_beam_search(make_step(7, 4, (salt,)), 1, 6, search, SOS, EOS)
        assert alone == [hypothesis]


@pytest.mark.parametrize("sharpness", [0.0, 1.5], ids=["tied", "random"])
def test_each_utterance_of_an_attention_beam_search_ends_at_its_own_length(sharpness, monkeypatch):
    monkeypatch.setattr(
        f"{__name__}.next_token_log_probs",
        lambda prefix, vocabulary, salt: random_log_probs(
            vocabulary, seed=hash((salt, *prefix)) % 2**31, sharpness=sharpness
        ),
    )
    for seed in range(25):
        vocabulary = 2 + seed % 6
        beam_size = 1 + seed % 7
        search = beams(beam_size)
        lengths = [seed % 11, 3, 0, 7, 10]
        salts = range(seed, seed + 5)
        step = make_step(vocabulary, beam_size, salts)
        together = attention_beam_search(step, 5, torch.tensor(lengths), search, SOS, EOS)
        for salt, length, hypothesis in zip(salts, lengths, together):
            assert all(len(tokens) <= length for tokens in hypothesis.nbest)
            step = make_step(vocabulary, beam_size, (salt,))
            assert attention_beam_search(step, 1, length, search, SOS, EOS) == [hypothesis]


def test_attention_length_penalty_favours_longer_hypotheses():
    # "2 2 2 eos" is less likely than "eos", but likelier per token.
    def step(prefixes, state, parents):
        ends = torch.tensor([[0.0, 0.4, 0.6]] if prefixes.shape[1] < 4 else [[0.0, 0.9, 0.1]])
        return ends.log().expand(prefixes.shape[0], -1), None

    for penalty, tokens in ((0.0, []), (1.0, [2, 2, 2])):
        search = SearchOptions(beam_size=3, length_penalty=penalty)
        assert attention_beam_search(step, 1, 10, search, SOS, EOS)[0].tokens == tokens


@pytest.mark.parametrize("sos, eos", [(5, 6), (6, 6)])
def test_a_length_penalty_counts_tokens_whatever_the_ids_of_sos_and_eos(sos, eos):
    prefixes = torch.tensor([[sos, 2, 3, 2, eos], [sos, 2, eos, eos, eos]])
    (found,) = rank_beams(prefixes, torch.tensor([[-3.0, -2.0]]), eos, length_penalty=1.0)
    assert found.nbest == [[2, 3, 2], [2]] and found.nbest_scores == [-1.0, -2.0]


def make_scorer(vocabulary, calls):
    """Makes teacher forcing with next_token_log_probs, by the tokens that each node sees.

    Each direction and utterance has distributions of its own.
    """

    def score(tree, reverse):
        calls.append(reverse)
        log_probs = torch.empty(*tree.tokens.shape, vocabulary)
        for row, (tokens, positions, sees) in enumerate(zip(*tree)):
            assert tokens[0] == SOS
            for node in range(len(tokens)):
                before = sorted(
                    sees[node].nonzero()[:, 0].tolist(), key=positions.tolist().__getitem__
                )
                if before[0] == 0:  # else the node is padding
                    assert positions[before].tolist() == list(range(len(before)))
                    assert before[-1] == node
                    log_probs[row, node] = next_token_log_probs(
                        tokens[before[1:]].tolist(), vocabulary, 10 * row + reverse
                    )
                else:
                    assert before == [node] and tokens[node] == EOS
                    log_probs[row, node] = math.nan
        return log_probs

    return score


def sequence_log_prob(tokens, vocabulary, salt):
    return sum(
        next_token_log_probs(tokens[:i], vocabulary, salt)[token].item()
        for i, token in enumerate([*tokens, EOS])
    )


@pytest.mark.parametrize("ctc_weight, reverse_weight", [(0.5, 0.3), (0.0, 0.0), (1.0, 1.0)])
def test_attention_rescoring_is_the_weighted_sum_over_both_directions(ctc_weight, reverse_weight):
    vocabulary = 6
    calls = []
    search = SearchOptions(beam_size=5, ctc_weight=ctc_weight, reverse_weight=reverse_weight)
    log_probs = random_log_probs(3, 9, vocabulary, seed=11)
    ctc = ctc_prefix_beam_search(log_probs, torch.tensor([9, 5, 0]), search)
    turns = attention_rescoring(ctc, make_scorer(vocabulary, calls), search, SOS, EOS)
    found = answered(turns)
    # The whole batch is one call per direction.
    assert calls == ([False, True] if reverse_weight else [False])
    for row, (before, after) in enumerate(zip(ctc, found)):
        expected = {
            tuple(tokens): ctc_weight * score
            + (1 - reverse_weight) * sequence_log_prob(tokens, vocabulary, 10 * row)
            + reverse_weight * sequence_log_prob(tokens[::-1], vocabulary, 10 * row + 1)
            for tokens, score in zip(before.nbest, before.nbest_scores)
        }
        assert {
            tuple(tokens): score for tokens, score in zip(after.nbest, after.nbest_scores)
        } == pytest.approx(expected, abs=1e-4)
        assert after.nbest_scores == sorted(after.nbest_scores, reverse=True)
        assert (after.tokens, after.score, after.times) == (
            after.nbest[0],
            after.nbest_scores[0],
            after.nbest_times[0],
        )
        assert after.times == before.nbest_times[before.nbest.index(after.tokens)]


def test_decoders_give_a_tree_of_hypotheses_what_they_give_each_of_them():
    torch.manual_seed(0)
    net = U2Conformer(ModelOptions(**PRESETS["tiny"]), 80, 12, 0, 10, 11).double().eval()
    encoded = torch.randn(3, 7, 64, dtype=torch.float64)
    lengths = torch.tensor([7, 4, 0])
    nbests = [[[2, 3, 4, 5], [2, 3, 5], [3, 4, 5], [2, 3, 4, 5, 5]], [[]], [[6, 7], [7]]]
    hypotheses = [
        Hypothesis(nbest[0], 0.0, [], nbest, [0.0] * len(nbest), [[]] * len(nbest))
        for nbest in nbests
    ]
    sizes = []

    def score(tree, reverse):
        sizes.append(tree.tokens.shape[1])
        decoder = net.right_decoder if reverse else net.decoder
        return decoder(tree.tokens, encoded, lengths, tree.positions, tree.sees).log_softmax(-1)

    with torch.no_grad():
        found = answered(attention_rescoring(hypotheses, score, SearchOptions(), 10, 11))
        for row, hypothesis in enumerate(found):
            for tokens, total in zip(hypothesis.nbest, hypothesis.nbest_scores):
                expected = 0.0
                for decoder, weight, said in (
                    (net.decoder, 0.7, tokens),
                    (net.right_decoder, 0.3, tokens[::-1]),
                ):
                    logits = decoder(
                        torch.tensor([[10, *said]]), encoded[row : row + 1], lengths[row : row + 1]
                    )
                    labels = torch.tensor([*said, 11])[:, None]
                    expected += weight * logits[0].log_softmax(-1).gather(1, labels).sum().item()
                assert total == pytest.approx(expected, abs=1e-9)
    # <sos> and the 15 tokens of a row, without those that an earlier hypothesis begins (ends) with.
    assert sizes == [1 + 9, 1 + 10]


# Turns of the device and the CPU


def search_in_turns(number, turns, log):
    """A search that reads `turns` tensors, one after the other, and returns their sum."""
    total = 0
    for turn in range(turns):
        log.append((number, turn))
        (read,) = yield (torch.tensor(10 * number + turn),)
        total += int(read)
    return total


@pytest.mark.parametrize("turns", [(), (2,), (2, 2, 2, 2), (0, 3, 1, 0, 2, 5, 1)])
def test_searches_overlap_on_a_card_alone_and_their_results_keep_their_order(turns, monkeypatch):
    expected = [sum(10 * number + turn for turn in range(n)) for number, n in enumerate(turns)]
    log = []
    in_turn = [(number, turn) for number, n in enumerate(turns) for turn in range(n)]
    assert [answered(search_in_turns(*given, log)) for given in enumerate(turns)] == expected
    assert list(overlapped(search_in_turns(*given, log) for given in enumerate(turns))) == expected
    assert log == in_turn * 2

    class Event:
        """Of a card: what was asked for is there once it is waited for."""

        def synchronize(self):
            waits.append(max(number for number, _ in log))

    waits = []  # the newest search that has begun, at each wait
    log.clear()
    fetch = decode.fetch
    monkeypatch.setattr(decode, "fetch", lambda parts: (fetch(parts)[0], Event()))
    assert list(overlapped(search_in_turns(*given, log) for given in enumerate(turns))) == expected
    assert sorted(log) == in_turn and len(waits) == len(in_turn)
    if turns == (2, 2, 2, 2):  # while there are searches to begin, one is ahead of the wait
        assert log == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (3, 0), (2, 1), (3, 1)]
        assert waits == [1, 2, 2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("blank_id", [0, 3])
def test_the_columns_of_the_tokens_are_all_that_alignment_reads(blank_id):
    log_probs = random_log_probs(3, 12, 9, seed=5)
    nbests = [[[1, 2, 2, 8], [5, 1]], [[]], [[7, 7, 7], [blank_id, 1], [6] * 13]]
    picked, columns = decode.columns_of(log_probs, nbests, blank_id)
    assert picked.shape[2] == max(map(len, columns)) < 9
    for nbest, row, of_row, used in zip(nbests, log_probs, picked, columns):
        found = Hypothesis(nbest[0], 0.0, [], nbest, [0.0] * len(nbest), [[]] * len(nbest))
        expected = decode.align(found, row, 11, blank_id)
        assert decode.align(found, of_row, 11, blank_id, used) == expected
        assert any(expected.nbest_times) == any(nbest)


# WeNet's results


@pytest.mark.skipif(not GOLDEN.exists(), reason="WeNet's results (../shared/golden) are not here")
def test_ctc_searches_return_what_wenet_returns():
    golden = torch.load(GOLDEN, weights_only=True)
    expected = json.loads(golden["decode"])
    log_probs = golden["ctc_log_probs_full"]
    lengths = golden["encoder_lengths"]
    for found, wanted in zip(
        ctc_greedy_search(log_probs, lengths), expected["ctc_greedy_search"], strict=True
    ):
        assert found.tokens == wanted["tokens"]
    searched = ctc_prefix_beam_search(log_probs, lengths, beams(5))
    for found, wanted in zip(searched, expected["ctc_prefix_beam_search"], strict=True):
        assert (found.tokens, found.times, found.nbest) == (
            wanted["tokens"],
            wanted["times"],
            wanted["nbest"],
        )
        assert found.score == pytest.approx(wanted["score"], abs=1e-9)
        assert found.nbest_scores == pytest.approx(wanted["nbest_scores"], abs=1e-9)


def test_alignment_takes_the_best_ctc_path_of_the_tokens():
    torch.manual_seed(0)
    log_probs = torch.randn(7, 4).log_softmax(-1)
    tokens = [1, 1, 2]
    paths = [
        path
        for path in itertools.product(range(4), repeat=7)
        if [token for token, _ in itertools.groupby(path) if token] == tokens
    ]
    best = max(
        paths, key=lambda path: sum(float(log_probs[t, token]) for t, token in enumerate(path))
    )
    runs = [list(run) for token, run in itertools.groupby(range(7), key=best.__getitem__) if token]
    expected = [max(run, key=lambda t: float(log_probs[t, best[t]])) for run in runs]
    hypothesis = Hypothesis(tokens, 0.0, [], [tokens, [3] * 5], [0.0, 0.0], [[], []])
    aligned = decode.align(hypothesis, log_probs, 7)
    # Five threes have no path in 7 frames.
    assert aligned.times == expected and aligned.nbest_times == [expected, []]
