"""An n-gram language model of words: this file reads one (ARPA), and scores tokens by it.

The automaton stands where a context.ContextGraph of hotwords stands: prefix beam search adds to a
hypothesis what the language model says of its words. A word counts when it is complete, that is at
the space behind it or at the first token of the next word. Before this, its beginning counts as the
likeliest word that begins so (look-ahead; by the model without history), and what begins no
word of the vocabulary as the unknown word, which so is spelled out and not lost. The model knows
characters, whatever tokens they come in.
"""

import itertools
import math
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from cli import UserError, option, options_class, shown

import numpy as np

from context import ContextGraph, HotwordOptions, make_context
from files import cannot_read, read_text
from wfst import load_graph
from words import ALONE, OPENING, begins_word, belongs, split_words

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
LARGEST_ARPA = 2**34  # bytes
NEVER = -99 * math.log(10)  # SRILM's -99, which stands for no chance at all
ROUNDING = 1e-5  # how far above 0 rounding may put a log-probability in a file
SECTION = re.compile(r"\\(\d{1,9})-grams:")
COUNT = re.compile(r"ngram\s+(\d{1,9})\s*=\s*(\d{1,18})")
# Nodes of the trie of spellings: between words, and three for an unknown word, which ends in a
# letter, in a Chinese character, or in an opening bracket.
BETWEEN, UNSPELLED, UNSPELLED_ALONE, UNSPELLED_OPEN = range(4)
ID = 2**32  # above all numbers of words, tokens and histories


@options_class
class LmOptions:
    """Names the language model that the search favours (prefix beam search, joint, rescoring)."""

    lm: str | None = option(None, "n-gram language model of words (ARPA; python -m tools.lm)")
    lm_weight: float = option(
        0.5, "with --lm: weight of its log-probabilities; 0: none", at_least=0.0, at_most=100.0
    )
    word_bonus: float = option(
        2.0, "with --lm: what each word adds to a score", at_least=-100.0, at_most=100.0
    )
    graph: str | None = option(
        None, "HLG.fst of a language model (python -m tools.lm), to be searched in place of --lm"
    )

    def __post_init__(self):
        if self.lm and self.graph:
            raise UserError("--graph has a language model of its own; leave out --lm or --graph")
        for name in ("lm_weight", "word_bonus"):
            if self.lm is None and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"--{name} has no effect without --lm; give both or neither")

    def used(self) -> dict:
        """Returns the options that count, by name: a graph has its weights inside."""
        if self.lm:
            return {name: getattr(self, name) for name in ("lm", "lm_weight", "word_bonus")}
        return {"graph": self.graph} if self.graph else {}


class NGrams(NamedTuple):
    """An n-gram model as an automaton of H histories; history 0 is that before a sentence."""

    words: dict[str, int]
    keys: np.ndarray  # (G,) sorted: ID * history + word
    scores: np.ndarray  # (G,) log-probability of the word after the history
    targets: np.ndarray  # (G,) the history behind the word
    link: np.ndarray  # (H,) the history without its first word
    backoff: np.ndarray  # (H,) what it costs to go there

    def say(self, histories: np.ndarray, words) -> tuple[np.ndarray, np.ndarray]:
        """Gives the words' log-probabilities, and the histories behind them."""
        score = np.zeros(np.shape(histories))
        while True:
            keys = histories * ID + words
            places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            missing = self.keys[places] != keys
            if not missing.any():
                return score + self.scores[places], self.targets[places]
            score = np.where(missing, score + self.backoff[histories], score)
            histories = np.where(missing, self.link[histories], histories)


class LanguageModel(NamedTuple):
    """An automaton over tokens; state h * nodes + n is history h and node n of the spellings."""

    ngrams: NGrams
    parts: np.ndarray  # (P,V) the parts of each token, see parts_of; -1 behind the last one
    keys: np.ndarray  # sorted: ID * node + part, for each part with which a spelling goes on
    targets: np.ndarray  # the node to which it leads
    word: np.ndarray  # (nodes,) the word that ends at the node, else the unknown word
    ahead: np.ndarray  # (nodes,) weighted log-probability of the likeliest word through the node
    alone: np.ndarray  # (nodes,) bool: a letter begins a new word, as behind a Chinese character
    opened: np.ndarray  # (nodes,) bool: only a space begins a new word, as behind a bracket
    spaced: np.ndarray  # (U,) bool for each of U parts: it begins with a space
    begins: np.ndarray  # (U,) bool: the part begins a word as a Chinese character does
    letter: np.ndarray  # (U,) bool: the part begins a word behind an `alone` node
    unspelled: np.ndarray  # (U,) the node to which the part leads where no word goes on so
    weight: float
    bonus: float  # of each word

    def step(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives the states behind the tokens, and the bonus of the step; arguments broadcast."""
        first, *others = self.parts[:, tokens]
        states, total = self.step_part(states, first)
        for parts in others:
            behind, gain = self.step_part(states, parts)
            states = np.where(parts < 0, states, behind)
            total = np.where(parts < 0, total, total + gain)
        return states, total

    def step_part(self, states: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Does what `step` does, for parts of tokens."""
        histories, nodes = np.divmod(states, len(self.word))
        said, behind = self.end_word(histories, nodes)
        begins = self.begins[parts] | self.alone[nodes] & self.letter[parts]
        new = self.spaced[parts] | begins & ~self.opened[nodes]
        after = self.child(np.where(new, BETWEEN, nodes), parts)
        joins = ~self.letter[parts] & self.alone[nodes]  # a mark of the Chinese character before
        unspelled = np.where(joins, UNSPELLED_ALONE, self.unspelled[parts])
        after = np.where(after == UNSPELLED, unspelled, after)
        gain = np.where(new, said, 0.0) + self.ahead[after] - self.ahead[nodes]
        return np.where(new, behind, histories) * len(self.word) + after, gain

    def end_word(self, histories: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives what the words that end at the nodes add, and the histories behind them."""
        said, behind = self.ngrams.say(histories, self.word[nodes])
        between = nodes == BETWEEN
        said = np.where(between, 0.0, self.weight * said + self.bonus)
        return said, np.where(between, histories, behind)

    def child(self, nodes: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """Gives the nodes to which the parts lead, UNSPELLED where no word goes on so."""
        keys = nodes * ID + parts
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.targets[places], UNSPELLED)

    def pending(self, states: np.ndarray) -> np.ndarray:
        """Gives the bonus that is taken back where the sequence ends in these states."""
        histories, nodes = np.divmod(states, len(self.word))
        said, behind = self.end_word(histories, nodes)
        end, _ = self.ngrams.say(behind, self.ngrams.words[END])
        return self.ahead[nodes] - said - self.weight * end

    def hope(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Gives the most that so many more tokens can add: bonuses of parts and of the word before.

        The words themselves may be certain then, and what their beginnings cost is given back.
        """
        nodes = states % len(self.word)
        words = tokens * len(self.parts) + (nodes != BETWEEN)
        return max(self.bonus, 0.0) * words - self.ahead[nodes]


class Both(NamedTuple):
    """Favours what two automata favour: a language model, and hotwords of H states."""

    lm: LanguageModel
    hotwords: ContextGraph

    def step(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives the states behind the tokens, and the bonus of the step; arguments broadcast."""
        size = len(self.hotwords.link)
        one, other = np.divmod(states, size)
        one, gain = self.lm.step(one, tokens)
        other, bonus = self.hotwords.step(other, tokens)
        return one * size + other, gain + bonus

    def pending(self, states: np.ndarray) -> np.ndarray:
        """Gives the bonus that is taken back where the sequence ends in these states."""
        one, other = np.divmod(states, len(self.hotwords.link))
        return self.lm.pending(one) + self.hotwords.pending(other)

    def hope(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Gives the most that so many more tokens can add."""
        one, other = np.divmod(states, len(self.hotwords.link))
        return self.lm.hope(one, tokens) + self.hotwords.hope(other, tokens)


def favour(options: LmOptions, hotwords: HotwordOptions, tokenizer, stream: bool):
    """Makes the automaton of a language model, of hotwords, or of both; None for neither.

    A graph is made in place of an automaton. Raises UserError for a graph with hotwords or streams.
    """
    if options.graph is not None:
        if hotwords.hotwords is not None or stream:
            raise UserError(
                "--graph is for whole utterances without --hotwords and --stream; leave out one of "
                "them, or give --lm instead"
            )
        return load_graph(options.graph, tokenizer.vocab_size)
    context = make_context(hotwords, tokenizer)
    if options.lm is None or options.lm_weight == 0:
        return context
    return both(load_lm(options.lm, tokenizer, options.lm_weight, options.word_bonus), context)


def both(lm: LanguageModel | None, hotwords: ContextGraph | None):
    """Makes the automaton of two, either of which may be absent."""
    return Both(lm, hotwords) if lm and hotwords else lm or hotwords


def load_lm(path: str, tokenizer, weight: float, bonus: float = 0.0) -> LanguageModel:
    """Makes the automaton of an ARPA file over the tokens of a tokenizer.

    Raises UserError as read_arpa and spell_words do.
    """
    grams = read_arpa(path)
    ngrams = make_ngrams(grams)
    where = f"--lm {path}"
    unigrams = {word: score for (word, *more), (score, _) in grams.items() if not more}
    numbers, parts = number_parts(tokenizer.texts(range(tokenizer.vocab_size)))
    by_text = {}  # text without spaces -> the parts that have it
    for part, number in numbers.items():
        by_text.setdefault(part.strip(), []).append(number)
    unknown = ngrams.words[UNKNOWN]
    word = 4 * [unknown]
    ahead = [0.0] + 3 * [weight * unigrams[UNKNOWN]]
    alone = [False, False, True, False]
    opened = [False, False, False, True]
    steps = {number: BETWEEN for part, number in numbers.items() if part.isspace()}
    trie = {}  # (node, character) -> node
    said = {}  # node -> log-probability of the word that ends there
    longest = max(map(len, by_text))
    for name, spelling in single_words(spell_words(unigrams, tokenizer, where), where).items():
        nodes = [BETWEEN]
        for end, character in enumerate(spelling, 1):
            node = trie.setdefault((nodes[-1], character), len(word))
            if node == len(word):
                word.append(unknown)
                ahead.append(-math.inf)
                alone.append(ends_alone(spelling[:end]))
                opened.append(ends_open(character))
                for begin in range(max(0, end - longest), end):
                    for number in by_text.get(spelling[begin:end], ()):
                        steps[nodes[begin] * ID + number] = node
            nodes.append(node)
            ahead[node] = max(ahead[node], weight * unigrams[name])
        # Of words that are spelled alike the likeliest counts.
        if unigrams[name] >= said.get(node, -math.inf):
            said[node] = unigrams[name]
            word[node] = ngrams.words[name]
    keys = np.array(list(steps), np.int64)
    order = keys.argsort()
    return LanguageModel(
        ngrams,
        parts,
        keys[order],
        np.array(list(steps.values()))[order],
        *map(np.array, (word, ahead, alone, opened, *part_kinds(list(numbers)))),
        weight,
        bonus,
    )


def number_parts(texts: list[str]) -> tuple[dict[str, int], np.ndarray]:
    """Numbers the parts of all tokens -> {part: its number}, `parts` of a LanguageModel, (P,V)."""
    of_tokens = list(map(parts_of, texts))
    numbers = {part: n for n, part in enumerate(dict.fromkeys(itertools.chain(*of_tokens)))}
    rows = ([numbers[part] for part in parts] for parts in of_tokens)
    return numbers, np.array(list(itertools.zip_longest(*rows, fillvalue=-1)))


def parts_of(text: str) -> list[str]:
    """Cuts a token's text where a word begins in its midst, as one may in a piece of Chinese."""
    begins = [word.places[0] - word.spaced for word in split_words(text)[1:]]
    return [text[begin:end] for begin, end in itertools.pairwise([0, *begins, len(text)])]


def part_kinds(texts: list[str]) -> tuple[list, list, list, list]:
    """Returns `spaced`, `begins`, `letter` and `unspelled` of a LanguageModel, (U,) each."""
    spaced = [text[:1].isspace() for text in texts]
    begins = [text != "" and begins_word(text[0]) for text in texts]
    letter = [text != "" and not belongs(text[0]) for text in texts]
    return spaced, begins, letter, list(map(unspelled_node, texts))


def spell_words(words: Iterable[str], tokenizer, where: str) -> dict[str, str]:
    """Gives for each word the text of its tokens, but for words that the tokenizer lacks.

    A note on stderr says so where these are more than half of the words. Raises UserError where
    they are all of them. `where` says in both which file the words are from.
    """
    words = [word for word in words if word not in (BEGIN, END, UNKNOWN)]
    spelled = {
        word: spelling
        for word in words
        if not tokenizer.unknown(word)
        and (spelling := "".join(tokenizer.texts(tokenizer.encode(word))).strip())
    }
    if not spelled:
        raise UserError(
            f"{where}: the checkpoint's tokenizer spells none of its {len(words)} words; case "
            "counts, so make it from text like that of the training"
        )
    if 2 * len(spelled) < len(words):
        print(
            f"note: {shown(where)}: the checkpoint's tokenizer spells {len(spelled)} of its "
            f"{len(words)} words, and the others count as unknown; case counts",
            file=sys.stderr,
        )
    return spelled


def single_words(spelled: dict[str, str], where: str) -> dict[str, str]:
    """Returns the {word: spelling} in which the search hears one word; in ASCII it always does.

    A note on stderr says how many words are lost because the search hears several in each, as in
    Chinese ones of several characters. Raises UserError where they are all of them.
    """
    single = {
        word: spelling
        for word, spelling in spelled.items()
        if spelling.isascii() or len(split_words([spelling])) == 1
    }
    lost = (
        f"{len(spelled) - len(single)} of its {len(spelled)} words count as unknown, for each "
        "Chinese or Japanese character is a word here; python -m tools.lm writes such words, and a "
        "--graph of this file knows its own"
    )
    if not single:
        raise UserError(f"{where}: {lost}")
    if len(single) < len(spelled):
        print(f"note: {shown(where)}: {lost}", file=sys.stderr)
    return single


def unspelled_node(text: str) -> int:
    """Returns the node to which a token leads in a word that no language model knows."""
    if ends_open(text):
        return UNSPELLED_OPEN
    return UNSPELLED_ALONE if ends_alone(text) else UNSPELLED


def ends_open(spelling: str) -> bool:
    """Returns whether a bracket or quotation is open at the end, which what follows belongs to."""
    return spelling != "" and unicodedata.category(spelling[-1]) in OPENING


def ends_alone(spelling: str) -> bool:
    """Returns whether a letter behind the spelling begins a new word, as behind a Chinese sign."""
    kept = spelling
    while kept and belongs(kept[-1]):
        kept = kept[:-1]
    return bool(kept and ALONE.match(kept[-1]))


def make_ngrams(grams: dict[tuple[str, ...], tuple[float, float]]) -> NGrams:
    """Makes the automaton of {words: (log-probability of the last one, cost of backing off)}."""
    words = {word: number for number, (word, *more) in enumerate(grams) if not more}
    # A history is what stands before the last word of an n-gram, or has a cost of backing off.
    used = {gram[:-1] for gram in grams} | {gram for gram, (_, cost) in grams.items() if cost}
    first = (BEGIN,) if (BEGIN,) in used else ()
    histories = {history: n for n, history in enumerate(dict.fromkeys((first, (), *used)))}
    order = max(map(len, grams))

    def known(history: tuple[str, ...]) -> int:
        """Finds the longest end of the words that is a history."""
        while history not in histories:
            history = history[1:]
        return histories[history]

    steps = {
        histories[gram[:-1]] * ID + words[gram[-1]]: (score, known(gram[1 - order :]))
        for gram, (score, _) in grams.items()
    }
    keys = np.array(sorted(steps))
    scores, targets = zip(*map(steps.get, keys.tolist()))
    link = [known(history[1:]) for history in histories]
    backoff = [grams.get(history, (0.0, 0.0))[1] for history in histories]
    return NGrams(words, keys, *map(np.array, (scores, targets, link, backoff)))


def read_arpa(path: str) -> dict[tuple[str, ...], tuple[float, float]]:
    """Reads {words: (log-probability of the last one, cost of backing off)}, natural logarithms.

    The unknown word may also be <UNK>, as SRILM and Kaldi write it. A model without it gives it the
    score of its rarest word. Raises UserError for a file that cannot be read or is none.
    """
    try:
        lines = read_text(path, LARGEST_ARPA).split("\n")
    except (OSError, ValueError) as error:
        remedy = "give a language model in ARPA format, unpacked"
        raise cannot_read(f"--lm {path}", error, remedy) from error
    grams = {}
    promised = {}  # length of n-grams -> how many the file says it has
    order = 0
    ended = False
    # What stands before \data\, such as a description of the format, is no part of the model.
    head = next((n for n, line in enumerate(lines) if line.strip() == "\\data\\"), 0)
    for number, line in enumerate(itertools.islice(lines, head, None), head + 1):
        line = line.strip(" \t\r")
        if ended := line == "\\end\\":
            break
        if found := SECTION.fullmatch(line):
            order = int(found[1])
        elif order and line:
            gram, values = read_gram(line, order, f"--lm {path}, line {number}")
            grams[gram] = values
        elif found := COUNT.fullmatch(line):
            promised[int(found[1])] = int(found[2])
    if (UNKNOWN,) not in grams and (UNKNOWN.upper(),) in grams:
        names = {UNKNOWN.upper(): UNKNOWN}
        grams = {tuple(names.get(word, word) for word in gram): grams[gram] for gram in grams}
    words = {gram[0]: score for gram, (score, _) in grams.items() if len(gram) == 1}
    if END not in words:
        raise UserError(
            f"--lm {path}: no ARPA language model (its 1-grams have no {END}); make one with "
            "python -m tools.lm"
        )
    # Tools that take n-grams out leave the counts as they were, so a count proves little.
    there = set(map(len, grams))
    if not ended or any(count and length not in there for length, count in promised.items()):
        raise UserError(f"--lm {path}: it is cut short, or lacks \\end\\; get it again")
    for gram in grams:
        if gram[-1] not in words:
            raise UserError(f"--lm {path}: {shown(gram[-1], 100)} is not among its 1-grams")
    rarest = min((score for score in words.values() if score > NEVER), default=NEVER)
    grams.setdefault((UNKNOWN,), (rarest, 0.0))
    return grams


def read_gram(line: str, order: int, where: str) -> tuple[tuple[str, ...], tuple[float, float]]:
    """Reads a line of ARPA: a log-probability, the words, and perhaps the cost of backing off.

    KenLM writes -inf where SRILM writes -99, for a word that is never said.
    """
    score, *words = re.split("[ \t]+", line)
    cost = words.pop() if len(words) == order + 1 else "0"
    try:
        score, cost = (float(text) * math.log(10) for text in (score, cost))
    except ValueError:
        score = cost = math.nan
    # A probability above 1 would be more than LanguageModel.hope hopes for.
    if len(words) != order or not (score <= ROUNDING and math.isfinite(cost)):
        raise UserError(f"{where}: {shown(line, 100)} is no {order}-gram of an ARPA file")
    return tuple(words), (min(max(score, NEVER), 0.0), cost)
