"""A stream equals the pass over the whole: the encoder, the features, and recognition on both."""

import functools
import itertools
import math
from dataclasses import replace

from cli import UserError

import pytest
import torch

import conformer
import decode
import helpers
import stream
from conformer import U2Conformer
from decode import MODES, STREAM_MODES, SearchOptions
from frames import receptive_field, subsampled_length
from helpers import VARIANTS, network
from helpers_model import tiny_model
from ngram import load_lm
from presets import PRESETS, ModelOptions
from stream import LONGEST, frame_ms, is_endpoint, listen, listener, piece_samples, trailing_blanks
from tokenizer import train_char
from transforms import Frontend, extract, feature_state, moments, stream_features
from words import frame_times

noise = functools.partial(helpers.noise, dtype=torch.float64)
CONTEXTS = list(itertools.product((1, 4, 16, 25), (-1, 0, 1, 4)))


@torch.no_grad()
def streamed(encoder, features, chunk_size, left_chunks, pieces):
    """The stream's output for features (1,T,F) that come in `pieces`, and an empty last one."""
    state = encoder.stream_state(chunk_size, left_chunks)
    outs = []
    for piece in features.split(pieces, dim=1):
        out, state = encoder.stream(piece, state)
        assert not out.size(1) % chunk_size  # whole chunks only
        outs.append(out)
    ready = subsampled_length(features.size(1), encoder.options.input_layer)
    assert sum(out.size(1) for out in outs) == ready // chunk_size * chunk_size
    out, _ = encoder.stream(features[:, :0], state, last=True)
    return torch.cat([*outs, out], dim=1)


def random_pieces(total, longest, seed):
    sizes = []
    generator = torch.Generator().manual_seed(seed)
    while sum(sizes) < total:
        sizes.append(
            min(int(torch.randint(0, longest + 1, (), generator=generator)), total - sum(sizes))
        )
    return sizes


@pytest.mark.parametrize(
    "input_layer, chunk_size, left_chunks",
    [
        *(("conv2d", *context) for context in CONTEXTS),
        *((layer, *context) for layer in ("conv2d6", "conv2d8") for context in CONTEXTS[1::5]),
    ],
)
def test_a_stream_equals_the_masked_pass_over_the_whole(input_layer, chunk_size, left_chunks):
    model = network(input_layer=input_layer).double()
    field, rate = receptive_field(input_layer)
    for frames in (field, field + 1, field + rate, field + 4 * rate, 190):
        features = noise(1, frames, 80)
        with torch.no_grad():
            whole, _ = model.encode(features, torch.tensor([frames]), chunk_size, left_chunks)
        for longest in (1 if frames < 190 else 4, 9, 200):  # feature frames
            out = streamed(
                model.encoder,
                features,
                chunk_size,
                left_chunks,
                random_pieces(frames, longest, seed=frames),
            )
            torch.testing.assert_close(out, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_streams(name):
    model = network(**{**VARIANTS[name], "causal": True}).double()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm1d):  # as if trained
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    features = noise(1, 150, 80)
    with torch.no_grad():
        for chunk_size, left_chunks in ((1, 4), (4, -1), (16, 0), (25, 1)):
            whole, _ = model.encode(features, torch.tensor([150]), chunk_size, left_chunks)
            out = streamed(
                model.encoder,
                features,
                chunk_size,
                left_chunks,
                random_pieces(150, 40, seed=chunk_size),
            )
            torch.testing.assert_close(out, whole, rtol=0, atol=1e-9)


def test_the_base_model_streams_to_within_1e_4_in_float32():
    torch.manual_seed(0)
    model = U2Conformer(ModelOptions(**PRESETS["base"]), 80, 100, 0, 2, 3).eval()
    features = noise(1, 300, 80, dtype=torch.float32)
    with torch.no_grad():
        for chunk_size, left_chunks in ((16, 4), (25, -1)):
            whole, _ = model.encode(features, torch.tensor([300]), chunk_size, left_chunks)
            out = streamed(model.encoder, features, chunk_size, left_chunks, 37)
            torch.testing.assert_close(out, whole, rtol=0, atol=1e-4)


def test_a_state_is_a_value_that_can_be_gone_on_from_twice():
    encoder = network().double().encoder
    features = noise(1, 90, 80)
    with torch.no_grad():
        _, state = encoder.stream(features[:, :50], encoder.stream_state(4, 1))
        first, _ = encoder.stream(features[:, 50:], state)
        encoder.stream(noise(1, 33, 80), state, last=True)  # another way on, from the same state
        again, _ = encoder.stream(features[:, 50:], state)
    assert first.size(1) and torch.equal(first, again)


def test_the_last_piece_hands_back_the_state_of_a_new_utterance():
    encoder = network().double().encoder
    features = noise(1, 61, 80)
    with torch.no_grad():
        first, state = encoder.stream(features, encoder.stream_state(4), last=True)
        second, _ = encoder.stream(features, state, last=True)
    assert torch.equal(first, second)


def test_less_than_the_receptive_field_gives_nothing_and_no_error():
    encoder = network().double().encoder
    for last in (False, True):
        out, _ = encoder.stream(noise(1, 6, 80), encoder.stream_state(4), last)
        assert out.shape == (1, 0, 16)


def test_memory_is_flat_with_limited_left_chunks():
    encoder = network().encoder
    sizes = []
    with torch.no_grad():
        state = encoder.stream_state(4, 2)
        for _ in range(30):
            _, state = encoder.stream(noise(1, 32, 80, dtype=torch.float32), state)
            kept = [state.features, *itertools.chain(*state.blocks)]
            sizes.append(sum(part.untyped_storage().nbytes() for part in kept))
    assert max(sizes[5:]) <= 2 * sizes[4] and sizes[-1] == sizes[-3]


@pytest.mark.parametrize("kind", ["rel_selfattn", "selfattn"])
def test_a_chunk_makes_the_positions_of_its_own_frames_alone(kind, monkeypatch):
    sizes = []
    made = conformer.sinusoids

    def counted(size, *rest):
        sizes.append(size)
        return made(size, *rest)

    model = network(selfattention_layer_type=kind)
    monkeypatch.setattr(conformer, "sinusoids", counted)
    streamed(model.encoder, noise(1, 190, 80, dtype=torch.float32), 4, -1, 50)
    assert len(sizes) > 10 and max(sizes) == 4


def test_positions_stay_where_they_may_go_and_the_visible_past_keeps_its_distance():
    """From max_position on, a chunk is encoded as in an utterance that began later."""
    encoder = network(num_blocks=1, cnn_module_kernel=3).double().encoder
    features = noise(1, 403, 80)  # 100 encoder frames
    with torch.no_grad():
        late, _ = encoder.stream(features, encoder.stream_state(4, 2, max_position=20), last=True)
        absolute, _ = encoder.stream(features, encoder.stream_state(4, 2), last=True)
        # An utterance that begins 15 chunks later has the positions at which `late` stays.
        shifted, _ = encoder.stream(features[:, 15 * 16 :], encoder.stream_state(4, 2), last=True)
    torch.testing.assert_close(late[:, :20], absolute[:, :20], rtol=0, atol=1e-9)
    assert (late[:, 24:] - absolute[:, 24:]).abs().max() > 1e-3
    # The chunk's first two frames see, through the convolution, the chunk before at its position.
    torch.testing.assert_close(late[:, 78:80], shifted[:, 18:20], rtol=0, atol=1e-9)


def test_full_context_comes_out_at_the_end_only():
    model = network().double()
    features = noise(1, 90, 80)
    with torch.no_grad():
        out, state = model.encoder.stream(features, model.encoder.stream_state(-1))
        rest, _ = model.encoder.stream(features[:, :0], state, last=True)
        whole, _ = model.encode(features, torch.tensor([90]))
    assert out.size(1) == 0
    torch.testing.assert_close(rest, whole, rtol=0, atol=1e-9)


def test_an_encoder_that_sees_the_future_is_refused():
    with pytest.raises(UserError, match="not causal"):
        network(causal=False).encoder.stream_state(4)


# Features


@pytest.mark.parametrize(
    "frontend",
    [Frontend(frontend="fbank"), Frontend(mean_var_norm=False)],
    ids=["fbank", "log_mel"],
)
def test_features_in_pieces_are_those_of_the_whole(frontend):
    waveform = 0.1 * noise(16123, dtype=torch.float32)
    advance = stream_features(frontend)
    state = feature_state()
    parts = []
    for piece in waveform.split(random_pieces(len(waveform), 1500, seed=0)):
        features, state = advance(piece, state)
        parts.append(features)
        assert len(state.samples) < frontend.window_samples + frontend.shift_samples
    torch.testing.assert_close(torch.cat(parts), extract(frontend)(waveform), rtol=0, atol=1e-5)


def test_mean_var_norm_in_a_stream_uses_the_statistics_so_far_and_ends_with_those_of_the_whole():
    waveform = torch.cat(
        (0.01 * noise(16000, dtype=torch.float32), 0.3 * noise(16001, dtype=torch.float32) + 0.2)
    )
    advance = stream_features(Frontend())
    state = feature_state()
    parts = []
    for end in range(1600, len(waveform) + 1600, 1600):
        features, state = advance(waveform[end - 1600 : end], state)
        if len(features) and end <= 16000:  # A stream does not know what comes later.
            torch.testing.assert_close(
                features[-1], extract(Frontend())(waveform[:end])[-1], rtol=1e-4, atol=1e-4
            )
        parts.append(features)
    whole = extract(Frontend())(waveform)
    pieces = torch.cat(parts)
    assert (
        pieces.shape == whole.shape and (pieces[:90] - whole[:90]).abs().max() > 1
    )  # the quiet start was scaled up
    torch.testing.assert_close(pieces[-1], whole[-1], rtol=1e-3, atol=1e-3)


def test_the_statistics_of_a_stream_are_a_window_that_forgets_sample_by_sample():
    samples = 3 * noise(300)
    window = 100.0
    count = 0.0
    total = 0.0
    squares = 0.0
    for sample in samples.clamp(-2, 2).tolist():
        keep = min(window / (count + 1), 1.0)
        count, total, squares = (
            keep * (count + 1),
            keep * (total + sample),
            keep * (squares + sample**2),
        )
    for pieces in (300, 7, 1, random_pieces(300, 40, seed=0)):
        statistics = feature_state().statistics
        for piece in samples.split(pieces):
            statistics = moments(piece, statistics, window, peak=2.0)
        assert statistics.tolist() == pytest.approx([count, total, squares], rel=1e-9)


def streamed_features(waveform, pieces, frontend=Frontend()):
    """The features (T,F) of a waveform in pieces, and the state behind it."""
    advance = stream_features(frontend)
    state = feature_state()
    parts = []
    for piece in waveform.split(pieces):
        features, state = advance(piece, state)
        parts.append(features)
    return torch.cat(parts), state


def test_what_a_stream_knows_of_the_loudness_does_not_depend_on_how_it_was_cut():
    waveform = torch.cat([gain * noise(48000, dtype=torch.float32) for gain in (0.01, 0.3, 0.05)])
    whole, expected = streamed_features(waveform, 1600)
    for pieces in (800, 6400, random_pieces(len(waveform) - 1600, 5000, seed=1) + [1600]):
        features, state = streamed_features(waveform, pieces)
        torch.testing.assert_close(state.statistics, expected.statistics, rtol=1e-9, atol=0)
        # The last frame of both is normalised alike, because both last pieces end here.
        torch.testing.assert_close(features[-1], whole[-1], rtol=1e-5, atol=1e-5)


def test_after_an_hour_the_statistics_are_those_of_the_last_window():
    block = noise(1000, dtype=torch.float32)
    statistics = feature_state().statistics
    for _ in range(3600):  # an hour at 1,000 samples per second
        statistics = moments(block, statistics, 10000.0, peak=math.inf)
    mean = float(block.mean())
    squares = float(block.square().mean())
    assert statistics.tolist() == pytest.approx([10000, 10000 * mean, 10000 * squares], rel=0.02)


# Recognition


@pytest.fixture(scope="module")
def model():
    made = tiny_model(train_char(["abcdefgh"]), frontend=Frontend(frontend="fbank"), sharpness=2)
    made.set_cmvn(torch.full((80,), 10.0), torch.full((80,), 0.5))
    return made.eval()


@pytest.mark.parametrize("mode", STREAM_MODES)
@pytest.mark.parametrize(
    "chunk_size, left_chunks, tail", [(4, -1, 0), (4, -1, 300), (16, 2, 0), (-1, -1, 300)]
)
def test_what_a_stream_hears_is_what_decode_hears(
    model, monkeypatch, chunk_size, left_chunks, tail, mode
):
    monkeypatch.setattr(model, "frontend", replace(model.frontend, tail_padding=tail))
    waveform = 0.1 * noise(40000, dtype=torch.float32)
    search = SearchOptions(chunk_size=chunk_size, left_chunks=left_chunks)
    features = extract(model.frontend)(waveform)[None]
    (expected,) = model.decode(
        features,
        torch.tensor([features.size(1)]),
        mode,
        chunk_size=chunk_size,
        left_chunks=left_chunks,
    )
    for pieces in ([waveform], waveform.split(777)):
        *partial, heard = listen(model, pieces, search, endpoints=False, mode=mode)
        assert heard.final and heard.hypothesis.tokens == expected.tokens and expected.tokens
        assert heard.hypothesis.nbest == expected.nbest and heard.hypothesis.times == expected.times
        assert heard.hypothesis.score == pytest.approx(expected.score, abs=1e-3)
        assert not any(guess.final for guess in partial) and (len(partial) > 1) == (chunk_size > 0)
        assert heard.seconds == 2.5  # also what lies behind the last whole frame


def test_an_utterance_ends_by_wenets_three_rules(model):
    per_second = 1000 // frame_ms(model)
    assert not is_endpoint(model, False, 5 * per_second - 1, 10 * per_second)
    assert is_endpoint(model, False, 5 * per_second, 10 * per_second)
    assert is_endpoint(model, True, per_second, 2 * per_second)
    assert not is_endpoint(model, True, per_second - 1, 99)
    assert is_endpoint(model, True, 0, LONGEST // frame_ms(model))
    probabilities = torch.tensor([0.9, 0.95, 0.5, 0.81, 0.99])
    assert trailing_blanks(probabilities.log(), 7) == 2
    assert trailing_blanks(probabilities[:2].log(), 7) == 9
    assert trailing_blanks(probabilities[:0].log(), 7) == 7


@pytest.mark.parametrize("rate", [16000, 11025])
def test_times_count_the_samples_between_frames_at_any_rate(rate, monkeypatch):
    """10 ms are 110.25 samples at 11,025 Hz, where frames are 110 apart."""
    monkeypatch.setattr(stream, "LONGEST", 1000)
    frontend = Frontend(frontend="fbank", sample_rate=rate, num_mel_bins=23)
    model = tiny_model(train_char(["abcdefgh"]), frontend=frontend).eval()
    seconds = 4 * frontend.shift_samples / rate  # between encoder frames
    _, later = piece_samples(model, 4)
    assert later == round(4 * seconds * rate)
    waveform = 0.1 * noise(3 * rate, dtype=torch.float32)
    search = SearchOptions(chunk_size=4)
    heard = [found for found in listen(model, [waveform], search) if found.final]
    assert len(heard) >= 3
    for one, other in zip(heard, heard[1:]):
        assert one.seconds == pytest.approx(other.first_frame * seconds, rel=1e-12)
    assert frame_times("conv2d", frontend).shift == pytest.approx(seconds, rel=1e-12)
    assert frame_ms(model) == (40 if rate == 16000 else pytest.approx(1000 * seconds, rel=1e-12))
    assert isinstance(frame_ms(model), int) == (rate == 16000)


def test_after_an_endpoint_a_new_utterance_begins_and_no_frame_is_lost(model):
    waveform = 0.1 * noise(16000 * 45, dtype=torch.float32)
    search = SearchOptions(chunk_size=16, left_chunks=1, beam_size=2)
    finals = [heard for heard in listen(model, [waveform], search) if heard.final]
    assert len(finals) >= 3  # rule 3: 20 s at most
    assert [heard.first_frame * frame_ms(model) / 1000 for heard in finals[1:]] == [
        heard.seconds for heard in finals[:-1]
    ]
    frames = subsampled_length(extract(model.frontend)(waveform).size(0), "conv2d")
    assert finals[-1].first_frame + finals[-1].encoded.size(1) == frames
    assert finals[-1].seconds == 45


@pytest.mark.parametrize("chunk_size", [4, -1])
def test_in_what_pieces_a_log_mel_stream_comes_makes_no_difference(model, monkeypatch, chunk_size):
    monkeypatch.setattr(model, "frontend", Frontend())
    waveform = torch.cat([gain * noise(40000, dtype=torch.float32) for gain in (0.3, 0.01)])
    search = SearchOptions(
        chunk_size=chunk_size, left_chunks=2 if chunk_size > 0 else -1, beam_size=3
    )
    expected = list(listen(model, [waveform], search))
    assert len(expected) == (31 if chunk_size > 0 else 1)  # 498 frames make 124 encoder frames
    for pieces in (
        waveform.split(777),
        waveform.split(10240),  # as large as a later chunk of 16
        waveform.split(random_pieces(len(waveform), 9000, seed=2)),
    ):
        for heard, meant in zip(listen(model, pieces, search), expected, strict=True):
            assert heard.hypothesis == meant.hypothesis and heard.seconds == meant.seconds
            assert not heard.final or torch.equal(heard.encoded, meant.encoded)


def mostly_blank(model, monkeypatch, spoken=(), noise=0.1, sure=0.9):
    """Makes CTC give the blank 0.9 and a token `noise`; a token `sure` in the frames `spoken`."""

    def log_probs(encoded):
        probs = torch.full((*encoded.shape[:2], model.tokenizer.vocab_size), 1e-6)
        probs[..., 0], probs[..., 3] = 0.9, noise
        probs[:, spoken, 0], probs[:, spoken, 3] = 1 - sure, sure
        return probs.log()

    monkeypatch.setattr(model, "ctc_log_probs", log_probs)
    monkeypatch.setattr(model.net, "ctc_log_probs", log_probs)


@pytest.mark.parametrize("mode", MODES)
def test_where_the_blank_wins_in_every_frame_there_is_no_text(model, monkeypatch, mode):
    encoded = noise(3, 200, 16, dtype=torch.float32)
    lengths = torch.tensor([200, 100, 0])
    search = SearchOptions()
    written = decode.Hypothesis([4], -1.0, [], [[4]], [-1.0], [[]])
    monkeypatch.setattr(model, "attention_search", lambda *_: [written] * 3)
    mostly_blank(model, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(decode, "without_text", lambda row: row)
        resurrected = [row.tokens for row in model.search(encoded, lengths, mode, search)]
    assert (resurrected == [[], [], []]) == (mode == "ctc_greedy_search")
    for row in model.search(encoded, lengths, mode, search):
        assert (row.tokens, row.nbest, row.times, row.nbest_times) == ([], [[]], [], [[]])
        assert row.nbest_scores == [row.score]
    mostly_blank(model, monkeypatch, spoken=[150])  # behind the end of the other rows
    assert [bool(row.tokens) for row in model.search(encoded, lengths, mode, search)] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("mode", STREAM_MODES)
def test_where_ctc_finds_nothing_a_stream_asks_the_decoder_as_decode_does(
    model, monkeypatch, tmp_path, mode
):
    mostly_blank(model, monkeypatch, spoken=[5], noise=1e-6, sure=0.6)
    path = tmp_path / "lm"
    path.write_text("\\data\\\n\\1-grams:\n-1 </s>\n-1 a\n\\end\\\n")
    lm = load_lm(str(path), model.tokenizer, 0.5, -1.0)  # so CTC's best is the empty sequence
    features = extract(model.frontend)(SOUND)[None]
    whole = model.decoding(features, torch.tensor([features.size(1)]), mode, SearchOptions(), lm)
    (expected,) = decode.answered(whole)
    *_, heard = listen(model, [SOUND], SearchOptions(), False, lm, mode)
    assert len(expected.nbest) > 1 and heard.hypothesis.nbest == expected.nbest
    assert heard.hypothesis.nbest_scores == pytest.approx(expected.nbest_scores, abs=1e-3)


def test_a_stream_in_which_the_blank_wins_has_no_text_and_ends_by_silence(model, monkeypatch):
    mostly_blank(model, monkeypatch)
    heard = list(listen(model, [torch.zeros(60 * 16000)], SearchOptions(chunk_size=16)))
    assert not any(guess.hypothesis.tokens for guess in heard)
    ends = [guess.seconds for guess in heard if guess.final]
    assert len(ends) > 10
    assert max(b - a for a, b in zip(ends, ends[1:])) < 6  # SILENCE and a chunk, 5.64 s


@pytest.mark.parametrize("mode", STREAM_MODES)
@pytest.mark.parametrize("chunk_size", [2, 16])
def test_silence_around_what_is_said_adds_up_to_no_text(model, monkeypatch, chunk_size, mode):
    # All frames but frame 100 are silence.
    def log_probs(encoded, begins=itertools.count(step=chunk_size)):
        begin = next(begins) if encoded.size(1) else 0
        frames = torch.arange(encoded.size(1)) + begin
        probs = torch.full((1, encoded.size(1), model.tokenizer.vocab_size), 1e-9)
        probs[..., 0], probs[..., 3] = 0.9, 0.1
        probs[:, frames == 100] = 1e-9
        probs[:, frames == 100, 4] = 1
        return probs.log()

    monkeypatch.setattr(model, "ctc_log_probs", log_probs)
    monkeypatch.setattr(
        model.net, "ctc_log_probs", lambda encoded: log_probs(encoded, itertools.count())
    )
    search = SearchOptions(chunk_size=chunk_size)
    *_, heard = listen(model, [torch.zeros(8 * 16000)], search, endpoints=False, mode=mode)
    said = heard.hypothesis.tokens
    assert 4 in said and len(said) <= 5, said


def test_a_stream_without_an_end_keeps_no_more_than_an_utterance(model, monkeypatch):
    sizes = []
    real = model.stream

    def watched(features, state, last):
        kept = itertools.chain(*state.blocks)
        sizes.append(sum(part.untyped_storage().nbytes() for part in kept if part is not None))
        return real(features, state, last)

    monkeypatch.setattr(model, "stream", watched)
    pieces = (0.1 * noise(10240, dtype=torch.float32) for _ in range(150))
    search = SearchOptions(chunk_size=16, beam_size=2)
    finals = [heard for heard in listen(model, pieces, search) if heard.final]
    assert len(finals) > 3 and max(sizes[75:]) <= max(sizes[:75])


def test_an_utterance_begins_with_no_list_of_the_ones_before(model, monkeypatch):
    monkeypatch.setattr(stream, "LONGEST", 1000)
    advance, state = listener(model, SearchOptions(chunk_size=16))
    states = [state]
    for chunk in SOUND.split(piece_samples(model, 16)[1]):
        heard, state = advance(chunk, False, 0, state)
        if heard and heard.final:
            states.append(state)
            assert heard.hypothesis.tokens
    assert len(states) > 1 and all(state.utterance.beam.lists == {-1: 0} for state in states)


SOUND = 0.1 * noise(40000, dtype=torch.float32)


@pytest.mark.parametrize(
    "bad, reason",
    [
        (torch.tensor([0.1, float("nan")]), "sample 30001 of the stream: samples are not finite"),
        (torch.tensor([0.1, 1e10]), "sample 30001 of the stream: samples as large as 1e.10; full"),
        (torch.tensor([0.1, 1e300], dtype=torch.float64), "not finite"),
        (SOUND.short(), "Tensor torch.int16"),
        (SOUND[0], r"Tensor torch.float32 \(\)"),
        (torch.stack((SOUND, SOUND)), r"Tensor torch.float32 \(2, 40000\)"),
        (SOUND.numpy(), "ndarray float32"),
        (None, "NoneType"),
        (SOUND + 0j, "complex64"),
        (b"abc", "bytes"),
    ],
    ids=str,
)
def test_a_piece_that_is_no_sound_is_refused_after_what_was_heard(model, bad, reason):
    search = SearchOptions(chunk_size=16)
    good = SOUND[:30000]
    if getattr(bad, "shape", ()) == (2,):
        good = torch.cat((good, torch.tensor([0.1])))
    *_, expected = listen(model, [good], search)
    heard = []
    with pytest.raises(UserError, match=reason):
        for guess in listen(model, [SOUND[:30000], bad, SOUND], search):
            heard.append(guess)
    assert heard[-1].final and heard[-1].hypothesis == expected.hypothesis
    assert heard[-1].seconds == expected.seconds > 1


def test_an_error_of_the_microphone_comes_after_what_was_heard_and_odd_pieces_are_none(model):
    def breaking():
        yield SOUND
        raise OSError("unplugged")

    search = SearchOptions(chunk_size=16)
    heard = []
    *_, expected = listen(model, [SOUND], search)
    with pytest.raises(OSError, match="unplugged"):
        for guess in listen(model, breaking(), search):
            heard.append(guess)
    assert heard[-1].final and heard[-1].hypothesis == expected.hypothesis
    odd = [SOUND[:0], SOUND, SOUND[:0]], [SOUND.double()], [SOUND.clone().requires_grad_()]
    for pieces in odd:
        assert list(listen(model, pieces, search))[-1].hypothesis == expected.hypothesis
    assert [heard.hypothesis.tokens for heard in listen(model, [], search)] == [[]]
