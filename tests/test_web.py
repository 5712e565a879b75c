"""The page of an export hears in the browser what hear.py hears, without a server of its own."""

import asyncio
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from cli import UserError

import pytest
import soundfile
from aiohttp import ClientSession

from helpers import ROOT
from helpers_browser import browser, needs_browser
from helpers_model import exportable_model
from tools import web
from tools.export import HEAR_PY, ExportOptions, export, texts
from tools.onnx_checks import synthetic_sound
from tools.onnx_graphs import ChunkOptions

PACKAGE = Path(os.environ.get("ONNXRUNTIME_WEB", ROOT / "data" / web.PACKAGE))
SIZES = dict(
    **dict(bins=80, rate=100, frame_ms=40, chunk_size=2, cache_size=4, first=10),
    **dict(silent=[0, 4], unk_id=5, unknown="\u2047", lower=True),
    **dict(later=6, first_least=5, later_least=3, tail_samples=4, attn_shape=[1], conv_shape=[1]),
)

# A graph that notes its inputs, and finds two tokens of `best` in each chunk.
NODE = """
const [, body] = process.argv[1].match(/<script>[^]*<script>([^]*)\\/\\/ ---- The page/);
const best = [1, 1, 0, 1, 5, 4, ...Array(25).fill(0), 2, 3, 0], chunks = [], starts = [];
class Tensor { constructor(type, data, dims) { Object.assign(this, {type, data, dims}); } }
const kept = ["samples", "statistics", "feats"], caches = ["attn", "conv"];
const session = {
  inputNames: ["waveform", ...kept, "offset", "size", ...caches, "mask"],
  outputNames: ["log_probs", ...kept, ...caches],
  async run({waveform, offset, mask}) {
    chunks.push([...waveform.data].map(x => 32768 * x));
    starts.push([Number(offset.data[0]), [...mask.data].join("")]);
    const data = best.splice(0, 2).flatMap(token => tokens.map((_, i) => i === token ? 0 : -9));
    return {log_probs: {data: Float32Array.from(data), dims: [1, 2, 6]}};
  },
};
const tokens = ["<blank>", "\\u2581A", "\\u2581b", "\\u2581", "</s>", "<unk>"];
const loading = Promise.resolve({ort: {Tensor}, session, tokens});
const Ear = new Function("loading", `"use strict"; ${body}; return Ear`)(loading);
const ear = new Ear(), told = [];
ear.onmessage = ({data}) => told.push(JSON.parse(data));
const sound = Int16Array.from(Array(100).keys());
for (let i = 0; i < sound.length; i += 7) ear.send(sound.slice(i, i + 7).buffer);
ear.send("end");
const closed = new Ear();
closed.onclose = () => told.push({last: "closed"});
closed.close();
const load = new Function("location", "fetch", `"use strict"; ${body}; return load()`);
const without = name => load({protocol: "http:"}, async asked => ({ok: asked !== name}))
  .catch(error => error.message);
const names = ["ort-wasm-simd-threaded.wasm", "model-streaming.onnx", "tokens.txt"];
Promise.all([ear.work, ...names.map(without)]).then(([, ...lost]) =>
  console.log(JSON.stringify({told, chunks, starts, left: ear.bufferedAmount, lost})));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="no node, which runs the page's script")
def test_the_ear_cuts_sound_as_hear_py_does_and_a_pause_ends_a_line():
    done = subprocess.run(
        ["node", "-e", NODE, web.page(SIZES)], cwd=ROOT, capture_output=True, text=True
    )
    heard = json.loads(done.stdout or done.stderr)
    samples, size, least, chunks = [*range(100), 0, 0, 0, 0], 10, 5, []
    while len(samples) >= least:  # as in hear.py
        chunks.append(samples[:size])
        samples, size, least = samples[size:], 6, 3
    assert heard["chunks"] == chunks and len(chunks[-1]) < 6
    assert heard["starts"][:3] == [[4, "000011"], [6, "001111"], [8, "111111"]]
    assert heard["left"] == 0
    assert ["is not beside this page" in line for line in heard["lost"]] == [True] * 3
    shut, hello, *told = heard["told"]
    assert shut == {"last": "closed"}  # so that the page lets the microphone go
    assert (hello["sample_rate"], hello["chunk_ms"]) == (100, 80)
    # Tokens on both sides of a blank are two. A second, 25 frames, without a token ends the line.
    # The text is the tokenizer's: without </s>, with the mark of <unk>, and in lower case.
    assert [m["text"] for m in told if m["final"]] == ["a a\u2047", "b"]
    assert [m["last"] for m in told] == [False] * (len(told) - 1) + [True]
    assert [m["cues"] for m in told if m["final"]] == [[[0, 0.2, "a a\u2047"]], [[1.24, 1.28, "b"]]]


def test_a_runtime_that_is_missing_or_damaged_is_one_clear_line(tmp_path):
    for path, reason in ((tmp_path / "none.tgz", "cannot be read"), (ROOT / "cli.py", "is not")):
        with pytest.raises(UserError, match=f"{reason}.*{web.PACKAGE}"):
            web.runtime(str(path))
    fbank = exportable_model()
    options = ExportOptions(out=str(tmp_path / "out"), onnxruntime_web=str(PACKAGE))
    with pytest.raises(UserError, match="--onnxruntime_web: a model on fbank has no index.html"):
        export(fbank, options, ChunkOptions(4, 2))
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_sizes_of_hear_py():
    model = exportable_model("log_mel", features={"tail_padding": 90})
    written = texts(model, ChunkOptions(4, 2))
    sizes = json.loads(re.search(r"const SIZES = (.*);", written["index.html"])[1])
    assert set(re.findall(r"SIZES\.(\w+)", written["index.html"])) == set(sizes)
    assert sizes["tail_samples"] == 1440 and sizes["attn_shape"] == [2, 2, 8, 16]
    assert written["hear.py"] == HEAR_PY.format_map(
        {name: tuple(v) if isinstance(v, list) else v for name, v in sizes.items()}
    )
    assert f"npm pack {web.PACKAGE[:15]}@" in written["README.md"]


def test_the_readme_of_an_fbank_model_names_sherpa_onnx_s_server():
    written = texts(exportable_model(), ChunkOptions(4, 2))
    assert "index.html" not in written
    assert "sherpa-onnx-online-websocket-server --port=6006" in written["README.md"]


def test_make_gets_the_package_that_export_takes():
    assert f"\nONNXRUNTIME_WEB = data/{web.PACKAGE}\n" in (ROOT / "Makefile").read_text()


# ---- In a browser


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@needs_browser
@pytest.mark.skipif(
    not PACKAGE.exists(), reason=f"no {PACKAGE}, which make web gets; ONNXRUNTIME_WEB=FILE names it"
)
def test_in_a_browser_the_page_hears_what_hear_py_hears(tmp_path):
    model = exportable_model("log_mel", features={"tail_padding": 90})
    folder, path = tmp_path / "out", tmp_path / "sound.wav"
    options = ExportOptions(out=str(folder), max_int8_cer=1.0, onnxruntime_web=str(PACKAGE))
    export(model, options, ChunkOptions(4, 2))
    soundfile.write(path, synthetic_sound(16000, 2.13).numpy(), 16000)
    command = [sys.executable, "hear.py", "model-streaming.onnx", str(path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    expected = done.stdout.removesuffix("\n")

    async def talking(url):
        async with asyncio.timeout(300), ClientSession() as session:
            async with browser(session, url, path, tmp_path / "profile") as window:
                await window.take_file(path)
                assert await window.run("texts") == [expected] and len(expected) > 5
                await window.take_file(path)  # A new stream begins as the first one did.
                assert await window.run("texts") == [expected] * 2
                await window.run("$('talk').click()")
                await window.until("$('partial').textContent && $('level').value > -60")
                await window.run("$('talk').click()")
                await window.until("!talk")
                assert not window.errors

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            asyncio.run(talking(f"http://127.0.0.1:{server.server_port}/"))
        finally:
            server.shutdown()
