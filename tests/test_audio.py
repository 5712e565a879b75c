"""audio.py and containers.py: all of the sound is heard, whatever headers say, or the loss is
told."""

import io
import os
import signal
import struct
import threading
import tracemalloc

from cli import SIGNALS, UserError

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st

import audio
from audio import read_audio, read_blocks, resample
from containers import frame_of, parts
from helpers import cases, encoded

RATE = 16000


def speech(seconds=2.0, rate=RATE, seed=0):
    """Makes soft noise under a tone that comes and goes."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.003, len(time))
    tone = np.sin(2 * np.pi * 3 * time) * np.sin(2 * np.pi * 300 * time)
    return (noise + 0.4 * tone).astype(np.float32)


def without_xing(mp3):
    """Returns an mp3 file without its first frame, in which LAME writes no sound."""
    assert mp3[frame_of(mp3).info :][:4] in (b"Xing", b"Info")
    return mp3[frame_of(mp3).size :]


def variable(samples, rate=RATE):
    return encoded(samples, "MP3", None, rate, bitrate_mode="VARIABLE")


def constant(samples, level, rate=RATE):
    return encoded(samples, "MP3", None, rate, bitrate_mode="CONSTANT", compression_level=level)


def told(content):
    """Returns (the samples that read_blocks gives, the reasons that it tells)."""
    reasons = []
    return np.concatenate(list(read_blocks(content, RATE, damaged=reasons.append))), reasons


def heard(content):
    """Returns all samples of a whole file, on which read_blocks and read_audio agree."""
    samples, reasons = told(content)
    assert reasons == [] and np.array_equal(samples, read_audio(content))
    return samples


def loss(content):
    """Returns what read_blocks and read_audio say of a file of which something is lost."""
    samples, (reason,) = told(content)
    with pytest.raises(UserError) as refused:
        read_audio(content)
    assert str(refused.value) in (reason, f"cannot be decoded: {reason}") and len(samples)
    return reason


# ---- Both ways in


FORMATS = [
    *(("WAV", kind) for kind in ("PCM_16", "PCM_24", "FLOAT", "MS_ADPCM")),
    *((kind, "PCM_16") for kind in ("WAVEX", "RF64", "W64", "AIFF", "AU")),
    *(("AU", "ULAW"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("FLAC", "PCM_16")),
    *(("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)),
]
UNKNOWN_SIZE = {
    "WAV": b"\xff" * 4,
    "AIFF": b"\xff" * 4,
    "AU": b"\xff" * 4,
    "CAF": b"\xff" * 8,
    "W64": b"\xff" * 7 + b"\x7f",
}


def size_field(content, format):
    """Returns the place where a file says how many bytes of samples it has, or 0."""
    if format in ("AU", "FLAC", "OGG", "MP3"):
        return 8 if format == "AU" else 0
    name = b"SSND" if format == "AIFF" else b"ds64" if format == "RF64" else b"data"
    return content.index(name) + {"W64": 16, "RF64": 16}.get(format, 4)


@st.composite
def recordings(draw):
    """Draws (content, kind of damage, the contents of its parts)."""
    format, subtype = draw(st.sampled_from(FORMATS))
    whole = []
    for seed in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        rate = draw(st.sampled_from((8000, 16000, 24000)))
        channels = draw(st.sampled_from((1, 1, 2)))
        samples = speech(draw(st.integers(2000, 12000)) / 10000, rate, seed)
        whole.append(encoded(np.stack([samples] * channels, axis=1), format, subtype, rate))
    content = b"".join(whole)
    damage = draw(st.sampled_from(("none", "none", "cut", "unknown", "less", "more", "hole")))
    changed = bytearray(content)
    at = size_field(content, format)
    if damage == "cut":
        del changed[draw(st.integers(len(content) // 10, len(content) - 1)) :]
    elif damage == "hole":
        start = draw(st.integers(0, len(content)))
        changed[start : start + 300] = bytes(len(changed[start : start + 300]))
    elif len(whole) > 1 or damage == "none":
        damage = "none"
    elif damage == "unknown" and format in UNKNOWN_SIZE:
        changed[at : at + len(UNKNOWN_SIZE[format])] = UNKNOWN_SIZE[format]
    elif damage == "unknown" and format == "FLAC":
        changed[21:26] = bytes([changed[21] & 0xF0, 0, 0, 0, 0])
    elif at and damage in ("less", "more") and format not in ("W64", "CAF"):
        order = "big" if format in ("AIFF", "AU") else "little"
        size = int.from_bytes(content[at : at + 4], order)
        changed[at : at + 4] = (size // 4 * 2 if damage == "less" else 2 * size).to_bytes(4, order)
    else:
        damage = "none"
    return bytes(changed), damage, whole


@cases(100)
@given(recordings())
def test_both_ways_in_hear_the_same_and_all_that_is_there(recording):
    content, damage, whole = recording
    expected = np.concatenate([read_audio(part) for part in whole])
    try:
        samples, reasons = told(content)
    except UserError:
        assert damage in ("cut", "hole")
        with pytest.raises(UserError):
            read_audio(content)
        return
    if reasons:
        assert damage in ("cut", "more", "hole") and all(" s" in reason for reason in reasons)
        with pytest.raises(UserError):
            read_audio(content)
    else:
        assert np.array_equal(samples, read_audio(content))
    if damage in ("none", "unknown", "less"):
        assert not reasons and np.array_equal(samples, expected)
    if damage == "more":
        assert reasons and np.array_equal(samples, expected)
    if damage == "cut" and not reasons:
        # Nothing says that there was more, so the file ends where one of its parts does.
        ends = np.cumsum([len(read_audio(part)) for part in whole])
        assert np.abs(ends - len(samples)).min() < RATE / 10


@pytest.mark.parametrize("format, subtype", FORMATS)
def test_block_by_block_is_what_the_decoder_makes_of_the_whole(format, subtype):
    samples = np.stack([speech(3.0, seed=0), speech(3.0, seed=1)], axis=1)
    content = variable(samples) if format == "MP3" else encoded(samples, format, subtype)
    expected = soundfile.read(io.BytesIO(content), dtype="float32")[0].mean(axis=1)
    found = heard(content)
    assert len(found) == len(expected) and np.abs(found - expected).max() < 1e-6


def test_a_long_file_takes_no_more_memory_than_a_block(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.tile(speech(10.0), 30), RATE)  # 10 MB
    (tmp_path / "a.mp3").write_bytes(without_xing(variable(speech(10.0))) * 30)
    for name in ("a.wav", "a.mp3"):
        tracemalloc.start()
        try:
            assert sum(map(len, read_blocks(str(tmp_path / name), RATE))) >= 4_800_000
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.flac", speech(), RATE)
    real = audio.at

    def failing(file, place, size):
        if place > 20_000:
            raise OSError(5, "Input/output error")
        return real(file, place, size)

    monkeypatch.setattr(audio, "at", failing)
    for how in ({}, {"damaged": lambda reason: None}):
        with pytest.raises(UserError, match="cannot be decoded|cut short"):
            list(read_blocks(str(tmp_path / "a.flac"), RATE, **how))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_never_lost_in_the_decoder(tmp_path, number):
    soundfile.write(tmp_path / "a.wav", np.stack([speech(30.0, 44100)] * 2, axis=1), 44100)
    handlers = {
        number: signal.signal(number, signal.default_int_handler),
        signal.SIGALRM: signal.signal(signal.SIGALRM, lambda *call: os.kill(os.getpid(), number)),
    }
    try:
        for attempt in range(40 if number == signal.SIGINT else 15):
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.0007 * attempt)
                for _ in range(20):  # it takes seconds where the signal is lost
                    list(read_blocks(str(tmp_path / "a.wav"), RATE))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for changed, handler in handlers.items():
            signal.signal(changed, handler)


def test_a_signal_while_a_file_closes_does_not_close_it_twice(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", speech(1.0), RATE)
    library, closed = soundfile._snd, []

    class Library:
        def __getattr__(self, name):
            return getattr(library, name)

        def sf_close(self, file):
            if not closed:
                library.sf_close(file)
            closed.append(file)
            signal.raise_signal(signal.SIGINT)
            return 0

    monkeypatch.setattr(soundfile, "_snd", Library())
    with pytest.raises(KeyboardInterrupt):
        list(read_blocks(str(tmp_path / "a.wav"), RATE))
    assert len(closed) == 1


# ---- Mp3


def power(samples):
    """Returns the power of each 0.05 s of samples at RATE."""
    return np.square(samples[: len(samples) // 800 * 800].reshape(-1, 800)).sum(axis=1)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_an_mp3_of_variable_bit_rate_without_a_xing_header_is_heard_to_its_end(rate):
    quiet = 1e-5 * speech(8.0, rate)  # the encoder gives it a lower bit rate
    loud = speech(4.0, rate)
    for samples in (np.concatenate([quiet, loud]), np.concatenate([loud, quiet])):
        whole = variable(samples, rate)
        expected = heard(whole)
        found = heard(without_xing(whole))
        assert len(expected) == len(resample(samples, rate))
        shift = len(found) - len(expected)
        assert 0 <= shift < 0.4 * RATE  # how much the encoder padded is no longer known
        powers = [power(found[skip:][: len(expected)]) for skip in range(0, shift, 40)]
        assert max(np.corrcoef(some, power(expected))[0, 1] for some in powers) > 0.99


def test_frames_of_several_bit_rates_are_all_heard():
    content = b"".join(without_xing(constant(speech(2.0), level)) for level in (0.1, 0.5, 0.8, 0.1))
    assert 8.0 <= len(heard(content)) / RATE < 8.6


def test_several_mp3_files_in_one_are_all_heard():
    one, other = variable(speech(2.0)), constant(speech(1.0, 44100, 1), 0.5, 44100)
    bare = without_xing(one)
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 32, 0, 0) + bytes(8)
    tags = (b"ID3\4\0\0\0\0\0\5hello", b"TAG" + bytes(125), ape)
    for first, second in ((one, one), (one, other), (other, one), (bare, other), (other, bare)):
        expected = np.concatenate([heard(first), heard(second)])
        assert np.array_equal(heard(first + second), expected)
        for tag in tags:
            assert np.array_equal(heard(tags[0] + first + tag + second + tags[1]), expected)
    assert 4.0 <= len(heard(2 * bare)) / RATE < 4.3


@pytest.mark.parametrize("promised", [0, 1, 20, 57, 80, 100])
def test_a_xing_header_that_lies_loses_nothing(promised):
    content = variable(speech(2.0))
    at = frame_of(content).info + 8
    there = int.from_bytes(content[at : at + 4], "big")
    lying = content[:at] + promised.to_bytes(4, "big") + content[at + 4 :]
    if promised > there + 2:
        assert loss(lying).startswith(f"cut short: 2.0 s of {promised * 0.036 - 0.05:.1f}")
    else:
        assert 2.0 <= len(heard(lying)) / RATE < 2.1


def test_an_mp3_that_is_cut_short_is_found_out_with_and_without_a_xing_header():
    content = variable(speech(4.0))
    for share in (0.9, 0.5, 0.2):
        size = int(share * len(content))
        assert loss(content[:size]).endswith("s of 4.0 s")
        assert loss(content[:size] + content).endswith("s of 4.0 s")  # it begins within a frame
        inside = content.rindex(content[:2], 0, size + 1) + 7
        bare = without_xing(content)[: inside - len(content)]
        assert "frame" in loss(bare)
        assert "frame" in loss(bare + content)


def test_what_lies_between_frames_is_skipped_and_told_where_it_may_have_been_sound():
    content = without_xing(constant(speech(2.0), 0.5))
    size = frame_of(content).size
    before, after = content[: 10 * size], content[10 * size :]
    assert np.array_equal(heard(before + b"\xff\xfbjunk\xff" * 5 + after), heard(content))
    assert loss(before + bytes(20 * size) + after).startswith("cut short: 2.")


def test_layer_2_and_the_free_format_have_lengths_too():
    """soundfile does not write such frames, so only their headers are read."""
    for header, size, samples in (
        ("fffda000", 626, 1152),  # MPEG 1, layer 2, 192 kbit/s, 44.1 kHz
        ("fff55400", 240, 1152),  # MPEG 2, layer 2, 40 kbit/s, 24 kHz
        ("ffff4400", 128, 384),  # MPEG 1, layer 1, 128 kbit/s, 48 kHz
    ):
        assert frame_of(bytes.fromhex(header))[1:3] == (size, samples)
    frame = b"\xff\xfb\x04\xc0" + bytes(200)  # free format, layer 3, mono, 48 kHz
    (part,) = parts(io.BytesIO(10 * frame))
    assert part.pieces[1:] == [(0, 2040)] and part.frames == 10 * 1152 - 529


ID3 = b"ID3\3\0\0\0\0\0\5hello"
ADTS = b"\xff\xf1\x60\x40\x1a\x1f\xfc" + bytes(204)  # a frame of aac
MP4 = b"\0\0\0\x18ftypM4A \0\0\2\0isommp41" + bytes(999)


def test_what_only_begins_as_an_mp3_is_refused_in_one_line_and_the_decoder_is_silent(capfd):
    # The second text looks like the free format.
    texts = [(500 * text).encode("utf-16") for text in ("hello world ", "\n\u4e00")]
    for content in (*texts, b"\xff\xfb\x90\0" + bytes(9999), ID3, ID3 + 99 * b"no"):
        with pytest.raises(UserError, match="^cannot be decoded: no mp3 frames follow.*ffmpeg -i"):
            read_audio(content)
    assert capfd.readouterr() == ("", "")


def test_bytes_of_ones_are_passed_over_without_a_look_at_each():
    class Counted(io.BytesIO):
        reads = 0

        def read(self, *size):
            self.reads += 1
            return super().read(*size)

    file = Counted(b"\xff\xfb\x90\0" + b"\xff" * 2**17)
    with pytest.raises(ValueError, match="no mp3 frames"):
        parts(file)
    assert file.reads < 50


@pytest.mark.parametrize(
    "content",
    [
        MP4,
        ID3 + MP4,
        9 * ADTS,
        ID3 + 9 * ADTS,
        b"\x1aE\xdf\xa3" + bytes(99),
        b"#!AMR\n" + bytes(99),
    ],
    ids=["m4a", "m4a behind a tag", "aac", "aac behind a tag", "webm", "amr"],
)
def test_a_format_that_only_ffmpeg_reads_is_refused_with_the_way_to_convert_it(content, capfd):
    with pytest.raises(UserError, match="^cannot be decoded: Format not recognised. .*ffmpeg -i"):
        read_audio(content)
    assert capfd.readouterr() == ("", "")


def test_an_mp3_whose_first_frame_is_damaged_or_is_its_only_one_is_heard():
    content = without_xing(constant(speech(), 0.5))
    size = frame_of(content).size
    damaged = content[:4] + bytes(size // 2) + content[size:]
    for tag in (b"", ID3):
        assert np.array_equal(heard(tag + damaged), heard(content[size:]))
        assert len(heard(tag + content[:size])) == 576 - 529


# ---- Headers that were never written, or too early


@pytest.mark.parametrize("size", [0, 1000, 0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("format", ["WAV", "WAVEX", "AIFF", "AU"])
def test_samples_that_a_header_does_not_know_of_are_heard(format, size):
    content = encoded(speech(), format, "PCM_16")
    at = size_field(content, format)
    order = "big" if format in ("AIFF", "AU") else "little"
    riffs = (content[4:8], bytes(4), b"\xff" * 4)
    for riff in riffs if format.startswith("WAV") else riffs[:1]:
        lying = content[:4] + riff + content[8:at] + size.to_bytes(4, order) + content[at + 4 :]
        assert np.array_equal(heard(lying), heard(content))


@pytest.mark.parametrize("format", ["W64", "CAF", "RF64"])
@pytest.mark.parametrize("size", [24, 1000, 2**63 - 1, 2**64 - 1])
def test_samples_that_a_wide_header_does_not_know_of_are_heard(format, size):
    content = encoded(speech(), format, "PCM_16")
    at = size_field(content, format)
    order = "big" if format == "CAF" else "little"
    lying = content[:at] + size.to_bytes(8, order) + content[at + 8 :]
    assert np.array_equal(heard(lying), heard(content))


@pytest.mark.parametrize("rate, samples", [(RATE, 8000), (RATE, 8001)])
def test_chunks_after_the_samples_are_not_heard(rate, samples):
    content = encoded(speech()[:samples], "WAV", "PCM_U8", rate)
    info = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    id3 = b"id3 " + struct.pack("<I", 4) + b"ID3\0"
    unknown = b"odd " + struct.pack("<I", 0)
    # An odd number of bytes may be padded or not.
    for padded in {content, content[: 44 + samples]}:
        for tail in (info, info[:-1], info + id3, id3[:-2], unknown, b"TAG" + bytes(125)):
            assert np.array_equal(heard(padded + tail), heard(content))
    empty = encoded(np.zeros(0, np.float32), "WAV")
    with pytest.raises(UserError, match="no samples"):
        read_audio(empty + info)


def test_several_files_in_one_are_all_heard_whatever_their_formats():
    contents = [encoded(speech(0.5, seed=i), *kind) for i, kind in enumerate(FORMATS[:-1])]
    expected = list(map(read_audio, contents))
    some = contents[:-2]  # which end with the one FLAC file and without Ogg
    assert np.array_equal(heard(b"".join(some)), np.concatenate(expected[: len(some)]))
    assert all(map(len, expected)) and len(heard(500 * contents[0])) == 500 * 8000


@pytest.mark.parametrize("format, subtype", FORMATS)
def test_a_file_that_is_cut_short_is_told_and_the_one_after_it_is_heard(format, subtype):
    content = encoded(speech(6.0), format, subtype)
    expected = heard(content)
    for share in (0.5, 0.777):
        cut = content[: int(share * len(content))]
        assert " s" in loss(cut) and " s" in loss(cut + content)
        assert np.array_equal(told(cut + content)[0][-len(expected) :], expected)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_what_follows_the_last_page_of_an_ogg_stream_is_no_sound_and_no_loss(subtype):
    content = encoded(speech(), "OGG", subtype)
    expected = heard(content)
    for junk in (b"\0", bytes(70_000), b"junk" * 99):
        assert np.array_equal(heard(content + junk), expected)
        assert np.array_equal(heard(content + junk + content), np.tile(expected, 2))
        assert "no end mark" in loss(content[:-100] + junk)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "ULAW"])
def test_a_sphere_file_that_is_cut_short_is_told(subtype, channels):
    content = encoded(np.stack([speech()] * channels, axis=1), "NIST", subtype)
    assert len(heard(content)) == 2 * RATE
    cut = content[: 1024 + (len(content) - 1024) // 4]
    assert loss(cut) == "cut short: 0.5 s of 2.0 s"
    endless = cut.replace(b"count -i 32000", b"count -i " + b"9" * 400)
    assert loss(endless).startswith("cut short: ")


@pytest.mark.parametrize("format", ["WAV", "AIFF", "AU"])
def test_recordings_of_unknown_length_that_follow_each_other_do_not_hear_the_other_header(format):
    content = encoded(speech(), format, "PCM_16")
    at = size_field(content, format)
    unknown = content[:at] + b"\xff" * 4 + content[at + 4 :]
    assert np.array_equal(heard(unknown + unknown + content), np.tile(heard(content), 3))


@pytest.mark.parametrize(
    "frames, what",
    [
        *((frames, "all") for frames in (0, 100, 31999, 32000)),
        (64000, "2.0 s of 4.0 s"),
        (2**36 - 1, "2.0 s of 4294967.3 s"),
    ],
)
def test_flac_is_heard_to_its_end_whatever_its_header_says(frames, what):
    content = encoded(speech(), "FLAC")
    number = (content[21] & 0xF0) << 32 | frames
    lying = content[:21] + number.to_bytes(5, "big") + content[26:]
    if what == "all":
        assert np.array_equal(heard(lying), heard(content))
        assert np.array_equal(heard(lying + lying), np.tile(heard(content), 2))
        assert np.array_equal(heard(lying + b"TAG" + bytes(125)), heard(content))
    else:
        assert loss(lying) == f"cut short: {what}"
    reason = loss(lying[: len(content) // 2])
    assert reason.startswith(("damaged after 0.", "damaged after 1."))
    assert (" of " in reason) == (frames > 31000)


# ---- Channels


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_channels_that_cancel_out_are_heard_as_the_loudest_from_start_to_end(format):
    pause = np.zeros(RATE, np.float32)
    samples = np.concatenate([pause, speech(), pause, speech(seed=1)])
    # The channels have noise of their own, as two microphones have.
    noise = np.random.default_rng(0).normal(0, 1e-3, (len(samples), 2))
    found = heard(encoded(np.stack([samples, -0.9 * samples], axis=1) + noise, format))
    expected = samples + noise[:, 0]
    limit = 1e-3 if format in ("WAV", "FLAC") else 0.1
    assert len(found) == len(expected) and np.abs(found - expected).max() < limit


def test_other_channels_are_heard_as_their_mean():
    one, other = speech(seed=0), np.roll(speech(seed=1), 4000)
    for channels in ([one, other], [one, 0 * one], [one, one], [0.7 * one + 0.1, -0.2 * one]):
        samples = np.stack(channels, axis=1)
        assert np.array_equal(heard(encoded(samples, "WAV", "FLOAT")), samples.mean(axis=1))
    offset = np.stack([one + 0.2, 0.2 - 0.9 * one], axis=1)  # the mean is a constant
    assert np.array_equal(heard(encoded(offset, "WAV", "FLOAT")), offset[:, 0])


# ---- Pipes


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_pipe_is_heard_to_its_end_whatever_its_header_says(pipe, subtype, channels):
    content = encoded(np.stack([speech(0.4)] * channels, axis=1), "WAV", subtype)
    at = size_field(content, "WAV")
    expected = heard(content)
    right = int.from_bytes(content[at : at + 4], "little")
    # 1001 bytes would end within a frame.
    wrong = [(size, b"") for size in (0, 1001, 1200, 0xFFFFFFFF, 0x7FFFF000)]
    chunk = b"LIST" + struct.pack("<I", 4) + b"INFO"
    for size, tail in ((right, b""), (right, chunk), *wrong):
        pipe(content[:at] + size.to_bytes(4, "little") + content[at + 4 :] + tail)
        samples, reasons = told("-")
        assert not reasons and np.array_equal(samples, expected)
    pipe(content[: len(content) // 2])
    assert told("-")[1] == ["cut short: 0.2 s of 0.4 s"]


PIPED = [
    ("WAV", "PCM_16", "FILE"),
    ("WAV", "PCM_U8", "FILE"),
    ("WAV", "FLOAT", "BIG"),
    ("RF64", "PCM_16", "FILE"),
    ("W64", "PCM_24", "FILE"),
    ("AIFF", "PCM_16", "FILE"),
    ("AIFF", "PCM_S8", "FILE"),
    ("AIFF", "PCM_16", "LITTLE"),
    ("AU", "PCM_16", "FILE"),
    ("AU", "PCM_16", "LITTLE"),
    ("AU", "ULAW", "FILE"),
    ("CAF", "PCM_16", "FILE"),
]


@pytest.mark.parametrize("format, subtype, endian", PIPED)
def test_a_pipe_of_any_format_with_its_samples_behind_a_header_is_heard(
    pipe, format, subtype, endian
):
    stereo = np.stack([speech(0.3), speech(0.3, seed=1)], axis=1)
    content = encoded(stereo, format, subtype, endian=endian)
    expected = heard(content)
    at = size_field(content, format)
    width = {"RF64": 8, "W64": 8, "CAF": 8}.get(format, 4)
    right = content[at : at + width]
    for size in (right, bytes(width), b"\xff" * width):
        pipe(content[:at] + size + content[at + width :])
        samples, reasons = told("-")
        assert not reasons and np.array_equal(samples, expected), size
    pipe(content[: -len(content) // 3])
    assert told("-")[1][0].startswith("cut short: 0.")


@pytest.mark.parametrize("samples", [4000, 4001])
@pytest.mark.parametrize(
    "format, subtype, form, names",
    [
        ("WAV", "PCM_U8", "<4sI", ("LIST", "DISP", "acid", "inst", "afsp", "axml", "umid", "PAD ")),
        ("WAV", "PCM_24", "<4sI", ("LIST", "DISP")),
        ("AIFF", "PCM_S8", ">4sI", ("ANNO", "NAME", "MARK", "APPL")),
        ("AIFF", "PCM_16", ">4sI", ("ANNO",)),
        ("CAF", "PCM_S8", ">4sQ", ("info",)),
        ("W64", "PCM_16", "<4s12xQ", ("list",)),
    ],
)
def test_chunks_and_padding_behind_the_samples_of_a_pipe_are_not_heard(
    pipe, format, subtype, form, names, samples
):
    content = encoded(speech()[:samples], format, subtype)
    expected = heard(content)
    text = bytes(range(100, 200))
    chunks = [struct.pack(form, name.encode(), len(text)) + text for name in names]
    for tail in (b"", *chunks):
        pipe(content + tail)
        assert np.array_equal(told("-")[0], expected), tail[:4]


def test_samples_on_a_pipe_may_end_within_one_before_a_chunk(pipe):
    content = encoded(np.stack([speech(0.3)] * 2, axis=1), "WAV", "PCM_16")
    at = size_field(content, "WAV")
    size = int.from_bytes(content[at : at + 4], "little") + 2  # half of a frame more
    chunk = b"LIST" + struct.pack("<I", 60) + bytes(range(60))
    pipe(content[:at] + struct.pack("<I", size) + content[at + 4 :] + b"\1\1" + chunk)
    samples, reasons = told("-")
    assert not reasons and np.array_equal(samples, heard(content))


def test_a_second_chunk_of_samples_on_a_pipe_is_not_lost(pipe):
    content = encoded(speech(0.3))
    pipe(content + content[content.index(b"data") :])
    assert len(told("-")[0]) >= 2 * 4800


@pytest.mark.parametrize("format", ["WAV", "AIFF", "AU", "CAF", "W64"])
def test_a_second_file_on_a_pipe_is_told_and_not_heard_at_the_rate_of_the_first(pipe, format):
    content = encoded(speech(0.5), format, "PCM_16")
    pipe(content + encoded(speech(0.2, 44100), "WAV", "PCM_16", 44100))
    blocks = []
    with pytest.raises(UserError, match="^another file begins after 0.5 s; pipe one at a time$"):
        for block in read_blocks("-", RATE, damaged=print):
            blocks.append(block)
    assert np.array_equal(np.concatenate(blocks), heard(content))


def test_bytes_ahead_of_the_samples_of_an_aiff_are_not_heard_on_a_pipe(pipe):
    content = encoded(speech(0.5), "AIFF", "PCM_16")
    body = content.index(b"SSND") + 16
    sizes = struct.pack(">III", len(content) - body + 8 + 100, 100, 0)
    pipe(content[: body - 12] + sizes + b"\x55" * 100 + content[body:])
    assert np.array_equal(told("-")[0], heard(content))


@pytest.mark.parametrize(
    "content",
    [
        encoded(speech(), "FLAC"),
        encoded(speech(), "MP3"),
        without_xing(encoded(speech(), "MP3")),
        encoded(speech(), "OGG"),
        encoded(speech(), "WAV", "MS_ADPCM"),
        encoded(speech(), "CAF", "ALAC_16"),
        b"",
        b"R",
        b"RIFF",
        b"RIFF\0\0\0\0WAVE",
        b"RIFF\0\0\0\0WAVEdata\0\0\0\0" + bytes(999),
        b".snd" + b"\xff" * 999,
        b"caff\0\1\0\0" + b"\xff" * 999,
        bytes(9999),
        b"hello world " * 999,
        b"\x1f\x8b" + np.random.default_rng(0).bytes(9999),
    ],
    ids=range(16),
)
def test_a_pipe_of_anything_else_is_refused_and_never_taken_for_samples(pipe, content):
    pipe(content)
    with pytest.raises(UserError, match="cannot be decoded: .*; pipe wav"):
        next(read_blocks("-", RATE))


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize(
    "bad, reason", [(np.nan, "samples are not finite"), (1e10, "samples as large as 1e.10; full")]
)
def test_what_comes_before_a_sample_that_is_none_is_heard_to_its_end(pipe, rate, bad, reason):
    samples = speech(0.3, rate)
    expected = read_audio(encoded(samples[: rate // 4], "WAV", "FLOAT", rate))
    samples[rate // 4] = bad
    content = encoded(samples, "WAV", "FLOAT", rate)
    for source in ("-", content):
        pipe(content)
        blocks = []
        with pytest.raises(UserError, match=f"^{reason}.* after 0.2 s$"):
            for block in read_blocks(source, RATE, damaged=print):
                blocks.append(block)
        assert np.array_equal(np.concatenate(blocks), expected)


def test_standard_input_may_have_been_set_not_to_wait(pipe):
    content = encoded(speech(0.3))
    out, into = os.pipe()
    os.dup2(out, 0)
    os.set_blocking(0, False)
    writer = threading.Timer(0.2, lambda: (os.write(into, content), os.close(into)))
    writer.start()
    assert np.array_equal(read_audio("-"), heard(content))
    writer.join()
    os.close(out)


def test_standard_input_that_is_a_file_is_read_as_one(pipe, tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(2 * variable(speech()))
    file = os.open(path, os.O_RDONLY)
    os.dup2(file, 0)
    os.close(file)
    assert np.array_equal(read_audio("-"), heard(str(path)))


# ---- Rates, and what is refused


def test_audio_files_become_mono_at_16_khz(tmp_path):
    path = tmp_path / "stereo.wav"
    stereo = 0.1 * np.random.default_rng(0).normal(0, 1, (8000, 2))
    soundfile.write(path, stereo, 8000, subtype="FLOAT")
    for source in (str(path), path.read_bytes()):
        waveform = read_audio(source)
        assert waveform.dtype == np.float32 and waveform.shape == (16000,)
    same = speech()
    assert resample(same, 16000) is same


def test_audio_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    empty = encoded(np.zeros(0))
    wrong = encoded(np.array([0.0, np.nan]), "WAV", "FLOAT")
    for source, reason in (
        (str(tmp_path / "no.wav"), "file missing"),
        (os.devnull, "no file; make a file of its sound"),
        (str(tmp_path / "text.wav"), "cannot be decoded"),
        (b"", "cannot be decoded"),
        (empty, "no samples"),
        (wrong, "not finite"),
    ):
        with pytest.raises(UserError, match=reason):
            read_audio(source)


@pytest.mark.parametrize("rate", [1, 3999, 400_000])
def test_a_rate_whose_filter_would_take_gigabytes_is_refused(rate):
    with pytest.raises(UserError, match=f"sample rate {rate}: it must be 4000 to 384000"):
        next(audio.resampled(iter([np.zeros(10, np.float32)]), rate, RATE))


@pytest.mark.parametrize("rate", [8000, 11025, 22254, 44100, 48000])
def test_resampling_in_blocks_is_resampling_the_whole(rate):
    samples = np.random.default_rng(0).normal(0, 0.1, int(rate * 1.037)).astype(np.float32)
    blocks = np.array_split(samples, [1, 50, 51, rate // 3, rate // 2])
    near = round(rate / 25) * 25
    expected = torchaudio.functional.resample(torch.from_numpy(samples), near, RATE).numpy()
    in_blocks = np.concatenate(list(audio.resampled(iter(blocks), rate, RATE)))
    for found in (in_blocks, resample(samples, rate)):
        assert len(found) == len(expected) and np.abs(found - expected).max() < 1e-5


# ---- Pieces


def test_cutting_loses_no_sample_reads_no_further_than_it_must_and_finds_the_pauses():
    rng = np.random.default_rng(0)
    loud = [rng.normal(0, 0.1, int(seconds * RATE)) for seconds in (3.1, 3.4, 2.8, 3.3, 1.0)]
    samples = np.concatenate(
        [part for piece in loud for part in (piece, rng.normal(0.3, 0.001, RATE // 4))]
    ).astype(np.float32)
    consumed = 0

    def blocks():
        nonlocal consumed
        for block in np.array_split(samples, 100):
            consumed += len(block)
            yield block

    pieces = []
    for piece in audio.cut_at_pauses(blocks(), RATE, 4.0):
        pieces.append(piece)
        assert len(piece) <= 4 * RATE
        assert consumed <= sum(map(len, pieces)) + 4 * RATE + len(samples) // 50
    assert np.array_equal(np.concatenate(pieces), samples)
    pauses = np.cumsum([len(part) + RATE // 4 for part in loud]) - RATE // 8  # their middles
    cuts = np.cumsum([len(piece) for piece in pieces])[:-1]
    assert len(cuts) == 4 and np.abs(cuts - pauses[:4]).max() < RATE // 20
