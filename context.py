"""Hotwords: a file of phrases, and the automaton by which a prefix search favours them.

Every token that goes on with a phrase earns a bonus. Where the phrase breaks off, what it has earned is given back, less what
the longest beginning of a phrase in the last tokens is worth; a phrase that is heard to its end keeps its bonus. As in WeNet
and icefall: Aho and Corasick 1975 (doi:10.1145/360825.360855), a trie with a link from each state to that longest beginning.
Phrases are sequences of tokens: one of whole words in characters is also found inside of longer words.
"""

import re
from typing import NamedTuple

from cli import UserError, option, options_class, shown

import numpy as np

from files import read_text
from tokenizer import quoted

LARGEST_SCORE = 1000.0  # of a token, in natural logarithms: no sound outweighs it
MANY_TOKENS = 2**20  # of all phrases


@options_class
class HotwordOptions:
    """Phrases to favour in prefix beam search and in the rescoring of what it finds. Raises UserError."""

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
    """The automaton of S states; 0 is the start, where nothing is matched."""

    keys: np.ndarray  # sorted 2**32 * state + token, of the trie's steps
    targets: np.ndarray  # the states that they lead to
    link: (
        np.ndarray
    )  # (S,) the state of the longest beginning of a phrase that what was matched ends with
    held: (
        np.ndarray
    )  # (S,) the bonus of the phrase that has begun, to be given back if it breaks off
    whole: np.ndarray  # (S,) the bonus of all phrases that end here, to keep

    def step(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """States and tokens that broadcast to each other -> the states behind the tokens, and the bonus of the step."""
        before, targets = states, self.find(states * 2**32 + tokens)
        while (missing := (targets == 0) & (states > 0)).any():
            states = np.where(missing, self.link[states], 0)
            targets = np.where(missing, self.find(states * 2**32 + tokens), targets)
        return targets, self.held[targets] - self.held[before] + self.whole[targets]

    def find(self, keys: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.targets[place], 0)

    def pending(self, states: np.ndarray) -> np.ndarray:
        """The bonus to give back where the sequence ends in these states."""
        return self.held[states]


def make_graph(phrases: list[tuple[list[int], float]]) -> ContextGraph:
    """The automaton of phrases (token ids, at least one; bonus per token). What two share has the larger bonus. Time and memory
    grow as the number of tokens."""
    trie, parents, last, depths, bonus, ends = {}, [0], [0], [0], [0.0], set()
    for tokens, score in phrases:
        state = 0
        for token in tokens:
            if (child := trie.setdefault(2**32 * state + token, len(parents))) == len(parents):
                parents.append(state)
                last.append(token)
                depths.append(depths[state] + 1)
                bonus.append(score)
            state = child
            bonus[state] = max(bonus[state], score)
        ends.add(state)
    held, whole, link = [0.0] * len(parents), [0.0] * len(parents), [0] * len(parents)
    for state in sorted(
        range(1, len(parents)), key=depths.__getitem__
    ):  # links lead to states that are less deep
        parent, key = link[parents[state]], last[state]
        while parent and 2**32 * parent + key not in trie:
            parent = link[parent]
        link[state] = trie.get(2**32 * parent + key, 0) if parents[state] else 0
        held[state] = held[parents[state]] + bonus[state]
        whole[state] = whole[link[state]] + (held[state] if state in ends else 0.0)
    keys = np.array(list(trie), np.int64)
    order = keys.argsort()  # the trie's targets are 1, 2, ... in the order in which they were made
    return ContextGraph(keys[order], order + 1, *map(np.array, (link, held, whole)))


def load_hotwords(path: str, tokenizer, score: float) -> ContextGraph:
    """The automaton of the phrases in a file, a line each; `score` is for lines that do not end in ` :SCORE`.

    Raises UserError for a file that cannot be read or has no phrase, and with its line for a phrase that the tokenizer
    cannot spell.
    """
    try:
        lines = re.split("\r\n?|\n", read_text(path))
    except (OSError, ValueError) as error:
        reason = (
            error.strerror
            if isinstance(error, OSError)
            else "not UTF-8"
            if isinstance(error, UnicodeDecodeError)
            else error
        )
        raise UserError(
            f"--hotwords {path}: cannot be read ({reason}); give a text file, a phrase a line"
        ) from error
    phrases, left = [], MANY_TOKENS
    for number, line in enumerate(lines, 1):
        if line.strip():
            phrases.append(read_phrase(line, f"--hotwords {path}, line {number}", tokenizer, score))
            left -= len(phrases[-1][0])
        if left < 0:
            raise UserError(
                f"--hotwords {path}: its phrases have more than {MANY_TOKENS} tokens; leave out those that matter least"
            )
    if not phrases:
        raise UserError(f"--hotwords {path}: no phrase in it; write one a line")
    return make_graph(phrases)


def read_phrase(line: str, place: str, tokenizer, score: float) -> tuple[list[int], float]:
    *words, last = line.split()
    if words and last.startswith(":"):
        line = " ".join(words)
        try:
            score = float(last[1:])
        except ValueError:
            score = 0.0
        if not 0 < score <= LARGEST_SCORE:
            raise UserError(
                f"{place}: {shown(last, 100)} is no score; write a number above 0 behind the colon, and at most "
                f"{LARGEST_SCORE:g}"
            )
    tokens, unknown = tokenizer.encode(line), sorted(set(tokenizer.unknown(line)))
    if unknown or not tokens:
        what = " ".join(map(quoted, unknown[:10])) or quoted(line[:40])
        raise UserError(
            f"{place}: the tokenizer cannot spell {what}; write as its transcripts do (case "
            "counts) or leave the phrase out"
        )
    return tokens, score
