"""Makes an n-gram language model: python -m tools.lm --data_root data/demo --out lm.arpa

The model is of words, in ARPA format, by interpolated modified Kneser-Ney smoothing (Chen and
Goodman 1999, doi:10.1006/csla.1999.0128). It is made from the transcripts of the split train, as
the tokenizer writes them, or from any text (--text FILE). score.py and transcribe.py take it as
--lm.

With --graph the command also compiles a model to HLG.fst, for --graph of score.py and for
sherpa-onnx (--ctc-graph): H knows CTC, L how the tokenizer of --checkpoint spells the words, and G
which word follows which. --lm_weight and --word_bonus are part of the graph. --lm FILE takes a
model that there is, instead of making one.
"""

import math
import os
import tempfile
from collections import Counter, defaultdict

from cli import UserError, build, make_parser, option, options_class, run

from checkpoint import HUB_FILES
from datamodule import load_split
from files import cannot_read, check_replaced, read_text, write_whole
from ngram import (
    BEGIN,
    END,
    ID,
    UNKNOWN,
    LmOptions,
    NGrams,
    ends_alone,
    make_ngrams,
    read_arpa,
    spell_words,
)
from tokenizer import load_tokenizer, normalize_text
from wfst import check_packages
from words import ALONE, begins_word, split_words

LARGEST_TEXT = 2**34  # bytes


@options_class
class MakeOptions:
    data_root: str | None = option(None, "data that prepare.py wrote: the text is its split train")
    text: str | None = option(None, "a file of text, a sentence a line, instead")
    lm: str | None = option(None, "a language model (ARPA) that there is, instead")
    order: int = option(3, "how many words the model sees together", at_least=1, at_most=9)
    out: str | None = option(None, "file to write: the language model")
    graph: str | None = option(None, "file to write: the graph")
    checkpoint: str | None = option(None, "of the graph: a .ckpt, tokenizer.json or org/name")
    lm_weight: float = option(
        LmOptions.lm_weight, "in the graph, as in score.py", above=0.0, at_most=100.0
    )
    word_bonus: float = option(
        LmOptions.word_bonus, "in the graph, as in score.py", at_least=-100.0, at_most=100.0
    )
    closed: bool = option(False, "in the graph, no other words than the model's")


# Flag, how such a file begins (an OpenFst file with its number), and what it is.
OUTPUTS = (
    ("out", b"\\data\\", "language model in ARPA format"),
    ("graph", b"\xd6\xfd\xb2\x7e", "graph"),
)


def check_options(options: MakeOptions) -> None:
    """Raises UserError for options that do not go together."""
    if [options.data_root, options.text, options.lm].count(None) != 2:
        raise UserError("give one of --data_root, --text and --lm, where the model comes from")
    if (options.lm is None) != (options.out is not None):
        raise UserError("give --out for a model that is made, and not for one of --lm")
    if (options.graph is None) != (options.checkpoint is None):
        raise UserError("give --graph and --checkpoint, whose tokens the graph knows, together")
    both = options.out and options.graph
    if both and os.path.realpath(options.out) == os.path.realpath(options.graph):
        raise UserError(f"--out and --graph are both {options.out}; name two files")
    if options.lm and not options.graph:
        raise UserError("--lm alone asks for nothing; give --graph, too")
    for name in () if options.graph else ("lm_weight", "word_bonus", "closed"):
        if getattr(options, name) != getattr(MakeOptions, name):
            raise UserError(f"--{name} has no effect without --graph; give both or neither")


def main(argv: list[str]) -> None:
    options = build(MakeOptions, vars(make_parser(__doc__, MakeOptions).parse_args(argv)))
    check_options(options)
    inputs = [*filter(None, (options.text, options.lm, options.checkpoint))]
    folders = filter(None, (options.data_root, options.checkpoint))
    inputs += [os.path.join(folder, name) for folder in folders for name in HUB_FILES]
    for name, start, kind in OUTPUTS:
        if path := getattr(options, name):
            check_replaced(path, f"--{name}", inputs, start, kind)
    if options.graph:
        check_packages()
        tokenizer = load_tokenizer(options.checkpoint)
    if options.out:
        sentences = read_sentences(options)
        text = arpa_text(*train(sentences, options.order))
        write_whole(options.out, text.encode())
        count = sum(map(len, sentences))
        print(f"{options.out}: {text.count(chr(10))} lines, of {count} words")
    if options.graph:
        compile_graph(options.lm or options.out, tokenizer, options)


def read_sentences(options: MakeOptions) -> list[list[str]]:
    """Reads the sentences as lists of words. Raises UserError where there is no word."""
    if options.text:
        try:
            lines = read_text(options.text, LARGEST_TEXT).split("\n")
        except (OSError, ValueError) as error:
            raise cannot_read(f"--text {options.text}", error, "give a text file") from error
    else:
        tokenizer = load_tokenizer(options.data_root)
        rows = load_split([options.data_root], "train", tokenizer)["labels"]
        labels = (row["input_ids"] if isinstance(row, dict) else row for row in rows)
        lines = map(tokenizer.decode, labels)
    sentences = [[word.text for word in split_words([normalize_text(line)])] for line in lines]
    sentences = list(filter(None, sentences))
    where = options.text or options.data_root
    if not sentences:
        raise UserError(f"{where}: no word in it; give another text")
    if marks := {BEGIN, END, UNKNOWN}.intersection(word for line in sentences for word in line):
        raise UserError(f"{where}: {min(marks)} stands for no word; take it out")
    return sentences


# ---- Kneser-Ney


def train(sentences: list[list[str]], order: int) -> tuple[list[dict], dict]:
    """Estimates the model -> for each length {words: probability of the last}, {words: back-off}.

    A back-off is the share of the words that were not seen behind these words; it weighs the model
    that sees one word less. Below all stand the equal shares of all words, the unknown one, too.
    """
    counts = [Counter() for _ in range(order)]
    for sentence in sentences:
        words = (BEGIN, *sentence, END)
        for end in range(2, len(words) + 1):
            for size in range(1, min(order, end) + 1):
                counts[size - 1][words[end - size : end]] += 1
    vocabulary = {word for (word,) in counts[0]} | {UNKNOWN}
    lower = {(): 1 / len(vocabulary)}
    models = []
    backoffs = {}
    for size in range(1, order + 1):
        of_size = counts[size - 1] if size == order else heard_behind(counts, size)
        lower, shares = smooth(of_size, lower)
        models.append(lower)
        backoffs |= shares
    models[0][UNKNOWN,] = backoffs[()] / len(vocabulary)
    return models, backoffs


def heard_behind(counts: list[Counter], size: int) -> Counter:
    """Counts behind how many words each n-gram was seen; at a sentence's begin, how often it was.

    So "Francisco", which is seen behind "San" alone, is a rare word where "San" is not before it.
    """
    numbers = Counter(words[1:] for words in counts[size])
    begins = {words: count for words, count in counts[size - 1].items() if words[0] == BEGIN}
    return Counter({**numbers, **begins})


def smooth(counts: Counter, lower: dict) -> tuple[dict, dict]:
    """Takes a discount off each count, and shares it out by the `lower` model."""
    discounts = [0.0, *find_discounts(Counter(counts.values()))]
    totals = Counter()
    taken = defaultdict(float)
    for words, count in counts.items():
        totals[words[:-1]] += count
        taken[words[:-1]] += discounts[min(count, 3)]
    shares = {history: taken[history] / totals[history] for history in totals}
    probabilities = {
        words: (count - discounts[min(count, 3)]) / totals[words[:-1]]
        + shares[words[:-1]] * lower[words[1:]]
        for words, count in counts.items()
    }
    return probabilities, shares


def find_discounts(times: Counter) -> tuple[float, float, float]:
    """Finds the discounts of counts 1, 2 and 3 or more; times[n] n-grams have the count n.

    A small text gives none. Then the discounts are KenLM's for this case.
    """
    if all(times[count] for count in range(1, 5)):
        share = times[1] / (times[1] + 2 * times[2])
        found = [n - (n + 1) * share * times[n + 1] / times[n] for n in (1, 2, 3)]
        if all(0 < discount < n for n, discount in enumerate(found, 1)):
            return tuple(found)
    return 0.5, 1.0, 1.5


def arpa_text(models: list[dict], backoffs: dict) -> str:
    """Writes a model in ARPA format: logarithms to base 10, n-grams in order."""
    models = [{(BEGIN,): None, **models[0]}, *models[1:]]
    lines = ["\\data\\", *(f"ngram {n}={len(model)}" for n, model in enumerate(models, 1))]
    for size, model in enumerate(models, 1):
        lines += ["", f"\\{size}-grams:"]
        for words, probability in sorted(model.items()):
            score = -99 if probability is None else math.log10(probability)
            share = f"\t{math.log10(backoffs[words]):.7f}" if words in backoffs else ""
            lines.append(f"{score:.7f}\t{' '.join(words)}{share}")
    return "\n".join([*lines, "", "\\end\\", ""])


# ---- The graph


def compile_graph(path: str, tokenizer, options: MakeOptions) -> None:
    """Compiles a model to HLG.fst."""
    import kaldifst  # Only graphs need this package.

    ngrams = make_ngrams(read_arpa(path))
    back = len(ngrams.words) + 1  # the number of #0 among the words, which count from 1
    where = f"--lm {path}" if options.lm else path
    spelled = spell_words(ngrams.words, tokenizer, where)
    lexicon = make_lexicon(spelled, ngrams.words, back, tokenizer, options)
    grammar = make_grammar(ngrams, back, options.lm_weight)
    kaldifst.arcsort(lexicon, sort_type="olabel")
    kaldifst.arcsort(grammar, sort_type="ilabel")
    graph = kaldifst.compose(lexicon, grammar)
    kaldifst.determinize_star(graph)
    kaldifst.minimize_encoded(graph)
    graph = add_ctc(graph, tokenizer)
    with tempfile.NamedTemporaryFile() as file:
        graph.write(file.name)
        write_whole(options.graph, file.read())
    print(f"{options.graph}: {graph.num_states} states")


def make_grammar(ngrams: NGrams, back: int, weight: float):
    """Makes G: the histories as states, with all costs times `weight`; word `back` backs off."""
    import kaldifst

    histories, words = divmod(ngrams.keys, ID)
    lines = []
    for history, word, score, target in zip(histories, words, ngrams.scores, ngrams.targets):
        if word == ngrams.words[END]:
            lines.append(f"{history} {-weight * score}")
        elif word != ngrams.words.get(BEGIN):
            lines.append(f"{history} {target} {word + 1} {word + 1} {-weight * score}")
    for history, (target, cost) in enumerate(zip(ngrams.link, ngrams.backoff)):
        if target != history:
            lines.append(f"{history} {target} {back} 0 {-weight * cost}")
    lines.sort(key=lambda line: line.split()[0] != "0")  # The first line's state is the start.
    return kaldifst.compile("\n".join([*lines, ""]))


def make_lexicon(
    spelled: dict[str, str], numbers: dict[str, int], back: int, tokenizer, options: MakeOptions
):
    """Makes L, from labels (token id + 1) to words, of which spell_words gave the `spelled` ones.

    State 0 is the start, state 1 behind a word, where a space must come, and state 2 behind the
    space. Where spaces are parts of tokens, and behind Chinese words, state 0 stands for all. Each
    word ends in a sign of its own, so that no word is the beginning of another one: the first
    above the labels is for words, more are for words that are spelled alike, the last for unknown
    ones. Label tokenizer.vocab_size + 1 stands for #0.
    """
    import kaldifst

    texts = texts_of(tokenizer)
    spaces = [i for i, text in enumerate(texts, 1) if text == " "]
    pieces = any(text[:1].isspace() and not text.isspace() for text in texts)
    behind, begin = (0, 0) if pieces else (1, 2)
    between = sorted({0, behind, begin})
    sign = tokenizer.vocab_size + 1
    arcs = [(state, state, sign, back, 0.0) for state in between]
    arcs += [] if pieces else [(0, begin, 0, 0, 0.0)]
    alone = [0] if any(map(ALONE.match, texts)) else []
    arcs += [(state, begin, space, 0, 0.0) for state in (behind, *alone) for space in spaces]
    seen = Counter()
    states = 3
    for word, spelling in spelled.items():
        labels = [token + 1 for token in tokenizer.encode(word)]
        seen[tuple(labels)] += 1
        labels.append(sign + seen[tuple(labels)])
        for state in {begin, behind} if begins_word(spelling[0]) else (begin,):
            inside = range(states, states + len(labels) - 1)
            path = state, *inside, 0 if ends_alone(spelling) else behind
            arcs.append((*path[:2], labels[0], numbers[word] + 1, -options.word_bonus))
            arcs += [(*step, label, 0, 0.0) for *step, label in zip(path[1:], path[2:], labels[1:])]
            states += len(inside)
    if not options.closed:
        last = sign + 1 + max(seen.values(), default=0)
        letters, begins = letters_of(texts)
        arcs += [(begin, states, i, numbers[UNKNOWN] + 1, -options.word_bonus) for i in begins]
        arcs += [(states, states, i, 0, 0.0) for i in letters]
        arcs.append((states, behind, last, 0, 0.0))
        if pieces:  # The space before the word may be a token of its own.
            middle = states + len(texts) + 1
            arcs += [(begin, middle, i, numbers[UNKNOWN] + 1, -options.word_bonus) for i in spaces]
            arcs += [(middle, states, i, 0, 0.0) for i in letters]
        # A Chinese character is a word of its own, with or without a space before.
        for i in [i for i, text in enumerate(texts, 1) if ALONE.fullmatch(text)]:
            for state in {begin, behind}:
                arcs.append((state, states + i, i, numbers[UNKNOWN] + 1, -options.word_bonus))
            arcs.append((states + i, 0, last, 0, 0.0))
    lines = [" ".join(map(str, line)) for line in (*arcs, *((state,) for state in {0, behind}))]
    return kaldifst.compile("\n".join([*lines, ""]))


def texts_of(tokenizer) -> list[str]:
    """Lists the text of each token, nothing for the special ones."""
    texts = tokenizer.texts(range(tokenizer.vocab_size))
    texts[tokenizer.unk_id] = ""
    return texts


def letters_of(texts: list[str]) -> tuple[list[int], list[int]]:
    """Lists the labels with which an unknown word goes on, and those with which it begins."""
    spaced = [i + 1 for i, text in enumerate(texts) if text[:1].isspace() and not text.isspace()]
    letters = [
        i + 1
        for i, text in enumerate(texts)
        if text and not text[:1].isspace() and not ALONE.match(text)
    ]
    return letters, spaced or letters


def add_ctc(grammar, tokenizer):
    """Composes H with LG: frames of the network lead through the graph to its words.

    A state is one of LG, with the label of the frame before: the same label again is the same
    token. The frames' labels are the network's ids + 1, as in sherpa-onnx; signs become empty.
    """
    import kaldifst

    blank = tokenizer.blank_id + 1
    numbers = {(grammar.start, blank): 0}
    waiting = [(grammar.start, blank)]
    graph = kaldifst.StdVectorFst()
    graph.add_state()
    graph.start = 0

    def to(state: int, label: int) -> int:
        """Gives the number of a state, which is new where it was not met."""
        number = numbers.setdefault((state, label), len(numbers))
        if number == graph.num_states:
            graph.add_state()
            waiting.append((state, label))
        return number

    arc = kaldifst.StdArc
    while waiting:
        state, before = waiting.pop()
        here = numbers[state, before]
        graph.set_final(here, grammar.final(state).value)
        for label in {blank, before}:
            graph.add_arc(here, arc(label, 0, 0.0, to(state, label)))
        for step in kaldifst.ArcIterator(grammar, state):
            label = step.ilabel if step.ilabel <= tokenizer.vocab_size else 0
            if label == 0:
                behind = to(step.nextstate, before)
            elif label == before:
                continue  # It takes a blank to write the token again.
            else:
                behind = to(step.nextstate, label)
            graph.add_arc(here, arc(label, step.olabel, step.weight.value, behind))
    return graph


if __name__ == "__main__":
    run(main)
