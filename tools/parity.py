"""What every runtime hears, in one table: python parity.py --checkpoint runs/an4/best.ckpt --data_root data/an4 --split dev

The network in torch (with full context, under the mask of chunks, as a stream), its ONNX files in onnxruntime, and the same
files in sherpa-onnx by its Python API, in float32 and in int8; all by greedy CTC. Below it, for each pair, how many tokens
are heard otherwise. Streams hear every recording with silence behind it to the end of a chunk.

On the same features all float32 rows must hear the same tokens. By itself sherpa-onnx computes other features than a model
was trained on, mirrored at the edges and with no mel filter above 7,600 Hz (of 16 kHz), so each of the others hears those as
well, and sherpa-onnx is also set to the model's. Whole recordings it hears with dither, which is random; the rows "louder"
drown it: the samples are multiplied by 4,096, and the mean of the features is moved by as much.
"""

import copy
import math
import tempfile
from dataclasses import asdict
from typing import NamedTuple

from cli import build, make_parser, option, options_class, run, shown

import sherpa_onnx
import torch
import torchaudio
import torchaudio.compliance.kaldi as kaldi
from torchmetrics.functional.text import char_error_rate

from model import U2, load_checkpoint
from score import ScoreOptions, load_data, waveforms_of
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
from tools.onnx_graphs import ChunkOptions, piece_samples, sherpa_graphs, write_graph

OWN, SO_FAR, SHERPA = "the model's", "the model's, so far", "sherpa-onnx's"  # features
LOUDER = 4096.0


@options_class
class ParityOptions:
    checkpoint: str = option(
        "runs/an4/best.ckpt",
        "checkpoint that train.py wrote; one on log_mel has no rows of sherpa-onnx",
    )
    data_root: str = option("data/an4", "data that prepare.py wrote")
    split: str = option("dev", "split of the data")


def is_inside(model: U2) -> bool:
    """Whether the frontend is inside the graphs; then a stream's features are others than those of the whole."""
    return model.frontend.frontend == "log_mel"


class Row(NamedTuple):
    context: str  # full or chunk
    features: str
    program: str
    weights: str
    tokens: list[list[int]]  # per recording


class Sounds(NamedTuple):
    """Recordings (n,), as whole recordings and as streams hear them."""

    whole: list[torch.Tensor]
    padded: list[torch.Tensor]


def to_chunks(model: U2, chunks: ChunkOptions, sound: torch.Tensor) -> torch.Tensor:
    """The sound with silence behind it to the end of a chunk and a frame, the least with which sherpa-onnx hears the chunk."""
    first, later = piece_samples(model, chunks.chunk_size)
    least = first + model.frontend.shift_samples
    return torch.nn.functional.pad(
        sound, (0, least + max(0, -(-(len(sound) - least) // later)) * later - len(sound))
    )


def sherpa_features(model: U2, sound: torch.Tensor) -> torch.Tensor:
    """(1,T,F) as sherpa-onnx computes them unless it is told otherwise, but without dither."""
    return kaldi.fbank(
        sound[None] * 32768,
        num_mel_bins=model.frontend.num_mel_bins,
        high_freq=-400.0,
        snip_edges=False,
        sample_frequency=model.frontend.sample_rate,
        dither=0.0,
    )[None]


def network_rows(model: U2, chunks: ChunkOptions, features: str, given: Sounds) -> list[Row]:
    def row(context, features, program, sounds, hear):
        return Row(context, features, program, "float32", [greedy(model, hear(x)) for x in sounds])

    def masked(x):
        return network_whole(model, x, chunks.chunk_size, chunks.left_chunks)

    streamed = [streamed_features(model, chunks, x) for x in given.padded]
    rows = [
        row("full", features, "torch", given.whole, lambda x: network_whole(model, x)),
        row("chunk", features, "torch, masked", given.padded, masked),
    ]
    if is_inside(model):
        features = SO_FAR
        rows.append(row("chunk", features, "torch, masked", streamed, masked))
    return [
        *rows,
        row(
            "chunk",
            features,
            "torch",
            streamed,
            lambda x: model.ctc_log_probs(network_stream(model, chunks, x)),
        ),
    ]


def graph_rows(
    model: U2, chunks: ChunkOptions, folder: str, features: str, given: Sounds
) -> list[Row]:
    rows = []
    for weights, kind in (("float32", ""), ("int8", ".int8")):
        whole, streaming = (
            open_session(f"{folder}/{name}{kind}.onnx") for name in ("model", "model-streaming")
        )
        rows += [
            Row(
                "full",
                features,
                "onnxruntime",
                weights,
                [greedy(model, graph_whole(whole, x)) for x in given.whole],
            ),
            Row(
                "chunk",
                SO_FAR if is_inside(model) else features,
                "onnxruntime",
                weights,
                [greedy(model, graph_stream(model, streaming, chunks, x)) for x in given.padded],
            ),
        ]
    return rows


def recognizer(kind, model: U2, folder: str, file: str, features: str, **sizes):
    """sherpa_onnx.OfflineRecognizer or OnlineRecognizer; only by its configuration does it take other features than its own."""
    made = kind.from_wenet_ctc(
        tokens=f"{folder}/tokens.txt",
        model=f"{folder}/{file}",
        num_threads=1,
        sample_rate=model.frontend.sample_rate,
        feature_dim=model.frontend.num_mel_bins,
        **sizes,
    )
    if features == OWN:
        made.config.feat_config.high_freq, made.config.feat_config.snip_edges = (
            model.frontend.high_freq,
            True,
        )
        made.recognizer = type(made.recognizer)(made.config)
    return made


def sherpa_rows(
    model: U2, chunks: ChunkOptions, folder: str, features: str, sounds: Sounds
) -> list[Row]:
    rows = []
    for weights, kind in (("float32", ""), ("int8", ".int8")):
        whole = recognizer(
            sherpa_onnx.OfflineRecognizer, model, folder, f"model{kind}.onnx", features
        )
        streaming = recognizer(
            sherpa_onnx.OnlineRecognizer,
            model,
            folder,
            f"model-streaming{kind}.onnx",
            features,
            chunk_size=chunks.chunk_size,
            num_left_chunks=chunks.left_chunks,
        )
        rows += [
            Row(
                "full",
                features,
                "sherpa-onnx",
                weights,
                [sherpa_whole(model, whole, sound) for sound in sounds.whole],
            ),
            Row(
                "chunk",
                features,
                "sherpa-onnx",
                weights,
                [sherpa_stream(model, streaming, sound) for sound in sounds.padded],
            ),
        ]
    return [*rows, louder_row(model, chunks, folder, features, sounds)]


def louder_row(model: U2, chunks: ChunkOptions, folder: str, features: str, sounds: Sounds) -> Row:
    """Whole recordings without the dither of sherpa-onnx, which it has no switch for."""
    shifted = copy.deepcopy(model)
    shifted.set_cmvn(
        model.net.encoder.cmvn_mean + 2 * math.log(LOUDER), model.net.encoder.cmvn_istd
    )
    graph = sherpa_graphs(shifted, chunks)[0]._replace(file="louder.onnx", int8=False)
    write_graph(graph, folder)
    whole = recognizer(sherpa_onnx.OfflineRecognizer, model, folder, graph.file, features)
    return Row(
        "full",
        features,
        "sherpa-onnx, louder",
        "float32",
        [sherpa_whole(model, whole, sound * LOUDER) for sound in sounds.whole],
    )


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
    """Token ids of what sherpa-onnx calls tokens: lines of tokens.txt, with spaces."""
    ids = {
        line.split()[0].replace(BPE_SPACE, " "): i
        for i, line in enumerate(token_lines(model.tokenizer).splitlines())
    }
    return [ids[token] for token in tokens]


@torch.no_grad()
def hear(model: U2, chunks: ChunkOptions, recordings: list[torch.Tensor]) -> list[Row]:
    """All rows of the table."""
    sounds, rows = Sounds(recordings, [to_chunks(model, chunks, sound) for sound in recordings]), []
    with tempfile.TemporaryDirectory() as folder:
        write_onnx(model, chunks, folder)
        for features, make in ((OWN, given_of), (SHERPA, sherpa_features))[
            : 1 if is_inside(model) else 2
        ]:
            given = Sounds(*([make(model, sound) for sound in part] for part in sounds))
            rows += network_rows(model, chunks, features, given) + graph_rows(
                model, chunks, folder, features, given
            )
            rows += [] if is_inside(model) else sherpa_rows(model, chunks, folder, features, sounds)
    return sorted(rows, key=lambda row: row.context != "full")


def otherwise(a: Row, b: Row) -> int:
    """Tokens that the one hears and not the other: the edit distance."""
    return sum(torchaudio.functional.edit_distance(x, y) for x, y in zip(a.tokens, b.tokens))


def table(model: U2, rows: list[Row], references: list[str]) -> list[list]:
    """Rows of the table: number, what it is, CER, the share of tokens heard as in torch's row of this context and features, and
    how many are heard otherwise than in each row before it."""
    lines = []
    for number, row in enumerate(rows):
        torch_row = next(other for other in rows if other[:2] == row[:2])
        total = sum(map(len, torch_row.tokens))
        texts = [model.tokenizer.decode(tokens) for tokens in row.tokens]
        lines.append(
            [
                number + 1,
                *row[:-1],
                float(char_error_rate(texts, references)),
                f"{1 - otherwise(row, torch_row) / max(total, 1):.2%}",
                *(otherwise(row, other) for other in rows[:number]),
                *[""] * (len(rows) - number),
            ]
        )
    return lines


def same(rows: list[Row]) -> str:
    """The verdict on the float32 rows of each context and features, those with dither excepted."""
    found = []
    for context, features in dict.fromkeys(row[:2] for row in rows):
        alike = [
            row
            for row in rows
            if row[:2] == (context, features)
            and row.weights == "float32"
            and (context, row.program) != ("full", "sherpa-onnx")
        ]
        most = max(otherwise(a, b) for a in alike for b in alike)
        found.append(
            f"  {context}; {features}: {len(alike)} rows, {most or 'no'} tokens heard otherwise"
        )
    return "\n".join(found)


def main(argv: list[str]) -> None:
    given = vars(make_parser(__doc__, ParityOptions, ChunkOptions).parse_args(argv))
    options, chunks = build(ParityOptions, given), build(ChunkOptions, given)
    model, tokenizer, frontend = load_checkpoint(options.checkpoint)
    check_supported(model)
    dataset, references = load_data(tokenizer, frontend, ScoreOptions(**asdict(options)))
    rows = hear(model, chunks, list(waveforms_of(dataset)))
    header = (
        "#",
        "context",
        "features",
        "program",
        "weights",
        "CER",
        "as torch",
        *range(1, len(rows) + 1),
    )
    print(
        f"{shown(options.checkpoint)} on {shown(options.data_root)}, {shown(options.split)}: "
        f"{len(references)} recordings; chunks of "
        f"{chunks.chunk_size}, {chunks.left_chunks} to the left. Under the numbers: tokens heard otherwise.\n"
    )
    print_table(list(map(str, header)), table(model, rows, references))
    print(f"\nfloat32 on the same features, without dither:\n{same(rows)}")
    if is_inside(model):
        print(
            "no rows of sherpa-onnx: it does not compute log_mel; train with --frontend fbank for it"
        )


if __name__ == "__main__":
    run(main)
