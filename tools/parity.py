"""Tables what every runtime hears: python -m tools.parity --checkpoint CKPT --data_root DATA

The table has the network in torch (with full context, under the mask of chunks, as a stream), its
ONNX files in onnxruntime, and the same files in sherpa-onnx by its Python API, in float32 and in
int8; all by greedy CTC. For each pair of rows it counts the tokens that are heard otherwise. In
streams every recording has silence behind it, up to the end of a chunk.

On the same features all float32 rows must hear the same tokens. By itself sherpa-onnx computes
other features than a model was trained on: the sound is mirrored at its edges, and no mel filter is
above 7,600 Hz (of 16 kHz). So all programs hear both kinds: the others also hear sherpa-onnx's, and
sherpa-onnx is also set to the model's. sherpa-onnx adds random dither to whole recordings. In the
rows "louder" the dither has no effect: the samples are multiplied by 4,096, and the mean of the
features is moved to match.
"""

import copy
import math
import tempfile
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

from cli import build, make_parser, option, options_class, run, shown

import sherpa_onnx
import torch
import torchaudio
import torchaudio.compliance.kaldi as kaldi
from torchmetrics.functional.text import char_error_rate

from model import U2, load_checkpoint
from score import ScoreOptions, load_data, waveforms_of
from stream import piece_samples
from tokenizer import BPE_SPACE
from tools.compare import print_table
from tools.export import check_supported, token_lines, write_onnx
from tools.onnx_checks import (
    given_of,
    graph_stream,
    graph_whole,
    greedy,
    network_stream,
    network_whole,
    open_session,
    streamed_features,
)
from tools.onnx_graphs import ChunkOptions, sherpa_graphs, write_graph

# Whose features are heard.
OWN = "the model's"
SO_FAR = "the model's, so far"
SHERPA = "sherpa-onnx's"

WEIGHTS = {"float32": "", "int8": ".int8"}  # and how the files with them end
LOUDER = 4096.0


@options_class
class ParityOptions:
    checkpoint: str = option(
        "runs/an4/best.ckpt",
        "checkpoint that train.py wrote; one on log_mel has no rows of sherpa-onnx",
    )
    data_root: str = option("data/an4", "data that prepare.py wrote")
    split: str = option("dev", "split of the data")


class Outcome(NamedTuple):
    """Holds what one program heard, for a row of the table."""

    context: str  # full or chunk
    features: str
    program: str
    weights: str
    tokens: list[list[int]]  # per recording


class Sounds(NamedTuple):
    """Holds recordings, samples (n,) or features (1,T,F), as they are and padded for streams."""

    whole: list[torch.Tensor]
    padded: list[torch.Tensor]


def to_chunks(model: U2, chunks: ChunkOptions, sound: torch.Tensor) -> torch.Tensor:
    """Pads a sound with silence to the end of a chunk and a frame.

    With less behind it sherpa-onnx does not hear the last chunk.
    """
    first, later = piece_samples(model, chunks.chunk_size)
    least = first + model.frontend.shift_samples
    more = max(0, -(-(len(sound) - least) // later))  # chunks behind the first
    return torch.nn.functional.pad(sound, (0, least + more * later - len(sound)))


def sherpa_features(model: U2, sound: torch.Tensor) -> torch.Tensor:
    """Computes (1,T,F) as sherpa-onnx does unless it is told otherwise, but without dither."""
    return kaldi.fbank(
        sound[None] * 32768,
        num_mel_bins=model.frontend.num_mel_bins,
        high_freq=-400.0,
        snip_edges=False,
        sample_frequency=model.frontend.sample_rate,
        dither=0.0,
    )[None]


# ---- The programs


def in_torch(model: U2, chunks: ChunkOptions, features: str, given: Sounds) -> list[Outcome]:
    def outcome(context, features, program, inputs, log_probs_of):
        tokens = [greedy(model, log_probs_of(x)) for x in inputs]
        return Outcome(context, features, program, "float32", tokens)

    def whole(x):
        return network_whole(model, x)

    def masked(x):
        return network_whole(model, x, chunks.chunk_size, chunks.left_chunks)

    def stream(x):
        return model.ctc_log_probs(network_stream(model, chunks, x))

    streamed = [streamed_features(model, chunks, x) for x in given.padded]
    outcomes = [
        outcome("full", features, "torch", given.whole, whole),
        outcome("chunk", features, "torch, masked", given.padded, masked),
    ]
    if has_frontend_inside(model):
        features = SO_FAR
        outcomes.append(outcome("chunk", features, "torch, masked", streamed, masked))
    return [*outcomes, outcome("chunk", features, "torch", streamed, stream)]


def has_frontend_inside(model: U2) -> bool:
    """True where the graphs take samples; then a stream has other features than the whole."""
    return model.frontend.frontend == "log_mel"


def in_onnxruntime(
    model: U2, chunks: ChunkOptions, folder: str, features: str, given: Sounds
) -> list[Outcome]:
    streamed = SO_FAR if has_frontend_inside(model) else features
    outcomes = []
    for weights, suffix in WEIGHTS.items():
        whole = open_session(f"{folder}/model{suffix}.onnx")
        streaming = open_session(f"{folder}/model-streaming{suffix}.onnx")
        full = [greedy(model, graph_whole(whole, x)) for x in given.whole]
        chunk = [greedy(model, graph_stream(model, streaming, chunks, x)) for x in given.padded]
        outcomes.append(Outcome("full", features, "onnxruntime", weights, full))
        outcomes.append(Outcome("chunk", streamed, "onnxruntime", weights, chunk))
    return outcomes


def in_sherpa(
    model: U2, chunks: ChunkOptions, folder: str, features: str, sounds: Sounds
) -> list[Outcome]:
    sizes = dict(chunk_size=chunks.chunk_size, num_left_chunks=chunks.left_chunks)
    offline = partial(recognizer, sherpa_onnx.OfflineRecognizer, model, folder, features)
    online = partial(recognizer, sherpa_onnx.OnlineRecognizer, model, folder, features, **sizes)
    outcomes = []
    for weights, suffix in WEIGHTS.items():
        whole = offline(f"model{suffix}.onnx")
        streaming = online(f"model-streaming{suffix}.onnx")
        full = [sherpa_whole(model, whole, sound) for sound in sounds.whole]
        chunk = [sherpa_stream(model, streaming, sound) for sound in sounds.padded]
        outcomes.append(Outcome("full", features, "sherpa-onnx", weights, full))
        outcomes.append(Outcome("chunk", features, "sherpa-onnx", weights, chunk))
    write_louder(model, chunks, folder)
    whole = offline("louder.onnx")
    louder = [sherpa_whole(model, whole, sound * LOUDER) for sound in sounds.whole]
    return [*outcomes, Outcome("full", features, "sherpa-onnx, louder", "float32", louder)]


def recognizer(kind, model: U2, folder: str, features: str, file: str, **sizes):
    """Makes a sherpa_onnx.OfflineRecognizer or OnlineRecognizer.

    Its constructor has no arguments for other features than sherpa-onnx's own, so it is made once
    more from a changed configuration.
    """
    made = kind.from_wenet_ctc(
        tokens=f"{folder}/tokens.txt",
        model=f"{folder}/{file}",
        num_threads=1,
        sample_rate=model.frontend.sample_rate,
        feature_dim=model.frontend.num_mel_bins,
        **sizes,
    )
    if features == OWN:
        made.config.feat_config.high_freq = model.frontend.high_freq
        made.config.feat_config.snip_edges = True
        made.recognizer = type(made.recognizer)(made.config)
    return made


def write_louder(model: U2, chunks: ChunkOptions, folder: str) -> None:
    """Writes louder.onnx, a model.onnx for samples that are LOUDER times as loud.

    sherpa-onnx has no switch for its dither; of such samples the dither is a small part.
    """
    shifted = copy.deepcopy(model)
    encoder = model.net.encoder
    shifted.set_cmvn(encoder.cmvn_mean + 2 * math.log(LOUDER), encoder.cmvn_istd)
    graph = sherpa_graphs(shifted, chunks)[0]
    write_graph(graph._replace(file="louder.onnx", int8=False), folder)


def sherpa_whole(model: U2, whole, sound: torch.Tensor) -> list[int]:
    stream = whole.create_stream()
    stream.accept_waveform(model.frontend.sample_rate, sound.numpy())
    whole.decode_stream(stream)
    return ids_of(model, stream.result.tokens)


def sherpa_stream(model: U2, streaming, sound: torch.Tensor) -> list[int]:
    stream = streaming.create_stream()
    stream.accept_waveform(model.frontend.sample_rate, sound.numpy())
    stream.input_finished()
    while streaming.is_ready(stream):
        streaming.decode_stream(stream)
    return ids_of(model, streaming.tokens(stream))


def ids_of(model: U2, tokens: list[str]) -> list[int]:
    """Gives the ids of sherpa-onnx's tokens, which are those of tokens.txt, with spaces."""
    lines = token_lines(model.tokenizer).splitlines()
    ids = {line.split()[0].replace(BPE_SPACE, " "): i for i, line in enumerate(lines)}
    return [ids[token] for token in tokens]


# ---- The table


@torch.no_grad()
def all_outcomes(model: U2, chunks: ChunkOptions, recordings: list[torch.Tensor]) -> list[Outcome]:
    """Hears the recordings (n,) in every program; outcomes with full context come first."""
    sounds = Sounds(recordings, [to_chunks(model, chunks, sound) for sound in recordings])
    has_sherpa = not has_frontend_inside(model)
    kinds = {OWN: given_of, SHERPA: sherpa_features} if has_sherpa else {OWN: given_of}
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(model, chunks, folder)
        for features, given_for in kinds.items():
            given = Sounds(*([given_for(model, sound) for sound in part] for part in sounds))
            outcomes += in_torch(model, chunks, features, given)
            outcomes += in_onnxruntime(model, chunks, folder, features, given)
            if has_sherpa:
                outcomes += in_sherpa(model, chunks, folder, features, sounds)
    return sorted(outcomes, key=lambda outcome: outcome.context != "full")


def otherwise(a: Outcome, b: Outcome) -> int:
    """Counts the tokens that the two heard otherwise: the edit distance."""
    return sum(torchaudio.functional.edit_distance(x, y) for x, y in zip(a.tokens, b.tokens))


def table(model: U2, outcomes: list[Outcome], references: list[str]) -> list[list]:
    """Makes the rows of the table: number, what it is, CER, and two comparisons.

    One is the share of tokens heard as torch heard them with this context and these features, the
    other how many tokens are heard otherwise than in each row before.
    """
    rows = []
    for number, outcome in enumerate(outcomes):
        torchs = next(other for other in outcomes if other[:2] == outcome[:2])
        total = max(sum(map(len, torchs.tokens)), 1)
        texts = [model.tokenizer.decode(tokens) for tokens in outcome.tokens]
        rows.append(
            [
                number + 1,
                *outcome[:-1],
                float(char_error_rate(texts, references)),
                f"{1 - otherwise(outcome, torchs) / total:.2%}",
                *(otherwise(outcome, other) for other in outcomes[:number]),
                *[""] * (len(outcomes) - number),
            ]
        )
    return rows


def verdict(outcomes: list[Outcome]) -> str:
    """Tells how float32 rows agree, by context and features; rows with dither do not count."""
    lines = []
    for context, features in dict.fromkeys(outcome[:2] for outcome in outcomes):
        alike = [
            outcome
            for outcome in outcomes
            if outcome[:2] == (context, features)
            and outcome.weights == "float32"
            and (context, outcome.program) != ("full", "sherpa-onnx")
        ]
        most = max(otherwise(a, b) for a in alike for b in alike)
        lines.append(
            f"  {context}; {features}: {len(alike)} rows, {most or 'no'} tokens heard otherwise"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    given = vars(make_parser(__doc__, ParityOptions, ChunkOptions).parse_args(argv))
    options = build(ParityOptions, given)
    chunks = build(ChunkOptions, given)
    model, tokenizer, frontend = load_checkpoint(options.checkpoint)
    check_supported(model)
    dataset, references = load_data(tokenizer, frontend, ScoreOptions(**asdict(options)))
    # All programs hear the same samples, so the model's tail is put there for all of them.
    tail = (0, frontend.tail_samples)
    recordings = [torch.nn.functional.pad(sound, tail) for sound in waveforms_of(dataset)]
    model.frontend = frontend.without_tail
    outcomes = all_outcomes(model, chunks, recordings)
    print(
        f"{shown(options.checkpoint)} on {shown(options.data_root)}, {shown(options.split)}: "
        f"{len(references)} recordings; chunks of {chunks.chunk_size}, {chunks.left_chunks} to the "
        "left. Under the numbers: tokens heard otherwise.\n"
    )
    names = ("#", "context", "features", "program", "weights", "CER", "as torch")
    header = [*names, *map(str, range(1, len(outcomes) + 1))]
    print_table(header, table(model, outcomes, references))
    print(f"\nfloat32 on the same features, without dither:\n{verdict(outcomes)}")
    if has_frontend_inside(model):
        print(
            "no rows of sherpa-onnx: it does not compute log_mel; train with --frontend fbank "
            "for it"
        )


if __name__ == "__main__":
    run(main)
