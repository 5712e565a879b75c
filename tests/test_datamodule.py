"""From shards to batches: order, schema, lengths, filter.

An example depends on (seed, epoch, row) alone.
"""

import copy
import dataclasses
import json
import os
import pickle
import shutil
from functools import partial
from types import SimpleNamespace

from cli import UserError

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from conformer import Subsampling, U2Conformer
from datamodule import (
    DataOptions,
    SpeechDataModule,
    SpeechDataset,
    audio_lengths,
    collate,
    eval_loader,
    filter_conformer_len_prob,
    get_concat_dataset,
    label_checksum,
    label_statistics,
    load_split,
    row_values,
)
from frames import SUBSAMPLING, subsampled_length
from helpers import TINY, one_line
from recovery import Place, check_plan, make_plan
from sampler import LengthGroupedSampler, Shaped
from tokenizer import train_char
from transforms import (
    Augment,
    Compose,
    Frontend,
    extract,
    make_generator,
    num_frames,
    shortest_frames,
    speed_length,
    train_transform,
)

TOKENIZER = train_char(["abcdef"])
FRONTEND = Frontend()
AUGMENT = Augment()
SAMPLES = [9000, 12000, 7000, 20000, 16000, 8000, 11000, 15000]
datasets.disable_progress_bars()


def audio(samples, row=0):
    return np.random.default_rng(row).normal(0, 0.1, samples).astype(np.float32)


def columns(samples, labels=None, struct=True, length=True):
    """Make the columns of a shard; a row's audio is seeded by its number of samples."""
    labels = labels or [[4, 5, 5]] * len(samples)
    made = {
        "input_values": [audio(n, n) for n in samples],
        "labels": [{"input_ids": ids} for ids in labels] if struct else labels,
    }
    return made | ({"length": list(samples)} if length else {})


def save(path, samples, labels=None, **options):
    datasets.Dataset.from_dict(columns(samples, labels, **options)).save_to_disk(str(path))


@pytest.fixture
def root(tmp_path):
    save(tmp_path / "root/train/0", SAMPLES[:4])
    save(tmp_path / "root/train/1/data", SAMPLES[4:])
    save(tmp_path / "root/dev/0", SAMPLES[:3])
    save(tmp_path / "root/eval_clean/0", SAMPLES[:5])
    return tmp_path / "root"


def module(*roots, augment=AUGMENT, **options):
    return SpeechDataModule(
        data_roots=roots,
        tokenizer=TOKENIZER,
        frontend=FRONTEND,
        augment=augment,
        options=DataOptions(**{"num_workers": 0, "batch_size": 3} | options),
    )


# Shards


def test_shards_come_in_numeric_order_whether_at_k_or_k_data(tmp_path):
    for shard in range(12):
        save(tmp_path / f"train/{shard}" / ("data" if shard % 2 else ""), [1000 + shard])
    (tmp_path / "train/.tmp-12").mkdir()  # what an interrupted run may leave
    assert audio_lengths(get_concat_dataset([tmp_path], "train")).tolist() == [
        1000 + shard for shard in range(12)
    ]


def test_a_shard_of_another_name_or_one_that_is_absent_is_told(tmp_path, caplog):
    for name in ("0", "3", "4/data", "part_5"):
        save(tmp_path / "train" / name, [1000])
    with caplog.at_level("INFO", logger="pytorch_lightning.utilities.rank_zero"):
        assert len(get_concat_dataset([tmp_path], "train")) == 3
    assert caplog.messages == [
        f"{tmp_path}/train: left out part_5; shards are called 0, 1, ...",
        f"{tmp_path}/train: 2 of the shards 0 .. 4 absent",
    ]


@pytest.mark.parametrize("spelling", ["same", "dots", "link", "linked split", "linked shard"])
def test_the_same_rows_twice_are_refused_however_they_are_spelt(root, tmp_path, spelling):
    other = {"same": root, "dots": root / "train/..", "link": tmp_path / "link"}.get(
        spelling, tmp_path / "other"
    )
    if spelling == "link":
        other.symlink_to(root)
    elif spelling.startswith("linked"):
        part = "train" + "/1" * (spelling == "linked shard")
        (other / part).parent.mkdir(parents=True)
        (other / part).symlink_to(root / part)
    with pytest.raises(UserError, match="rows would come twice") as error:
        get_concat_dataset([root, other], "train")
    assert f"{other}/train/" in one_line(error)
    shutil.copytree(root, tmp_path / "copy")
    assert len(get_concat_dataset([root, tmp_path / "copy"], "train")) == 16


def test_a_split_comes_from_the_roots_that_have_it_and_the_others_are_named(root, tmp_path, caplog):
    save(tmp_path / "more/train/0", SAMPLES[:2])
    save(tmp_path / "less/dev/0", SAMPLES[:1])
    data = module(root, tmp_path / "more", tmp_path / "less")
    with caplog.at_level("INFO", logger="pytorch_lightning.utilities.rank_zero"):
        data.setup("fit")
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 10, "dev": 4}
    assert [line for line in caplog.messages if "has none" in line] == [
        f"train: {tmp_path}/less has none, so it is that of {root}, {tmp_path}/more alone",
        f"dev: {tmp_path}/more has none, so it is that of {root}, {tmp_path}/less alone",
    ]
    for roots, reason in (
        ((tmp_path / "more", tmp_path / "more"), "no split dev"),
        ((root, tmp_path / "no"), "no such data root"),
    ):
        with pytest.raises(UserError, match=reason):
            get_concat_dataset(roots, "dev")


@pytest.mark.parametrize(
    "length", [[3000, 2999, 3001], [3000, None, 3001], [3000, -1, 3001]], ids=str
)
def test_a_length_that_the_audio_contradicts_is_refused_and_the_row_named(tmp_path, length):
    for shard in ("0", "1"):
        made = columns([3000, 3000, 3001])
        datasets.Dataset.from_dict(
            made | {"length": made["length"] if shard == "0" else length}
        ).save_to_disk(str(tmp_path / "train" / shard))
    with pytest.raises(
        UserError, match=f"length is {length[1] or 'nan'} in row 1 of the shard, .* 3000 samples"
    ) as error:
        get_concat_dataset([tmp_path], "train")
    assert str(tmp_path / "train/1") in one_line(error)


def test_a_shard_of_another_schema_is_named(tmp_path):
    save(tmp_path / "train/0", [3000])
    save(tmp_path / "train/1", [3000], struct=False)
    with pytest.raises(UserError) as error:
        get_concat_dataset([tmp_path], "train")
    assert str(tmp_path / "train/1") in one_line(error) and "labels" in one_line(error)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"labels": None}, "no column labels"),
        ({"input_values": None}, "no column input_values"),
        ({"labels": ["ab"]}, "not a list of ints"),
        ({"labels": [{"ids": [4]}]}, "not a list of ints"),
        ({"input_values": [[1, 2]]}, "not a list of floats"),
        ({"length": [0.5]}, "column length"),
        ({"labels": [None], "input_values": [None]}, "column"),
    ],
)
def test_a_wrong_column_is_refused_and_the_shard_named(tmp_path, change, reason):
    made = {name: value for name, value in (columns([3000]) | change).items() if value is not None}
    datasets.Dataset.from_dict(made).save_to_disk(str(tmp_path / "train/0"))
    with pytest.raises(UserError, match=reason) as error:
        get_concat_dataset([tmp_path], "train")
    assert str(tmp_path / "train/0") in one_line(error)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_a_truncated_shard_is_named(root, kept):
    file = next((root / "train/1/data").glob("*.arrow"))
    os.truncate(file, int(kept if kept >= 1 else kept * file.stat().st_size))
    with pytest.raises(UserError) as error:
        get_concat_dataset([root], "train")
    assert str(root / "train/1/data") in one_line(error)


def test_a_shard_cut_between_two_record_batches_is_not_taken_for_whole(tmp_path):
    save(tmp_path / "train/0", [3000] * 2500)
    file = next((tmp_path / "train/0").glob("*.arrow"))
    # All rows are there, but no end mark, as after a cut at the border of a record batch.
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(UserError, match="truncated"):
        get_concat_dataset([tmp_path], "train")


def test_a_wrong_root_a_missing_split_and_an_empty_split_are_refused(root):
    for split, where, reason in (
        ("train", root / "no", "no such data root"),
        ("eval_other", root, "no split eval_other"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            get_concat_dataset([where], split)
        assert str(where) in one_line(error)
    (root / "bare").mkdir()
    with pytest.raises(UserError, match="holds no shard"):
        get_concat_dataset([root], "bare")
    save(root / "whole", SAMPLES[:2])
    datasets.DatasetDict(train=datasets.load_from_disk(str(root / "whole"))).save_to_disk(
        str(root / "several")
    )
    for place, split, name in (root, "whole", "whole"), (root / "several", "train", "several"):
        with pytest.raises(UserError, match=f"{name} is itself a dataset.*{split}/0"):
            get_concat_dataset([place], split)
    rows = datasets.load_from_disk(str(root / "whole"))
    rows.select([]).save_to_disk(str(root / "train/2"))
    with pytest.raises(UserError, match="train/2: .*it has no rows"):
        get_concat_dataset([root], "train")
    shutil.rmtree(root / "train/2")
    save(root / "train/2", SAMPLES[:2])
    (arrow,) = (root / "train/2").glob("*.arrow")
    arrow.write_bytes(b"")
    with pytest.raises(UserError, match="is truncated"):
        get_concat_dataset([root], "train")


def test_roots_with_different_tokenizers_are_refused(tmp_path, root):
    save(tmp_path / "other/train/0", [3000])
    for place, tokens in ((root, ["a"]), (tmp_path / "other", ["a"])):
        (place / "tokenizer.json").write_text(json.dumps(tokens))
    assert len(get_concat_dataset([root, tmp_path / "other"], "train")) == 9
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(["b"]))
    with pytest.raises(UserError, match="differs") as error:
        get_concat_dataset([root, tmp_path / "other"], "train")
    assert str(tmp_path / "other") in one_line(error)


def test_token_ids_that_no_label_may_hold_are_refused_with_their_row(tmp_path):
    for wrong in (TOKENIZER.vocab_size, -100, TOKENIZER.blank_id):
        save(tmp_path / f"{wrong}/dev/0", [3000, 3000], [[4, 5], [4, wrong, 5]])
        with pytest.raises(UserError, match=rf"dev row 1: token id {wrong}"):
            load_split([tmp_path / str(wrong)], "dev", TOKENIZER)


# Lengths


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float64())], ids=str
)
def test_an_absent_length_comes_from_the_offsets_in_any_list_type_and_number_of_chunks(kind):
    parts = [
        pa.table({"input_values": pa.array([np.zeros(n) for n in part], kind)})
        for part in ([5, 0, 7], [2], [9, 1])
    ]
    # The offsets of a slice do not start at 0.
    dataset = datasets.Dataset(pa.concat_tables([parts[0].slice(1), *parts[1:]]))
    assert dataset.data.column("input_values").num_chunks == 3
    assert audio_lengths(dataset).tolist() == [0, 7, 2, 9, 1]


def test_a_shard_saved_from_a_selection_keeps_its_rows(tmp_path):
    whole = datasets.Dataset.from_dict(
        columns(SAMPLES, [[4, 4, i + 4] for i in range(8)], struct=False, length=False)
    )
    # One shard has picked rows, the other a slice of the same Arrow table.
    for shard, rows in enumerate(([5, 0, 2], range(3, 6))):
        whole.select(rows).save_to_disk(str(tmp_path / f"train/{shard}"))
    made = get_concat_dataset([tmp_path], "train")
    order = [5, 0, 2, 3, 4, 5]
    assert audio_lengths(made).tolist() == [SAMPLES[row] for row in order]
    assert label_statistics(made)[1].tolist() == [1 + (row == 0) for row in order]
    for position, row in enumerate(order):
        assert np.array_equal(made[position]["input_values"], audio(SAMPLES[row], SAMPLES[row]))


def test_a_given_length_is_read_and_the_audio_is_not():
    dataset = datasets.Dataset.from_dict({"input_values": [[0.0] * 5], "length": [123]})
    assert audio_lengths(dataset).tolist() == [123]


@pytest.mark.parametrize("struct", [True, False])
def test_label_statistics_count_adjacent_repeats_within_a_row_only(struct):
    labels = [[4, 4, 4], [4, 5], [], [5, 5], [-1, 9]]
    dataset = datasets.Dataset.from_dict(columns([1] * 5, labels, struct=struct))
    counts, repeats = label_statistics(dataset)
    assert counts.tolist() == [3, 2, 0, 2, 2] and repeats.tolist() == [2, 0, 0, 1, 0]


def test_the_checksum_of_labels_is_of_what_they_say_and_not_of_how_they_are_stored():
    def checksum(*parts, struct=False, pick=None):
        made = datasets.concatenate_datasets(
            [
                datasets.Dataset.from_dict(columns([1] * len(part), part, struct=struct))
                for part in parts
            ]
        )
        return label_checksum(made if pick is None else made.select(pick))

    labels = [[4, 5], [], [6], [7, 7, 7]]
    assert (
        checksum(labels)
        == checksum(labels[:1], labels[1:], struct=True)
        == checksum(labels[::-1], pick=[3, 2, 1, 0])
    )
    others = [
        [[5, 5], [], [6], [7, 7, 7]],
        [[4], [5], [6], [7, 7, 7]],
        labels[::-1],
        [[4, 5], [6], [], [7, 7, 7]],
    ]
    assert len({checksum(labels), *map(checksum, others)}) == 5


def test_picked_rows_have_their_own_lengths():
    labels = [[4, 4], [5], []]
    for length in (True, False):
        dataset = datasets.Dataset.from_dict(columns([10, 20, 30], labels, length=length)).select(
            [2, 0]
        )
        assert audio_lengths(dataset).tolist() == [30, 10]
        assert [made.tolist() for made in label_statistics(dataset)] == [[0, 2], [0, 1]]


# Filter


@pytest.mark.parametrize("input_layer", SUBSAMPLING)
def test_the_predicted_encoder_length_is_the_real_one(input_layer):
    subsampling = Subsampling(input_layer, 80, 8).eval()
    extractor = extract(FRONTEND)
    for samples in [*range(3000, 5400, 79), 16000, 16159, 16160, 40001]:
        for speed in (0.9, 1.0, 1.1):
            augment = Augment(speeds=(speed,), num_freq_masks=0, num_time_masks=0, num_subs=0)
            example = train_transform(FRONTEND, augment)(
                {"input_values": torch.from_numpy(audio(samples))}, torch.Generator().manual_seed(0)
            )
            predicted = int(
                subsampled_length(shortest_frames(samples, FRONTEND, augment), input_layer)
            )
            assert subsampling(example["features"][None]).shape[1] == predicted
        predicted = int(
            subsampled_length(shortest_frames(samples, FRONTEND, Augment(speeds=())), input_layer)
        )
        assert subsampling(extractor(torch.from_numpy(audio(samples)))[None]).shape[1] == predicted


def kept(samples, labels, repeats, tail_padding=0, **options):
    return filter_conformer_len_prob(
        np.array(samples),
        np.array(labels),
        np.array(repeats),
        frontend=dataclasses.replace(FRONTEND, tail_padding=tail_padding),
        augment=AUGMENT,
        input_layer="conv2d",
        options=DataOptions(**options),
    )


def test_in_a_tail_ctc_has_room_but_it_makes_no_utterance_of_too_few_frames():
    rows = [0, 400, 8000, 8000], [1, 1, 10, 20], [0, 0, 0, 0]
    assert kept(*rows)[0].tolist() == [False, False, True, False]
    assert kept(*rows, tail_padding=500)[0].tolist() == [False, False, True, True]


@pytest.mark.parametrize("input_layer", SUBSAMPLING)
@pytest.mark.parametrize(
    "augment", [AUGMENT, Augment(max_trim=50), Augment(speeds=())], ids=["speeds", "trim", "plain"]
)
def test_a_kept_row_has_finite_ctc_loss_and_one_dropped_for_ctc_has_none(input_layer, augment):
    rng = np.random.default_rng(0)
    decisions = []
    for samples in rng.integers(6000, 24000, 24).tolist():
        frames = int(subsampled_length(shortest_frames(samples, FRONTEND, augment), input_layer))
        if not frames:
            continue
        log_probs = torch.from_numpy(rng.standard_normal((frames, 1, 6), np.float32)).log_softmax(
            -1
        )
        # Labels are of 3 kinds, so repeats are many. The boundary lies within this range.
        counts = range(max(1, frames // 2), frames + 2)
        drawn = [rng.integers(1, 4, count) for count in counts]
        statistics = label_statistics(datasets.Dataset.from_dict({"labels": drawn}))
        for labels, length, repeats in zip(drawn, *statistics, strict=True):
            if abs(length + repeats - frames) > 1:
                continue
            loss = torch.nn.functional.ctc_loss(
                log_probs,
                torch.from_numpy(labels)[None],
                (frames,),
                (len(labels),),
                reduction="none",
            )
            keep, _ = filter_conformer_len_prob(
                np.array([samples]),
                np.array([length]),
                np.array([repeats]),
                options=DataOptions(),
                frontend=FRONTEND,
                augment=augment,
                input_layer=input_layer,
            )
            assert torch.isfinite(loss).item() == keep[0]
            decisions.append((keep[0], repeats > 0))
    assert {True, False} == {kept for kept, _ in decisions} and any(
        repeated for _, repeated in decisions
    )


def test_the_filter_counts_every_dropped_row_under_one_reason():
    keep, reasons = kept(
        [1000, 16000, 160000, 16000], [1, 3, 3, 90], [0, 0, 0, 0], min_frame=20, max_frame=500
    )
    assert keep.tolist() == [False, True, False, False]
    assert reasons == {
        "shorter than 20 frames": 1,
        "longer than 500 frames": 1,
        "labels too long for CTC": 1,
    }
    assert (
        kept([16000], [15], [0], output_len_prob=1.0)[0].all()
        and not kept([16000], [15], [0], output_len_prob=0.5)[0].any()
    )


def test_rows_are_dropped_from_train_only_and_numbered_as_before_the_filter(root, caplog):
    for split in ("train", "dev"):
        save(root / split / "2", [16000, 16000], [[4] * 60, [4, 5]])
    data = module(root)
    with caplog.at_level("INFO", logger="pytorch_lightning.utilities.rank_zero"):
        data.setup("fit")
    assert "9 of 10 rows kept, dropped: 1 labels too long for CTC" in caplog.text
    assert sorted(row for batch in data.train_dataloader() for row in batch.rows.tolist()) == [
        *range(8),
        9,
    ]
    assert sorted(row for batch in data.val_dataloader() for row in batch.rows.tolist()) == [
        *range(5)
    ]
    unfiltered = module(root, filter=False)
    unfiltered.setup("fit")
    assert sorted(
        row for batch in unfiltered.train_dataloader() for row in batch.rows.tolist()
    ) == [*range(10)]


@pytest.mark.parametrize("input_layer", SUBSAMPLING)
def test_a_dev_row_too_short_for_its_labels_is_scored_with_a_finite_loss(tmp_path, input_layer):
    save(tmp_path / "dev/0", [1, 300, 1500, 9000], [[4, 5], [4] * 9, [4] * 40, []])
    # The filter would drop these rows from train.
    options = DataOptions(num_workers=0, batch_size=2, min_frame=50)
    loader = eval_loader(load_split([tmp_path], "dev", TOKENIZER), FRONTEND, options)
    torch.manual_seed(0)
    net = U2Conformer(
        dataclasses.replace(TINY, input_layer=input_layer),
        80,
        TOKENIZER.vocab_size,
        0,
        TOKENIZER.sos_id,
        TOKENIZER.eos_id,
    ).eval()
    rows = []
    for batch in loader:
        loss = net.loss(batch.features, batch.feature_lengths, batch.labels, batch.label_lengths)[
            "loss"
        ]
        assert torch.isfinite(loss)
        rows += batch.rows.tolist()
    assert sorted(rows) == [0, 1, 2, 3]


def test_no_row_left_is_refused(root):
    with pytest.raises(UserError, match="no row of train is left") as error:
        module(root, min_frame=5000).setup("fit")
    assert str(root) in one_line(error)


# Examples and batches


def test_a_batch_is_padded_with_zeros_and_its_lengths_are_true(root):
    data = module(
        root,
        batch_size=8,
        augment=Augment(speeds=(), num_freq_masks=0, num_time_masks=0, num_subs=0),
    )
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert (
        batch.features.dtype == torch.float32
        and batch.labels.dtype == batch.rows.dtype == torch.int64
    )
    for i, row in enumerate(batch.rows.tolist()):
        expected = extract(FRONTEND)(torch.from_numpy(audio(SAMPLES[row], SAMPLES[row])))
        frames = int(batch.feature_lengths[i])
        assert (
            torch.equal(batch.features[i, :frames], expected)
            and not batch.features[i, frames:].any()
        )
        assert batch.labels[i, : batch.label_lengths[i]].tolist() == [4, 5, 5]


@pytest.mark.parametrize(
    "options", [{"struct": False}, {"length": False}], ids=["labels as a list", "no length"]
)
def test_every_form_of_the_data_gives_the_same_batches(root, tmp_path, options):
    save(tmp_path / "same/train/0", SAMPLES, **options)
    save(tmp_path / "same/dev/0", SAMPLES[:3], **options)
    assert same_examples(examples(module(root)), examples(module(tmp_path / "same")))


def test_what_transformers_feature_extractor_gives_is_accepted(tmp_path):
    """A feature extractor gives lists of float64, its tokenizer lists of labels, and no length."""
    waveform = audio(9000).astype(np.float64)
    dataset = datasets.Dataset.from_dict({"input_values": [waveform.tolist()], "labels": [[4, 5]]})
    assert dataset.features["input_values"].feature.dtype == "float64"
    for split in ("train", "dev"):
        dataset.save_to_disk(str(tmp_path / split / "0"))
    [batch] = eval_loader(
        load_split([tmp_path], "dev", TOKENIZER), FRONTEND, DataOptions(num_workers=0)
    )
    assert torch.equal(
        batch.features[0], extract(FRONTEND)(torch.from_numpy(waveform.astype(np.float32)))
    )


def examples(data, epoch=0, world_size=1):
    """Return {row: (features, labels)} of an epoch of train, over all ranks."""
    data.setup("fit")
    found = {}
    for rank in range(world_size):
        data.ranks = lambda: (rank, world_size)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            for i, row in enumerate(batch.rows.tolist()):
                assert row not in found
                found[row] = (
                    batch.features[i, : batch.feature_lengths[i]],
                    batch.labels[i, : batch.label_lengths[i]],
                )
    return found


def same_examples(one, other):
    return one.keys() == other.keys() and all(
        a.shape == b.shape and torch.equal(a, b)
        for row in one
        for a, b in zip(one[row], other[row])
    )


def test_examples_are_a_function_of_seed_epoch_and_row_alone(root):
    expected = examples(module(root), epoch=3)
    assert same_examples(expected, examples(module(root, num_workers=2), epoch=3))
    assert same_examples(expected, examples(module(root, batch_size=1), epoch=3, world_size=2))
    assert not same_examples(expected, examples(module(root), epoch=4))


def test_persistent_workers_learn_the_epoch(root):
    data = module(root, num_workers=1)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        epochs.append(
            {
                row: (batch.features[i, : batch.feature_lengths[i]],)
                for batch in loader
                for i, row in enumerate(batch.rows.tolist())
            }
        )
        assert same_examples(
            epochs[-1], {row: made[:1] for row, made in examples(module(root), epoch).items()}
        )
    assert not same_examples(*epochs)


def test_a_loader_works_with_workers_that_are_not_forked(root):
    """macOS spawns workers, Python 3.14 starts them from a server.

    Both send the dataset to them by pickle.
    """
    loader = eval_loader(load_split([root], "dev", TOKENIZER), FRONTEND, DataOptions(num_workers=1))
    for dataset in (
        loader.dataset,
        SpeechDataset(loader.dataset.dataset, partial(train_transform, FRONTEND, AUGMENT), 0),
    ):
        made = pickle.loads(pickle.dumps(dataset))[[(1, 2)]]
        assert torch.equal(made.features, dataset[[(1, 2)]].features)


def test_rows_are_read_from_the_table_itself_picked_ones_too(root):
    dataset = get_concat_dataset([root], "train")
    for column in ("input_values", "labels"):
        values = row_values(dataset, column, 5)
        # The values are neither a copy nor a Python list.
        assert isinstance(values, np.ndarray) and not values.flags.owndata
    assert np.array_equal(row_values(dataset.select([6, 5]), "input_values", 1), audio(8000, 8000))


def test_a_batch_is_the_same_behind_a_pipe(root):
    data = module(root)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    for made in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch)):
        assert type(made) is type(batch) and all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(made, batch)
        )


def test_test_splits_are_eval_clean_and_where_present_eval_other(root):
    """load_split and eval_loader read a split by its name."""

    def rows(split):
        loader = eval_loader(
            load_split([root], split, TOKENIZER), FRONTEND, DataOptions(num_workers=0, batch_size=3)
        )
        return len(loader.dataset.dataset), sum(len(batch.rows) for batch in loader)

    assert rows("eval_clean") == (5, 5)
    with pytest.raises(UserError, match="no split eval_other"):
        rows("eval_other")
    save(root / "eval_other/0", SAMPLES[:2])
    assert rows("eval_other") == (2, 2)


def test_a_validation_needs_dev_alone(root):
    shutil.rmtree(root / "train")
    data = module(root)
    data.setup("validate")
    assert list(data.splits) == ["dev"] and sum(len(b.rows) for b in data.val_dataloader()) == 3


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_largest_batches_of_an_epoch_are_known_before_it(root, world_size):
    """recovery.MemoryCheck runs the largest by frames and by labels, and the longest of dev."""
    save(root / "train/2", [30000, 7500, 7600, 7700], [[4], [4, 5] * 9, [4], [5]])
    data = module(root, augment=Augment(speeds=()))
    data.setup("fit")
    dev = []
    for rank in range(world_size):
        data.ranks = lambda: (rank, world_size)
        batches = list(data.train_dataloader())
        largest = data.largest_batches()
        rows = [batch.rows.tolist() for batch in batches]
        assert all(batch.rows.tolist() in rows for batch in largest)
        for name in ("features", "labels"):
            most, found = (
                max(getattr(batch, name).numel() for batch in some) for some in (batches, largest)
            )
            assert most == found
        dev += data.longest_dev_batch().rows.tolist()
    assert SAMPLES.index(max(SAMPLES[:3])) in dev


@pytest.mark.parametrize("size", [{"max_batch_seconds": 4.0}, {"batch_size": 8}], ids=str)
def test_the_slowest_speed_counts_as_seconds_of_a_batch_and_in_the_memory_check(root, size):
    data = module(root, augment=Augment(speeds=(0.5, 1.0)), **{"batch_size": None, **size})
    data.setup("fit")
    for batch in data.largest_batches():
        samples = speed_length(data.lengths[batch.rows], 0.5)
        assert batch.feature_lengths.tolist() == num_frames(samples, FRONTEND).tolist()
    for epoch in range(4):
        data.next_epoch = lambda: epoch
        shapes = [batch.features.shape for batch in data.train_dataloader()]
        assert all("batch_size" in size or rows * frames <= 400 for rows, frames, _ in shapes)


def test_tails_count_as_seconds_of_a_batch(root):
    options = {"batch_size": None, "max_batch_seconds": 4.0}
    plain, tailed = (module(root, augment=Augment(speeds=()), **options) for _ in range(2))
    tailed.frontend = Frontend(tail_padding=1000)
    for data in (plain, tailed):
        data.setup("fit")
    for split in ("train", "val"):
        before, after = (
            [batch.features.shape for batch in getattr(data, f"{split}_dataloader")()]
            for data in (plain, tailed)
        )
        assert max(rows for rows, *_ in before) > max(rows for rows, *_ in after) > 1
        assert all(rows * frames <= 400 for rows, frames, _ in after)


def test_limit_rows_takes_the_first_rows_of_every_split(root):
    data = module(root, limit_rows=2)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert sorted(row for batch in loader for row in batch.rows.tolist()) == [0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 4, "max_batch_seconds": 9.0},
        {"max_batch_seconds": -1.0},
        {"limit_rows": 0},
        {"num_workers": -1},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError, match=f"--{next(iter(options))}"):
        DataOptions(**options)


# Few shapes


def shaped_module(folder, augment=AUGMENT, **options):
    return module(folder, augment=augment, few_shapes="on", **options)


def test_collate_pads_to_what_it_is_told_or_further():
    rows = [(torch.ones(n, 80), torch.ones(u, dtype=torch.int64), n) for n, u in ((5, 3), (9, 1))]
    plain = collate(rows)
    for least, found in (((20, 7), (20, 7)), ((6, 2), (9, 3)), ((9, 3), (9, 3))):
        batch = collate(rows, *least)
        assert batch.features.shape == (2, found[0], 80) and batch.labels.shape == (2, found[1])
        for one, other in zip(batch, plain):
            inner = one[:, : other.size(1)] if other.dim() > 1 else one
            assert torch.equal(inner, other) and one.dtype == other.dtype
        assert not batch.features[:, 9:].any() and not batch.labels[:, 3:].any()


@pytest.mark.parametrize("trim", [0, 20])
def test_a_batch_has_its_shape_and_each_row_at_the_planned_speed(root, trim):
    augment = dataclasses.replace(AUGMENT, max_trim=trim)
    # Of these rows, some have less than a frame at some speeds.
    save(root / "train/2", [1, 360, 399, 400, 440, 441])
    data = shaped_module(root, augment=augment, filter=False)
    data.setup("fit")
    loader = data.train_dataloader()
    found = {}
    for planned, batch in zip(list(loader.sampler), loader, strict=True):
        assert batch.features.shape == (len(planned.keys), planned.frames, 80)
        assert batch.labels.shape == (len(planned.keys), planned.labels)
        for place, (epoch, row, speed) in enumerate(planned.keys):
            samples = data.lengths[row]
            expected = train_transform(FRONTEND, augment)(
                {"input_values": torch.from_numpy(audio(samples, samples)), "speed": speed},
                make_generator(0, epoch, row),
            )["features"]
            frames = int(batch.feature_lengths[place])
            assert frames == len(expected) <= data.frames_by_speed()[speed, row]
            assert trim or frames == data.frames_by_speed()[speed, row]
            assert torch.equal(batch.features[place, :frames], expected)
            assert not batch.features[place, frames:].any()
            found[row] = frames
    assert sorted(found) == list(range(14))


def test_a_transform_that_lengthens_rows_makes_the_batch_larger(root):
    data = shaped_module(root)
    data.setup("fit")

    def longer():
        chain = train_transform(FRONTEND, AUGMENT).transforms
        longer = {"features": torch.zeros(500, 80)}
        return Compose([*chain, lambda example, _: {**example, **longer}])

    dataset = SpeechDataset(data.splits["train"], longer, 0)
    assert dataset[Shaped([(0, 1, 0), (0, 2, 1)], 102, 7)].features.shape == (2, 500, 80)


def test_examples_are_the_same_whatever_the_loader_and_the_ranks(root):
    expected = examples(shaped_module(root), epoch=3)
    assert same_examples(expected, examples(shaped_module(root, num_workers=2), epoch=3))
    assert same_examples(expected, examples(shaped_module(root, batch_size=1), 3, world_size=2))
    assert not same_examples(expected, examples(shaped_module(root), epoch=4))


@pytest.mark.parametrize("size", [{"batch_size": 2}, {"max_batch_seconds": 3.0}], ids=str)
def test_the_largest_batches_are_loaded_at_their_full_shape(root, size):
    save(root / "train/2", [30000, 7500, 7600, 7700], [[4], [4, 5] * 9, [4], [5]])
    data = shaped_module(root, **{"batch_size": None, **size})
    data.setup("fit")
    shapes, largest = (
        [(*batch.features.shape[:2], batch.labels.size(1)) for batch in batches]
        for batches in (data.train_dataloader(), data.largest_batches())
    )
    assert set(largest) <= set(shapes)
    for measure in (lambda b, t, u: b * t, lambda b, t, u: b * u, lambda b, t, u: b * t * t):
        assert max(measure(*one) for one in shapes) == max(measure(*one) for one in largest)


def test_the_largest_by_each_measure_are_loaded(root, monkeypatch):
    data = shaped_module(root)
    data.setup("fit")
    keys = [(0, row, 1) for row in range(3)]
    plan = [Shaped(keys[:n], t, u) for n, t, u in ((1, 130, 7), (3, 200, 7), (2, 240, 15))]
    plan.append(Shaped(keys[:1], 440, 7))
    monkeypatch.setattr(data, "sampler", lambda *_: SimpleNamespace(batches=lambda _: plan))
    shapes = [(*b.features.shape[:2], b.labels.size(1)) for b in data.largest_batches()]
    # By frames, by labels, and by the squares that attention makes of frames.
    assert shapes == [(3, 200, 7), (2, 240, 15), (1, 440, 7)]


@pytest.mark.parametrize("input_layer", SUBSAMPLING)
def test_few_shapes_make_a_multiple_of_8_encoder_frames_and_not_one_more_fits(root, input_layer):
    data = shaped_module(root)
    data.setup("fit")
    data.input_layer = input_layer
    for batch in data.sampler(0, 1).batches(0):
        encoder_frames = subsampled_length(batch.frames, input_layer)
        assert encoder_frames % 8 == 0 and (batch.labels + 1) % 8 == 0
        assert subsampled_length(batch.frames + 1, input_layer) == encoder_frames + 1


def test_few_shapes_without_groups_are_refused():
    with pytest.raises(UserError, match="--few_shapes on --no-group_by_length: .*") as error:
        DataOptions(few_shapes="on", group_by_length=False)
    assert "\n" not in str(error.value)


def test_an_unresolved_auto_plans_as_on_a_cpu(root):
    data = module(root)
    data.setup("fit")
    assert type(data.sampler(0, 1)) is LengthGroupedSampler


def test_another_choice_within_an_epoch_is_refused(root):
    data = shaped_module(root)
    data.setup("fit")
    plan = make_plan(data, 1, 1)
    place = Place("last.ckpt", batches=1, plan=plan)
    check_plan(place, plan, data)
    for change, said in (
        ({"options": dataclasses.replace(data.options, few_shapes="off")}, "not off"),
        ({"augment": dataclasses.replace(AUGMENT, speeds=(1.0,))}, r"not on \(speeds 1.0\)"),
        ({"augment": dataclasses.replace(AUGMENT, speeds=())}, r"not on \(speeds 1.0\)"),
    ):
        other = shaped_module(root)
        other.setup("fit")
        vars(other).update(change)
        with pytest.raises(UserError, match=rf"few_shapes on \(speeds 0.9 1.0 1.1\), {said}"):
            check_plan(place, make_plan(other, 1, 1), other)
    older = {name: value for name, value in plan.items() if name != "few_shapes"}
    with pytest.raises(UserError, match="few_shapes off, not on"):
        check_plan(place._replace(plan=older), plan, data)


def test_other_processes_that_make_the_same_steps_may_go_on_within_an_epoch(root):
    data = shaped_module(root, batch_size=4)
    data.setup("fit")
    place = Place("last.ckpt", batches=1, plan=make_plan(data, 1, 1))
    data.options = dataclasses.replace(data.options, batch_size=2)
    check_plan(place, make_plan(data, 2, 1), data)
    data.options = dataclasses.replace(data.options, batch_size=1)
    with pytest.raises(UserError, match="batch_size 4, not 1; processes 1, not 2"):
        check_plan(place, make_plan(data, 2, 1), data)
    place.plan["processes"] = 0
    with pytest.raises(UserError, match=r"last\.ckpt: its state of training is damaged \(plan\)"):
        check_plan(place, make_plan(data, 2, 1), data)
