"""A page to talk to: its texts are transcribe.py's, and no client can harm the others."""

import asyncio
import dataclasses
import json
import os
import re
import shutil
import signal
import socket as sockets
import subprocess
import threading

from cli import UserError

import numpy as np
import pytest
import soundfile
from aiohttp import ClientSession, WSMsgType, WSServerHandshakeError

import stream
import transcribe
from decode import SearchOptions
from helpers import ROOT, TINY, noise
from helpers_browser import browser, needs_browser
from helpers_model import call, save_model, tiny_model
from model import load_checkpoint
from stream import in_chunks, no_samples
from tokenizer import train_char
from tools import live
from tools.live import LiveOptions
from words import Transcript, Word, as_srt, join

SOUND = (3000 * noise(6 * 16000)).short().numpy()
SEARCH = SearchOptions(chunk_size=16, left_chunks=4)


@pytest.fixture(scope="module")
def model(world):
    return load_checkpoint(str(world / "best.ckpt"))[0]


@pytest.fixture
def short(monkeypatch):
    """Lets utterances end after 2 s, so that a short sound has several."""
    monkeypatch.setattr(stream, "LONGEST", 2000)


def serve(model, talking, search=SEARCH, **options) -> int:
    """Runs a server on a free port, and talking(room, session, url); then SIGTERM ends it."""

    async def body():
        room = live.make_room(LiveOptions(port=0, **options), model, search)
        lines = asyncio.Queue()
        async with asyncio.timeout(500):
            serving = asyncio.create_task(live.serve(room, tell=lines.put_nowait))
            await lines.get()
            url = live.ADDRESS.search(await lines.get())[0]
            try:
                async with ClientSession() as session:
                    await talking(room, session, f"{url}ws")
            finally:
                if not room.closing.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                number = await serving
            assert not room.clients
            assert asyncio.all_tasks() == {asyncio.current_task()}
        return number

    return asyncio.run(body())


async def hear(socket, sound=SOUND, size=5000) -> list:
    """Sends the sound in pieces of so many samples, and its end -> all answers."""
    for place in range(0, len(sound), size):
        await socket.send_bytes(sound[place : place + size].tobytes())
    await socket.send_str("end")
    return await answers(socket)


async def answers(socket) -> list:
    """The answers up to that to the end of the stream, or to an error."""
    heard = []
    while not heard or not heard[-1].get("last") and "error" not in heard[-1]:
        heard.append(await socket.receive_json())
    return heard


def texts(answers) -> list:
    return [answer["text"] for answer in answers if answer.get("final")]


def test_all_who_talk_at_once_read_what_transcribe_writes(model, world, tmp_path, capsys, short):
    path = tmp_path / "sound.wav"
    soundfile.write(path, SOUND, 16000)
    flags = "--checkpoint", world / "best.ckpt", "--stream", "--left_chunks", 4, "--format", "json"
    status, [line], _ = call(capsys, transcribe, *flags, path)
    expected = json.loads(line)
    assert status == 0

    async def talking(room, session, url):
        async def one(size):
            async with session.ws_connect(url) as socket:
                hello = await socket.receive_json()
                assert (hello["sample_rate"], hello["chunk_ms"]) == (16000, 640)
                return [await hear(socket, size=size), await hear(socket, size=size)]

        for first, again in await asyncio.gather(*map(one, (131072, 5000, 1777))):
            assert first == again  # "end" begins anew
            assert join(texts(first)) == expected["text"] and len(texts(first)) == 3
            words = [word for answer in first for word in answer["words"]]
            named = [(word["word"], word["start"], word["confidence"]) for word in words]
            assert named == [(w["word"], w["start"], w["confidence"]) for w in expected["words"]]
            assert first[-1]["seconds"] == expected["duration"] and named
            assert [answer["seconds"] for answer in first if not answer["final"]]

    assert serve(model, talking) == signal.SIGTERM


def test_who_sends_too_fast_is_slowed_and_loses_nothing(model, monkeypatch, short):
    read = []
    go_on = threading.Event()
    real = live.hear, live.as_samples
    monkeypatch.setattr(live, "hear", lambda *work: go_on.wait(60) and real[0](*work))
    monkeypatch.setattr(live, "as_samples", lambda data: read.append(data) or real[1](data))

    async def talking(_, session, url):
        async with session.ws_connect(url) as socket:
            await socket.receive_json()
            hearing = asyncio.create_task(hear(socket, size=10240))  # a chunk a message
            while len(read) < live.QUEUE:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert len(read) <= live.QUEUE + 3  # one is being heard, one waits for its place
            go_on.set()
            slow = await hearing
        async with session.ws_connect(url) as socket:
            await socket.receive_json()
            assert slow == await hear(socket)

    serve(model, talking)


def test_who_dies_or_reads_nothing_leaves_nothing_behind(model, monkeypatch):
    monkeypatch.setattr(live, "SEND", 0.3)

    async def gone(room):
        while room.clients:
            await asyncio.sleep(0.01)

    async def talking(room, session, url):
        async with session.ws_connect(url) as socket:
            await socket.receive_json()
            await socket.send_bytes(SOUND.tobytes())
            socket._response.connection.transport.abort()
            await gone(room)
        monkeypatch.setattr(live, "told", lambda *_: {"text": "x" * 2**24})
        async with session.ws_connect(url) as socket:
            await socket.send_bytes(SOUND.tobytes())
            transport = socket._response.connection.transport
            transport.pause_reading()
            await gone(room)
            transport.abort()

    serve(model, talking)


BROKEN = {
    "a message of 262146 bytes; send at most": [bytes(2**18 + 2)],
    "whole samples": [b"abc"],
    "more than 7 s without an end": [SOUND.tobytes(), SOUND.tobytes()],
    "no such message": ["[" * 100000],
    "nothing came for 0.2 s": [],
    "hotwords, line 2: the tokenizer cannot spell": ['{"hotwords": "one\\nßß"}'],
    "hotwords in the middle": [SOUND.tobytes(), '{"hotwords": "one"}'],
    "no phrase": ['{"hotwords": ""}'],
    'send samples as bytes, the text end, or {"hot': ['{"hotwords": 1}'],
}


def test_every_limit_is_told_in_one_message(model, monkeypatch):
    async def talking(_, session, url):
        for reason, messages in BROKEN.items():
            if reason.startswith("nothing"):
                monkeypatch.setattr(live, "IDLE", 0.2)
            async with session.ws_connect(url) as socket:
                await socket.receive_json()
                if reason.startswith("whole"):  # A second one finds no place.
                    async with session.ws_connect(url) as other:
                        assert "1 people talk" in (await other.receive_json())["error"]
                for said in messages:
                    await (socket.send_bytes if isinstance(said, bytes) else socket.send_str)(said)
                *heard, last = await answers(socket)
                if not last.get("error"):  # The sound before a broken rule has been heard.
                    heard, last = [*heard, last], await socket.receive_json()
                assert reason in last["error"]
                assert len(texts(heard)) == (SOUND.tobytes() in messages)
                assert (await socket.receive()).type == WSMsgType.CLOSE
            monkeypatch.undo()

    serve(model, talking, clients=1, max_seconds=7.0)


def test_a_strangers_page_may_not_listen_and_nothing_else_is_served(model):
    async def talking(_, session, url):
        page = url.removesuffix("ws")
        for origin in ("http://stranger.example", "http://[", "null"):
            with pytest.raises(WSServerHandshakeError, match="403"):
                await session.ws_connect(url, origin=origin)
        async with session.ws_connect(url, origin=page.rstrip("/")) as socket:
            assert "sample_rate" in await socket.receive_json()
        for path, status in (("", 200), ("live.py", 404), ("../cli.py", 404), ("ws", 400)):
            async with session.get(page + path) as answer:
                assert answer.status == status
        async with session.get(page) as answer:
            assert not re.search(r"(?:src|href)=[\"']?http", await answer.text())

    serve(model, talking)


def test_sigterm_lets_what_was_said_be_heard(model):
    async def talking(room, session, url):
        async with session.ws_connect(url) as socket:
            await socket.receive_json()
            await socket.send_bytes(SOUND.tobytes())
            await socket.receive_json()
            os.kill(os.getpid(), signal.SIGTERM)
            *_, last = await answers(socket)
            assert last["last"] and last["seconds"] > 5.9
            assert "server ends" in (await socket.receive_json())["error"]

    assert serve(model, talking) == signal.SIGTERM


def test_a_clients_hotwords_are_favoured(model):
    room = live.make_room(LiveOptions(), model, SEARCH)
    chunks, _ = in_chunks(live.as_samples(SOUND.tobytes()), True, no_samples(model, 16))

    def heard(ear):
        for chunk, last in chunks:
            message, ear = live.hear(room, ear, live.Sound(chunk, last, len(SOUND)))
        return message["text"]

    ear = live.new_ear(room, None)
    _, other = live.hear(room, ear, live.Hotwords("one two :30"))
    assert "one two" in heard(other) and "one two" not in heard(ear)


@pytest.mark.parametrize(
    "argv, reason",
    [
        ("--checkpoint nowhere/best.ckpt", "nowhere/best.ckpt: no such checkpoint"),
        ("--key a.pem", "--certificate and --key go together"),
        ("--certificate a.pem --key a.pem", "a.pem: they cannot be used .No such file"),
        ("--load --port 1", "--port has no effect with --load"),
        ("--chunk_size -1", "a page hears chunk by chunk"),
        ("--mode joint --ctc_weight 1", "--ctc_weight has no effect"),
        ("--host nowhere.invalid --checkpoint CKPT", "no such host"),
        ("--port TAKEN --checkpoint CKPT", "cannot be served .Address already in use"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(argv, reason, world):
    with sockets.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=reason):
        port = str(taken.getsockname()[1])
        argv = argv.replace("TAKEN", port).replace("CKPT", str(world / "best.ckpt"))
        live.main(argv.split())


def test_a_model_that_hears_no_streams_is_refused_before_it_is_served(tmp_path):
    model = tiny_model(train_char(["ab"]), dataclasses.replace(TINY, causal=False))
    save_model(model, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match="is not causal: it hears whole utterances only"):
        live.main(["--checkpoint", str(tmp_path / "best.ckpt"), "--port", "0"])


@pytest.mark.parametrize("host, more", [("127.0.0.1", 0), ("0.0.0.0", 1), ("192.0.2.1", 1)])
def test_an_address_that_others_reach_is_told(model, host, more):
    room = live.make_room(LiveOptions(host=host), model, SEARCH)
    assert sum("Others" in line for line in live.whereabouts(room, 8000)) == more


def test_the_load_test_ends_and_says_how_many(model, monkeypatch, capsys):
    for name, value in {"ROUND": 0.1, "ROUNDS": 1, "speech": lambda _: SOUND}.items():
        monkeypatch.setattr(live, name, value)
    found = []

    async def talking(_, session, url):
        found.append(await live.most_streams(url))

    serve(model, talking, SearchOptions(chunk_size=1, left_chunks=4))
    assert set(found[0]) >= {"streams", "limit_s", "chunk_ms"}
    assert "4 streams: 99 of 100" in capsys.readouterr().out


# ---- The page's script

NODE = """
const page = require("fs").readFileSync("tools/live.html", "utf8");
const [, script] = page.match(/<script>([^]*?)\\/\\/ ---- The page/);
const {pcm, resampler, srt} = new Function(script + "; return {pcm, resampler, srt}")();
const sine = x => Math.sin(2 * Math.PI * x);
const wave = hz => Float32Array.from(Array(4800).keys(), i => sine(hz * i / 48000));
const [tone, high] = [wave(440), wave(12000)];
const all = (sound, size, from, to) => {
  const resample = resampler(from, to), out = [];
  for (let i = 0; i < sound.length; i += size) out.push(...resample(sound.subarray(i, i + size)));
  return out;
};
console.log(JSON.stringify({
  pcm: [...new Uint8Array(pcm([0, 1, -1, 0.5, 1 / 32768, -2]))],
  whole: all(tone, 4800, 48000, 16000), pieces: all(tone, 128, 48000, 16000),
  odd: all(tone, 100, 44100, 16000), high: all(high, 128, 48000, 16000),
  srt: srt([[0, 1.5, "a --> b"], [3723.0456, 3724.0456, "c\\nd"]]),
}));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="no node, which runs the page's script")
def test_the_page_resamples_and_writes_subtitles():
    done = subprocess.run(["node", "-e", NODE], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert bytes(found["pcm"]) == np.array([0, 32767, -32768, 16384, 1, -32768], "<i2").tobytes()
    assert found["whole"] == found["pieces"] and 1500 < len(found["whole"]) <= 1600
    times = np.arange(len(found["whole"])) / 16000
    assert np.abs(found["whole"] - np.sin(2 * np.pi * 440 * times))[50:].max() < 1e-3
    times = np.arange(len(found["odd"])) / 16000 * 44100 / 48000
    assert np.abs(found["odd"] - np.sin(2 * np.pi * 440 * times))[50:].max() < 1e-3
    assert np.abs(found["high"][50:]).max() < 1e-3  # 16 kHz cannot have 12 kHz
    words = [Word("a --> b", 0.0, 1.5, 1.0), Word("c\nd", 3723.0456, 3724.0456, 1.0)]
    expected = as_srt(Transcript("", "", 3724.0, words))
    assert found["srt"] == expected.replace("c\\nd", "c\nd")


# ---- The page in a browser


@needs_browser
def test_in_a_browser_words_appear_from_a_microphone_and_from_a_file(model, tmp_path, short):
    path = tmp_path / "sound.wav"
    soundfile.write(path, SOUND, 16000)

    async def talking(_, session, url):
        async with session.ws_connect(url) as socket:
            await socket.receive_json()
            expected = texts(await hear(socket))
        page = url.removesuffix("ws")
        async with browser(session, page, path, tmp_path / "profile") as window:
            await window.run("$('talk').click()")
            await window.until("$('partial').textContent && $('level').value > -60")
            await window.until("$('finals').textContent")
            await window.run("$('talk').click()")  # Stop
            await window.until("!talk")
            await window.run("$('clear').click()")
            assert await window.run("texts.length + $('finals').children.length") == 0
            await window.take_file(path)
            assert await window.run("texts") == expected
            shown = await window.run("[...$('finals').children].map(p => p.textContent)")
            assert shown == expected and all(expected)
            assert (await window.run("srt(cues)")).startswith("1\n00:00:0")
            assert not window.errors

    serve(model, talking)
