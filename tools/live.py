"""Serves a page to talk to: python -m tools.live --checkpoint runs/demo/best.ckpt

The page records a microphone, or takes a file. Words appear while somebody speaks, and a pause
ends an utterance, which is then heard once more, as by transcribe.py --stream. docs/serving.md has
the protocol, for other clients. Ctrl-C and SIGTERM let what was said be heard to its end; a second
signal ends at once.

Browsers give a microphone only to this machine's own page and to HTTPS. From another machine, use
the ssh line that the command prints, or give --certificate and --key, with --host 0.0.0.0.

--load serves nobody. It measures how many streams keep up with real time on this machine: N clients
send synthetic speech in real time to a server of their own, for ever more N, and each text must
come within a second of its sound. The last line of stdout is JSON.
"""

import asyncio
import contextlib
import functools
import json
import math
import os
import re
import signal
import socket as sockets
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from cli import SIGNALS, UserError, build, make_parser, option, options_class, run, shown

import numpy as np
import torch
from aiohttp import ClientSession, ClientWSTimeout, WSMsgType, web

from audio import resample
from context import HotwordOptions, make_context, read_hotwords
from decode import STREAM_MODES, SearchOptions, check_used
from files import json_text
from model import load_checkpoint
from ngram import LmOptions, both, favour
from stream import Heard, Listening, frame_ms, in_chunks, listener, no_samples
from tools import demo, speak
from transcribe import Job, TranscribeOptions, words_of
from words import cues, word_fields

PAGE = Path(__file__).with_suffix(".html")
# The page loads nothing, from nowhere; its script and its style are inside.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline' blob:; style-src "
    "'unsafe-inline'; img-src data:; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
LARGEST_MESSAGE = 2**18  # bytes, 8 s of sound at 16 kHz
# aiohttp closes the socket without a text behind a message beyond this many bytes.
HUGE_MESSAGE = 16 * LARGEST_MESSAGE
QUEUE = 4  # chunks of a client that wait; while so many do, its socket is not read
# Seconds. A client that sends nothing for IDLE seconds, or takes nothing for SEND seconds, is sent
# away. What was said before the server ends has FINISH seconds to be heard.
IDLE = 60.0
SEND = 10.0
FINISH = 10.0
END = "end"  # the text by which a client ends its stream
# In --load, LAG seconds may pass from a sound to its text.
LAG = 1.0
SENTENCES = 8
STEP = 0.08  # seconds of sound in a message of a client of --load, as in the page's
ROUND = 8.0  # seconds in which the clients of --load send
ROUNDS = 9
SAY = functools.partial(print, flush=True)
ADDRESS = re.compile(r"https?://\S+/")


@options_class
class LiveOptions:
    checkpoint: str = option("runs/demo/best.ckpt", "a .ckpt, a folder for the hub, or org/name")
    mode: str = option("attention_rescoring", "search of the second pass", choices=STREAM_MODES)
    host: str = option("127.0.0.1", "address to serve at; 0.0.0.0: any of this machine's")
    port: int = option(8000, "port to serve at; 0: any that is free", at_least=0, at_most=65535)
    certificate: str | None = option(None, "PEM file of a certificate, for HTTPS; needs --key")
    key: str | None = option(None, "PEM file of the certificate's private key")
    clients: int = option(32, "most people who talk at once", at_least=1, at_most=10**4)
    max_seconds: float = option(
        3600.0, "most seconds of sound without an end", at_least=1.0, at_most=1e6
    )
    load: bool = option(False, "measure how many streams keep up with real time here")

    def __post_init__(self):
        if (self.certificate is None) != (self.key is None):
            raise UserError("--certificate and --key go together; give both or neither")


class Room(NamedTuple):
    """Holds what all clients share."""

    options: LiveOptions
    job: Job  # its context is what --lm and --hotwords favour
    lm: object | None  # what --lm alone favours
    hotword_score: float
    pool: ThreadPoolExecutor  # of the one thread in which all are heard
    clients: set[asyncio.Task]
    closing: asyncio.Event  # is set when the server is about to end


class Ear(NamedTuple):
    """Holds how a client is heard, and how far."""

    advance: object  # the function of stream.listener
    start: Listening
    state: Listening


class Hotwords(NamedTuple):
    """Holds the phrases of a client, one a line."""

    hotwords: str


class Sound(NamedTuple):
    """Holds a chunk of a client's sound, as stream.listener takes it."""

    chunk: torch.Tensor
    last: bool
    received: int


def main(argv: list[str]) -> None:
    parser = make_parser(__doc__, LiveOptions, SearchOptions, HotwordOptions, LmOptions)
    given = vars(parser.parse_args(argv))
    options = build(LiveOptions, given)
    check_given(given, options)
    if options.load:
        measure_load(argv)
        return
    search = build(SearchOptions, given, chunk_size=16, left_chunks=4)
    hotwords = build(HotwordOptions, given)
    context = certificate(options)
    model, tokenizer, _ = load_checkpoint(
        options.checkpoint, "cuda" if torch.cuda.is_available() else "cpu"
    )
    lm = favour(build(LmOptions, given), HotwordOptions(), tokenizer, stream=True)
    room = make_room(options, model, search, lm, hotwords)
    new_ear(room, room.job.context)  # A model that hears no streams is refused here.
    number = asyncio.run(serve(room, context))
    raise KeyboardInterrupt(number)


def check_given(given: dict, options: LiveOptions) -> None:
    """Raises UserError for flags that have no effect beside the others, or have no use here."""
    check_used(given, (options.mode,))
    if given.get("chunk_size") == -1:
        raise UserError("--chunk_size -1: a page hears chunk by chunk; give at least 1")
    for name in ("host", "port", "certificate", "key", "clients", "max_seconds"):
        if options.load and name in given:
            raise UserError(f"--{name} has no effect with --load; leave one of them out")


def make_room(options: LiveOptions, model, search, lm=None, hotwords=HotwordOptions()) -> Room:
    """Gathers what all clients share. `lm` is the automaton of a language model, if any."""
    heard_as = TranscribeOptions(mode=options.mode, stream=True, format="json")
    job = Job(model, heard_as, search, both(lm, make_context(hotwords, model.tokenizer)))
    pool = ThreadPoolExecutor(1, "listener")
    return Room(options, job, lm, hotwords.context_score, pool, set(), asyncio.Event())


# ---- The server


def certificate(options: LiveOptions) -> ssl.SSLContext | None:
    """Reads the certificate and its key. Raises UserError where they cannot be used."""
    if options.certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.certificate, options.key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise UserError(
            f"--certificate {options.certificate} --key {options.key}: they cannot be used "
            f"({error.strerror or error}); give PEM files of a certificate and its key, without a "
            "password"
        ) from None
    return context


async def serve(room: Room, certificate: ssl.SSLContext | None = None, tell=SAY) -> int:
    """Serves the page and the socket until a signal asks to end -> the signal's number.

    `tell` is called with the lines that say where the page is. Raises UserError where the address
    cannot be served.
    """
    app = web.Application()
    page = PAGE.read_bytes()

    async def show(_):
        return web.Response(body=page, content_type="text/html", charset="utf-8", headers=HEADERS)

    async def listen(request):
        return await talk(room, request)

    app.router.add_get("/", show)
    app.router.add_get("/ws", listen)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    options = room.options
    try:
        with stopping() as stopped:
            site = web.TCPSite(runner, options.host, options.port, ssl_context=certificate)
            try:
                await site.start()
            except OSError as error:
                raise cannot_serve(options, error) from error
            for line in whereabouts(room, runner.addresses[0][1]):
                tell(line)
            number = await stopped
        await site.stop()
        room.closing.set()
        if room.clients:
            await asyncio.wait(room.clients, timeout=FINISH)
    finally:
        await runner.cleanup()
        room.pool.shutdown(wait=False, cancel_futures=True)
    return number


@contextlib.contextmanager
def stopping():
    """Gives a future that gets the number of the first signal that asks the command to end.

    A second signal has its usual effect. Signals that are ignored stay so.
    """
    loop = asyncio.get_running_loop()
    stopped = loop.create_future()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number in SIGNALS if before[number] != signal.SIG_IGN]

    def stop(number):
        if not stopped.done():
            stopped.set_result(number)

    for number in heeded:
        loop.add_signal_handler(number, stop, number)
    try:
        yield stopped
    finally:
        for number in heeded:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


def cannot_serve(options: LiveOptions, error: OSError) -> UserError:
    """Explains why the address cannot be served."""
    where = f"--host {shown(options.host, 100)} --port {options.port}"
    if isinstance(error, sockets.gaierror):
        return UserError(f"{where}: no such host ({error.strerror}); give an address of this one")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return UserError(f"{where}: cannot be served ({reason}); give another --port or --host")


def whereabouts(room: Room, port: int) -> list[str]:
    """Writes the lines that say where the page is, and how to reach it from elsewhere."""
    options = room.options
    scheme = "http" if options.certificate is None else "https"
    anywhere = options.host in ("0.0.0.0", "::")
    host = "localhost" if anywhere else options.host
    host = f"[{host}]" if ":" in host else host
    lines = [
        f"{shown(options.checkpoint)} hears chunks of {chunk_ms(room.job)} ms",
        f"Open {scheme}://{host}:{port}/ and talk. Ctrl-C ends.",
    ]
    if scheme == "http":
        lines.append(
            f"From another machine: ssh -N -L {port}:{host}:{port} {sockets.gethostname()}, then "
            f"open http://localhost:{port}/ there."
        )
    if anywhere or host not in ("localhost", "127.0.0.1", "[::1]"):
        lines.append(
            "Others who reach this address can use the page, too"
            + (", but only HTTPS gives them a microphone." if scheme == "http" else ".")
        )
    return lines


def chunk_ms(job: Job) -> int:
    return round(job.search.chunk_size * frame_ms(job.model))


# ---- A client


async def talk(room: Room, request: web.Request) -> web.StreamResponse:
    """Hears a client until it leaves, breaks a rule, or the server ends."""
    origin = request.headers.get("Origin")
    if origin is not None and host_of(origin) != request.host:
        return web.Response(
            status=403, text=f"A page of {shown(origin, 100)} may not talk to {request.host}.\n"
        )
    # Messages would be compressed for nothing, and small ones could become huge.
    socket = web.WebSocketResponse(max_msg_size=HUGE_MESSAGE, compress=False, timeout=SEND)
    await socket.prepare(request)
    task = asyncio.current_task()
    full = len(room.clients) >= room.options.clients
    room.clients.add(task)
    try:
        if full:
            raise UserError(f"{room.options.clients} people talk already; try again later")
        await send(socket, greeting(room))
        await answer(room, socket)
    except UserError as error:
        with contextlib.suppress(ConnectionError, TimeoutError):
            await send(socket, {"error": str(error)})
    except TimeoutError:  # The client takes nothing; what waits for it would wait for ever.
        request.transport and request.transport.abort()
    except ConnectionError:
        pass
    finally:
        room.clients.discard(task)
        await socket.close()
    return socket


def host_of(origin: str) -> str | None:
    """Returns the host and port of a header Origin, None where it is no address."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def greeting(room: Room) -> dict:
    """Returns the first message, which says what the client should send."""
    job = room.job
    return {
        "sample_rate": job.model.frontend.sample_rate,
        "chunk_ms": chunk_ms(job),
        "checkpoint": shown(room.options.checkpoint, 100),
        "largest_message": LARGEST_MESSAGE,
        "max_seconds": room.options.max_seconds,
        "idle_seconds": IDLE,
    }


async def send(socket: web.WebSocketResponse, message: dict) -> None:
    """Sends a message. Raises TimeoutError where the client takes nothing for SEND seconds."""
    async with asyncio.timeout(SEND):
        await socket.send_str(json_text(message, ensure_ascii=False))


async def answer(room: Room, socket: web.WebSocketResponse) -> None:
    """Hears what the client sends and answers, chunk by chunk. Raises UserError for a broken rule.

    Two tasks do this: one reads into a queue, the other hears. While the queue is full nothing is
    read, and TCP slows the client. Each client has at most one chunk in the thread that hears, so
    that none waits for more than a chunk of each other one.
    """
    loop = asyncio.get_running_loop()
    queue = asyncio.Queue(QUEUE)
    reading = asyncio.create_task(read(room, socket, queue))
    try:
        ear = new_ear(room, room.job.context)
        while (work := await queue.get()) is not None:
            if isinstance(work, Exception):
                raise work
            message, ear = await loop.run_in_executor(room.pool, hear, room, ear, work)
            if message:
                await send(socket, message)
    finally:
        reading.cancel()
        await asyncio.wait([reading])


async def read(room: Room, socket: web.WebSocketResponse, queue: asyncio.Queue) -> None:
    """Puts into the queue what the client sends; at its end None, or the error that ended it."""
    try:
        async for work in works(room, socket):
            await queue.put(work)
        await queue.put(None)
    except Exception as error:
        await queue.put(error)


async def works(room: Room, socket: web.WebSocketResponse) -> AsyncIterator[Sound | Hotwords]:
    """Yields the chunks of sound that a client sends, and its hotwords, as they come.

    Raises UserError for a broken rule. The sound before it is ended first.
    """
    model = room.job.model
    limit = room.options.max_seconds * model.frontend.sample_rate
    tail = torch.zeros(model.frontend.tail_samples)
    start = waiting = no_samples(model, room.job.search.chunk_size)
    received = 0  # samples of this stream
    broken = None
    while not broken:
        try:
            said = await next_message(room, socket)
            if isinstance(said, Hotwords) and received:
                raise UserError("hotwords in the middle of a stream; send them before its sound")
            if isinstance(said, torch.Tensor) and received + len(said) > limit:
                raise UserError(f"more than {room.options.max_seconds:g} s without an end")
        except UserError as error:
            if not received:
                raise
            said, broken = END, error
        if said is None or isinstance(said, Hotwords):
            if said is None:
                return
            yield said
            continue
        samples = tail if said is END else said
        received += 0 if said is END else len(said)
        chunks, waiting = in_chunks(samples, said is END, waiting)
        for chunk, last in chunks:
            yield Sound(chunk, last, received)
        if said is END:
            waiting, received = start, 0
    raise broken


async def next_message(room: Room, socket: web.WebSocketResponse):
    """Waits for a message -> samples (n,), Hotwords, END, or None where the client has left.

    Raises UserError where nothing comes, for a message that is none, and when the server ends.
    """
    coming = asyncio.ensure_future(socket.receive())
    closing = asyncio.ensure_future(room.closing.wait())
    try:
        await asyncio.wait((coming, closing), timeout=IDLE, return_when=asyncio.FIRST_COMPLETED)
        if room.closing.is_set():
            raise UserError("the server ends; try again later")
        if not coming.done():
            raise UserError(f"nothing came for {IDLE:g} s; connect again to go on")
    finally:
        coming.cancel()
        closing.cancel()
    message = coming.result()
    if message.type == WSMsgType.BINARY:
        return as_samples(message.data)
    if message.type == WSMsgType.TEXT:
        return END if message.data == END else as_hotwords(message.data)
    return None


def as_samples(data: bytes) -> torch.Tensor:
    """Converts 16-bit samples to (n,) float32. Raises UserError for other bytes."""
    if len(data) > LARGEST_MESSAGE:
        raise UserError(f"a message of {len(data)} bytes; send at most {LARGEST_MESSAGE} at once")
    if len(data) % 2:
        raise UserError(f"a message of {len(data)} bytes; a sample has two, so send whole samples")
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.float32) / 32768)


def as_hotwords(text: str) -> Hotwords:
    """Reads the only message of JSON that there is. Raises UserError for any other text."""
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(text):
            case {"hotwords": str(phrases)}:
                return Hotwords(phrases)
    raise UserError(
        f"{shown(text, 100)}: no such message; send samples as bytes, the text {END}, or "
        '{"hotwords": "phrases, one a line"}'
    )


# ---- In the thread that hears


def new_ear(room: Room, context) -> Ear:
    """Makes the ear of a client whose stream begins."""
    job = room.job
    advance, start = listener(job.model, job.search, context=context, mode=job.options.mode)
    return Ear(advance, start, start)


def hear(room: Room, ear: Ear, work: Sound | Hotwords) -> tuple[dict | None, Ear]:
    """Hears a chunk -> the message for the client, if any, and the ear behind the chunk.

    Raises UserError for hotwords that are none.
    """
    if isinstance(work, Hotwords):
        phrases = work.hotwords, "hotwords", room.job.model.tokenizer, room.hotword_score
        return None, new_ear(room, both(room.lm, read_hotwords(*phrases)))
    heard, state = ear.advance(work.chunk, work.last, work.received, ear.state)
    message = heard and told(room.job, heard, work.last)
    return message, ear._replace(state=ear.start if work.last else state)


def told(job: Job, heard: Heard, last: bool) -> dict:
    """Returns the message that says what was heard; its times begin with the stream."""
    words = words_of(job, heard) if heard.final else []
    message = {
        "text": job.model.tokenizer.decode(heard.hypothesis.tokens),
        "seconds": round(heard.seconds, 3),
        "final": heard.final,
        "words": word_fields(words),
    }
    return {**message, "cues": cues(words), "last": last} if heard.final else message


# ---- How many streams keep up


def measure_load(argv: list[str]) -> None:
    """Prints how many streams a server with these flags hears in real time."""
    argv = [*argv, "--no-load", "--port", "0", "--clients", "10000"]
    command = [sys.executable, "-m", "tools.live", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = next(filter(None, map(ADDRESS.search, server.stdout)), None)
            if not url:
                raise UserError("the server of --load did not start; its own line says why")
            print(json_text(asyncio.run(most_streams(f"{url[0]}ws"))))
        finally:
            server.kill()


async def most_streams(url: str) -> dict:
    """Doubles the number of streams until it is too large, and then halves the distance."""
    async with ClientSession() as session:
        async with session.ws_connect(url) as socket:
            hello = await socket.receive_json()
        sound = speech(hello["sample_rate"])
        good = {"streams": 0}
        bad = None
        count = 4
        for _ in range(ROUNDS):
            lags = await play_round(session, url, hello, sound, count)
            late = round(float(np.percentile(lags, 99, method="higher")), 3)
            print(
                f"{count:5} streams: 99 of 100 texts came within {late:.2f} s, half within "
                f"{np.median(lags):.2f} s",
                flush=True,
            )
            if late <= LAG:
                good = {"streams": count, "late_s": late}
            else:
                bad = count
            count = (good["streams"] + bad) // 2 if bad else 2 * count
            if bad and bad - good["streams"] <= max(1, bad // 20):
                break
    return {
        **good,
        "limit_s": LAG,
        "checkpoint": hello["checkpoint"],
        "chunk_ms": hello["chunk_ms"],
    }


def speech(rate: int) -> np.ndarray:
    """Makes some sentences, with pauses that end utterances, as samples (N,) of 16 bits."""
    parts = []
    for utterance in demo.plan("eval_clean", SENTENCES):
        parts += [resample(speak.speak(utterance), speak.RATE, rate), np.zeros(int(1.5 * rate))]
    return (np.concatenate(parts) * 32767).astype("<i2")


async def play_round(session: ClientSession, url: str, hello: dict, sound, count: int) -> list:
    """Lets so many clients send for some seconds -> the lags of all texts, in seconds.

    Each begins elsewhere in the sound, and at another time within a chunk.
    """
    begin = asyncio.get_running_loop().time() + 1.0
    chunk = hello["chunk_ms"] / 1000
    clients = (
        play(
            session, url, np.roll(sound, -k * len(sound) // count), begin + k * chunk / count, hello
        )
        for k in range(count)
    )
    return sum(await asyncio.gather(*clients), [])


async def play(session: ClientSession, url: str, sound, begin: float, hello: dict) -> list:
    """Sends sound in real time from the time `begin` on -> the lag of each text, in seconds.

    A lag runs from the moment at which the text's last sound was due to be sent. A text that has
    not come long after its time has an infinite lag.
    """
    loop = asyncio.get_running_loop()
    seconds = round_seconds(hello)
    size = int(STEP * hello["sample_rate"])
    lags = []

    async def feed():
        for k in range(int(seconds / STEP)):
            await asyncio.sleep(begin + (k + 1) * STEP - loop.time())
            await socket.send_bytes(sound[k * size : (k + 1) * size].tobytes())

    async with session.ws_connect(url, timeout=ClientWSTimeout(ws_close=0)) as socket:
        await socket.receive_json()
        feeding = asyncio.create_task(feed())
        heard = 0.0
        try:
            async with asyncio.timeout_at(begin + seconds + 2 * LAG):
                while heard < seconds - 2 * hello["chunk_ms"] / 1000:
                    heard = (await socket.receive_json())["seconds"]
                    lags.append(loop.time() - begin - math.ceil(heard / STEP) * STEP)
        except TimeoutError:
            lags.append(math.inf)
        finally:
            feeding.cancel()
    return lags


def round_seconds(hello: dict) -> float:
    """Returns for how many seconds the clients of a round send: for a few chunks at least."""
    return max(ROUND, 6 * hello["chunk_ms"] / 1000)


if __name__ == "__main__":
    run(main)
