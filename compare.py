"""Tables runs side by side: python compare.py [RUN_DIR ...]

Reads each run's run.json (train.py writes it) and, where present, scores.jsonl (JSON lines that score.py printed).
Shows the last validation of each run, the options in which the runs differ, and the scores. Rates are fractions.
"""

import glob
import json
import os

import cli
from files import read_json

VALIDATION = ("val_cer", "val_wer", "val_cer_chunk16", "val_wer_chunk16", "best_val_cer_mean")
SCORES = ("split", "mode", "stream", "chunk_size", "left_chunks", "utterances", "wer", "cer", "rtf")
PLACES = {"output_dir", "resume", "overwrite"}  # options that say where, not what


def main(argv: list[str]) -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="folders of runs (default: all in runs/)")
    folders = parser.parse_args(argv).runs or sorted(map(os.path.dirname, glob.glob("runs/*/run.json")))
    if not folders:
        raise cli.UserError("no run to compare: runs/*/run.json matches nothing; train one or name folders")
    records = {os.path.normpath(folder): read_run(folder) for folder in folders}
    rows = [validation_row(run, record) for run, record in records.items()]
    print_table(("run", "preset", "commit", "seed", "steps", *VALIDATION), rows)
    names = differing(records)
    if names:
        print("\noptions that differ")
        print_table(("run", *names), [[run, *map(record["options"].get, names)] for run, record in records.items()])
    scores = [[run, *map(score.get, SCORES)] for run in records for score in read_scores(run)]
    if scores:
        print("\nscores")
        print_table(("run", *SCORES), scores)


def read_run(folder: str) -> dict:
    """The run.json of a run. Raises UserError when it is missing or damaged."""
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
    """The scores of a run, the newest of each split, mode and context; lines that are not scores are passed over."""
    newest = {}
    path = os.path.join(folder, "scores.jsonl")
    for line in open(path, encoding="utf-8") if os.path.exists(path) else ():
        if line.startswith("{"):
            score = json.loads(line)
            newest[tuple(map(score.get, ("split", "mode", "stream", "chunk_size", "left_chunks")))] = score
    return list(newest.values())


def validation_row(run: str, record: dict) -> list:
    options, metrics = record["options"], record["metrics"]
    return [run, options.get("preset"), record.get("commit"), record.get("seed"), metrics.get("steps"),
            *map(metrics.get, VALIDATION)]


def differing(records: dict[str, dict]) -> list[str]:
    """Names of the options that are not the same in all runs."""
    all_options = [record["options"] for record in records.values()]
    names = dict.fromkeys(name for options in all_options for name in options if name not in PLACES)
    return [name for name in names if any(options.get(name) != all_options[0].get(name) for options in all_options)]


def print_table(header, rows) -> None:
    """Columns as wide as their widest cell; numbers with 4 decimals, "-" for what is not known."""
    cells = [list(header)] + [[show(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def show(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    cli.run(main)
