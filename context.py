"""Hotwords: this file reads phrases and makes the automaton by which a prefix search favours them.

Every token that goes on with a phrase earns a bonus. Where a phrase breaks off, its bonus is given
back, except for one part: the last tokens may be the beginning of another phrase, and the longest
such beginning keeps what it has earned. A phrase that is heard to its end keeps its bonus. WeNet
and icefall do the same, after Aho and Corasick 1975 (doi:10.1145/360825.360855): the automaton is a
trie with a link from each state to the state of this longest beginning. Phrases are sequences of
tokens: where tokens are characters, a phrase is also found inside longer words.
"""

import re
from typing import NamedTuple

from cli import UserError, option, options_class, shown

import numpy as np

from files import cannot_read, read_text
from tokenizer import quoted

LARGEST_SCORE = 1000.0  # a token's bonus, in natural logarithms: no sound outweighs it
MANY_TOKENS = 2**20  # the most tokens that all phrases together may have


@options_class
class HotwordOptions:
    """Names the phrases that a search and its rescoring favour. Raises UserError."""

    hotwords: str | None = option(
        None, "file of phrases to favour, one a line, which may end in its own score: new york :2"
    )
    context_score: float = option(
        1.0,
        "with --hotwords: what each token of a phrase adds to a score",
        above=0,
        at_most=LARGEST_SCORE,
    )

    def __post_init__(self):
        if self.hotwords is None and self.context_score != type(self).context_score:
            raise UserError(
                "--context_score has no effect without --hotwords; give both or neither"
            )


class ContextGraph(NamedTuple):
    """An automaton of S states; in state 0, the start, no phrase has begun."""

    keys: np.ndarray  # the trie's steps as 2**32 * state + token, sorted
    targets: np.ndarray  # the state that each step leads to
    link: np.ndarray  # (S,) state of the longest shorter beginning of a phrase at the same place
    held: np.ndarray  # (S,) bonus of the phrase that has begun, given back if it breaks off
    whole: np.ndarray  # (S,) bonus of all phrases that end here, to keep

    def step(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives the states behind the tokens, and the bonus of the step; arguments broadcast."""
        before = states
        targets = self.child(states, tokens)
        while (missing := (targets == 0) & (states > 0)).any():
            states = np.where(missing, self.link[states], 0)
            targets = np.where(missing, self.child(states, tokens), targets)
        return targets, self.held[targets] - self.held[before] + self.whole[targets]

    def child(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Gives the states to which the trie's steps lead, 0 where the trie has no such step."""
        keys = states * 2**32 + tokens
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.targets[places], 0)

    def pending(self, states: np.ndarray) -> np.ndarray:
        """Gives the bonus that is taken back where the sequence ends in these states."""
        return self.held[states]

    def hope(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Gives the most that so many more tokens can add, if phrases end in each of them."""
        return self.whole.max() * tokens - self.held[states]


def make_graph(phrases: list[tuple[list[int], float]]) -> ContextGraph:
    """Makes the automaton of phrases, each of (token ids, at least one; bonus per token).

    A token that several phrases share has the largest of their bonuses. Time and memory grow in
    proportion to the number of tokens.
    """
    trie = {}  # 2**32 * state + token -> state; the states are 1, 2, ... in order of entry
    parents = [0]
    last = [0]  # the token that leads to each state
    depths = [0]
    bonus = [0.0]
    ends = set()
    for tokens, score in phrases:
        state = 0
        for token in tokens:
            child = trie.setdefault(2**32 * state + token, len(parents))
            if child == len(parents):
                parents.append(state)
                last.append(token)
                depths.append(depths[state] + 1)
                bonus.append(score)
            state = child
            bonus[state] = max(bonus[state], score)
        ends.add(state)
    held = [0.0] * len(parents)
    whole = [0.0] * len(parents)
    link = [0] * len(parents)
    # A link leads to a state that is less deep, so the less deep states come first.
    for state in sorted(range(1, len(parents)), key=depths.__getitem__):
        parent = link[parents[state]]
        while parent and 2**32 * parent + last[state] not in trie:
            parent = link[parent]
        if parents[state]:
            link[state] = trie.get(2**32 * parent + last[state], 0)
        held[state] = held[parents[state]] + bonus[state]
        whole[state] = whole[link[state]] + (held[state] if state in ends else 0.0)
    keys = np.array(list(trie), np.int64)
    order = keys.argsort()
    return ContextGraph(keys[order], order + 1, *map(np.array, (link, held, whole)))


def make_context(options: HotwordOptions, tokenizer) -> ContextGraph | None:
    """Makes the automaton of the options' phrases, None without --hotwords; see load_hotwords."""
    if options.hotwords is None:
        return None
    return load_hotwords(options.hotwords, tokenizer, options.context_score)


def load_hotwords(path: str, tokenizer, score: float) -> ContextGraph:
    """Makes the automaton of the phrases in a file, one on each line.

    A phrase may end in its own bonus per token, ` :SCORE`; `score` is the bonus of the others.
    Raises UserError for a file that cannot be read, and what read_hotwords raises.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        remedy = "give a text file, a phrase a line"
        raise cannot_read(f"--hotwords {path}", error, remedy) from error
    return read_hotwords(text, f"--hotwords {path}", tokenizer, score)


def read_hotwords(text: str, where: str, tokenizer, score: float) -> ContextGraph:
    """Makes the automaton of the phrases in a text, as load_hotwords does.

    Raises UserError for a text without a phrase or with too many and, with the line's number, for a
    phrase that the tokenizer cannot spell. `where` says in the message where the text is from.
    """
    phrases = []
    count = 0
    for number, line in enumerate(re.split("\r\n?|\n", text), 1):
        if line.strip():
            tokens, bonus = read_phrase(line, f"{where}, line {number}", tokenizer, score)
            phrases.append((tokens, bonus))
            count += len(tokens)
        if count > MANY_TOKENS:
            raise UserError(
                f"{where}: its phrases have more than {MANY_TOKENS} tokens; leave out those that "
                "matter least"
            )
    if not phrases:
        raise UserError(f"{where}: no phrase in it; write one a line")
    return make_graph(phrases)


def read_phrase(line: str, where: str, tokenizer, score: float) -> tuple[list[int], float]:
    """Reads a phrase's tokens, and the bonus of each: `score` unless the line ends in another."""
    *words, last = line.split()
    if words and last.startswith(":"):
        line = " ".join(words)
        try:
            score = float(last[1:])
        except ValueError:
            score = 0.0
        if not 0 < score <= LARGEST_SCORE:
            raise UserError(
                f"{where}: {shown(last, 100)} is no score; write a number above 0 behind the "
                f"colon, and at most {LARGEST_SCORE:g}"
            )
    tokens = tokenizer.encode(line)
    unknown = sorted(set(tokenizer.unknown(line)))
    if unknown or not tokens:
        what = " ".join(map(quoted, unknown[:10])) or quoted(line[:40])
        raise UserError(
            f"{where}: the tokenizer cannot spell {what}; write as its transcripts do (case "
            "counts) or leave the phrase out"
        )
    return tokens, score
