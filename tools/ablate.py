"""Tables what training techniques gain in equal wall time: python -m tools.ablate --sources DIR ...

Each technique below alone, and those of RECIPE together, trains preset tiny on each corpus with
each seed. A technique gets as many epochs as fit the time of the baseline's --epochs: two epochs of
the baseline and two of the technique are measured first, one after the other, because the speed of
a machine changes over a night. What is made before a training counts. With --jobs N, N trainings
run at a time, each with its share of the cores. Work that is done is not repeated, so that the same
command goes on after a kill. OUT/results.json holds what was measured, OUT/table.md the table so
far, in Markdown too.

Whether RECIPE is the right one is asked with --against together and the names without_X and with_X
of --techniques, which are RECIPE without X, or with X too.

The difference of a technique from --against is of the means over seeds, with its 95 % interval by a
paired bootstrap over utterances and Student's t over seeds, and the probability that the technique
is better.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

from cli import UserError, build, make_parser, option, options_class, run, shown

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tqdm import tqdm

from bootstrap import difference
from files import alone, json_text, read_json, why, write_whole
from presets import PRESETS
from tools.compare import has_counts, print_table, read_scores

# Flags of train.py with which all begin. Where a technique has the same flag, the technique's
# counts. Without the weight of CTC and the dropout, --init_from would take those of {spoken}.
BASELINE = (
    "--batch_size {batch_size} --lr 2e-3 --ctc_weight 0.3 --dropout_rate 0.1 --ema_decay 0.99 "
    "--check_val_every_n_epoch 4"
)
# Flags of train.py by the name of a technique. {spoken} is a model that was trained on synthetic
# speech of the corpus's own words, by SPOKEN_FLAGS, whatever the technique has besides.
TECHNIQUES = {
    "muon": "--optimizer muon --lr 4e-3",
    "ctc_weight": "--ctc_weight 0.5",
    "few_masks": "--num_subs 0 --num_time_masks 1 --dropout_rate 0.05",
    "tail_padding": "--tail_padding 300",
    "cr_ctc": "--cr_ctc_weight 0.2",
    "interctc": "--interctc_weight 0.3",
    "stochastic_depth": "--stochastic_depth 0.1",
    "wide_masks": "--num_time_masks 10 --max_time_mask_share 0.05 --max_freq_mask 27",
    "dynamic_left_chunk": "--use_dynamic_left_chunk",
    "synthetic_start": "--init_from {spoken}",
}
# Much as `make an4`.
RECIPE = "muon", "ctc_weight", "few_masks", "tail_padding", "cr_ctc", "synthetic_start"
SPOKEN = "--hours 1.5"  # flags of tools.demo --texts
SPOKEN_EPOCHS = 3
SPOKEN_FLAGS = (
    "--optimizer muon --lr 4e-3 --ctc_weight 0.5 --dropout_rate 0.05 "
    "--num_time_masks 0 --num_freq_masks 0 --num_subs 0"
)
ALONE = "baseline"
TOGETHER = "together"
VARIED = {
    **{f"without_{name}": tuple(one for one in RECIPE if one != name) for name in RECIPE},
    **{f"with_{name}": (*RECIPE, name) for name in TECHNIQUES if name not in RECIPE},
}  # the names of other recipes
SEARCHES = ("ctc_greedy_search", "attention_rescoring")
CHUNKS = (-1, 16)
STOP = threading.Event()  # ends the commands of all threads


@options_class
class AblateOptions:
    sources: tuple[str, ...] = option(
        (), "corpora, each a folder of train/metadata.csv and dev/metadata.csv"
    )
    out: str = option("runs/ablation", "folder for data, runs and results")
    epochs: int = option(40, "epochs of the baseline", at_least=1, at_most=10**6)
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds", at_least=0, at_most=2**32 - 1)
    batch_size: int = option(
        8,
        "rows per batch; long recordings need fewer, for a corpus lacks updates",
        at_least=1,
        at_most=10**6,
    )
    preset: str = option("tiny", "size of the model", choices=tuple(PRESETS))
    techniques: tuple[str, ...] = option(
        (),
        "only these beside --against; none: all but those named with_X or without_X",
        choices=(ALONE, *TECHNIQUES, TOGETHER, *VARIED),
    )
    against: str = option(ALONE, "what the others are compared with", choices=(ALONE, TOGETHER))
    limit_rows: int | None = option(
        None, "train on so many rows only, for a try", at_least=1, at_most=10**9
    )
    calibration_epochs: int = option(
        2, "epochs by which the time of one is measured", at_least=1, at_most=1000
    )
    jobs: int = option(1, "trainings at a time", at_least=1, at_most=1000)
    table: bool = option(False, "train nothing, print the table as far as it has come")

    def __post_init__(self):
        names = [name_of(source) for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"--sources: {' '.join(names)}: a name is there twice; rename a folder")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds: give at least one, and none twice")


class Job(NamedTuple):
    """Says what to train."""

    corpus: str
    name: str  # of the technique
    seed: int
    flags: str

    @property
    def key(self) -> str:
        return f"{self.corpus}, {self.name}, seed {self.seed}"

    @property
    def start_key(self) -> str:
        return f"{self.corpus}, seed {self.seed}"

    @property
    def cost_key(self) -> str:
        return f"{self.corpus}, {self.name}"


def main(argv: list[str]) -> None:
    options = build(AblateOptions, vars(make_parser(__doc__, AblateOptions).parse_args(argv)))
    if not options.sources:
        raise UserError("give --sources DIR ..., one or more folders of recordings")
    os.makedirs(options.out, exist_ok=True)
    if options.jobs > 1:  # Threads that fight for a core cost far more than they bring.
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // options.jobs))
    lock = alone(os.path.join(options.out, ".lock"), f"--out {options.out}")
    with contextlib.nullcontext() if options.table else lock:  # one may look while others train
        results = read_results(options)
        failed = 0 if options.table else train_all(options, results)
        tables = make_tables(options, results)
        for title, rows in tables:
            print(f"\n{title}")
            print_table(header_of(options), rows)
        write_tables(options, tables)
    print(f"\n{shown(options.out)}/table.md: {'the same in Markdown' if tables else 'no run yet'}")
    if failed:
        raise UserError(f"{failed} runs have failed, as said above; the same command tries again")


def name_of(source: str) -> str:
    return os.path.basename(os.path.abspath(source))


def jobs_of(options: AblateOptions) -> list[Job]:
    """Lists all trainings: of the first seed those of all techniques, then of the next."""
    names = options.techniques or (ALONE, *TECHNIQUES, TOGETHER)
    return [
        job_of(source, name, seed)
        for seed in options.seeds
        for source in options.sources
        for name in dict.fromkeys((options.against, *names))
    ]


def job_of(source: str, name: str, seed: int) -> Job:
    parts = {ALONE: (), TOGETHER: RECIPE, **VARIED}.get(name, (name,))
    return Job(name_of(source), name, seed, " ".join(TECHNIQUES[part] for part in parts))


# ---- What is known


def read_results(options: AblateOptions) -> dict:
    """Reads OUT/results.json, or begins it. Raises UserError where it is of other options."""
    path = os.path.join(options.out, "results.json")
    asked = {name: getattr(options, name) for name in ("preset", "epochs", "limit_rows")}
    asked["baseline"] = BASELINE.format(batch_size=options.batch_size)
    if not os.path.lexists(path):
        return {"options": asked, "costs": {}, "starts": {}, "runs": {}}
    try:
        results = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {why(error)}; move it away, or name another --out") from None
    before = results.get("options")
    if before != asked:
        raise UserError(
            f"{path} is of other options ({json_text(before)}, not {json_text(asked)}); give "
            "these, or name another --out"
        )
    return results


def write_results(options: AblateOptions, results: dict) -> None:
    path = os.path.join(options.out, "results.json")
    write_whole(path, json_text(results, indent=1).encode())


def epochs_of(job: Job, options: AblateOptions, results: dict) -> int:
    """Returns the epochs that fit the time of the baseline, 0 where none does."""
    if job.name == ALONE:
        return options.epochs
    cost = results["costs"][job.cost_key]
    left = options.epochs * cost["baseline"] - cost["start"]
    return round(left / cost["epoch"]) if left >= cost["epoch"] else 0


def start_seconds(job: Job, results: dict) -> float:
    """Returns the seconds that a training's {spoken} took, with the speech of its corpus."""
    if "{spoken}" not in job.flags:
        return 0.0
    return results["starts"][job.corpus] + results["starts"][job.start_key]


# ---- Work


def train_all(options: AblateOptions, results: dict) -> int:
    """Does what is left to do, and returns how many trainings have failed."""
    for source in options.sources:
        prepare(source, os.path.join(options.out, name_of(source)))
    jobs = jobs_of(options)
    pool = ThreadPoolExecutor(options.jobs)
    try:
        speak_all(pool, jobs, options, results)
        first = [job for job in jobs if job.seed == options.seeds[0] and job.name != ALONE]
        for job in tqdm(first, "costs"):
            cost = results["costs"].get(job.cost_key, {})
            if cost.get("flags") != job.flags or "baseline" not in cost:  # an older version's
                results["costs"][job.cost_key] = measure(job, options, results)
                write_results(options, results)
        return train_what_is_left(pool, jobs, options, results)
    finally:  # Ctrl-C ends the trainings too.
        STOP.set()
        pool.shutdown(cancel_futures=True)
        STOP.clear()


def train_what_is_left(
    pool: ThreadPoolExecutor, jobs: list[Job], options: AblateOptions, results: dict
) -> int:
    """Trains and scores, and returns how many trainings have failed."""
    started = {}
    for job in jobs:
        done = results["runs"].get(job.key, {})
        epochs = epochs_of(job, options, results)
        if (done.get("flags"), done.get("epochs")) != (job.flags, epochs):
            results["runs"].pop(job.key, None)  # of other flags, and its scores with it
            started[pool.submit(train_and_score, job, epochs, options, results)] = job
    failed = 0
    for future in tqdm(as_completed(started), "trainings", len(started)):
        job = started[future]
        try:
            results["runs"][job.key] = future.result()
        except UserError as error:
            tqdm.write(shown(f"{job.key}: {error}"))
            failed += 1
        write_results(options, results)
        write_tables(options, make_tables(options, results))
    return failed


def prepare(source: str, folder: str) -> None:
    """Makes folder/data of the source, once."""
    data = os.path.join(folder, "data")
    if not os.path.exists(data):
        os.makedirs(folder, exist_ok=True)
        call(f"{folder}/data.log", "prepare.py", "--source", source, "--data_root", data)


def measure(job: Job, options: AblateOptions, results: dict) -> dict:
    """Returns the seconds of an epoch of the baseline and of a technique, and of its start."""
    baseline = epoch_seconds(job._replace(flags=""), options)
    epoch = epoch_seconds(job, options)
    start = start_seconds(job, results)
    return {"flags": job.flags, "baseline": baseline, "epoch": epoch, "start": start}


def epoch_seconds(job: Job, options: AblateOptions) -> float:
    """Trains for some epochs, and returns the seconds that one takes."""
    folder = os.path.join(options.out, job.corpus, "measured")
    epochs = options.calibration_epochs
    call(f"{folder}.log", *training(job, folder, epochs, options))
    updates = read_json(os.path.join(folder, "run.json"))["metrics"]["steps"]
    return update_seconds(folder) * updates / epochs


def update_seconds(folder: str) -> float:
    """Returns the seconds that an update of a run took, by the times in its log of TensorBoard.

    A whole run would also count what happens before the first update. Raises UserError where the
    run was too short.
    """
    logs = os.path.join(folder, "logs")
    times = {}  # {update: when it was logged}
    for name in os.listdir(logs):
        for event in EventFileLoader(os.path.join(logs, name)).Load():
            if any(value.tag.startswith("lr") for value in event.summary.value):
                times[event.step] = event.wall_time
    if len(times) < 2:
        raise UserError(f"{folder}: too few updates to measure; give more --calibration_epochs")
    first, last = min(times), max(times)
    return (times[last] - times[first]) / (last - first)


def speak_all(
    pool: ThreadPoolExecutor, jobs: list[Job], options: AblateOptions, results: dict
) -> None:
    """Makes the models {spoken} that are not there yet, and notes the seconds that each took."""
    starts = results["starts"]
    spoken = {job.start_key: job for job in jobs if "{spoken}" in job.flags}
    for job in spoken.values():
        if job.corpus not in starts:
            starts[job.corpus] = make_speech(job, options)
            write_results(options, results)
    left = {
        pool.submit(train_spoken, job, options): key
        for key, job in spoken.items()
        if key not in starts
    }
    for future in tqdm(as_completed(left), "starts", len(left)):
        starts[left[future]] = future.result()
        write_results(options, results)


def make_speech(job: Job, options: AblateOptions) -> float:
    """Makes synthetic speech of a corpus's own words, and returns the seconds it took."""
    folder = os.path.join(options.out, job.corpus)
    source, data = (os.path.join(folder, name) for name in ("spoken_source", "spoken_data"))
    texts = next(one for one in options.sources if name_of(one) == job.corpus)
    texts = os.path.join(texts, "train", "metadata.csv")
    size = SPOKEN if options.limit_rows is None else f"--rows {options.limit_rows}"
    demo = "-m", "tools.demo", "--texts", texts, "--out", source, "--overwrite", *size.split()
    own = "--source", source, "--data_root", data, "--overwrite"
    letters = "--tokenizer", os.path.join(folder, "data", "tokenizer.json")
    log = f"{folder}/spoken.log"
    return call(log, *demo) + call(log, "prepare.py", *own, *letters)


def train_spoken(job: Job, options: AblateOptions) -> float:
    """Makes the model {spoken} of a corpus and a seed, and returns the seconds it took."""
    folder = os.path.dirname(spoken_model(job, options))
    data = os.path.join(options.out, job.corpus, "spoken_data")
    plain = job._replace(flags=SPOKEN_FLAGS)
    return call(f"{folder}.log", *training(plain, folder, SPOKEN_EPOCHS, options, data))


def spoken_model(job: Job, options: AblateOptions) -> str:
    return os.path.join(options.out, job.corpus, f"spoken_seed{job.seed}", "best.ckpt")


def train_and_score(job: Job, epochs: int, options: AblateOptions, results: dict) -> dict:
    """Trains, scores, and returns what results.json keeps of the run.

    Raises UserError where no epoch fits the time.
    """
    if not epochs:
        cost = results["costs"][job.cost_key]
        raise UserError(
            f"the start takes {cost['start']:.0f} s and an epoch {cost['epoch']:.0f} s, the "
            f"{options.epochs} epochs of the baseline {options.epochs * cost['baseline']:.0f} s; "
            "give more --epochs"
        )
    folder = run_folder(job, options)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    log = f"{folder}.log"
    seconds = start_seconds(job, results) + call(log, *training(job, folder, epochs, options))
    data = os.path.join(options.out, job.corpus, "data")
    for search in SEARCHES:
        for chunk in CHUNKS:
            words = ["score.py", "--checkpoint", os.path.join(folder, "best.ckpt"), "--keep"]
            words += ["--data_root", data, "--split", "dev", "--mode", search]
            call(log, *words, "--chunk_size", str(chunk))
    return {"flags": job.flags, "epochs": epochs, "minutes": seconds / 60}


def run_folder(job: Job, options: AblateOptions) -> str:
    return os.path.join(options.out, job.corpus, "runs", f"{job.name}_{job.seed}")


def training(job: Job, folder: str, epochs: int, options: AblateOptions, data="") -> list[str]:
    """Returns the command of a training into `folder`, on the corpus's data or on other data."""
    data = data or os.path.join(options.out, job.corpus, "data")
    values = {"batch_size": options.batch_size, "spoken": spoken_model(job, options)}
    flags = [word.format(**values) for word in f"{BASELINE} {job.flags}".split()]
    words = ["train.py", "--data_root", data, "--output_dir", folder, "--overwrite"]
    words += ["--max_epochs", str(epochs), "--seed", str(job.seed)]
    if "--init_from" not in flags:
        words += ["--preset", options.preset]
    if options.limit_rows:
        words += ["--limit_rows", str(options.limit_rows)]
    return words + flags


def call(log: str, *words: str) -> float:
    """Runs a command of this project, with its output in `log`, and returns the seconds it took.

    Raises UserError, with the last line of the output, where the command fails.
    """
    began = time.monotonic()
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with (
        open(log, "ab") as file,
        subprocess.Popen([sys.executable, *words], stdout=file, **streams) as process,
    ):
        try:
            while process.poll() is None and not STOP.wait(0.1):
                pass
        finally:
            process.terminate()
    if process.returncode:
        with open(log, errors="replace") as file:
            last = ([line for line in file.read().splitlines() if line.strip()] or ["nothing"])[-1]
        raise UserError(f"{' '.join(words)} ends with status {process.returncode}: {last} ({log})")
    return time.monotonic() - began


# ---- The table


def make_tables(options: AblateOptions, results: dict) -> list[tuple[str, list[list[str]]]]:
    """Returns (title, rows of cells) for each corpus, search and chunk, as far as known."""
    jobs = [job for job in jobs_of(options) if job.key in results["runs"]]
    scores = {job: read_scores(run_folder(job, options)) for job in jobs}
    tables = []
    for corpus in map(name_of, options.sources):
        for search in SEARCHES:
            for chunk in CHUNKS:
                found = {}  # {technique: {seed: its score}}
                for job in jobs:
                    for score in scores[job] if job.corpus == corpus else ():
                        asked = score["mode"], score.get("chunk_size")
                        if asked == (search, chunk) and has_counts(score):
                            found.setdefault(job.name, {})[job.seed] = score
                title = f"{corpus}, {search}, {'full context' if chunk == -1 else f'chunk {chunk}'}"
                rows = [
                    table_row(corpus, name, found, results["runs"], options.against)
                    for name in found
                ]
                tables += [(title, rows)] if rows else []
    return tables


def header_of(options: AblateOptions) -> tuple[str, ...]:
    rate = "spread", f"less {options.against}", "95 %", "p(better)"
    return "technique", "seeds", "epochs", "minutes", "CER", *rate, "WER", *rate


def table_row(corpus: str, name: str, found: dict, runs: dict, against: str) -> list[str]:
    """Makes the cells of a technique. found: {technique: {seed: score}}."""
    own = found[name]
    kept = [runs[Job(corpus, name, seed, "").key] for seed in own]
    minutes = statistics.mean(run["minutes"] for run in kept)
    cells = [name, str(len(own)), str(kept[0]["epochs"]), f"{minutes:.1f}"]
    for wrong, said in (("char_errors", "chars"), ("word_errors", "words")):
        rates = [sum(score[wrong]) / sum(score[said]) for score in own.values()]
        spread = f"{statistics.stdev(rates):.4f}" if len(rates) > 1 else "-"
        cells += [f"{statistics.mean(rates):.4f}", spread]
        first = found.get(against, {})
        pairs = [(first[seed], own[seed]) for seed in own if seed in first]
        if name == against or not pairs:
            cells += ["-"] * 3
            continue
        before, after = ([score[wrong] for score in side] for side in zip(*pairs))
        gain = difference(before, after, pairs[0][0][said])
        cells += [f"{gain.value:+.4f}", f"{gain.low:+.4f} {gain.high:+.4f}", f"{gain.better:.3f}"]
    return cells


def write_tables(options: AblateOptions, tables: list[tuple[str, list[list[str]]]]) -> None:
    """Writes OUT/table.md."""
    lines = []
    header = header_of(options)
    for title, rows in tables:
        table = [header, ["---"] * len(header), *rows]
        lines += [f"{title}:", "", *(f"| {' | '.join(row)} |" for row in table), ""]
    write_whole(os.path.join(options.out, "table.md"), "\n".join(lines).encode())


if __name__ == "__main__":
    run(main)
