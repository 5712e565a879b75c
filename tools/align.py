"""Measures how far word times are off: python -m tools.align --checkpoint runs/demo/best.ckpt

espeak-ng speaks sentences of the demo corpus in the voices of a held-out split, and says when it
speaks each word. A word starts with espeak-ng's event and ends where the pause behind the word
begins; two words that are run together count as one. The command prints, in milliseconds, the mean
absolute error of starts and ends, and by how much they are late on average (early: negative). It
does so for the true text, aligned, and for the words that were heard right. The last line of stdout
is JSON. With its `delay` in transcribe.py --delay, the true text is neither late nor early on
average. Each checkpoint has its own delay; synthetic speech gives only an estimate of the delay.
"""

from collections.abc import Iterator
from dataclasses import asdict
from difflib import SequenceMatcher

from cli import UserError, build, make_parser, option, options_class, run

import numpy as np
import torch
from tqdm import tqdm

from audio import resample
from decode import MODES, SearchOptions
from files import json_text
from model import load_checkpoint
from tools import demo, speak
from transforms import extract
from words import Word, align_words, frame_times


@options_class
class AlignOptions:
    checkpoint: str = option("runs/demo/best.ckpt", "a .ckpt, a folder for the hub, or org/name")
    split: str = option("eval_clean", "whose sentences and voices", choices=("dev", "eval_clean"))
    sentences: int = option(100, "how many", at_least=1, at_most=max(demo.UTTERANCES.values()))
    mode: str = option("attention_rescoring", "search", choices=MODES)
    delay: float = option(
        0.0, "seconds to take off all times, as in transcribe.py", at_least=-60.0, at_most=60.0
    )

    def __post_init__(self):
        if self.sentences > demo.UTTERANCES[self.split]:
            raise UserError(
                f"--sentences {self.sentences}: {self.split} has 1 to {demo.UTTERANCES[self.split]}"
            )


def main(argv: list[str]) -> None:
    given = vars(make_parser(__doc__, AlignOptions, SearchOptions).parse_args(argv))
    options = build(AlignOptions, given)
    search = build(SearchOptions, given)
    model, *_ = load_checkpoint(options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    errors = {"true_text": [], "heard": []}  # (start, end) in seconds, found minus true
    plan = demo.plan(options.split, options.sentences)
    for utterance in tqdm(plan, unit=" sentences", disable=None):
        waveform, spoken = speak.speak_with_words(utterance)
        samples = torch.from_numpy(resample(waveform, speak.RATE, model.frontend.sample_rate))
        text = spelled_as(model.tokenizer, utterance.text)
        for name, found in zip(errors, find_words(model, samples, text, options, search)):
            errors[name] += time_errors(match(text.split(), found), spoken)
    result = {name: summary(of_name) for name, of_name in errors.items()}
    print(f"{'':10} {'words':>6} {'start off':>10} {'late':>7} {'end off':>10} {'late':>7}")
    for name, numbers in result.items():
        print(
            f"{name:10} {numbers['words']:6} "
            f"{numbers['start_error_ms']:7.1f} ms {numbers['start_late_ms']:7.1f} "
            f"{numbers['end_error_ms']:7.1f} ms {numbers['end_late_ms']:7.1f}"
        )
    late = (result["true_text"]["start_late_ms"] + result["true_text"]["end_late_ms"]) / 2
    delay = round(options.delay + late / 1000, 3)
    print(json_text({**asdict(options), **asdict(search), **result, "delay": delay}))


def spelled_as(tokenizer, text: str) -> str:
    """Returns the text in the case that the tokenizer knows, or raises UserError."""
    for spelling in (text, text.upper()):
        if tokenizer.unk_id not in tokenizer.encode(spelling):
            return spelling
    raise UserError(
        f"the checkpoint's tokenizer cannot spell {text!r}; tools.align measures models of English"
    )


@torch.no_grad()
def find_words(
    model, samples: torch.Tensor, text: str, options: AlignOptions, search: SearchOptions
) -> Iterator[list[Word]]:
    """Yields the words of the true text, then those that the model hears in samples (N,)."""
    features = extract(model.frontend)(samples)[None].to(model.device)  # (1,T,F)
    lengths = torch.tensor([features.shape[1]], device=model.device)
    encoded, lengths = model.encode(features, lengths, search.chunk_size, search.left_chunks)
    (hypothesis,) = model.search(encoded, lengths, options.mode, search)
    log_probs = model.ctc_log_probs(encoded)[0].cpu()
    times = frame_times(model.options.input_layer, model.frontend)
    for tokens in (model.tokenizer.encode(text), hypothesis.tokens):
        yield align_words(tokens, log_probs, model.tokenizer, times, delay=options.delay)


def match(said: list[str], found: list[Word]) -> list[Word | None]:
    """Returns for each word that was said the same word among the found ones, or None."""
    matched = [None] * len(said)
    texts = [word.text for word in found]
    for block in SequenceMatcher(None, said, texts, autojunk=False).get_matching_blocks():
        matched[block.a : block.a + block.size] = found[block.b : block.b + block.size]
    return matched


def time_errors(
    matched: list[Word | None], spoken: list[speak.SpokenWord]
) -> list[tuple[float, float]]:
    """Returns (start, end), found minus true, of each spoken word that is found, in seconds."""
    result = []
    place = 0
    for true in spoken:
        words = matched[place : place + len(true.text.split())]
        place += len(words)
        if all(words):
            result.append((words[0].start - true.start, words[-1].end - true.end))
    return result


def summary(errors: list[tuple[float, float]]) -> dict:
    """Returns the means in milliseconds. Raises UserError where there are no errors."""
    if not errors:
        raise UserError("no word was heard right, so there is nothing to measure; train for longer")
    ms = 1000 * np.array(errors)
    start, end = np.abs(ms).mean(axis=0).round(1)
    start_late, end_late = ms.mean(axis=0).round(1)
    return {
        "words": len(errors),
        "start_error_ms": start,
        "start_late_ms": start_late,
        "end_error_ms": end,
        "end_late_ms": end_late,
    }


if __name__ == "__main__":
    run(main)
