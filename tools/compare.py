"""Tables runs side by side: python -m tools.compare [RUN_DIR ...]

The command reads each run's run.json, which train.py writes, and, where present, scores.jsonl, the
JSON lines of score.py --keep. It shows the last validation of each run, the options in which the
runs differ, and the scores, with each option of score.py that changes a score and is not its
default. Rates are fractions.

Where runs were scored in the same way on the same utterances, the last table says whether they
differ from the first of them: each rate less that of the first run, its 95 % interval by a paired
bootstrap over utterances, and the probability that the run is better (bootstrap.py).
"""

import glob
import json
import os
import sys
from dataclasses import asdict

import cli

from bootstrap import difference
from decode import SearchOptions
from files import cannot_read, parse_json, read_json, read_small

VALIDATION = ("val_cer", "val_wer", "val_cer_chunk16", "val_wer_chunk16", "best_val_cer_mean")
ASKED = ("split", "mode", "stream", "chunk_size", "left_chunks")  # of a score, always shown
RESULTS = ("utterances", "wer", "wer_95", "cer", "cer_95", "rtf")
REQUIRED = {"mode", "utterances", "wer", "cer", "rtf"}  # scores of older versions have these alone
COUNTS = ("word_errors", "words", "char_errors", "chars")  # of each utterance; --keep adds them
NOT_ASKED = {*RESULTS, *COUNTS, "references", "model", "run"}
ORIGINS = ("data_root", "checkpoint")  # shown where scores differ in them
LARGEST_SCORES = 2**28  # bytes of a scores.jsonl: --keep adds counts of each utterance for ever
PLACES = {"output_dir", "resume", "overwrite"}  # options that say where, not what


def main(argv: list[str]) -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "runs", nargs="*", metavar="RUN_DIR", help="folders of runs (default: all in runs/)"
    )
    folders = parser.parse_args(argv).runs or sorted(
        map(os.path.dirname, glob.glob("runs/*/run.json"))
    )
    if not folders:
        raise cli.UserError(
            "no run to compare: runs/*/run.json matches nothing; train one or name folders"
        )
    records = {os.path.normpath(folder): read_run(folder) for folder in folders}
    rows = [validation_row(run, record) for run, record in records.items()]
    print_table(("run", "preset", "commit", "seed", "steps", *VALIDATION), rows)
    names = differing(records)
    if names:
        print("\noptions that differ")
        print_table(
            ("run", *names),
            [[run, *map(record["options"].get, names)] for run, record in records.items()],
        )
    scores = [{**score, "run": run} for run in records for score in read_scores(run)]
    if scores:
        names = score_columns(scores)
        print("\nscores")
        print_table(("run", *names), [[*map(score.get, ("run", *names))] for score in scores])
    print_differences(scores)


def read_run(folder: str) -> dict:
    """Reads the run.json of a run. Raises UserError when it is missing or damaged."""
    path = os.path.join(folder, "run.json")
    try:
        record = read_json(path)
        if isinstance(record["options"], dict) and isinstance(record["metrics"], dict):
            return record
        reason = "options or metrics are no objects"
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError) as error:
        reason = f"damaged ({cli.shown(str(error), 100)})"
    raise cli.UserError(f"{path}: {reason}; name the OUTPUT_DIR of a run that train.py made")


def read_scores(folder: str) -> list[dict]:
    """Reads the scores of a run; of scores with the same options, only the newest.

    Scores of an earlier checkpoint of the same name are left out, which stderr says. Lines that are
    no scores, or are cut, are passed over. `checkpoint` becomes the bare name of its file. Raises
    UserError where the file cannot be read.
    """
    path = os.path.join(folder, "scores.jsonl")
    if not os.path.lexists(path):
        return []
    newest = {}
    models = {}  # {checkpoint: what its newest score says of the file}
    try:
        lines = read_small(path, LARGEST_SCORES).decode(errors="replace").splitlines()
    except (OSError, ValueError) as error:
        raise cannot_read(path, error, "keep there what score.py printed") from error
    for line in lines:
        try:
            score = parse_json(line)
        except ValueError:  # an example, or the line that a killed score.py had begun
            continue
        if isinstance(score, dict) and REQUIRED <= score.keys():
            if score.get("graph"):  # An older version also wrote down weights that had no effect.
                score = {k: v for k, v in score.items() if k not in ("lm_weight", "word_bonus")}
            score["checkpoint"] = os.path.basename(str(score.get("checkpoint", "best.ckpt")))
            newest[asked(score)] = score
            models[score["checkpoint"]] = score.get("model")
    there = [s for s in newest.values() if s.get("model") == models[s["checkpoint"]]]
    if left_out := len(newest) - len(there):
        note = f"note: {path}: {left_out} scores of an earlier checkpoint are left out; score again"
        print(cli.shown(note), file=sys.stderr)
    return there


def asked(score: dict, *but: str) -> str:
    """Returns what a score was asked for, without the options `but`, as a key.

    An option that a score of an older version lacks was at its default.
    """
    names = {*ASKED, *ORIGINS, *unusual(score)} - {*but, "stream"}
    options = {name: score.get(name) for name in names} | {"stream": bool(score.get("stream"))}
    return json.dumps(options, sort_keys=True)


def unusual(score: dict) -> list[str]:
    """Names the options that change a score, are not in ASKED, and are not score.py's defaults."""
    usual = asdict(SearchOptions())
    return [
        name
        for name, value in score.items()
        if name not in {*NOT_ASKED, *ASKED, *ORIGINS}
        and value is not None
        and value is not False
        and value != usual.get(name)
    ]


def score_columns(scores: list[dict]) -> list[str]:
    """Names the columns that tell the scores apart, and those of their results."""
    there = {name for score in scores for name in score}
    return [*asked_columns(scores), *(name for name in RESULTS if name in there)]


def asked_columns(scores: list[dict]) -> list[str]:
    """Names the columns that tell the scores apart."""
    names = dict.fromkeys(name for score in scores for name in unusual(score))
    origins = [
        name for name in ORIGINS if any(score.get(name) != scores[0].get(name) for score in scores)
    ]
    return [*ASKED, *names, *origins]


# ---- Differences


def print_differences(scores: list[dict]) -> None:
    """Prints how the scores of the later runs differ from the same scores of the first run.

    A line says which runs cannot be compared, and why.
    """
    pairs, reasons = pair_scores(scores)
    rows = []
    names = asked_columns([second for _, second in pairs])
    for first, second in pairs:
        cells = [second["run"], *map(second.get, names)]
        for wrong, said in (COUNTS[:2], COUNTS[2:]):
            found = difference([first[wrong]], [second[wrong]], first[said])
            span = f"{found.low:+.4f} {found.high:+.4f}"
            cells += [f"{found.value:+.4f}", span, f"{found.better:.3f}"]
        rows.append(cells)
    if rows:
        print(f"\ndifferences from {pairs[0][0]['run']}, paired bootstrap over utterances")
        results = ("wer", "95 %", "p(better)", "cer", "95 %", "p(better)")
        print_table(("run", *names, *results), rows)
    for reason in reasons:
        print(cli.shown(f"no difference: {reason}"))


def pair_scores(scores: list[dict]) -> tuple[list[tuple[dict, dict]], list[str]]:
    """Pairs the scores of the first run with those of each other run that were asked for alike.

    Returns the pairs that heard the same utterances, and why runs are left out.
    """
    runs = dict.fromkeys(score["run"] for score in scores)
    first, *others = runs or [None]
    pairs = []
    reasons = []
    for run in others:
        alike = [
            (one, two)
            for one in scores
            for two in scores
            if (one["run"], two["run"]) == (first, run)
            and asked(one, "data_root") == asked(two, "data_root")
        ]
        counted = [pair for pair in alike if all(map(has_counts, pair))]
        rows = ("references", "words", "chars")
        same = [(one, two) for one, two in counted if all(one[x] == two[x] for x in rows)]
        pairs += same
        if not alike:
            reasons.append(f"{first} and {run} have no score of the same split, mode and options")
        elif all(score["utterances"] == 1 for pair in alike for score in pair):
            reasons.append(f"{first} and {run} were scored on one utterance, which has no interval")
        elif not counted:
            reasons.append(
                f"{first} or {run} has no errors utterance by utterance; score both again, with "
                "make score or score.py --keep"
            )
        elif not same:
            reasons.append(f"{first} and {run} were scored on other utterances")
    return pairs, reasons


def has_counts(score: dict) -> bool:
    """Returns whether a score has errors and length of each of its utterances, and a digest."""
    columns = [score.get(name) for name in COUNTS]
    return (
        isinstance(score.get("references"), str)
        and all(isinstance(column, list) for column in columns)
        and all(len(column) == score["utterances"] > 1 for column in columns)
        and all(type(count) is int and count >= 0 for column in columns for count in column)
        and sum(score["words"]) > 0 < sum(score["chars"])
    )


def validation_row(run: str, record: dict) -> list:
    options = record["options"]
    metrics = record["metrics"]
    return [
        run,
        # With --init_from the sizes are those of the checkpoint.
        None if options.get("init_from") else options.get("preset"),
        record.get("commit"),
        record.get("seed"),
        metrics.get("steps"),
        *map(metrics.get, VALIDATION),
    ]


def differing(records: dict[str, dict]) -> list[str]:
    """Names the options that are not the same in all runs."""
    all_options = [record["options"] for record in records.values()]
    names = dict.fromkeys(name for options in all_options for name in options if name not in PLACES)
    return [
        name
        for name in names
        if any(options.get(name) != all_options[0].get(name) for options in all_options)
    ]


def print_table(header, rows) -> None:
    """Prints columns as wide as their widest cell."""
    cells = [list(map(as_cell, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def as_cell(value) -> str:
    """Writes a value as text: numbers with 4 decimals, "-" for what is not known."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e9 or value == 0 else f"{value:.1e}"
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value)) or "none"
    return "-" if value is None else cli.shown(value, 200)


if __name__ == "__main__":
    cli.run(main)
