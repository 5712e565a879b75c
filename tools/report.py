"""Shows what a run learnt, and where it errs: python -m tools.report RUN [OTHER_RUN ...]

RUN is the OUTPUT_DIR of a run, or a checkpoint alone. The command hears a split with RUN's
best.ckpt and writes RUN/report.html, one page that opens without a network: the curves of all runs,
training rows before and after augmentation, CTC's probabilities, attention maps, the worst
utterances to listen to, and where the errors are. Where something is missing, such as the data, the
page has the rest, and says what is missing.
"""

import contextlib
import csv
import glob
import io
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

import cli
from cli import UserError, option, options_class, shown

import numpy as np

from datamodule import DataOptions, SpeechDataModule, load_split, rows_rate
from decode import MODES
from files import identity, parse_json, write_whole
from model import load_checkpoint
from score import references_of
from tokenizer import check_maker
from tools import report_heard, report_plots
from tools.compare import VALIDATION, read_run, read_scores, score_columns, validation_row
from tools.report_heard import Heard
from tools.report_page import bar, image, make_page, missing, player, table, text
from transforms import Augment
from words import Word, frame_times

EXAMPLES = 6  # training rows before and after augmentation
WORST = 12  # utterances with the most errors
PICTURED = 2  # utterances with CTC's probabilities and attention maps
MOST = 15  # lines of a table
SPACE = "\u2423"  # what a token's space looks like in figures
LENGTHS = 5  # groups of utterances alike in length


@options_class
class ReportOptions:
    data_root: tuple[str, ...] = option(
        (), "data that prepare.py wrote; none: where the run had its data"
    )
    split: str = option("dev", "split that is heard")
    mode: str | None = option(
        None,
        "search; default: attention_rescoring or, of a model without trained decoders, "
        "ctc_prefix_beam_search",
        choices=MODES,
    )
    rows: int = option(
        500, "most utterances that are heard, spread over the split", at_least=1, at_most=10**6
    )
    epoch: int = option(0, "epoch of the training rows that are shown", at_least=0, at_most=10**6)
    out: str | None = option(None, "file to write; default: report.html beside the checkpoint")


class Run(NamedTuple):
    """Holds what lies in the folder of a run; a checkpoint alone has no record."""

    name: str
    folder: str
    record: dict | None  # of run.json
    checkpoint: str | None

    @property
    def options(self) -> dict:
        return self.record["options"] if self.record else {}


def main(argv: list[str]) -> None:
    parser = cli.make_parser(__doc__, ReportOptions)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a .ckpt")
    parser.add_argument("others", nargs="*", metavar="OTHER_RUN", help="runs to compare")
    given = vars(parser.parse_args(argv))
    options = cli.build(ReportOptions, given)
    run = open_run(given["run"])
    others = [open_run(path) for path in given["others"]]
    out = options.out or os.path.join(run.folder, "report.html")
    check_out(out, run)
    model = show_model(run, options)  # first, because it may refuse the data
    sections = {"Curves": curves(run, others)} | model
    command = run.record and run.record.get("command")
    page = make_page(run.name, command and str(command), sections).encode()
    write_whole(out, page)
    print(f"{shown(out)}: {len(page) / 1e6:.1f} MB; open it in a browser")


def open_run(path: str) -> Run:
    """Finds the parts of a run. Raises UserError where there are none."""
    folder, checkpoint = path, os.path.join(path, "best.ckpt")
    if os.path.isfile(path):
        folder, checkpoint = os.path.dirname(path) or ".", path
    record = None
    if os.path.lexists(os.path.join(folder, "run.json")):
        record = read_run(folder)
    there = os.path.isfile(checkpoint)
    if not record and not there:
        raise UserError(
            f"{path}: no run, which has a run.json or a best.ckpt; name the OUTPUT_DIR of a run "
            "that train.py made, or a checkpoint"
        )
    return Run(os.path.normpath(path), folder, record, checkpoint if there else None)


def check_out(out: str, run: Run) -> None:
    """Raises UserError where the page cannot be written, or would replace another kind of file."""
    folder = os.path.dirname(out) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{out}: its folder cannot be written; name another file with --out")
    if (
        not out.endswith(".html")
        or os.path.exists(out)
        and identity(out) == identity(run.checkpoint or run.folder)
    ):
        raise UserError(f"--out {out}: the page's name must end in .html; name another file")


# ---- Curves


def curves(run: Run, others: list[Run]) -> str:
    """Shows losses and errors of all runs, their last validation, and RUN's scores."""
    runs = {each.name: each for each in (run, *others)}
    read = {name: read_curves(each.folder) for name, each in runs.items()}
    parts = [
        missing(f"{name} has no {part}")
        for name, found in read.items()
        for tag, part in (("loss", "steps.jsonl"), ("val_cer", "validation in its logs/"))
        if not found.get(tag)
    ]
    if any(read.values()):
        parts.insert(0, image(report_plots.draw_curves(read)))
    recorded = [(name, each.record) for name, each in runs.items() if each.record]
    if recorded:
        rows = (validation_row(name, record) for name, record in recorded)
        parts.append(table(("run", "preset", "commit", "seed", "steps", *VALIDATION), rows))
    if scores := read_scores(run.folder):
        names = score_columns(scores)
        parts.append("<p>Scores that score.py --keep added</p>")
        parts.append(table(names, (map(score.get, names) for score in scores)))
    return "".join(parts)


def read_curves(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Reads the loss of each update, and what the run's logs have: {tag: [(step, value), ...]}."""
    found = {}
    lines = read_lines(os.path.join(folder, "steps.jsonl"))
    if losses := [
        (line["step"], line["loss"])
        for line in lines
        if isinstance(line.get("step"), int) and isinstance(line.get("loss"), float)
    ]:
        found["loss"] = losses
    logs = os.path.join(folder, "logs")
    if glob.glob(f"{glob.escape(logs)}/events.out.tfevents*"):
        found |= read_events(logs)
    for path in sorted(glob.glob(f"{glob.escape(logs)}/**/metrics.csv", recursive=True)):
        for name, step, value in read_cells(path):
            found.setdefault(name, []).append((step, value))
    return found


def read_cells(path: str) -> Iterator[tuple[str, int, float]]:
    """Yields (column, step, value) of a metrics.csv; what is no number is passed over."""
    # A run that still goes on may have written half of its last line.
    with open(path, errors="replace") as file:
        whole = file.read().rpartition("\n")[0]
    for row in csv.DictReader(io.StringIO(whole)):
        for name, value in row.items():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                yield name, int(row["step"]), float(value)


def read_events(logs: str) -> dict[str, list[tuple[int, float]]]:
    """Reads TensorBoard's scalars in a folder."""
    # TensorBoard takes a second to import, and a run with another logger does not need it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    wanted = {"scalars": 0, "images": 1, "tensors": 1}  # 0: all of them
    events = EventAccumulator(logs, wanted)
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def read_lines(path: str) -> list[dict]:
    """Reads the JSON objects of a file's lines; a line that was cut is passed over."""
    found = []
    if os.path.isfile(path):
        with open(path, errors="replace") as file:
            for line in file:
                try:
                    found.append(parse_json(line))
                except ValueError:
                    continue
    return [line for line in found if isinstance(line, dict)]


def skipped(run: Run) -> str:
    """Lists the updates that the guard skipped, with their rows."""
    steps = read_lines(os.path.join(run.folder, "steps.jsonl"))
    lines = read_lines(os.path.join(run.folder, "skipped.jsonl"))
    if not steps and not lines:
        return missing("neither steps.jsonl nor skipped.jsonl is there")
    if not lines:
        return f"<p>None of {len(steps)} updates was skipped.</p>"
    names = ("step", "epoch", "rows_with_nonfinite_loss", "rows")
    said = f"<p>{len(lines)} updates were skipped; these are the last.</p>"
    return said + table(names, ([line.get(name) for name in names] for line in lines[-MOST:]))


# ---- The model


def show_model(run: Run, options: ReportOptions) -> dict[str, str]:
    """Makes the sections that need the data or the checkpoint."""
    guard = {"Skipped updates": skipped(run)}
    roots = options.data_root or tuple(run.options.get("data_root", ()))
    reason = None
    if not roots:
        reason = "no run.json says where the data are; give --data_root"
    elif not options.data_root and not all(map(os.path.isdir, roots)):
        reason = f"{', '.join(map(str, roots))}, where the run had its data; give --data_root"
    elif not run.checkpoint:
        reason = "there is no best.ckpt yet"
    if reason:
        return {"What the model hears": missing(reason)} | guard
    model, tokenizer, frontend = load_checkpoint(run.checkpoint)
    rows_rate(roots, frontend)
    for root in roots:
        check_maker(tokenizer, f"the tokenizer of {run.checkpoint}", root)
    dataset = load_split(roots, options.split, tokenizer)
    picked = np.linspace(0, len(dataset) - 1, min(len(dataset), options.rows)).astype(int)
    trained = model.options.ctc_weight < 1
    mode = options.mode or ("attention_rescoring" if trained else "ctc_prefix_beam_search")
    heard = report_heard.hear(model, dataset.select(picked), mode)
    heard = [each._replace(row=int(picked[each.row])) for each in heard]
    about = f"{options.split} of {', '.join(roots)} in mode {mode}, {len(heard)} utterances"
    return {
        "Augmentation": augmentation(run, roots, model, options.epoch),
        "CTC and attention": inside(model, dataset, heard, mode),
        "Worst utterances": worst(heard, dataset, frontend.sample_rate),
        "Errors": errors(heard, about),
        "Confidence": calibration(heard),
    } | guard


def data_of_run(run: Run, roots: tuple[str, ...], model) -> SpeechDataModule:
    """Opens the data that the run trained on, with its options. Raises UserError for other data."""
    data = SpeechDataModule(
        data_roots=roots,
        tokenizer=model.tokenizer,
        frontend=model.frontend,
        augment=cli.build(Augment, {}, **run.options),
        options=cli.build(DataOptions, {}, **{"few_shapes": "off", **run.options}),
        input_layer=model.options.input_layer,
        seed=run.options.get("seed", 0),
        views=model.options.views,
    )
    data.setup("fit")
    return data


def augmentation(run: Run, roots: tuple[str, ...], model, epoch: int) -> str:
    """Shows rows of train before and after augmentation, as the run drew it."""
    if not run.record:
        return missing("no run.json says how training augmented")
    try:
        data = data_of_run(run, roots, model)
        examples = list(report_heard.training_examples(data, epoch, EXAMPLES))
    except (UserError, TypeError) as error:
        return missing(error)
    parts = [
        f"<p>Rows of train as epoch {epoch} of the run heard them (seed {data.seed}): the features "
        "that reached the network, and the sound before any mask.</p>"
    ]
    rate = model.frontend.sample_rate
    for example in examples:
        views = example.features if example.features.dim() == 3 else example.features[None]
        names = ["trained on"] if len(views) == 1 else ["first view", "second view"]
        shown_views = {"as recorded": example.plain} | dict(zip(names, views))
        said = references_of(data.splits["train"].select([example.row]), model.tokenizer)
        seconds = f"{len(example.before) / rate:.2f} s, then {len(example.after) / rate:.2f} s"
        parts.append(f"<h4>Row {example.row}: {text(said[0])} ({seconds})</h4>")
        parts.append(image(report_plots.draw_features(shown_views, model.frontend.shift_ms / 1e3)))
        parts += [
            player(report_plots.sound(each, rate)) for each in (example.before, example.after)
        ]
    return "".join(parts)


def inside(model, dataset, heard: list[Heard], mode: str) -> str:
    """Shows CTC's probabilities and the decoders' attention of a few utterances."""
    times = frame_times(model.options.input_layer, model.frontend)
    shift = model.frontend.shift_ms / 1000
    parts = []
    for each in pictured(heard):
        seen = report_heard.see(model, report_heard.samples_of(dataset, each.row), mode)
        pieces = model.tokenizer.texts(seen.tokens)
        tokens = [shown(piece, 20).replace(" ", SPACE) for piece in pieces]
        ids = model.tokenizer.blank_id
        parts.append(f"<h4>Row {each.row}, said: {text(each.said)}</h4>")
        drawn = report_plots.draw_posteriors(seen, each.words, tokens, times, shift, ids)
        parts.append(image(drawn))
        if seen.maps:
            seconds = len(seen.log_probs) * times.shift
            parts.append(image(report_plots.draw_attention(seen.maps, tokens, seconds)))
    if not parts:
        parts.append(missing("nothing was heard"))
    if model.net.right_decoder is None:
        parts.append(missing("the model has no right-to-left decoder"))
    if model.options.ctc_weight == 1:
        parts.append(missing("with --ctc_weight 1 the attention decoders were not trained"))
    return "".join(parts)


def pictured(heard: list[Heard]) -> list[Heard]:
    """Picks utterances of a usual length in which something was heard: a right one, a wrong one."""
    usual = np.median([each.seconds for each in heard])
    by_length = sorted(heard, key=lambda each: abs(each.seconds - usual))
    by_length = [each for each in by_length if each.words]
    wrong = [each for each in by_length if each.errors]
    right = [each for each in by_length if not each.errors]
    return [*right[:1], *wrong[: PICTURED - len(right[:1])]] or by_length[:PICTURED]


# ---- Errors


def worst(heard: list[Heard], dataset, sample_rate: int) -> str:
    """Lists the utterances with the most errors, said above heard, to listen to."""
    order = sorted(heard, key=lambda each: (-each.errors, each.row))
    order = [each for each in order[:WORST] if each.errors]
    parts = [] if order else ["<p>No utterance has an error.</p>"]
    for each in order:
        who = f", speaker {each.speaker}" if each.speaker else ""
        samples = report_heard.samples_of(dataset, each.row)
        parts.append(
            f"<h4>Row {each.row}{text(who)}: {each.errors} of {each.length} words</h4>"
            + player(report_plots.sound(samples, sample_rate))
            + pair_table(each)
        )
    return "".join(parts)


def pair_table(each: Heard) -> str:
    """Shows the words said above those heard; a heard word's title is its confidence."""
    words = iter(each.words)
    above, below = [], []
    for said, heard in each.pairs:
        wrong = ' class="wrong"' if said != heard else ""
        above.append(f"<td{wrong}>{text(said or '')}</td>")
        below.append(f"<td{wrong}>{'' if heard is None else heard_word(next(words))}</td>")
    return (
        f'<table class="pairs"><tr><td class="side">said</td>{"".join(above)}</tr>'
        f'<tr><td class="side">heard</td>{"".join(below)}</tr></table>'
    )


def heard_word(word: Word) -> str:
    unsure = ' class="unsure"' if word.confidence < 0.5 else ""
    title = f"{word.start:.2f} to {word.end:.2f} s, confidence {word.confidence:.2f}"
    return f'<span{unsure} title="{title}">{text(word.text)}</span>'


def errors(heard: list[Heard], about: str) -> str:
    """Shows which words go wrong, and for which lengths and speakers."""
    wrong, said = (sum(getattr(each, name) for each in heard) for name in ("errors", "length"))
    parts = [
        f"<p>{text(about)}: {wrong} errors in {said} words"
        + (f", {100 * wrong / said:.2f} %" if said else "")
        + ". Chinese and Japanese characters count as words.</p>"
    ]
    confused, inserted, deleted = report_heard.count_errors(heard)
    pairs = ((*words, count) for words, count in confused.most_common(MOST))
    tables = [table(("said", "heard", "times"), pairs)]
    for name, counter in (("inserted", inserted), ("deleted", deleted)):
        tables.append(table((name, "times"), counter.most_common(MOST) or [("none", "")]))
    parts.append(f'<div class="tables">{"".join(tables)}</div>')
    order = sorted(heard, key=lambda each: each.seconds)
    groups = np.array_split(np.arange(len(order)), min(LENGTHS, len(order)))
    lengths = [[order[i] for i in group] for group in groups]
    parts.append(
        rates("seconds", [(f"{g[0].seconds:.1f} to {g[-1].seconds:.1f}", g) for g in lengths])
    )
    speakers = {}
    for each in heard:
        if each.speaker is not None:
            speakers.setdefault(each.speaker, []).append(each)
    if not speakers:
        return "".join([*parts, missing("the split has no column speaker")])
    order = sorted(speakers.items(), key=lambda item: -rate(item[1]))
    title = "speaker" if len(order) <= MOST else f"speaker (the worst {MOST} of {len(order)})"
    return "".join([*parts, rates(title, order[:MOST])])


def rate(group: list[Heard]) -> float:
    """Returns the errors of a group of utterances per word that was said."""
    return sum(each.errors for each in group) / max(1, sum(each.length for each in group))


def rates(title: str, groups: list[tuple[str, list[Heard]]]) -> str:
    """Tables the error rate of groups of utterances."""
    most = max((rate(group) for _, group in groups), default=0) or 1
    rows = [
        (name, len(group), sum(each.length for each in group), rate(group), bar(rate(group) / most))
        for name, group in groups
    ]
    return table((title, "utterances", "words", "errors per word", ""), rows)


def calibration(heard: list[Heard]) -> str:
    """Shows how many words are right by their confidence."""
    points = report_heard.confidences(heard)
    if not len(points):
        return missing("nothing was heard")
    return image(report_plots.draw_calibration(points))


if __name__ == "__main__":
    cli.run(main)
