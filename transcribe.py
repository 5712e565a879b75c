"""Transcribes audio files: python transcribe.py --checkpoint runs/demo/best.ckpt FILE ...

Prints a line per file, its path and what was heard, with a tab between. Files may have any format that soundfile
decodes, any rate and any number of channels. A file that cannot be read gets a line on stderr, the others are
transcribed all the same, and the exit status is 2.

With --stream the file is heard as if it were being spoken: what was heard so far appears on stderr as it grows, after
the seconds of audio that it took; a pause ends an utterance, which is then rescored.
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial

import torch

from cli import UserError, build, make_parser, option, run
from decode import MODES, SearchOptions
from model import load_checkpoint
from stream import cut, listen
from transforms import extract, read_audio


@dataclass(frozen=True)
class TranscribeOptions:
    checkpoint: str = option("runs/demo/best.ckpt", "checkpoint that train.py wrote")
    mode: str = option("attention_rescoring", "search; --stream is always attention_rescoring", choices=MODES)
    stream: bool = option(False, "hear the file piece by piece, in chunks of --chunk_size, 16 unless given")


def main(argv: list[str]) -> None:
    parser = make_parser(__doc__, TranscribeOptions, SearchOptions)
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files")
    given = vars(parser.parse_args(argv))
    options = build(TranscribeOptions, given)
    if options.stream and "mode" in given:
        raise UserError("--mode has no effect with --stream, which is always attention_rescoring; leave one of them out")
    search = build(SearchOptions, given, **({"chunk_size": 16} if options.stream else {}))
    model, _, frontend = load_checkpoint(options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    hear = hear_stream if options.stream else partial(hear_whole, mode=options.mode)
    failed = False
    for path in given["files"]:
        try:
            waveform = torch.from_numpy(read_audio(path, frontend.sample_rate))  # (N,)
        except UserError as error:
            failed = True
            print(f"transcribe.py: error: {path}: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        print(f"{path}\t{hear(model, waveform, search)}", flush=True)
    if failed:
        sys.exit(2)


def hear_whole(model, waveform: torch.Tensor, search: SearchOptions, mode: str) -> str:
    features = extract(model.frontend)(waveform)[None].to(model.device)  # (1,T,F)
    lengths = torch.tensor([features.shape[1]], device=model.device)
    hypothesis, = model.decode(features, lengths, mode, **asdict(search))
    return model.tokenizer.decode(hypothesis.tokens)


def hear_stream(model, waveform: torch.Tensor, search: SearchOptions) -> str:
    """The text of all utterances; of each, what is heard so far goes to stderr whenever it changes."""
    texts, shown = [], ""
    for heard in listen(model, cut(model, waveform, search.chunk_size), search):
        text = model.tokenizer.decode(heard.hypothesis.tokens)
        if heard.final:
            texts.append(text)
        if text and (heard.final or text != shown):
            print(f"{heard.seconds:8.2f} s {'=' if heard.final else ' '} {text}", file=sys.stderr, flush=True)
        shown = text
    return " ".join(filter(None, texts))


if __name__ == "__main__":
    run(main)
