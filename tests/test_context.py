"""context.py gives the bonus of its definition; hotwords act in the search and in the commands."""

import json
import math
import random

from cli import UserError

import numpy as np
import pytest
import torch

import score
from context import HotwordOptions, load_hotwords, make_graph
from decode import ctc_prefix_beam_search, prefix_advance, prefix_result, prefix_start
from helpers import all_sequences, beams, random_log_probs
from helpers_model import score_json
from model import U2
from tokenizer import Tokenizer, train_bpe, train_char


def walk(graph, tokens):
    """The bonus that the tokens have earned so far, and how much of it is pending."""
    state = np.zeros((), np.int64)
    total = 0.0
    for token in tokens:
        state, bonus = graph.step(state, np.array(token))
        total += float(bonus)
    return total, float(graph.pending(state))


def ends_with(tokens, phrase):
    return len(phrase) <= len(tokens) and tokens[len(tokens) - len(phrase) :] == phrase


def bonus_by_definition(phrases, score, tokens):
    """The bonus of all phrases in the tokens, and of the longest beginning at their end."""
    kept = sum(
        score * len(phrase)
        for end in range(len(tokens) + 1)
        for phrase in set(phrases)
        if ends_with(tokens[:end], phrase)
    )
    begun = [
        phrase[:size]
        for phrase in phrases
        for size in range(1, len(phrase) + 1)
        if ends_with(tokens, phrase[:size])
    ]
    return kept, score * max(map(len, begun), default=0)


def test_the_bonus_is_that_of_all_whole_phrases_and_of_the_one_that_has_begun():
    draw = random.Random(0)
    for _ in range(300):
        phrases = [
            tuple(draw.choices(range(3), k=draw.randint(1, 4))) for _ in range(draw.randint(1, 5))
        ]
        graph = make_graph([(list(phrase), 1.5) for phrase in phrases])
        tokens = tuple(draw.choices(range(4), k=12))
        for size in range(13):
            total, pending = walk(graph, tokens[:size])
            kept, begun = bonus_by_definition(phrases, 1.5, tokens[:size])
            assert (total, pending) == (pytest.approx(kept + begun), begun)


def test_a_token_of_two_phrases_has_the_larger_bonus():
    phrases = [([1, 2], 1.0), ([1, 3], 5.0)]
    for graph in make_graph(phrases), make_graph(phrases[::-1]):
        assert walk(graph, [1]) == (5.0, 5.0)
        assert walk(graph, [1, 2]) == (2 * 6.0, 6.0) and walk(graph, [1, 3]) == (2 * 10.0, 10.0)
        assert walk(graph, [1, 2, 4]) == (6.0, 0.0) and walk(graph, [1, 4]) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_log_probability_and_bonus_of_whole_phrases_when_the_beam_holds_every_prefix(
    seed,
):
    log_probs = random_log_probs(2, 4, 4, seed=seed)
    lengths = torch.tensor([4, 3])
    phrases = [(1, 2), (2, 3, 1), (3,)]
    graph = make_graph([(list(phrase), 0.8) for phrase in phrases])
    hypotheses = ctc_prefix_beam_search(log_probs, lengths, beams(1000), 0, graph)
    for row, length, found in zip(log_probs, lengths, hypotheses):
        expected = {
            tokens: math.log(probability) + bonus_by_definition(phrases, 0.8, tokens)[0]
            for tokens, probability in all_sequences(row[:length], 0).items()
        }
        assert dict(zip(map(tuple, found.nbest), found.nbest_scores)) == pytest.approx(
            expected, abs=1e-5
        )
        assert found.nbest_scores == sorted(found.nbest_scores, reverse=True)
        assert list(map(len, found.nbest_times)) == list(map(len, found.nbest))


def test_a_phrase_wins_over_a_likelier_neighbour_and_a_broken_one_does_not():
    probabilities = torch.full((1, 5, 5), 0.001)
    for frame, token in enumerate((1, 0, 2, 0, 3)):
        probabilities[0, frame, token] = 0.6
    probabilities[0, 2, 4] = 0.3  # so that 1 4 3 is half as likely as 1 2 3
    log_probs = (probabilities / probabilities.sum(-1, keepdim=True)).log()

    def heard(*phrases, score=1.0):
        graph = make_graph([(list(phrase), score) for phrase in phrases]) if phrases else None
        return ctc_prefix_beam_search(log_probs, torch.tensor([5]), beams(5), 0, graph)[0].tokens

    assert heard() == heard((1, 4, 4)) == [1, 2, 3]
    assert heard((1, 4, 3)) == heard((4,)) == [1, 4, 3]
    assert heard((4,), score=0.5) == [1, 2, 3]  # less than log 2


def test_phrases_that_never_occur_change_nothing_in_one_piece_or_many():
    log_probs = random_log_probs(2, 40, 8, seed=1, sharpness=4.0)
    lengths = torch.tensor([40, 31])
    search = beams(5)
    graph = make_graph([([100, 101], 3.0)])
    found = ctc_prefix_beam_search(log_probs, lengths, search, 0, graph)
    assert found == ctc_prefix_beam_search(log_probs, lengths, search, 0)
    graph = make_graph([([1, 2], 1.0), ([2, 1, 3], 2.0)])
    beam = prefix_start(1, graph)
    for piece in log_probs[:1].split(7, dim=1):
        beam = prefix_advance(beam, piece, search)
        prefix_result(beam)  # the bonus that is given back here is not missing later
    whole = ctc_prefix_beam_search(log_probs[:1], lengths[:1], search, 0, graph)
    assert prefix_result(beam) == whole


@pytest.mark.parametrize("stream", [[], ["--stream", "--chunk_size", 4]])
def test_score_hears_hotwords_and_says_that_it_was_given_them(world, capsys, tmp_path, stream):
    words = tmp_path / "words.txt"
    details = tmp_path / "details"
    words.write_text("fox\n")
    # With a beam of 20, a frame offers every token.
    argv = [*stream, "--beam_size", 20, "--details", details]
    (plain,) = score_json(capsys, world, *argv)
    assert "fox" not in details.read_text() and "hotwords" not in plain
    (found,) = score_json(capsys, world, *argv, "--hotwords", words, "--context_score", 20)
    heard = [json.loads(line)["hypothesis"] for line in details.read_text().splitlines()]
    assert sum("fox" in text for text in heard) > 3
    assert (found["hotwords"], found["context_score"]) == (str(words), 20.0)


# The file


def test_a_line_is_a_phrase_with_its_own_score_or_the_common_one(tmp_path):
    path = tmp_path / "words.txt"
    tokenizer = train_char(["new york"])
    path.write_text("new york\n\n   \n  york   :2.5 \n")
    graph = load_hotwords(str(path), tokenizer, 1.0)
    assert walk(graph, tokenizer.encode("new york")) == (8 + 4 * 2.5 + 8, 8.0)
    assert walk(graph, tokenizer.encode("york")) == (2 * 10.0, 10.0)


def test_pieces_of_words_are_phrases_too(tmp_path):
    path = tmp_path / "words.txt"
    tokenizer = train_bpe(["new york new york newer"], 20)
    path.write_text("york\n")
    _, pending = walk(load_hotwords(str(path), tokenizer, 1.0), tokenizer.encode("new york"))
    assert pending == len(tokenizer.encode("york")) < len("york")


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("one\ntwö\n", "line 2: the tokenizer cannot spell 'ö';"),
        ("two\u200b\n", "line 1: the tokenizer cannot spell U+200B;"),
        ("\ufeffone\n\ufefftwo\n", "line 2: the tokenizer cannot spell U+FEFF;"),
        ("one\u2028two z\n", "cannot spell 'z';"),
        ("o\u0308ne\n", "cannot spell 'ö';"),
        ("w\u0308o\n", "cannot spell 'ẅ';"),
        ("a\u0301\u0301\n", "cannot spell 'á' U+0301;"),
        ("One\n", "line 1: the tokenizer cannot spell 'O';"),
        ("one :two\n", "line 1: :two is no score"),
        ("one :-1\n", "line 1: :-1 is no score"),
        ("one :nan\n", "line 1: :nan is no score"),
        ("\n \n", "no phrase in it"),
        (None, "cannot be read (No such file"),
        (b"\xff\xfe", "cannot be read (not UTF-8)"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, text, complaint):
    path = tmp_path / "words.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as raised:
        load_hotwords(str(path), train_char(["one two"]), 1.0)
    assert complaint in str(raised.value) and str(raised.value).startswith(f"--hotwords {path}")


@pytest.mark.parametrize(
    "text", ["caf\u00e9", "cafe\u0301", "\ufeffcafe\u0301\r\n", "\ufeff\n caf\u00e9 "]
)
def test_a_phrase_may_be_decomposed_and_behind_a_byte_order_mark(tmp_path, text):
    path = tmp_path / "words.txt"
    tokenizer = train_char(["un caf\u00e9"])
    path.write_bytes(text.encode())
    graph = load_hotwords(str(path), tokenizer, 1.0)
    assert walk(graph, tokenizer.encode("caf\u00e9")) == (2 * 4.0, 4.0)


def test_a_vocabulary_without_an_unknown_token_leaves_nothing_out(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("abc\n")
    tokenizer = Tokenizer(
        tokens=["<blank>", "a", "b", "<sos>", "<eos>"], blank_id=0, unk_id=0, sos_id=3, eos_id=4
    )
    with pytest.raises(UserError, match="cannot spell 'c';"):
        load_hotwords(str(path), tokenizer, 1.0)


def test_flags_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="--context_score has no effect without --hotwords"):
        HotwordOptions(context_score=2.0)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="above 0"):
            HotwordOptions(hotwords="words.txt", context_score=value)
    for mode in ("ctc_greedy_search", "attention"):
        with pytest.raises(UserError, match=f"--mode {mode} cannot favour --hotwords"):
            score.main(["--mode", mode, "--hotwords", "words.txt"])
        with pytest.raises(UserError, match=f"mode {mode} cannot favour hotwords"):
            next(U2.searching(None, None, None, mode, beams(5), make_graph([([1], 1.0)])))
