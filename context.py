"""Hotwords: a file of phrases, and the automaton by which a prefix search favours them.

Every token that goes on with a phrase earns a bonus. Where the phrase breaks off, what it has earned is given back, less what
the longest beginning of a phrase in the last tokens is worth; a phrase that is heard to its end keeps its bonus. As in WeNet
and icefall: Aho and Corasick 1975 (doi:10.1145/360825.360855), a trie with a link from each state to that longest beginning.
Phrases are sequences of tokens: one of whole words in characters is also found inside of longer words.
"""

from typing import NamedTuple

import numpy as np

from cli import UserError, option, options_class
from tokenizer import quoted


@options_class
class HotwordOptions:
    """Phrases to favour in prefix beam search and in the rescoring of what it finds. Raises UserError."""

    hotwords: str | None = option(None, "file of phrases to favour, one a line, which may end in its own score: new york :2")
    context_score: float = option(
        1.0, "with --hotwords: what each token of a phrase adds to a score",
        above=0, at_most=1000.0)

    def __post_init__(self):
        if self.hotwords is None and self.context_score != type(self).context_score:
            raise UserError("--context_score has no effect without --hotwords; give both or neither")


class ContextGraph(NamedTuple):
    """The automaton of S states; 0 is the start, where nothing is matched."""

    keys: np.ndarray  # sorted 2**32 * state + token, of all steps that go on with a phrase
    targets: np.ndarray  # the states that they lead to
    held: np.ndarray  # (S,) the bonus of the phrase that has begun, to be given back if it breaks off
    whole: np.ndarray  # (S,) the bonus of all phrases that end here, to keep

    def step(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """States and tokens that broadcast to each other -> the states behind the tokens, and the bonus of the step."""
        targets = self.find(states * 2**32 + tokens)
        targets = np.where(targets > 0, targets, self.find(tokens))  # else the token may begin a phrase
        return targets, self.held[targets] - self.held[states] + self.whole[targets]

    def find(self, keys: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.targets[place], 0)

    def pending(self, states: np.ndarray) -> np.ndarray:
        """The bonus to give back where the sequence ends in these states."""
        return self.held[states]


def make_graph(phrases: list[tuple[list[int], float]]) -> ContextGraph:
    """The automaton of phrases (token ids, at least one; bonus per token). What two share has the larger bonus."""
    children, bonus, ends = [{}], [0.0], set()
    for tokens, score in phrases:
        state = 0
        for token in tokens:
            if token not in children[state]:
                children[state][token] = len(children)
                children.append({})
                bonus.append(score)
            state = children[state][token]
            bonus[state] = max(bonus[state], score)
        ends.add(state)
    held, whole, link = np.zeros(len(children)), np.zeros(len(children)), [0] * len(children)
    steps = children[:1] + [{}] * (len(children) - 1)  # with those of the link, but not those of the start
    queue = [0]
    for state in queue:  # which grows: states by depth, so that links, which are less deep, are complete
        for token, child in children[state].items():
            link[child] = state and (steps[link[state]].get(token) or children[0].get(token, 0))
            held[child] = held[state] + bonus[child]
            whole[child] = whole[link[child]] + (held[child] if child in ends else 0.0)
            steps[child] = (steps[link[child]] if link[child] else {}) | children[child]
            queue.append(child)
    pairs = sorted((2**32 * state + token, target) for state in queue for token, target in steps[state].items())
    return ContextGraph(*np.array(pairs, np.int64).T, held, whole)


def load_hotwords(path: str, tokenizer, score: float) -> ContextGraph:
    """The automaton of the phrases in a file, a line each; `score` is for lines that do not end in ` :SCORE`.

    Raises UserError for a file that cannot be read or has no phrase, and with its line for a phrase that the tokenizer
    cannot spell.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--hotwords {path}: cannot be read ({reason}); give a text file, a phrase a line") from error
    phrases = [read_phrase(line, f"--hotwords {path}, line {number}", tokenizer, score)
               for number, line in enumerate(lines, 1) if line.strip()]
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
        if not 0 < score < float("inf"):
            raise UserError(f"{place}: {last} is no score; write a number above 0 behind the colon")
    tokens, unknown = tokenizer.encode(line), sorted(set(tokenizer.unknown(line)))
    if unknown or not tokens:
        what = " ".join(map(quoted, unknown)) or quoted(line)
        raise UserError(f"{place}: the tokenizer cannot spell {what}; write as its transcripts do (case "
                        "counts) or leave the phrase out")
    return tokens, score
