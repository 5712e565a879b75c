"""ngram.py scores words as the model's definition does; tools/lm.py makes models and graphs."""

import itertools
import json
import math
import os
import random
import struct
from pathlib import Path

from cli import UserError

import numpy as np
import pytest
import soundfile
import torch

import score
import transcribe
from context import make_graph
from decode import (
    SearchOptions,
    check_mode,
    ctc_prefix_beam_search,
    prefix_advance,
    prefix_result,
    prefix_start,
)
from helpers import all_sequences, beams, collapse, earned, one_line, random_log_probs
from helpers_model import TEXTS, call, score_json, waveform, write_split
from ngram import Both, LmOptions, load_lm, make_ngrams, read_arpa
from tokenizer import from_vocab, save_tokenizer, train_bpe, train_char
from tools.lm import arpa_text, main, train
from wfst import Graph, load_graph
from words import spell

SENTENCES = ["a b ab", "ab a", "b a ab ab", "a", "abba a b"]
CHINESE = ["你 好 a 吗", "好 ab 吗 你", "a 你"]
SIGNS = ["「你 好」 a", "a( b 「ab」 ガー 好", "“你 ”好 (a) 「"]


def write_lm(path, sentences=SENTENCES, order=3) -> str:
    path.write_text(arpa_text(*train([line.split() for line in sentences], order)))
    return str(path)


def by_definition(grams, words) -> float:
    """The log-probability of a sentence: of the longest n-gram there is, backing off to it."""
    sentence = ["<s>", *(word if (word,) in grams else "<unk>" for word in words), "</s>"]
    total = 0.0
    for end in range(1, len(sentence)):
        gram = tuple(sentence[: end + 1])
        while gram not in grams:
            total += grams.get(gram[:-1], (0.0, 0.0))[1]
            gram = gram[1:]
        total += grams[gram][0]
    return total


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_probabilities_behind_each_history_add_up_to_one(order):
    draw = random.Random(order)
    sentences = [draw.choices("abcdefgh", k=draw.randint(1, 9)) for _ in range(200)]
    models, backoffs = train(sentences, order)
    ngrams = make_ngrams(
        {
            words: (math.log(p), math.log(backoffs.get(words, 1.0)))
            for model in [{("<s>",): 1e-99}, *models]
            for words, p in model.items()
        }
    )
    words = np.array([n for word, n in ngrams.words.items() if word != "<s>"])
    said, _ = ngrams.say(np.arange(len(ngrams.link))[:, None], words)
    assert np.exp(said).sum(1) == pytest.approx(1.0)


def test_a_small_model_has_the_figures_of_a_hand():
    """Discounts 0.5, 1 and 1.5: too few counts to estimate them."""
    models, backoffs = train([["a", "b"], ["a"]], 2)
    # Behind <s>, a, and b stand 5 different pairs: <s> a; a b, a </s>; b </s>.
    assert backoffs[()] == pytest.approx((0.5 + 0.5 + 1.0) / 4)
    unigram = {"a": 0.5 / 4 + 0.125, "b": 0.5 / 4 + 0.125, "</s>": 1.0 / 4 + 0.125, "<unk>": 0.125}
    assert models[0] == pytest.approx({(word,): p for word, p in unigram.items()})
    assert models[1]["<s>", "a"] == pytest.approx((2 - 1) / 2 + 0.5 * unigram["a"])
    assert models[1]["a", "b"] == pytest.approx((1 - 0.5) / 2 + 0.5 * unigram["b"])


VOCAB = {token: i for i, token in enumerate(["<pad>", "|", "A", "B", "C", "AB"])}


@pytest.mark.parametrize(
    "tokenizer, sentences",
    [
        (train_char(["a bc"]), SENTENCES),
        (train_bpe(["ab ab abba a b c"] * 9, 16), SENTENCES),
        (from_vocab(VOCAB, {}, {"do_lower_case": True}), SENTENCES),
        (train_char(["a bc你好吗"]), CHINESE),
        (train_char(["a b你好「」“”()ガー"]), SIGNS),
        (train_bpe(3 * ["你好 吗", "好ab 吗你", "ab好 你ab"], 40), CHINESE),
        (train_bpe(3 * [*SIGNS, "你好ab「ab」ガー「好"], 60), SIGNS),
    ],
    ids=["char", "bpe", "wav2vec2", "chinese", "signs", "bpe-chinese", "bpe-signs"],
)
def test_tokens_earn_what_their_words_are_worth_in_whatever_pieces(tokenizer, sentences, tmp_path):
    path = write_lm(tmp_path / "lm", sentences)
    grams = read_arpa(path)
    lm = load_lm(path, tokenizer, 0.7, 0.3)
    graph = make_graph([([5, 6], 1.5)])
    draw = random.Random(0)
    tokens = [t for t in range(tokenizer.vocab_size) if tokenizer.texts([t]) != [""]]
    for _ in range(200):
        drawn = draw.choices(tokens, k=draw.randint(0, 9))
        words = [word.text for word in spell(drawn, tokenizer)]
        expected = 0.7 * by_definition(grams, words) + 0.3 * len(words)
        assert earned(lm, drawn) == pytest.approx(expected), words
        assert earned(Both(lm, graph), drawn) == pytest.approx(expected + earned(graph, drawn))


@pytest.mark.parametrize(
    "tokenizer, sentences",
    [
        (train_char(["a b"]), [*SENTENCES, *["b ab"] * 9]),
        (train_bpe(3 * ["你好吗 你好", "好吗你 ab你"], 40), [*CHINESE, *["你 好 吗"] * 9]),
    ],
    ids=["char", "bpe-chinese"],
)
def test_no_tokens_earn_more_than_was_hoped_for(tokenizer, sentences, tmp_path):
    path = write_lm(tmp_path / "lm", sentences)
    graph = make_graph([([5, 6], 1.5), ([5, 6, 4], 0.5), ([6], 3.0)])
    draw = random.Random(0)
    for bonus in (-1.0, 0.0, 5.0):
        lm = load_lm(path, tokenizer, 0.7, bonus)
        for automaton in (lm, graph, Both(lm, graph)):
            for _ in range(100):
                tokens = draw.choices(range(4, tokenizer.vocab_size), k=draw.randint(0, 6))
                cut = draw.randint(0, len(tokens))
                state = so_far = np.zeros((), np.int64)
                for token in tokens[:cut]:
                    state, gain = automaton.step(state, np.array(token))
                    so_far = so_far + gain
                hope = automaton.hope(state, np.array(len(tokens) - cut))
                assert earned(automaton, tokens) - so_far <= hope + 1e-9


def test_scores_are_log_probability_and_language_model_when_the_beam_holds_every_prefix(tmp_path):
    tokenizer = train_char(["a b"])
    path = write_lm(tmp_path / "lm")
    lm = load_lm(path, tokenizer, 0.7, 0.3)
    log_probs = random_log_probs(2, 3, tokenizer.vocab_size)
    for row, found in zip(
        log_probs, ctc_prefix_beam_search(log_probs, torch.tensor([3, 3]), beams(1000), 0, lm)
    ):
        expected = {
            tokens: math.log(probability) + earned(lm, tokens)
            for tokens, probability in all_sequences(row, 0).items()
        }
        assert dict(zip(map(tuple, found.nbest), found.nbest_scores)) == pytest.approx(expected)
        assert found.nbest_scores == sorted(found.nbest_scores, reverse=True)


def test_a_batch_hears_what_single_rows_hear_in_one_piece_or_many(tmp_path):
    tokenizer = train_char(["a b"])
    lm = load_lm(write_lm(tmp_path / "lm"), tokenizer, 5.0, 0.3)
    log_probs = random_log_probs(3, 40, tokenizer.vocab_size)
    lengths = torch.tensor([40, 31, 7])
    batch = ctc_prefix_beam_search(log_probs, lengths, beams(5), 0, lm)
    plain = ctc_prefix_beam_search(log_probs, lengths, beams(5), 0)
    assert [row.tokens for row in batch] != [row.tokens for row in plain]
    for row, length, found in zip(log_probs, lengths, batch):
        beam = prefix_start(1, lm)
        for piece in row[None, :length].split(7, dim=1):
            beam = prefix_advance(beam, piece, beams(5))
            prefix_result(beam)  # what is given back here is not missing later
        assert prefix_result(beam) == [found]


@pytest.mark.parametrize(
    "stream",
    [[], ["--stream", "--chunk_size", 4], ["--stream", "--chunk_size", 4, "--mode", "joint"]],
    ids=["whole", "stream", "joint"],
)
def test_score_favours_a_model_by_its_weight_and_without_weight_not(
    world, capsys, tmp_path, stream
):
    lm = write_lm(tmp_path / "lm", ["g z g z", "z g"])
    runs = []
    for more in (
        [],
        ["--lm", lm, "--lm_weight", 0],
        ["--lm", lm, "--lm_weight", 20.0, "--word_bonus", 40],
    ):
        details = tmp_path / "details"
        (scores,) = score_json(
            capsys, world, *stream, "--beam_size", 20, "--details", details, *more
        )
        runs.append((details.read_text(), scores.get("lm_weight")))
    assert runs[0] == runs[1] and runs[2][1] == 20.0
    assert "g z" not in runs[0][0] and "g z" in runs[2][0]


@pytest.mark.parametrize("way", ["whole", "stream", "graph"])
def test_transcribe_hears_by_a_language_model_and_keeps_the_times_of_words(
    world, capsys, tmp_path, way
):
    if way == "graph":
        pytest.importorskip("kaldi_decoder", reason="graphs need kaldifst and kaldi-decoder")
        favours = "--graph", write_graph(tmp_path, train_char(TEXTS), "--closed", sentences=TEXTS)
    else:
        favours = "--lm", write_lm(tmp_path / "lm", ["g z g z", "z g"])
        favours += "--lm_weight", 20.0, "--word_bonus", 40, "--beam_size", 20
    path = tmp_path / "a.wav"
    soundfile.write(path, waveform(0), 16000)
    argv = ["--checkpoint", world / "best.ckpt", "--format", "json", path]
    argv += ["--stream"] * (way == "stream")
    plain, heard = (call(capsys, transcribe, *argv, *more)[1] for more in ((), favours))
    plain, heard = json.loads(plain[0]), json.loads(heard[0])
    assert plain["text"] != heard["text"] == " ".join(word["word"] for word in heard["words"])
    known = set(" ".join(TEXTS).split()) if way == "graph" else {"g", "z"}
    assert known & set(heard["text"].split())
    ends = [0, *(time for word in heard["words"] for time in (word["start"], word["end"]))]
    assert ends == sorted(ends) and ends[-1] <= heard["duration"] + 1e-3


@pytest.mark.parametrize(
    "before, after",
    [
        ("-99 <s>", "-inf <s>"),  # as KenLM
        ("-1 </s>", "-1 </s>\n-1 <UNK>"),  # as SRILM for Kaldi, of the score that it has here
        ("0 a </s>", "1e-9 a </s>"),  # as where rounding put it
        ("ngram 2=2", "ngram 2=3"),  # as where one was taken out
        ("\\data\\", "p_1 wd_1\n\\1-grams:\np_1 wd_1 bo_wt_1\n\\data\\"),  # as CMU's toolkit
    ],
)
def test_models_of_other_toolkits_are_the_same_model(tmp_path, before, after):
    path = tmp_path / "lm"
    text = "\\data\\\nngram 1=3\nngram 2=2\n\\1-grams:\n-99 <s> -0.3\n-1 </s>\n-1 a -0.3\n"
    text += "\\2-grams:\n-0.3 <s> a\n0 a </s>\n\\end\\\n"
    path.write_text(text)
    expected = read_arpa(str(path))
    assert before in text
    path.write_text(text.replace(before, after))
    assert read_arpa(str(path)) == expected
    assert expected["<unk>",] == expected["a",][:1] + (0.0,)  # the rarest word that there is


def test_where_both_are_there_unk_is_the_unknown_word_and_UNK_another(tmp_path):
    path = tmp_path / "lm"
    path.write_text("\\1-grams:\n-1 </s>\n0 <UNK>\n-2 <unk>\n\\end\\")
    grams = read_arpa(str(path))
    assert grams["<UNK>",] == (0.0, 0.0) and grams["<unk>",][0] == pytest.approx(-2 * math.log(10))


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "no ARPA language model"),
        ("\\data\\\n\\1-grams:\n-1 a\n", "no ARPA language model"),
        ("\\1-grams:\n-1 </s>\n\\2-grams:\n-1 a b\n\\end\\", "b is not among its 1-grams"),
        ("\\1-grams:\n-1 </s>\n", "it is cut short"),
        ("\\data\\\nngram 1=1\nngram 2=1\n\\1-grams:\n-1 </s>\n\\end\\", "it is cut short"),
        ("\\1-grams:\n-1 </s>\nx a\n", "line 3: x a is no 1-gram"),
        ("\\1-grams:\n-1 </s>\nnan a\n", "line 3: nan a is no 1-gram"),
        ("\\1-grams:\n-1 a b c\n", "line 2: -1 a b c is no 1-gram"),
        ("\\1-grams:\n0.5 a\n", "line 2: 0.5 a is no 1-gram"),
        (f"ngram 1={5000 * '9'}\n\\{5000 * '9'}-grams:\n-1 a\n", "no ARPA language model"),
        (None, "cannot be read (No such file"),
        (b"\xff\xfe", "cannot be read (not UTF-8); give a language model in ARPA format, unpacked"),
    ],
)
def test_what_is_wrong_with_a_model_is_one_line(tmp_path, text, complaint):
    path = tmp_path / "lm"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as raised:
        read_arpa(str(path))
    assert complaint in one_line(raised) and str(raised.value).startswith(f"--lm {path}")


@pytest.mark.parametrize("texts", [["a b"], ["ab"], ["你好"]])
def test_a_model_of_other_letters_is_refused_and_one_of_few_is_noted(tmp_path, capsys, texts):
    tokenizer = train_char(texts)
    with pytest.raises(UserError) as raised:
        load_lm(write_lm(tmp_path / "lm", ["X Y Z"]), tokenizer, 0.7)
    assert "spells none of its 3 words; case counts" in one_line(raised)
    load_lm(write_lm(tmp_path / "lm", [f"X Y {texts[0][0]}"]), tokenizer, 0.7)
    assert "spells 1 of its 3 words" in capsys.readouterr().err
    load_lm(write_lm(tmp_path / "lm", [f"X {texts[0][0]}"]), tokenizer, 0.7)
    assert capsys.readouterr().err == ""


def test_words_of_several_chinese_characters_are_noted(tmp_path, capsys):
    path = write_lm(tmp_path / "lm", ["你好 吗", "好"])
    load_lm(path, train_char(["你好吗"]), 0.7)
    assert "1 of its 3 words count as unknown" in capsys.readouterr().err
    path = write_lm(tmp_path / "lm", ["你好", "好吗 你好"])
    with pytest.raises(UserError) as raised:
        load_lm(path, train_char(["你好吗"]), 0.7)
    assert "2 of its 2 words count as unknown" in one_line(raised)


def test_of_words_that_are_spelled_alike_the_likeliest_counts(tmp_path):
    tokenizer = from_vocab(VOCAB, {}, {"do_lower_case": True})
    for sentences in ["A B", "a b", "a b"], ["a B", "A b", "A b"]:
        path = write_lm(tmp_path / "lm", sentences, 1)
        a, b = (max(read_arpa(path)[name,][0] for name in (c, c.upper())) for c in "ab")
        end = read_arpa(path)["</s>",][0]
        drawn = tokenizer.encode("a b")
        assert earned(load_lm(path, tokenizer, 1.0), drawn) == pytest.approx(a + b + end)


def test_flags_that_mean_nothing_are_refused(tmp_path):
    for flags in {"lm_weight": 2.0}, {"word_bonus": 1.0}:
        with pytest.raises(UserError, match="has no effect without --lm"):
            LmOptions(**flags)
    for mode, flag in ("attention", "--lm"), ("joint", "--graph"):
        with pytest.raises(UserError, match=f"--mode {mode} cannot favour {flag}"):
            score.main(["--mode", mode, flag, "lm"])
    with pytest.raises(UserError, match="mode joint cannot favour a graph; choose one of ctc_p"):
        check_mode("joint", Graph(None))
    text = tmp_path / "text"
    for name in ("text", "tokenizer.json", "config.json"):
        (tmp_path / name).write_text("\n \n")
    for argv, complaint in (
        ([], "give one of"),
        (["--text", text], "give --out"),
        (["--lm", text], "give --graph, too"),
        (["--text", text, "--out", "x", "--graph", "x"], "together"),
        (["--text", text, "--out", "x"], "no word in it"),
        (["--text", text, "--out", text], "is what this command reads"),
        (["--data_root", tmp_path, "--out", tmp_path / "tokenizer.json"], "is what this command"),
        (["--lm", "x", "--checkpoint", tmp_path, "--graph", tmp_path / "config.json"], "reads"),
        (["--data_root", tmp_path, "--out", text], "exists and is no language model in ARPA"),
        (["--lm", "x", "--checkpoint", "y", "--graph", text], "exists and is no graph"),
        (["--text", text, "--out", "x", "--graph", "./x", "--checkpoint", "y"], "are both x"),
        (["--text", tmp_path / "gone", "--out", "x"], "cannot be read (No such file"),
    ):
        with pytest.raises(UserError) as raised:
            main(list(map(str, argv)))
        assert complaint in one_line(raised)


def test_a_model_is_made_anew_in_its_place_of_lines_that_end_in_any_way(tmp_path):
    made = []
    for ends in ("\n", "\r\n", "\r"):
        (tmp_path / "text").write_bytes(f"a b{ends}b{ends}".encode())
        main(["--text", str(tmp_path / "text"), "--out", str(tmp_path / "lm")])
        made.append((tmp_path / "lm").read_text())
    assert "b b" not in made[0] and made[0] == made[1] == made[2]


def test_what_is_wrong_with_the_words_is_said_of_the_file_they_are_from(tmp_path):
    data = tmp_path / "data"
    tokenizer = train_char(["hello <unk> world"])
    write_split(data / "train", tokenizer, texts=["hello <unk> world", "hello"])
    save_tokenizer(tokenizer, str(data / "tokenizer.json"))
    with pytest.raises(UserError) as raised:
        main(["--data_root", str(data), "--out", str(tmp_path / "lm")])
    assert one_line(raised) == f"{data}: <unk> stands for no word; take it out"
    pytest.importorskip("kaldi_decoder", reason="graphs need kaldifst and kaldi-decoder")
    text = tmp_path / "text"
    text.write_text("XX YY")
    given = {"text": text, "out": tmp_path / "lm", "graph": tmp_path / "graph"}
    with pytest.raises(UserError) as raised:
        main([f"--{k}={v}" for k, v in {**given, "checkpoint": data / "tokenizer.json"}.items()])
    assert one_line(raised).startswith(f"{tmp_path / 'lm'}: the checkpoint's tokenizer spells none")


# Graphs


def by_paths(grams, words) -> float:
    """What by_definition gives, but a graph may back off although it knows the longer n-gram."""
    scores = {("<s>",): 0.0}
    for word in [*(word if (word,) in grams else "<unk>" for word in words), "</s>"]:
        behind = {}
        for history, total in scores.items():
            for start in range(len(history) + 1):
                if gram := grams.get((*history[start:], word)):
                    key = (*history[start:], word)[-2:]
                    behind[key] = max(behind.get(key, -math.inf), total + gram[0])
                total += grams.get(history[start:], (0.0, 0.0))[1]
        scores = behind
    return max(scores.values())


def write_graph(folder, tokenizer, *more, sentences=SENTENCES) -> str:
    """Writes the graph of sentences, with the weight and the bonus of the other tests."""
    save_tokenizer(tokenizer, str(folder / "tokenizer.json"))
    flags = {"lm": write_lm(folder / "lm", sentences), "checkpoint": folder / "tokenizer.json"}
    flags |= {"graph": folder / "HLG.fst", "lm_weight": 0.7, "word_bonus": 0.3}
    main([*(f"--{name}={value}" for name, value in flags.items()), *more])
    return str(folder / "HLG.fst")


@pytest.mark.parametrize("closed", [False, True])
def test_a_graph_finds_the_likeliest_paths_and_knows_the_language_model(tmp_path, closed):
    pytest.importorskip("kaldi_decoder", reason="graphs need kaldifst and kaldi-decoder")
    tokenizer = train_char(["a b"])
    path = write_graph(tmp_path, tokenizer, *(["--closed"] if closed else []))
    graph = load_graph(path, tokenizer.vocab_size)
    grams = read_arpa(str(tmp_path / "lm"))
    for seed in range(5):
        log_probs = random_log_probs(1, 4, tokenizer.vocab_size, seed=seed)
        best = {}
        for path in itertools.product(range(tokenizer.vocab_size), repeat=4):
            tokens = collapse(path, 0)
            total = sum(log_probs[0, t, v].item() for t, v in enumerate(path))
            best[tokens] = max(best.get(tokens, -math.inf), total)
        vocabulary = set(" ".join(SENTENCES).split())
        expected = {}
        for tokens, total in best.items():
            text = "".join(tokenizer.texts(tokens))
            words = text.split(" ") if tokens else []
            known = not closed or vocabulary.issuperset(words)
            if all(words) and known and not {1, 2, 3} & set(tokens):
                lm = 0.7 * by_paths(grams, words) + 0.3 * len(words)
                expected[tokens] = total + lm
        (found,) = graph.search(log_probs, torch.tensor([4]), 10, 0)
        first = sorted(expected, key=expected.get, reverse=True)[: len(found.nbest)]
        assert list(map(tuple, found.nbest)) == first and len(first) > 3
        assert found.nbest_scores == pytest.approx([expected[tokens] for tokens in first], abs=1e-3)
        assert len(found.times) == len(found.tokens)


OF_PIECES = train_bpe(3 * ["ab ab ab ba ba ab zb bz"], 12)  # z begins no piece with a space


@pytest.mark.parametrize(
    "tokenizer, said",
    [
        *((train_char(["你好吗们 ab"]), said) for said in ("你好吗", "吗", "吗 b们", "你 ab")),
        *((OF_PIECES, said) for said in ("ab", "ba aab", "z", "ab zb ab")),
    ],
)
def test_a_graph_also_says_what_its_model_lacks(tmp_path, tokenizer, said):
    pytest.importorskip("kaldi_decoder", reason="graphs need kaldifst and kaldi-decoder")
    path = write_graph(tmp_path, tokenizer, sentences=["你 好 ab"])
    model = load_lm(str(tmp_path / "lm"), tokenizer, 0.7, 0.3)
    tokens = tokenizer.encode(said)
    log_probs = torch.full((1, 2 * len(tokens), tokenizer.vocab_size), -12.0)
    log_probs[0, ::2, 0] = 0.0  # blank
    log_probs[0, range(1, 2 * len(tokens), 2), tokens] = 0.0
    length = torch.tensor([2 * len(tokens)])
    (found,) = load_graph(path, tokenizer.vocab_size).search(log_probs, length, 10, 0)
    (meant,) = ctc_prefix_beam_search(log_probs, length, SearchOptions(beam_size=10), 0, model)
    assert tokenizer.decode(found.tokens) == tokenizer.decode(meant.tokens) == said
    assert found.score == pytest.approx(meant.score, abs=0.01)


def test_score_searches_a_graph_and_refuses_what_is_none(world, capsys, tmp_path):
    pytest.importorskip("kaldi_decoder", reason="graphs need kaldifst and kaldi-decoder")
    kaldifst = pytest.importorskip("kaldifst")
    details = tmp_path / "details"
    path = write_graph(tmp_path, train_char(TEXTS), sentences=TEXTS)
    (scores,) = score_json(capsys, world, "--graph", path, "--details", details)
    assert scores["graph"] == path and scores["utterances"] == len(TEXTS)
    assert not {"lm", "lm_weight", "word_bonus"} & set(scores)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="a pipe or a device"):
        load_graph(str(tmp_path / "fifo"), 9)
    bad = tmp_path / "bad"
    whole = Path(path).read_bytes()
    graph = kaldifst.StdVectorFst.read(path)
    first = next(iter(kaldifst.ArcIterator(graph, 0)))
    arc = struct.pack(
        "<iifi", first.ilabel, first.olabel, float(first.weight.value), first.nextstate
    )
    # No file may make the decoder read outside the frames' log-probabilities.
    graph.add_arc(0, kaldifst.StdArc(-5, 0, 0.0, 0))
    graph.write(str(bad))
    huge = [whole[:i] + bytes([whole[i] ^ 0x80]) + whole[i + 1 :] for i in (54, 57)]  # the states
    for content, complaint in (
        (b"", "no graph"),
        (b"something else", "no graph"),
        (whole[:50], "no graph"),
        (whole[:-9], "no graph"),
        *((content, "no graph") for content in huge),
        (whole.replace(arc, arc[:12] + struct.pack("<i", -5)), "damaged"),
        (bad.read_bytes(), "damaged"),
        (None, "cannot be read"),
    ):
        bad.unlink(missing_ok=True)
        if content is not None:
            bad.write_bytes(content)
        with pytest.raises(UserError) as raised:
            load_graph(str(bad), 9)
        assert complaint in one_line(raised)
    with pytest.raises(UserError, match="its tokens are not the checkpoint's, which has 5;"):
        load_graph(path, 5)
    for argv in ["--stream"], ["--hotwords", path]:
        with pytest.raises(UserError, match="--graph is for whole utterances"):
            score.main(["--checkpoint", str(world / "best.ckpt"), "--graph", path, *argv])
