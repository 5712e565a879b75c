"""Writes a checkpoint as ONNX for phones and browsers, or as a folder for the Hugging Face hub.

  python -m tools.export --checkpoint runs/demo/best.ckpt --out runs/demo/export
  python -m tools.export --checkpoint runs/demo/best.ckpt --hub_dir runs/demo/hub

--out gets model.onnx (whole recordings), model-streaming.onnx (chunk by chunk), both also in int8,
tokens.txt, and a README.md with the commands that run the models. A model on fbank runs in
sherpa-onnx. Its encoder.onnx, ctc.onnx and decoder.onnx run in WeNet's onnxruntime runtime, which
rescores. Neither runtime computes log_mel, so a model on log_mel has its frontend inside the
graphs: they take samples and run in onnxruntime alone. Such a model also gets index.html, which
hears in the browser once onnxruntime-web lies beside it, as after `make web`.

Before OUT appears, onnxruntime hears the sounds of --audio, whole and chunk by chunk. Its
log-probabilities must be those of the network and of stream.py to 1e-4, and int8 must hear the same
tokens to --max_int8_cer. Otherwise OUT does not appear.

--hub_dir gets the weights, the options, the tokenizer, a model card, and in onnx/ the ONNX files.
Fill in its README.md, then `hf upload ORG/NAME runs/demo/hub`. The folder, and after the upload
ORG/NAME, can stand for a checkpoint in every command.
"""

import os
import re

from cli import UserError, build, make_parser, one_line, option, options_class, run, shown

import torch

from audio import read_audio
from checkpoint import write_folder
from files import check_path, published
from model import U2, load_checkpoint, read_checked
from stream import frame_ms, piece_samples
from tokenizer import BPE_SPACE, UNKNOWN_MARK, Tokenizer, unit_lines
from tools import web
from tools.compare import as_cell, read_scores, score_columns, unusual
from tools.onnx_checks import check_files, synthetic_sound
from tools.onnx_graphs import (
    ChunkOptions,
    cache_inputs,
    sherpa_graphs,
    waveform_graphs,
    wenet_graphs,
    write_graph,
)
from transforms import Frontend

BLANK = "<blank>"  # by this name sherpa-onnx finds it


@options_class
class ExportOptions:
    checkpoint: str = option(
        "runs/demo/best.ckpt", "checkpoint that train.py wrote, a --hub_dir, or org/name on the hub"
    )
    out: str = option("runs/demo/export", "folder to make")
    hub_dir: str | None = option(None, "folder for the hub to make, in place of --out")
    audio: tuple[str, ...] = option(
        (), "recordings to check the export on; none: a synthetic sound"
    )
    max_int8_cer: float = option(
        0.1,
        "share of the float models' tokens that int8 may hear otherwise",
        at_least=0.0,
        at_most=1.0,
    )
    onnxruntime_web: str | None = option(
        None, f"{web.PACKAGE}, of which index.html of a log_mel model needs two files beside it"
    )
    overwrite: bool = option(
        False, "replace --out or --hub_dir, where it holds nothing but what this command writes"
    )


def check_supported(model: U2) -> None:
    """Raises UserError for a model that sherpa-onnx and WeNet's runtime cannot run."""
    o = model.options
    frontend = model.frontend
    if o.encoder != "conformer" or not o.causal:
        raise UserError(
            f"its encoder is a {o.encoder}{'' if o.causal else ' that is not causal'}; what is "
            "exported must stream: train with --encoder conformer --causal"
        )
    if (o.pos_enc_layer_type, o.selfattention_layer_type) != ("rel_pos", "rel_selfattn"):
        raise UserError(
            f"its positions are {o.pos_enc_layer_type} with {o.selfattention_layer_type}; only "
            "rel_pos with rel_selfattn is exported"
        )
    if frontend.frame_shift > frontend.frame_length:
        raise UserError(
            f"its frames are {frontend.frame_length} ms long and {frontend.frame_shift} apart; the "
            "streams of the exported model cannot leave out the sound between"
        )
    if frontend.frontend == "fbank" and (frontend.frame_length, frontend.frame_shift) != (25, 10):
        raise UserError(
            f"its frames are {frontend.frame_length} ms long and {frontend.frame_shift} apart; "
            "sherpa-onnx and WeNet's runtime have 25 and 10"
        )


# ---- The folder of ONNX files

SHERPA_README = """# A speech recognition model in ONNX

Made by export.py of lightning-U2. The files ending in `.int8.onnx` are smaller and can take the
place of those without. These programs come with `pip install sherpa-onnx-bin`. FILE.wav is mono.

    # whole recordings
    sherpa-onnx-offline --tokens=tokens.txt --wenet-ctc-model=model.onnx {flags} FILE.wav

    # as they are spoken; the sizes of chunks are not read from the model
    sherpa-onnx --tokens=tokens.txt --wenet-ctc-model=model-streaming.onnx \\
      --wenet-ctc-chunk-size={chunk_size} --wenet-ctc-num-left-chunks={left_chunks} {flags} FILE.wav

`--high-freq={high_freq:g}` gives the model the mel filters that it was trained with. By itself
sherpa-onnx also mirrors the sound at its edges. In Python, these lines give the model all of the
features that it was trained with:

    recognizer = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(
        tokens="tokens.txt", model="model-streaming.onnx", chunk_size={chunk_size},
        num_left_chunks={left_chunks}, sample_rate={rate}, feature_dim={bins})
    recognizer.config.feat_config.high_freq = {high_freq:g}
    recognizer.config.feat_config.snip_edges = True
    recognizer.recognizer = type(recognizer.recognizer)(recognizer.config)

A stream is heard to its end when about {tail:.1f} s of silence follow. Whole recordings are heard
with dither, which is random.
"""

TAIL_README = """
This model was trained with {tail_padding} ms of zeros behind every recording, and misses the ends
of recordings without. Put them there before either program hears a recording.
"""

SERVER_README = """
A server to talk to comes with the same programs. Its page is the folder python-api-examples/web of
https://github.com/k2-fsa/sherpa-onnx, which any web server serves, as `python -m http.server`:

    sherpa-onnx-online-websocket-server --port=6006 --tokens=tokens.txt \\
      --wenet-ctc-model=model-streaming.onnx --wenet-ctc-chunk-size={chunk_size} \\
      --wenet-ctc-num-left-chunks={left_chunks} {flags}
"""

WENET_README = """
WeNet's onnxruntime runtime hears streams with a second pass, by encoder.onnx, ctc.onnx and
decoder.onnx:

    decoder_main --onnx_dir . --unit_path tokens.txt --chunk_size {chunk_size} \\
      --num_left_chunks {left_chunks} --blank_id {blank_id} --reverse_weight {reverse_weight} \\
      --num_bins {bins} --sample_rate {rate} --wav_path FILE.wav
"""

WAVEFORM_README = """# A speech recognition model in ONNX

Made by export.py of lightning-U2. Its features (log_mel) are computed inside the graphs, so these
run in onnxruntime alone, not in sherpa-onnx or WeNet's runtime. The files ending in `.int8.onnx`
are smaller and can take the place of those without. FILE.wav is mono with {rate} samples per
second. `hear.py` shows how the graphs are called, in few lines of NumPy.

    pip install onnxruntime soundfile
    python hear.py model.onnx FILE.wav
    python hear.py model-streaming.onnx FILE.wav

`index.html` hears a microphone or a file by model-streaming.onnx in the browser, and sends nothing
anywhere. Browsers load no model into a page that is a file, so let any web server serve the folder:

    python -m http.server --directory . --bind 127.0.0.1 8000    # and open http://127.0.0.1:8000/

The page needs two files of onnxruntime-web beside it. Where they are missing, they come so:

    npm pack {package}
    tar --extract --file {package_file} --strip-components 2 {runtime}
"""

HEAR_PY = """import sys
import unicodedata

import numpy as np
import onnxruntime
import soundfile


def hear_whole(samples):
    log_probs, frames = session.run(None, dict(waveform=samples))
    return log_probs[0, : frames[0]].argmax(-1).tolist()


def hear_stream(samples):
    samples = np.pad(samples, (0, {tail_samples}))  # silence, in which the last word is still heard
    chunk, cache = {chunk_size}, {cache_size}  # encoder frames
    size = {first}  # samples of the first chunk
    least = {first_least}  # samples of a first chunk that is the last as well
    offset = cache
    kept = [np.zeros(0, "f"), np.zeros(3), np.zeros((1, 0, {bins}), "f")]
    caches = [np.zeros({attn_shape}, "f"), np.zeros({conv_shape}, "f")]
    names = [node.name for node in session.get_inputs()]
    found = []
    while len(samples) >= least:
        # At the beginning the cache holds nothing yet.
        mask = np.arange(cache + chunk)[None, None] >= 2 * cache - offset
        counts = np.array([offset]), np.array([cache])
        inputs = samples[:size], *kept, *counts, *caches, mask
        log_probs, *state = session.run(None, dict(zip(names, inputs)))
        kept, caches = state[:3], state[3:]
        found += log_probs[0].argmax(-1).tolist()
        samples = samples[size:]
        offset += chunk
        size, least = {later}, {later_least}  # of the later chunks
    return found


model, path = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
samples, rate = soundfile.read(path, dtype="float32")
assert rate == {rate} and samples.ndim == 1
best = hear_stream(samples) if "streaming" in model else hear_whole(samples)
with open("tokens.txt", encoding="utf-8") as file:
    tokens = [line.split()[0] for line in file]
tokens[{unk_id}] = "{unknown}"
heard = [i for i, before in zip(best, [-1, *best]) if i not in (before, *{silent})]
text = " ".join("".join(tokens[i] for i in heard).replace("\u2581", " ").split())
print(unicodedata.normalize("NFC", text.lower() if {lower} else text))
"""


def token_lines(tokenizer: Tokenizer) -> str:
    """Makes tokens.txt, lines of `token id`. Raises UserError where two tokens would look alike."""
    tokens = [BPE_SPACE if token == tokenizer.space else token for token in tokenizer.tokens]
    tokens[tokenizer.blank_id] = BLANK
    return unit_lines(tokens, "tokens.txt")


def sizes_of(model: U2, chunks: ChunkOptions) -> dict:
    """Computes what hear.py and index.html have to know of the streaming graph."""
    frontend = model.frontend
    tokenizer = model.tokenizer
    first, later = piece_samples(model, chunks.chunk_size)
    first_least, later_least = piece_samples(model, 1)
    caches = cache_inputs(model, chunks, 0)
    return dict(
        bins=frontend.num_mel_bins,
        rate=frontend.sample_rate,
        frame_ms=frame_ms(model),
        silent=(tokenizer.blank_id, tokenizer.sos_id, tokenizer.eos_id),
        unk_id=tokenizer.unk_id,
        unknown=UNKNOWN_MARK,
        lower=tokenizer.written("A") == "a",
        chunk_size=chunks.chunk_size,
        cache_size=chunks.cache_size,
        first=first,
        later=later,
        first_least=first_least,
        later_least=later_least,
        tail_samples=frontend.tail_samples,
        attn_shape=tuple(caches["attn_cache"].shape),
        conv_shape=tuple(caches["conv_cache"].shape),
    )


def texts(model: U2, chunks: ChunkOptions) -> dict[str, str]:
    """Makes tokens.txt and the files that say how to run the graphs, by file name."""
    frontend = model.frontend
    tokens = {"tokens.txt": token_lines(model.tokenizer)}
    sizes = sizes_of(model, chunks)
    if frontend.frontend == "log_mel":
        readme = WAVEFORM_README.format(**sizes, **web.NAMES)
        return {
            **tokens,
            "README.md": readme,
            "hear.py": HEAR_PY.format(**sizes),
            "index.html": web.page(sizes),
        }
    tail = TAIL_README * (frontend.tail_padding > 0)
    readme = SHERPA_README + SERVER_README + WENET_README * frontend.is_wenets + tail
    more = dict(
        flags=sherpa_flags(frontend),
        high_freq=frontend.high_freq,
        blank_id=model.net.blank_id,
        reverse_weight=model.options.reverse_weight,
        left_chunks=chunks.left_chunks,
        tail=(sizes["first"] + frontend.tail_samples) / frontend.sample_rate,
        tail_padding=frontend.tail_padding,
    )
    return {**tokens, "README.md": readme.format(**sizes, **more)}


def sherpa_flags(frontend: Frontend) -> str:
    """Gives the flags by which sherpa-onnx's programs compute the features of this model."""
    flags = []
    if frontend.sample_rate != 16000:
        flags.append(f"--sample-rate={frontend.sample_rate}")
    if frontend.num_mel_bins != 80:
        flags.append(f"--feat-dim={frontend.num_mel_bins}")
    return " ".join([*flags, f"--high-freq={frontend.high_freq:g}"])


def read_sounds(options: ExportOptions, sample_rate: int) -> list[torch.Tensor]:
    sounds = []
    for path in options.audio:
        try:
            sounds.append(torch.from_numpy(read_audio(path, sample_rate)))
        except UserError as error:
            raise UserError(f"--audio {path}: {error}") from None
    return sounds or [synthetic_sound(sample_rate)]


def write_runtime(model: U2, path: str, folder: str) -> None:
    """Writes what index.html needs beside it, from web.PACKAGE at `path`.

    Raises UserError for a model without index.html and for another file, or OSError.
    """
    if model.frontend.frontend != "log_mel":
        raise UserError(
            "--onnxruntime_web: a model on fbank has no index.html, because no graph computes its "
            "features; its README.md names the page of sherpa-onnx's server"
        )
    for name, content in web.runtime(path).items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)


def write_onnx(model: U2, chunks: ChunkOptions, folder: str) -> None:
    """Writes all files of --out but the runtime's, unchecked. Raises OSError."""
    for name, text in texts(model, chunks).items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
    graphs = waveform_graphs if model.frontend.frontend == "log_mel" else sherpa_graphs
    more = wenet_graphs(model, chunks) if model.frontend.is_wenets else []
    try:
        for graph in graphs(model, chunks) + more:
            write_graph(graph, folder)
    except Exception:
        # On a full disk onnx writes half a file and fails to read it. The probe raises OSError.
        with open(os.path.join(folder, "probe"), "wb") as file:
            file.write(bytes(2**20))
        raise


def write_checked(
    model: U2, options: ExportOptions, chunks: ChunkOptions, folder: str
) -> list[str]:
    """Writes all files of --out and checks them -> lines for the user.

    Raises UserError where the files do not hear what the network hears, or OSError.
    """
    check_supported(model)
    sounds = read_sounds(options, model.frontend.sample_rate)
    if options.onnxruntime_web is not None:
        write_runtime(model, options.onnxruntime_web, folder)
    write_onnx(model, chunks, folder)
    lines = check_files(model, chunks, folder, sounds, options.max_int8_cer)
    seconds = sum(map(len, sounds)) / model.frontend.sample_rate
    heard = "a synthetic sound"
    if options.audio:
        heard = f"{len(sounds)} recording{'s' * (len(sounds) > 1)}"
    return [f"checked on {heard}, {seconds:.1f} s:", *lines]


# ---- The folder for the hub

CARD = """---
library_name: lightning-u2
pipeline_tag: automatic-speech-recognition
tags:
- automatic-speech-recognition
- streaming
- u2
- {encoder}
{onnx_tag}# Fill in, and remove the "# ":
# language: en
# license: the licence of these weights, as the hub spells it
---

# (the name of this model)

A speech recognition model by lightning-U2, for whole recordings and for streams: {encoder} encoder,
{parameters:.2f} M parameters, {vocab_size} tokens, {bins} mel bins ({frontend}) of sound with
{rate} samples per second.

## Use

With ORG/NAME or this folder for a checkpoint, in lightning-U2:

    python transcribe.py --checkpoint ORG/NAME FILE.wav

{onnx}

## Numbers

{numbers}

## Licence

Fill in: the licence of these weights, and of the recordings that they were trained on.
"""


def write_hub(model: U2, options: ExportOptions, chunks: ChunkOptions, folder: str) -> list[str]:
    """Writes all files of --hub_dir -> lines for the user. Raises as write_checked does.

    A model that the runtimes cannot run gets no ONNX files.
    """
    write_folder(read_checked(options.checkpoint), folder)
    try:
        check_supported(model)
    except UserError as error:
        lines = [f"without ONNX files: {error}"]
        onnx = f"No ONNX files: {markdown(error)}."
        onnx_tag = ""
    else:
        onnx_folder = os.path.join(folder, "onnx")
        os.mkdir(onnx_folder)
        lines = write_checked(model, options, chunks, onnx_folder)
        onnx = "Without PyTorch: the files in `onnx/`, whose README.md has the commands."
        onnx_tag = "- onnx\n"
    card = CARD.format(
        encoder=model.options.encoder,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        bins=model.frontend.num_mel_bins,
        vocab_size=model.tokenizer.vocab_size,
        frontend=model.frontend.frontend,
        rate=model.frontend.sample_rate,
        onnx=onnx,
        onnx_tag=onnx_tag,
        numbers=score_table(options.checkpoint),
    )
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(card)
    return lines


def score_table(checkpoint: str) -> str:
    """Tables in Markdown the scores of a best.ckpt, which score.py left beside it.

    Scores with hotwords, or with another beam or other weights than score.py's, are left out. Where
    no score is left, or they are older than the checkpoint, the text names the command for scores.
    """
    folder, name = os.path.split(checkpoint)
    scores = []
    if name == "best.ckpt" and is_newer(os.path.join(folder, "scores.jsonl"), checkpoint):
        scores = [score for score in read_scores(folder) if score["checkpoint"] == name]
    scores = [score for score in scores if not unusual(score)]
    if not scores:
        return (
            "None yet. `python score.py --checkpoint ORG/NAME --data_root DATA --split dev "
            "--mode all` prints them."
        )
    columns = score_columns(scores)
    rows = [columns, ["---"] * len(columns)]
    for score in scores:
        rows.append([markdown(as_cell(score.get(column))) for column in columns])
    lines = [
        "By `score.py`; wer and cer are fractions, chunk_size is in encoder frames, -1 is full "
        "context.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)


def markdown(text: str) -> str:
    """Makes one line that Markdown shows as the text is, also in a table."""
    return re.sub(r"[\\`*<>\[\]|&#!~$]|:(?=//)", r"\\\g<0>", one_line(text))


def is_newer(path: str, than: str) -> bool:
    return os.path.isfile(path) and os.path.getmtime(path) >= os.path.getmtime(than)


# ---- The command


def export(model: U2, options: ExportOptions, chunks: ChunkOptions) -> list[str]:
    """Writes OUT, or HUB_DIR where it is given, once all its files are checked.

    -> lines for the user. Where it raises UserError, the folder is as before.
    """
    inputs = (options.checkpoint, *options.audio, options.onnxruntime_web)
    path = options.hub_dir or options.out
    with published(path, "an export", options.overwrite, inputs) as folder:
        try:
            write = write_hub if options.hub_dir else write_checked
            return write(model, options, chunks, folder)
        except UserError as error:
            raise UserError(f"{options.checkpoint}: {error}") from None


def main(argv: list[str]) -> None:
    given = vars(make_parser(__doc__, ExportOptions, ChunkOptions).parse_args(argv))
    options = build(ExportOptions, given)
    chunks = build(ChunkOptions, given)
    if "hub_dir" in given and "out" in given:
        raise UserError(
            "--out has no effect with --hub_dir, which has the same files in onnx/; leave one of "
            "them out"
        )
    folder = options.hub_dir or options.out
    check_path(os.path.realpath(folder), "--hub_dir" if options.hub_dir else "--out", "ONNX")
    if os.path.lexists(folder) and not options.overwrite:  # even an empty one
        raise UserError(f"{folder} exists; name another folder, or add --overwrite")
    model, _, frontend = load_checkpoint(options.checkpoint)
    lines = export(model, options, chunks)
    print("\n".join(map(shown, lines)))
    if options.hub_dir:
        folder = shown(options.hub_dir)
        print(f"{folder}: fill in its README.md, then: hf upload ORG/NAME {folder}")
        return
    programs = "sherpa-onnx (model*.onnx)"
    if frontend.frontend == "log_mel":
        programs = "onnxruntime alone: sherpa-onnx and WeNet's runtime do not compute log_mel"
    if frontend.is_wenets:
        programs += " and WeNet's onnxruntime runtime (encoder.onnx, ctc.onnx, decoder.onnx)"
    print(f"{shown(options.out)}: runs in {programs}; its README.md has the commands")


if __name__ == "__main__":
    run(main)
