"""Transcribes audio files: python transcribe.py --checkpoint runs/demo/best.ckpt FILE ...

Prints a line per file, its path and what was heard, with a tab between. Files may have any format that soundfile
decodes, any rate and any number of channels. A file that cannot be read gets a line on stderr, the others are
transcribed all the same, and the exit status is 2.
"""

import sys
from dataclasses import asdict, dataclass

import torch

from cli import UserError, build, make_parser, option, run
from decode import MODES, SearchOptions
from model import load_checkpoint
from transforms import extract, read_audio


@dataclass(frozen=True)
class TranscribeOptions:
    checkpoint: str = option("runs/demo/best.ckpt", "checkpoint that train.py wrote")
    mode: str = option("attention_rescoring", "search", choices=MODES)


def main(argv: list[str]) -> None:
    parser = make_parser(__doc__, TranscribeOptions, SearchOptions)
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files")
    given = vars(parser.parse_args(argv))
    options, search = build(TranscribeOptions, given), build(SearchOptions, given)
    model, tokenizer, frontend = load_checkpoint(options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    features_of, failed = extract(frontend), False
    for path in given["files"]:
        try:
            waveform = torch.from_numpy(read_audio(path, frontend.sample_rate))  # (N,)
        except UserError as error:
            failed = True
            print(f"transcribe.py: error: {path}: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        features = features_of(waveform)[None].to(model.device)  # (1,T,F)
        lengths = torch.tensor([features.shape[1]], device=model.device)
        hypothesis, = model.decode(features, lengths, options.mode, **asdict(search))
        print(f"{path}\t{tokenizer.decode(hypothesis.tokens)}", flush=True)
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    run(main)
