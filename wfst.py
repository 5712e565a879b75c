"""Searches a graph of all that may be said: paths of CTC through HLG.fst, by kaldi-decoder.

tools/lm.py makes the graph of a language model and a tokenizer. The graph's labels are token ids
+ 1, and its costs hold the language model with its weight, as in sherpa-onnx. kaldi-decoder finds
the likeliest paths, where prefix beam search adds up all paths of a sequence.
"""

import importlib.util
import math
from collections import Counter, defaultdict
from operator import itemgetter
from typing import NamedTuple

from cli import UserError

import torch

from decode import Hypothesis, align
from files import cannot_read, open_file

BEAM = 10.0  # paths so much worse than the best one, in natural logarithms, are left
LATTICE_BEAM = 8.0  # and so much worse sequences are none of the n-best
MAKE_ONE = "make one with python -m tools.lm"


class Graph(NamedTuple):
    """Holds a graph for model.U2.search; `fst` is a kaldifst.StdVectorFst."""

    fst: object

    def search(
        self, log_probs: torch.Tensor, lengths: torch.Tensor, beam_size: int, blank_id: int
    ) -> list[Hypothesis]:
        """Finds the likeliest sequences of each row of log_probs (B,T,V), on the CPU.

        There are at most beam_size nbest. A score is that of the likeliest path, graph included.
        """
        rows = zip(log_probs, lengths.tolist())
        return [self.search_one(row[:length], beam_size, blank_id) for row, length in rows]

    def search_one(self, log_probs: torch.Tensor, beam_size: int, blank_id: int) -> Hypothesis:
        """Does what `search` does, for one utterance (T,V)."""
        import kaldi_decoder

        found = []
        for beam in (BEAM, 10 * BEAM) if len(log_probs) else ():
            config = kaldi_decoder.LatticeSimpleDecoderConfig(beam=beam, lattice_beam=LATTICE_BEAM)
            decoder = kaldi_decoder.LatticeSimpleDecoder(self.fst, config)
            ended = decoder.decode(kaldi_decoder.DecodableCtc(log_probs.float().numpy()))
            found = nbest_of(decoder.get_raw_lattice()[1], beam_size, blank_id + 1)
            if ended:  # Else the graph ends for none of the paths: they are in the midst of a word.
                break
        nbest, scores = zip(*(found or [([], 0.0)]))
        first = Hypothesis(nbest[0], scores[0], [], list(nbest), list(scores), [])
        return align(first, log_probs, len(log_probs), blank_id)


def nbest_of(lattice, count: int, blank: int) -> list[tuple[list[int], float]]:
    """Lists the likeliest token sequences of a lattice, best first, each with its score.

    A lattice has many paths for each sequence, so each state keeps its `count` likeliest sequences,
    each by its likeliest path; no others can be among the likeliest of all. A state of HLG knows
    the label of the frame before: where another label follows, a token begins.
    """
    arcs, ends = read_lattice(lattice)
    entries = Counter(target for of_state in arcs.values() for target, *_ in of_state)
    reached = defaultdict(dict)  # state -> {(labels of a sequence, last label): cost}
    reached[lattice.start] = {((), blank): 0.0}
    whole = {}
    waiting = [lattice.start]  # states that all paths to them have reached
    while waiting:
        state = waiting.pop()
        best = sorted(reached.pop(state).items(), key=itemgetter(1))[:count]
        if state in ends:
            for (labels, _), cost in best:
                whole[labels] = min(whole.get(labels, math.inf), cost + ends[state])
        for target, label, more in arcs[state]:
            for (labels, before), cost in best:
                grown = labels if label in (0, blank, before) else (*labels, label)
                key = grown, label or before
                reached[target][key] = min(reached[target].get(key, math.inf), cost + more)
            entries[target] -= 1
            if entries[target] == 0:
                waiting.append(target)
    best = sorted(whole.items(), key=itemgetter(1))[:count]
    return [([label - 1 for label in labels], -cost) for labels, cost in best]


def read_lattice(lattice) -> tuple[dict, dict[int, float]]:
    """Reads {state: [(next state, label, cost)]}, and {final state: cost}."""
    arcs = defaultdict(list)
    ends = {}
    for line in lattice.to_str(show_weight_one=True).splitlines():
        state, *fields, costs = line.split()
        cost = sum(map(float, costs.split(",")))  # of the graph, and of the sound
        if fields:
            arcs[int(state)].append((int(fields[0]), int(fields[1]), cost))
        else:
            ends[int(state)] = cost
    return arcs, ends


def check_packages() -> None:
    """Raises UserError where the packages are missing that only graphs need."""
    for name in ("kaldifst", "kaldi_decoder"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--graph needs the package {name}; make setup installs it")


def load_graph(path: str, vocab_size: int) -> Graph:
    """Reads HLG.fst. Raises UserError where it is none, or is of more tokens than vocab_size."""
    check_packages()
    import kaldifst

    try:
        with open_file(path) as file:
            known = file.read(4) == b"\xd6\xfd\xb2\x7e"
        fst = kaldifst.StdVectorFst.read(path) if known else None
    except OSError as error:
        raise cannot_read(f"--graph {path}", error, MAKE_ONE) from error
    except (MemoryError, RuntimeError, ValueError):  # A damaged header may ask for any memory.
        fst = None
    if fst is None:
        raise UserError(f"--graph {path}: no graph; {MAKE_ONE}")
    most = 0
    sound = True
    states = range(fst.num_states)
    for state in states:
        for arc in kaldifst.ArcIterator(fst, state):
            most = max(most, arc.ilabel)
            sound = sound and arc.nextstate in states and arc.ilabel >= 0
    if not sound or states and fst.start not in states:
        raise UserError(
            f"--graph {path}: damaged, an arc has no token or leads to no state; {MAKE_ONE}"
        )
    if most > vocab_size:
        raise UserError(
            f"--graph {path}: its tokens are not the checkpoint's, which has {vocab_size}; make it "
            "for this checkpoint with python -m tools.lm"
        )
    return Graph(fst)
