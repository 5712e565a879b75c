"""Any row, length and option is used as promised, dropped with a reason, or refused in one line.

None of them ends in a traceback.
"""

import itertools
import tempfile
from pathlib import Path

from cli import UserError

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from datamodule import DataOptions, SpeechDataModule, filter_conformer_len_prob, label_statistics
from frames import SUBSAMPLING
from helpers import cases, json_lines
from helpers_model import quiet_trainer, tiny_model
from model import OptimOptions
from sampler import LengthGroupedSampler, eval_batches
from tokenizer import train_char
from transforms import (
    Augment,
    Frontend,
    dithered,
    fbank,
    log_mel,
    make_generator,
    mean_var_norm,
    num_frames,
    shortest_frames,
    spec_aug,
    spec_sub,
    spec_trim,
    speed_length,
    speed_perturb,
    train_transform,
    transpose,
)

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filterbank")
TOKENIZER = train_char(["abcdefgh"])
datasets.disable_progress_bars()


# Any row


SOUNDS = {
    "noise": lambda n: np.random.default_rng(n).normal(0, 0.1, n),
    "silence": np.zeros,
    "clipped": np.ones,
    "offset": lambda n: 5 + np.random.default_rng(n).normal(0, 0.1, n),
    "tiny": lambda n: np.full(n, 1e-30),
    "huge": lambda n: 1e30 * np.random.default_rng(n).normal(0, 1, n),
}
SPOILS = (np.nan, np.inf, -np.inf)
BAD_LABELS = (
    [-1],
    [TOKENIZER.vocab_size],
    [4, 2**31 - 1],
    [4, TOKENIZER.blank_id],
    [4, None],
    None,
)
FLOATS = (pa.float32(), pa.float64(), pa.float16())
FRONTENDS = (Frontend(), Frontend(mean_var_norm=False), Frontend(frontend="fbank"))
SAMPLES = st.one_of(
    st.integers(1600, 6000), st.integers(0, 6000), st.sampled_from([0, 1, 399, 400, 401])
)


@st.composite
def sounds(draw, length=SAMPLES):
    samples = SOUNDS[draw(st.sampled_from([*SOUNDS, "noise", "noise"]))](draw(length)).astype(
        np.float64
    )
    if len(samples) and draw(st.integers(0, 5)) == 5:
        samples[draw(st.integers(0, len(samples) - 1))] = draw(st.sampled_from(SPOILS))
    return samples


@st.composite
def tables(draw):
    """Draw columns as prepare.py, transformers or anybody may have written them."""
    rows = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(FLOATS))
    listed = draw(
        st.sampled_from([pa.list_, pa.list_, pa.large_list, lambda kind: pa.list_(kind, 4000)])
    )
    length = st.just(4000) if pa.types.is_fixed_size_list(listed(kind)) else SAMPLES
    audio = [draw(sounds(length)) for _ in range(rows)]
    # A huge sample is infinite as float16, and nan may be stored as null.
    with np.errstate(over="ignore"):
        values = np.concatenate(audio).astype(kind.to_pandas_dtype())
    values = pa.array(values, from_pandas=draw(st.booleans()))
    if pa.types.is_fixed_size_list(listed(kind)):
        audio = pa.FixedSizeListArray.from_arrays(values, 4000)
    else:
        kinds = (
            (pa.LargeListArray, np.int64) if listed is pa.large_list else (pa.ListArray, np.int32)
        )
        audio = kinds[0].from_arrays(np.cumsum([0, *map(len, audio)]).astype(kinds[1]), values)
    label = st.lists(
        st.integers(4, TOKENIZER.vocab_size - 1), max_size=draw(st.sampled_from([3, 60]))
    )
    labels = [draw(label) for _ in range(rows)]
    if draw(st.integers(0, 5)) == 5:
        labels[draw(st.integers(0, rows - 1))] = draw(st.sampled_from(BAD_LABELS))
    label_kind = draw(st.sampled_from([pa.list_, pa.large_list]))(
        draw(st.sampled_from([pa.int32(), pa.int64()]))
    )
    labels = pa.array(labels, label_kind)
    if draw(st.booleans()):
        labels = pa.StructArray.from_arrays([labels], ["input_ids"])
    return pa.table({"input_values": audio, "labels": labels})


def spoilt(samples):
    """Return whether samples are not finite, or far from what a waveform is."""
    return not (np.abs(samples) < 1e29).all()


def ids_of(value):
    return value["input_ids"] if isinstance(value, dict) else value


def is_label(ids):
    return ids is not None and all(i is not None and 0 < i < TOKENIZER.vocab_size for i in ids)


@cases(100)
@given(tables(), st.sampled_from(FRONTENDS), st.booleans())
def test_any_row_is_used_as_promised_dropped_with_a_reason_or_refused_by_name(
    table, frontend, wanted
):
    with tempfile.TemporaryDirectory() as root:
        datasets.Dataset(table).save_to_disk(f"{root}/train/0")
        Path(root, "dev").symlink_to("train")
        augment = Augment(max_trim=50)
        data = SpeechDataModule(
            data_roots=[root],
            tokenizer=TOKENIZER,
            frontend=frontend,
            augment=augment,
            options=DataOptions(num_workers=0, batch_size=2, filter=wanted),
        )
        labels = [ids_of(value) for value in table["labels"].to_pylist()]
        wrong = [row for row, ids in enumerate(labels) if not is_label(ids)]
        try:
            data.setup("fit")
        except UserError as error:
            message = str(error)
            assert root in message and "\n" not in message
            missing = [row for row, ids in enumerate(labels) if ids is None]
            assert (
                "after the filter" in message
                if not wrong
                else f"row {(missing or wrong)[0]}" in message
            )
            return
        assert not wrong
        samples = [row.values.to_numpy(zero_copy_only=False) for row in table["input_values"]]
        for loader, kept in (
            (data.train_dataloader(), data.kept),
            (data.val_dataloader(), range(len(samples))),
        ):
            batches = list(loader)
            assert sorted(row for batch in batches for row in batch.rows.tolist()) == sorted(kept)
            for batch in batches:
                for features, frames, ids, count, row in zip(*batch):
                    assert ids[:count].tolist() == labels[row] and not features[frames:].any()
                    whole = num_frames(len(samples[row]), frontend)
                    length = len(samples[row])
                    low = whole
                    high = whole
                    if loader.sampler.__class__ is LengthGroupedSampler:
                        low = shortest_frames(length, frontend, augment)
                        high = num_frames(speed_length(length, min(augment.speeds)), frontend)
                    assert max(1, low) <= frames <= max(1, high)
                    assert features[:frames].isfinite().all() or spoilt(samples[row])


@cases(100)
@given(
    st.lists(st.tuples(SAMPLES, st.lists(st.integers(4, 8), max_size=40)), min_size=1, max_size=20),
    st.integers(1, 60),
    st.integers(0, 100),
    st.floats(0.1, 1),
    st.sampled_from(list(SUBSAMPLING)),
)
def test_the_filter_counts_what_it_drops(rows, fewest, more, share, input_layer):
    lengths, labels = zip(*rows)
    counts, repeats = label_statistics(
        datasets.Dataset(pa.table({"labels": pa.array(labels, pa.list_(pa.int32()))}))
    )
    assert counts.tolist() == [len(ids) for ids in labels]
    assert repeats.tolist() == [sum(a == b for a, b in itertools.pairwise(ids)) for ids in labels]
    options = DataOptions(min_frame=fewest, max_frame=fewest + more, output_len_prob=share)
    keep, reasons = filter_conformer_len_prob(
        np.array(lengths),
        counts,
        repeats,
        frontend=Frontend(),
        augment=Augment(),
        input_layer=input_layer,
        options=options,
    )
    assert sum(reasons.values()) == len(rows) - keep.sum() and all(reasons.values())
    frames = num_frames(np.array(lengths), Frontend())
    assert ((frames[keep] >= fewest) & (frames[keep] <= fewest + more)).all()


def test_a_label_of_a_million_tokens_is_dropped_and_not_a_problem():
    labels = pa.array([np.full(10**6, 5), [4, 5]], pa.list_(pa.int32()))
    counts, repeats = label_statistics(datasets.Dataset(pa.table({"labels": labels})))
    assert counts.tolist() == [10**6, 2] and repeats.tolist() == [10**6 - 1, 0]
    keep, reasons = filter_conformer_len_prob(
        np.array([160000, 16000]),
        counts,
        repeats,
        frontend=Frontend(),
        augment=Augment(),
        input_layer="conv2d",
        options=DataOptions(),
    )
    assert keep.tolist() == [False, True] and reasons == {"labels too long for CTC": 1}


@pytest.mark.parametrize(
    "value, place, frontend",
    [
        (np.nan, 0, FRONTENDS[0]),
        (np.inf, 8000, FRONTENDS[1]),
        (-np.inf, 4000, FRONTENDS[2]),
        (None, 8000, FRONTENDS[2]),
        (np.nan, 8999, FRONTENDS[2]),  # behind the last frame
        (1e30, 4000, FRONTENDS[0]),
        (1e38, 0, FRONTENDS[1]),
        (1e38, 8000, FRONTENDS[2]),
    ],
    ids=["nan", "inf", "-inf", "null", "unheard", "1e30", "1e38", "1e38 fbank"],
)
def test_a_row_that_is_not_finite_costs_one_update_and_no_weight(value, place, frontend):
    noise = np.random.default_rng(0)
    audio = [noise.normal(0, 0.1, 9000).astype(np.float32).astype(object) for _ in range(6)]
    audio[3][place] = value
    with tempfile.TemporaryDirectory() as root:
        table = pa.table(
            {
                "input_values": pa.array(map(list, audio), pa.list_(pa.float32())),
                "labels": pa.array([[4, 5]] * 6, pa.list_(pa.int32())),
            }
        )
        for split in ("train", "dev"):
            datasets.Dataset(table).save_to_disk(f"{root}/{split}/0")
        data = SpeechDataModule(
            data_roots=[root],
            tokenizer=TOKENIZER,
            frontend=frontend,
            augment=Augment(speeds=()),
            options=DataOptions(num_workers=0, batch_size=2),
        )
        data.setup("fit")
        assert all(statistic.isfinite().all() for statistic in data.cmvn())
        log = Path(root) / "skipped.jsonl"
        optim = OptimOptions(warmup_steps=2)
        model = tiny_model(TOKENIZER, optim=optim, total_steps=20, skip_log=str(log))
        trainer = quiet_trainer()
        trainer.fit(model, DataLoader(list(data.train_dataloader()), batch_size=None))
        bad = [
            batch.rows.tolist()
            for batch in data.train_dataloader()
            if not batch.features.isfinite().all()
        ]
        named = [(line["rows"], line["rows_with_nonfinite_loss"]) for line in json_lines(log)]
        assert named == [(rows, [3]) for rows in bad] and len(bad) <= 1
        assert trainer.global_step == 3 and all(
            weight.isfinite().all() for weight in model.parameters()
        )
        (metrics,) = trainer.validate(model, data.val_dataloader(), verbose=False)
        assert all(np.isfinite(value) for value in metrics.values())


# Transforms, one by one


SPEEDS = st.lists(
    st.sampled_from([0.5, 0.8, 0.9, 0.97, 1.0, 1.1, 1.25, 2.0]), min_size=1, max_size=3
)


@st.composite
def augments(draw):
    return Augment(
        speeds=tuple(draw(SPEEDS)),
        num_freq_masks=draw(st.integers(0, 3)),
        max_freq_mask=draw(st.integers(1, 200)),
        num_time_masks=draw(st.integers(0, 3)),
        max_time_mask=draw(st.integers(1, 200)),
        num_subs=draw(st.integers(0, 4)),
        max_sub=draw(st.integers(1, 200)),
        max_trim=draw(st.integers(1, 200)),
        dither=draw(st.sampled_from([0.0, 1.0])),
    )


@st.composite
def frontends(draw):
    frame_length = draw(st.integers(10, 40))
    return Frontend(
        frontend=draw(st.sampled_from(["log_mel", "fbank"])),
        frame_length=frame_length,
        frame_shift=draw(st.integers(5, min(15, frame_length))),
        num_mel_bins=draw(st.sampled_from([4, 16, 23, 40, 80])),
        window=draw(st.sampled_from(["hamming", "hann"])),
        sample_rate=draw(st.sampled_from([8000, 16000])),
    )


def applied(transform, example, key):
    """Transform the example twice: the results are the same, and the example is not changed."""
    before = {name: value.clone() for name, value in example.items()}
    made, again = (transform(example, make_generator(*key)) for _ in range(2))
    assert made.keys() == again.keys() and all(
        torch.equal(made[name], again[name]) for name in made
    )
    assert example.keys() == before.keys() and all(
        torch.equal(example[name], value) for name, value in before.items()
    )
    assert all(value.isfinite().all() for value in made.values())
    return made


@cases(120)
@given(
    st.integers(0, 6000),
    st.sampled_from(["noise", "silence", "clipped", "offset", "tiny"]),
    frontends(),
    augments(),
    st.tuples(*[st.integers(0, 2**32 - 1)] * 3),
)
def test_every_transform_is_pure_and_keeps_its_promises_at_any_length(
    samples, sound, frontend, augment, key
):
    example = {"input_values": torch.from_numpy(SOUNDS[sound](samples).astype(np.float32))}
    lengths = {speed_length(samples, speed) for speed in augment.speeds}
    assert len(applied(speed_perturb(augment.speeds), example, key)["input_values"]) in lengths
    assert len(applied(mean_var_norm, example, key)["input_values"]) == samples
    frames = max(1, num_frames(samples, frontend))
    bins = frontend.num_mel_bins
    example = applied(dithered(augment.dither), example, key)
    make = fbank(frontend) if frontend.frontend == "fbank" else log_mel(frontend)
    example = applied(make, example, key)
    assert example["features"].shape == (bins, frames)
    for make in (spec_aug, spec_sub):
        assert applied(make(augment), example, key)["features"].shape == (bins, frames)
    trimmed = applied(spec_trim(augment), example, key)["features"].shape[1]
    assert frames - min(augment.max_trim, (frames - 1) // 2) <= trimmed <= frames
    assert torch.equal(applied(transpose, example, key)["features"], example["features"].T)
    whole = applied(
        train_transform(frontend, augment), {"input_values": example["input_values"]}, key
    )["features"]
    assert whole.shape[1] == bins and len(whole) >= max(
        1, shortest_frames(samples, frontend, augment)
    )


@cases(60)
@given(
    st.integers(20000, 24000), st.tuples(*[st.integers(0, 10**6)] * 3), st.sampled_from([0, 1, 2])
)
def test_another_seed_epoch_or_row_hears_something_else(samples, key, changed):
    transform = train_transform(Frontend(), Augment())
    example = {"input_values": torch.from_numpy(SOUNDS["noise"](samples).astype(np.float32))}
    other = tuple(number + (place == changed) for place, number in enumerate(key))
    one, two = (
        transform(example, make_generator(*numbers))["features"] for numbers in (key, other)
    )
    assert one.shape != two.shape or not torch.equal(one, two)


# Plans


@cases(200)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=300),
    st.integers(1, 5),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.integers(0, 3),
    st.integers(1, 50),
)
def test_every_row_once_an_epoch_in_equally_many_batches_for_every_rank(
    lengths, world, size, by_sum, grouped, seed, epoch, megabatch
):
    lengths = np.array(lengths)
    rows = 7 + np.arange(len(lengths))
    options = {"batch_size": None, "max_batch": 40 * size} if by_sum else {"batch_size": size}
    samplers = [None] * world
    try:
        for rank in range(world):
            samplers[rank] = LengthGroupedSampler(
                lengths=lengths,
                rows=rows,
                group_by_length=grouped,
                megabatch=megabatch,
                seed=seed,
                rank=rank,
                world_size=world,
                **options,
            )
    except UserError as error:
        assert len(lengths) < world and str(len(lengths)) in str(error)
        return
    plans = [sampler.plan(epoch) for sampler in samplers]
    assert (
        {len(plan) for plan in plans} == {len(sampler) for sampler in samplers} == {len(plans[0])}
    )
    assert (
        sorted(row for plan in plans for batch in plan for row in batch.tolist()) == rows.tolist()
    )
    for batch in itertools.chain(*plans):
        # Rows that are too few for a step of their own join the step before.
        regular = max(1, len(batch) - (len(lengths) % world > 0))
        assert len(batch) and (
            regular == 1 or regular * lengths[batch - 7].max() <= 40 * size
            if by_sum
            else regular <= size
        )
    steps = samplers[0].steps(epoch)
    longest_first = max(range(len(steps)), key=lambda i: lengths[steps[i] - 7].max())
    assert longest_first == 0
    assert all(np.array_equal(a, b) for a, b in zip(steps, samplers[-1].steps(epoch)))


@cases(60)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=100), st.integers(1, 5), st.integers(1, 20)
)
def test_every_row_is_evaluated_once_the_longest_first(lengths, world, size):
    if len(lengths) < world:
        with pytest.raises(UserError):
            eval_batches(lengths, size, 0, world)
        return
    plans = [eval_batches(lengths, size, rank, world) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1 and all(
        batch for plan in plans for batch in plan
    )
    assert sorted(row for plan in plans for batch in plan for _, row in batch) == list(
        range(len(lengths))
    )
    for plan in plans:
        order = [lengths[row] for batch in plan for _, row in batch]
        assert order == sorted(order, reverse=True)
