"""The frontend and the augmentations are pure and seeded, and their lengths known beforehand."""

import dataclasses
import json
import math

from cli import UserError

import numpy as np
import pytest
import torch
import torchaudio.compliance.kaldi as kaldi

from audio import read_audio
from helpers import ROOT, noise
from transforms import (
    LOUDEST,
    Augment,
    Compose,
    Frontend,
    bounded,
    check_samples,
    dithered,
    eval_transform,
    extract,
    fbank,
    log_mel,
    log_mel_filters,
    make_generator,
    mean_var_norm,
    mel_power,
    mix_noise,
    num_frames,
    read_cmvn,
    reverberate,
    shortest_frames,
    spec_aug,
    spec_sub,
    spec_trim,
    speed_length,
    speed_perturb,
    train_transform,
    transpose,
)

FRONTEND = Frontend()
FBANK = Frontend(frontend="fbank")
AUGMENT = Augment(max_trim=50)
OFF = Augment(speeds=(), num_freq_masks=0, num_time_masks=0, num_subs=0)
# Of recorded noise and of impulse responses, in samples; the largest sample of a room's is not its
# first.
SOUNDS = [noise(n).numpy() for n in (1, 700, 9000, 20000)]
ROOM = np.float32([0, 0.1, -2, 0.5, 0.3, 0.2])
LENGTHS = [0, 1, 159, 160, 399, 400, 401, 559, 560, 561, 1000, 4401, 16000, 16001, 47999, 160007]
TRANSFORMS = {
    "speed_perturb": speed_perturb(AUGMENT.speeds),
    "reverberate": reverberate([ROOM, *SOUNDS], 0.5),
    "mix_noise": mix_noise(SOUNDS, AUGMENT),
    "mean_var_norm": mean_var_norm,
    "log_mel": log_mel(FRONTEND),
    "spec_aug": spec_aug(AUGMENT),
    "spec_sub": spec_sub(AUGMENT),
    "spec_trim": spec_trim(AUGMENT),
    "dithered": dithered(1.0),
    "fbank": fbank(FBANK),
    "transpose": transpose,
    "train_fbank": train_transform(FBANK, AUGMENT),
    "train": train_transform(FRONTEND, AUGMENT),
    "train_in_noise": train_transform(FRONTEND, AUGMENT, SOUNDS, SOUNDS),
    "eval": eval_transform(FRONTEND),
}


def features(frames, seed=0):
    """Return features (F,T) without a zero, every frame distinct."""
    return 1 + torch.rand(80, frames, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_a_pure_function(name):
    example = {"input_values": noise(9000), "features": features(200), "other": "kept"}
    before = {key: value.clone() for key, value in example.items() if key != "other"}
    items = dict(example)
    for row in range(20):
        first, second = (TRANSFORMS[name](example, make_generator(3, 1, row)) for _ in range(2))
        assert first is not example or first == items
        assert first["other"] == "kept" and first.keys() == second.keys()
        # All randomness is the generator's.
        assert all(torch.equal(first[key], second[key]) for key in before)
        assert all(
            example[key] is items[key] and torch.equal(example[key], before[key]) for key in before
        )


def test_randomness_is_a_function_of_seed_epoch_and_row():
    keys = [(seed, epoch, row) for seed in range(6) for epoch in range(6) for row in range(6)]
    draws = {key: tuple(torch.rand(4, generator=make_generator(*key)).tolist()) for key in keys}
    assert len(set(draws.values())) == len(keys)  # (0, 1, 2) and (1, 0, 2) share nothing
    assert all(
        tuple(torch.rand(4, generator=make_generator(*key)).tolist()) == draw
        for key, draw in draws.items()
    )


def test_training_features_repeat_for_the_same_key_and_change_with_the_epoch():
    transform = train_transform(FRONTEND, Augment())
    waveform = noise(16000)

    def made(*key):
        return transform({"input_values": waveform}, make_generator(*key))["features"]

    assert torch.equal(made(1, 2, 3), made(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert made(*other).shape != made(1, 2, 3).shape or not torch.equal(
            made(*other), made(1, 2, 3)
        )


@pytest.mark.parametrize(
    "frontend",
    [
        FRONTEND,
        FBANK,
        Frontend(frame_length=32, frame_shift=12),
        Frontend(sample_rate=8000, num_mel_bins=40),
        Frontend(tail_padding=73),
        Frontend(frontend="fbank", tail_padding=300),
    ],
)
def test_predicted_frames_are_the_real_ones(frontend):
    extractor = extract(frontend)
    for samples in [*LENGTHS, *range(380, 420), *range(1980, 2020)]:
        real = extractor(noise(samples))
        assert real.shape == (max(1, num_frames(samples, frontend)), frontend.num_mel_bins)
        assert torch.isfinite(real).all()
    assert num_frames(np.array(LENGTHS), frontend).tolist() == [
        num_frames(n, frontend) for n in LENGTHS
    ]


@pytest.mark.parametrize("frontend", [FRONTEND, FBANK], ids=["log_mel", "fbank"])
def test_a_tail_is_silence_behind_features_that_stay_as_they_are(frontend):
    waveform = noise(16000)
    with_tail = extract(dataclasses.replace(frontend, tail_padding=300))(waveform)
    without = extract(frontend)(waveform)
    assert len(with_tail) == len(without) + 30
    assert torch.equal(with_tail[: len(without)], without)
    silence = extract(frontend)(torch.zeros(16000))[0]
    # Up to two frames see the end of the waveform as well.
    assert torch.equal(with_tail[len(without) + 2 :], silence.expand(28, -1))
    trained = train_transform(dataclasses.replace(frontend, tail_padding=300), OFF)
    assert torch.equal(trained({"input_values": waveform}, None)["features"], with_tail)
    dithered = trained({"input_values": waveform}, make_generator(0, 0, 0))["features"]
    assert torch.equal(dithered[len(without) + 2 :], silence.expand(28, -1))


@pytest.mark.parametrize("speed", [0.8, 0.9, 1.0, 1.1, 1.25])
def test_predicted_lengths_at_a_speed_are_the_real_ones(speed):
    change = speed_perturb((speed,))
    lengths = [*LENGTHS, *range(2, 40), 1_920_000 + 7, 2_345_679]  # beyond two minutes, too
    for samples in lengths:
        real = change({"input_values": noise(samples)}, make_generator(0, 0, 0))["input_values"]
        assert len(real) == speed_length(samples, speed) == -(-samples * 100 // round(speed * 100))
    assert speed_length(np.array(lengths), speed).tolist() == [
        speed_length(n, speed) for n in lengths
    ]


@pytest.mark.parametrize(
    "augment",
    [
        Augment(),
        Augment(max_trim=50),
        Augment(max_trim=7, speeds=()),
        OFF,
        Augment(speeds=(0.8, 0.9)),
    ],
)
def test_shortest_frames_is_what_the_worst_draw_leaves(augment):
    quick = dataclasses.replace(augment, num_freq_masks=0, num_time_masks=0, num_subs=0)
    transform = train_transform(FRONTEND, quick)
    draws = 400 if augment.max_trim else 30  # so many meet the worst one
    for samples in (400, 1400, 5000, 20000):
        frames = [
            len(transform({"input_values": noise(samples)}, make_generator(0, 0, row))["features"])
            for row in range(draws)
        ]
        assert min(frames) == max(1, shortest_frames(samples, FRONTEND, quick))
    assert shortest_frames(np.array([400, 5000]), FRONTEND, quick).tolist() == [
        shortest_frames(400, FRONTEND, quick),
        shortest_frames(5000, FRONTEND, quick),
    ]


def test_speed_changes_duration_and_pitch_together():
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)
    for speed in (0.9, 1.1):
        changed = speed_perturb((speed,))({"input_values": tone}, make_generator(0, 0, 0))[
            "input_values"
        ]
        peak = torch.fft.rfft(changed).abs().argmax() * 16000 / len(changed)
        assert abs(peak - 1000 * speed) < 5


def test_every_speed_is_drawn():
    lengths = [
        len(
            TRANSFORMS["speed_perturb"]({"input_values": noise(9900)}, make_generator(0, 0, row))[
                "input_values"
            ]
        )
        for row in range(200)
    ]
    assert set(lengths) == {9000, 9900, 11000} and min(lengths.count(n) for n in set(lengths)) > 40


def test_a_planned_speed_takes_the_place_of_the_draw():
    for choice, samples in enumerate((11000, 9900, 9000)):
        generator = make_generator(0, 0, 0)
        changed = TRANSFORMS["speed_perturb"](
            {"input_values": noise(9900), "speed": choice}, generator
        )
        assert len(changed["input_values"]) == samples and changed["speed"] == choice
        assert torch.equal(generator.get_state(), make_generator(0, 0, 0).get_state())


def energy(waveform):
    return float(waveform.double().square().sum())


@pytest.mark.parametrize("samples", [1, 700, 8999, 9000, 30001])
def test_noise_is_as_many_db_below_the_example_as_was_drawn(samples):
    waveform = 0.01 * noise(samples)

    def below(row, snr):
        transform = mix_noise(SOUNDS, Augment(snr=snr, noise_prob=1.0))
        made = transform({"input_values": waveform}, make_generator(0, 0, row))["input_values"]
        return 10 * math.log10(energy(waveform) / energy(made - waveform))

    assert all(
        below(row, (snr, snr)) == pytest.approx(snr, abs=0.01)
        for row, snr in enumerate((-9, 0, 20))
    )
    drawn = [below(row, (5, 20)) for row in range(60)]
    assert 4.9 < min(drawn) < 7 and 18 < max(drawn) < 20.1


@pytest.mark.parametrize("samples", [60, 99, 100, 250])
def test_noise_is_a_piece_from_a_random_place_repeated_where_it_is_short(samples):
    ramp = np.arange(100, dtype=np.float32)
    transform = mix_noise([ramp], Augment(snr=(0, 0), noise_prob=1.0))
    waveform = torch.ones(samples)
    starts = set()
    for row in range(60):
        made = transform({"input_values": waveform}, make_generator(0, 0, row))["input_values"] - 1
        piece = (made / made.diff().median()).round().int().numpy()
        starts.add(int(piece[0]))
        assert piece.tolist() == [n % 100 for n in range(piece[0], piece[0] + samples)]
    # A noise that is long enough is cut where its end does not meet its beginning.
    possible = range(101 - samples if samples < 100 else 100)
    assert starts <= set(possible) and len(starts) >= min(20, len(possible))


def test_a_room_keeps_the_times_the_length_and_the_energy():
    for samples, rir in (
        (1, ROOM),
        (5, ROOM),
        (16374, ROOM),
        (9000, SOUNDS[2]),
        (90000, SOUNDS[1]),
    ):
        waveform = noise(samples)
        transform = reverberate([rir], 1.0)
        heard = transform({"input_values": waveform}, make_generator(0, 0, 0))["input_values"]
        peak = np.abs(rir).argmax()
        whole = np.convolve(waveform.double().numpy(), rir)[peak : peak + samples]
        assert energy(heard) == pytest.approx(energy(waveform), rel=1e-4)
        whole = torch.from_numpy(whole * math.sqrt(energy(waveform) / np.square(whole).sum()))
        assert torch.allclose(heard.double(), whole, atol=1e-4)
    click = torch.zeros(9000)
    click[4000] = 1
    transform = reverberate([ROOM], 1.0)
    heard = transform({"input_values": click}, make_generator(0, 0, 0))["input_values"]
    assert heard.abs().argmax() == 4000


@pytest.mark.parametrize("samples", [0, 1, 400, 16000])
def test_silence_and_sounds_of_nothing_or_of_one_sample_do_no_harm(samples):
    nothing = [np.zeros(300, np.float32), np.zeros(1, np.float32)]
    tiny = [np.float32([1e-30]), np.float32([-3e9])]
    for waveform in (torch.zeros(samples), noise(samples), 1e9 * noise(samples)):
        for sounds in (nothing, tiny, SOUNDS):
            for transform in (reverberate(sounds, 1.0), mix_noise(sounds, Augment(noise_prob=1.0))):
                for row in range(4):
                    example = {"input_values": waveform}
                    made = transform(example, make_generator(0, 0, row))["input_values"]
                    assert made.shape == waveform.shape and made.isfinite().all()
                    assert sounds is not nothing or torch.equal(made, waveform)


def test_noise_and_rooms_come_to_the_share_of_examples_that_was_asked_for():
    for share in (0.2, 1.0):
        for transform in (reverberate([ROOM], share), mix_noise(SOUNDS, Augment(noise_prob=share))):
            example = {"input_values": noise(50)}
            changed = sum(
                transform(example, make_generator(0, 0, row)) is not example for row in range(400)
            )
            assert changed == 400 if share == 1 else 40 < changed < 120


def test_mean_var_norm_gives_zero_mean_and_unit_variance_and_stands_silence():
    normed = mean_var_norm({"input_values": 3 + 5 * noise(16000)}, None)["input_values"]
    assert abs(normed.mean()) < 1e-5 and abs(normed.var(correction=0) - 1) < 1e-4
    assert (
        mean_var_norm({"input_values": torch.zeros(100)}, None)["input_values"].tolist()
        == [0.0] * 100
    )
    assert len(mean_var_norm({"input_values": torch.zeros(0)}, None)["input_values"]) == 0


def test_log_mel_is_what_torchaudio_computes():
    import torchaudio

    reference = torchaudio.transforms.MelSpectrogram(
        16000,
        n_fft=400,
        win_length=400,
        hop_length=160,
        n_mels=80,
        center=False,
        power=2,
        window_fn=lambda n: torch.hamming_window(n, periodic=False),
    )
    waveform = noise(12345)
    ours = log_mel(FRONTEND)({"input_values": waveform}, None)["features"]
    torch.testing.assert_close(ours, torch.log1p(reference(waveform)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bins", [1, 15, 16, 17, 40, 80, 200])
def test_mel_power_in_bands_and_blocks_is_the_whole_product(bins):
    frontend = Frontend(num_mel_bins=bins)
    waveform = noise(160 * 1100)
    window, mel = log_mel_filters(frontend)
    expected = torch.fft.rfft(waveform.unfold(0, 400, 160) * window).abs().square() @ mel
    made = mel_power(
        waveform, frontend, log_mel_filters, lambda frames, window: torch.fft.rfft(frames * window)
    )
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-4)


def test_silence_is_zero_which_is_what_masks_write():
    assert not extract(FRONTEND)(torch.zeros(4000)).any()


def zeroed_runs(flags):
    """Return the lengths of the runs of True."""
    padded = np.diff(np.concatenate(([0], np.asarray(flags, int), [0])))
    return np.flatnonzero(padded == -1) - np.flatnonzero(padded == 1)


def test_spec_aug_zeroes_at_most_its_masks_and_nothing_else():
    change = spec_aug(AUGMENT)
    widest_time = 0
    widest_band = 0
    for row in range(300):
        before = features(300)
        after = change({"features": before}, make_generator(0, 0, row))["features"]
        masked = after == 0
        assert torch.equal(after[~masked], before[~masked])
        frames = masked.all(dim=0)
        bands = masked.all(dim=1)
        assert torch.equal(masked, frames[None, :] | bands[:, None])
        assert 1 <= len(zeroed_runs(frames)) <= 2 and frames.sum() <= 100
        assert 1 <= len(zeroed_runs(bands)) <= 2 and bands.sum() <= 20
        if len(zeroed_runs(frames)) == 2:
            widest_time = max(widest_time, *zeroed_runs(frames))
        if len(zeroed_runs(bands)) == 2:
            widest_band = max(widest_band, *zeroed_runs(bands))
    assert widest_time in range(45, 51) and widest_band == 10


def test_spec_sub_copies_from_the_unchanged_past():
    change = spec_sub(AUGMENT)
    moved = []
    for row in range(200):
        before = torch.arange(200.0).expand(80, 200).clone()  # a frame's value is its time
        after = change({"features": before}, make_generator(0, 0, row))["features"]
        assert torch.equal(after, after[:1].expand(80, -1))  # whole frames
        source = after[0]
        assert (source <= before[0]).all()
        changed = source != before[0]
        assert changed.sum() <= 3 * 30
        moved.append(int(changed.sum()))
    assert max(moved) > 30 and np.mean(moved) > 15


def test_spec_trim_cuts_the_end_unless_that_is_half():
    change = spec_trim(AUGMENT)
    lengths = set()
    for row in range(500):
        before = features(90)
        after = change({"features": before}, make_generator(0, 0, row))["features"]
        assert torch.equal(after, before[:, : after.shape[1]])
        lengths.add(after.shape[1])
    assert lengths == set(range(46, 91))  # cutting 45 of 90 or more leaves all 90


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_features_of_a_few_frames_go_through_every_transform(frames):
    for row in range(50):
        example = {"input_values": noise(400 + 160 * (frames - 1))}
        made = train_transform(FRONTEND, AUGMENT)(example, make_generator(0, 0, row))["features"]
        assert made.shape[0] >= 1 and made.shape[1] == 80 and torch.isfinite(made).all()


def test_every_transform_can_be_left_out():
    names = [t.__qualname__.split(".")[0] for t in train_transform(FRONTEND, AUGMENT).transforms]
    assert names == [
        "speed_perturb",
        "mean_var_norm",
        "log_mel",
        "spec_aug",
        "spec_sub",
        "spec_trim",
        "transpose",
    ]
    chain = train_transform(FRONTEND, AUGMENT, [ROOM], SOUNDS).transforms
    assert [t.__qualname__.split(".")[0] for t in chain] == [
        "speed_perturb",
        "reverberate",
        "mix_noise",
        *names[1:],
    ]
    for name, options in (
        ("speed_perturb", {"speeds": ()}),
        ("spec_aug", {"num_freq_masks": 0, "num_time_masks": 0}),
        ("spec_sub", {"num_subs": 0}),
        ("spec_trim", {"max_trim": 0}),
    ):
        left = train_transform(FRONTEND, dataclasses.replace(AUGMENT, **options)).transforms
        assert [t.__qualname__.split(".")[0] for t in left] == [n for n in names if n != name]
    left = train_transform(Frontend(mean_var_norm=False), AUGMENT).transforms
    assert [t.__qualname__.split(".")[0] for t in left] == [
        n for n in names if n != "mean_var_norm"
    ]
    assert Augment().max_trim == 0  # off by default
    for axis, options in ((0, {"num_freq_masks": 0}), (1, {"num_time_masks": 0})):
        after = spec_aug(Augment(**options))({"features": features(300)}, make_generator(0, 0, 0))[
            "features"
        ]
        assert not (after == 0).all(dim=1 - axis).any() and (after == 0).any()


def test_evaluation_normalises_and_extracts_and_nothing_else():
    waveform = 0.1 * noise(8000)
    expected = log_mel(FRONTEND)(mean_var_norm({"input_values": waveform}, None), None)[
        "features"
    ].T
    assert torch.equal(
        eval_transform(FRONTEND)({"input_values": waveform}, None)["features"], expected
    )
    assert torch.equal(extract(FRONTEND)(waveform), expected)
    assert torch.equal(
        train_transform(FRONTEND, OFF)({"input_values": waveform}, make_generator(0, 0, 0))[
            "features"
        ],
        expected,
    )
    assert len(eval_transform(Frontend(mean_var_norm=False)).transforms) == 2


def test_compose_calls_in_order():
    chain = Compose([lambda e, g: {**e, "x": e["x"] + 1}, lambda e, g: {**e, "x": e["x"] * 10}])
    assert chain({"x": 1}, None) == {"x": 20}


def test_the_frontend_travels_as_plain_data():
    frontend = Frontend(num_mel_bins=40, window="hann")
    assert Frontend(**dataclasses.asdict(frontend)) == frontend
    assert extract(frontend)(noise(4000)).shape == (23, 40)


@pytest.mark.parametrize(
    "cls, options",
    [
        (Frontend, {"num_mel_bins": 0}),
        (Frontend, {"num_mel_bins": 3, "frontend": "fbank"}),
        (Frontend, {"frame_length": 0}),
        (Frontend, {"window": "boxcar"}),
        (Frontend, {"frame_shift": 0}),
        (Augment, {"speeds": (1.0, 0.0)}),
        (Augment, {"num_subs": -1}),
        (Augment, {"max_time_mask": 0}),
        (Augment, {"max_trim": -1}),
        (Augment, {"snr": (20.0, 5.0)}),
        (Augment, {"snr": (5.0,)}),
        (Augment, {"noise_prob": 0.0}),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(cls, options):
    with pytest.raises(UserError) as refused:
        cls(**options)
    name = next(iter(options))
    assert "\n" not in str(refused.value) and name in str(refused.value)


# Kaldi's fbank


def kaldis(waveform):
    """Compute the features that WeNet trains on, without dither."""
    return kaldi.fbank(
        waveform[None] * 32768,
        num_mel_bins=80,
        dither=0.0,
        energy_floor=0.0,
        sample_frequency=16000,
    )


def speechlike(seconds=2.0):
    """Make a gliding tone that fades in over soft noise, with an offset.

    Like speech, it has loud and quiet bands.
    """
    time = torch.arange(int(seconds * 16000)) / 16000
    return (
        0.01
        + time / seconds * 0.5 * torch.sin(2 * torch.pi * (200 + 300 * time) * time)
        + 1e-3 * noise(len(time))
    )


def test_fbank_is_kaldis_on_synthetic_sound():
    for waveform in (speechlike(), noise(16001) * 0.1, torch.zeros(4000)):
        made = extract(FBANK)(waveform)
        assert made.shape == kaldis(waveform).shape and (made - kaldis(waveform)).abs().max() < 1e-3


def test_fbank_is_kaldis_on_real_recordings():
    folder = ROOT.parent / "shared" / "speech" / "librispeech_1h" / "dev"
    files = sorted(folder.glob("*.flac"))
    if not files:
        pytest.skip(
            "no ../shared/speech/librispeech_1h: fbank is compared with Kaldi's on synthetic "
            "sound only"
        )
    extractor = extract(FBANK)
    for file in files[:20]:
        waveform = torch.from_numpy(read_audio(str(file)))
        assert (extractor(waveform) - kaldis(waveform)).abs().max() < 1e-3


@pytest.mark.parametrize("high_freq", [-400.0, 7000.0])
def test_fbank_ends_where_kaldis_does(high_freq):
    waveform = speechlike()
    expected = kaldi.fbank(
        waveform[None] * 32768,
        num_mel_bins=80,
        dither=0.0,
        high_freq=high_freq,
        sample_frequency=16000,
    )
    assert (
        extract(dataclasses.replace(FBANK, high_freq=high_freq))(waveform) - expected
    ).abs().max() < 1e-3
    assert (kaldis(waveform) - expected).abs().max() > 0.1


def test_a_stream_hears_as_loud_samples_as_a_recording():
    loud = LOUDEST * torch.tensor([1.0, -1.0, 0.5])
    assert check_samples(loud.numpy()) == (3, "")
    assert bounded(loud).equal(loud)


@pytest.mark.parametrize("high_freq", [8001.0, 20.0, -7980.0, float("nan")])
def test_filters_that_end_nowhere_are_refused(high_freq):
    with pytest.raises(UserError, match="--high_freq "):
        dataclasses.replace(FBANK, high_freq=high_freq)


def test_dither_is_for_training_only_and_of_the_size_asked_for():
    silence = {"input_values": torch.zeros(160000)}
    assert dithered(1.0)(silence, None) == silence
    quiet, loud = (
        fbank(FBANK)(dithered(amount)(silence, make_generator(0, 0, 0)), None)["features"]
        for amount in (1.0, 2.0)
    )
    torch.testing.assert_close(
        loud - quiet, torch.full_like(loud, 2 * np.log(2)), rtol=0, atol=1e-3
    )
    assert quiet.std() > 0.1


def test_global_cmvn_reads_the_same_from_wenets_json_and_from_kaldis_text(tmp_path):
    frames = np.random.default_rng(0).normal(5, 2, (50, 4))
    total = frames.sum(0)
    squares = (frames**2).sum(0)
    (tmp_path / "json").write_text(
        json.dumps({"mean_stat": total.tolist(), "var_stat": squares.tolist(), "frame_num": 50})
    )
    rows = (" ".join(map(repr, map(float, row))) for row in ([*total, 50], [*squares, 0]))
    (tmp_path / "kaldi").write_text(" [\n  " + "\n  ".join(rows) + " ]\n")
    for name in ("json", "kaldi"):
        mean, istd = read_cmvn(str(tmp_path / name))
        assert np.allclose(mean, frames.mean(0)) and np.allclose(istd, 1 / frames.std(0))
    for content in (
        "",
        "{}",
        "[ 1 2 3 ]",
        '{"mean_stat": [1], "var_stat": [1], "frame_num": 0}',
        "nonsense",
    ):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(UserError, match="bad: no global CMVN"):
            read_cmvn(str(tmp_path / "bad"))
    with pytest.raises(UserError, match="No such file"):
        read_cmvn(str(tmp_path / "none"))
