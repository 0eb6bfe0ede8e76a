"""Things dropped and poked, seen by seven sensors -> bound corpus: `vla corpus --bind`.

    settings.json errors.jsonl                        what was asked for; files that could not be made
    manifest.json train-*.npz validation-*.npz ...    the corpus (multimodal/bind/corpus_file.py)

A file is a function of the settings and its number, whole or absent, so the command goes on where it stopped and the
corpus depends on neither the number of workers nor interruptions.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from multimodal.bind.corpus_file import LABEL, MANIFEST, SPLITS, BoundManifest, read_rows, write_manifest
from multimodal.bind.sensors import SENSORS
from sim.bound.objects import object_classes
from sim.bound.plan import BindCorpusConfig, Job, bodies_of, jobs_of
from sim.bound.worker import work
from sim.folder_lock import locked
from sim.job_queue import ErrorCount
from sim.packing import check_disk, folder_bytes
from sim.results import append_row, differences
from sim.workers import Died, Done, Failed, WorkerPool, run_jobs

BYTES_PER_SAMPLE = 40_000  # 32 kB were measured with the default sizes


def make_bound_corpus(config: BindCorpusConfig) -> BoundManifest:
    """Make what is missing, then the manifest. Raises ValueError if the folder holds another corpus, ChildProcessError if the
    simulator does not run. What is finished stays, and the same command goes on."""
    with locked(config.root):
        jobs = open_corpus(config)
        missing = [job for job in jobs if not (config.root / job.file).exists()]
        count = sum(len(bodies_of(job.split)) for job in missing) * config.samples_per_shape
        check_disk(config.root, BYTES_PER_SAMPLE * count, f"A bound corpus of {count} samples")
        began = time.perf_counter()
        run_files(config, missing, count)
        manifest = finish(config, jobs)
        if count:
            seconds = time.perf_counter() - began
            print(f"{seconds:.0f} s, {1000 * seconds / count:.0f} ms a sample with {config.workers} workers")
        print(f"{dict(manifest.rows)} samples, {folder_bytes(config.root) / 1e6:.1f} MB")
        print(f"next: vla train-bind --corpus={config.root} --output_dir=RUN")
        return manifest


def open_corpus(config: BindCorpusConfig) -> list[Job]:
    """Make or reopen the folder; every file of the corpus. Raises ValueError if the folder is another's."""
    root = config.root
    if (root / MANIFEST).exists():
        raise ValueError(f"{root} holds a finished corpus: train on it, or name another --output_dir.")
    for partial in root.glob(".*.partial"):  # of a process that was killed while writing
        partial.unlink()
    settings = root / "settings.json"
    if settings.exists():
        changed = differences(json.loads(settings.read_text()), config.identity)
        if changed:
            raise ValueError(f"{root} was begun with other settings: {changed}. Use another --output_dir.")
    settings.write_text(json.dumps(config.identity, indent=1))
    return jobs_of(config)


def run_files(config: BindCorpusConfig, missing: Sequence[Job], count: int) -> None:
    """Make the missing files in W processes. Raises ChildProcessError after a few that failed."""
    waiting = list(missing)
    if not waiting:
        return
    with tqdm(total=count, unit="sample", desc="bound corpus") as bar:
        errors = ErrorCount(bar.write, most=3)  # a file is hundreds of samples

        def finished(job: Job, outcome: Done | Failed | Died) -> None:
            if isinstance(outcome, Done):
                bar.update(outcome.result["samples"])
                return
            append_row(config.root / "errors.jsonl", {"file": job.file, "error": str(outcome)})
            errors.add(job.file, outcome)

        with WorkerPool(min(config.workers, len(waiting)), work, (config,)) as pool:
            run_jobs(
                pool, lambda last: waiting.pop(0) if waiting else None, started=lambda facts: None, finished=finished
            )


def finish(config: BindCorpusConfig, jobs: Sequence[Job]) -> BoundManifest:
    """Count and describe. Raises ChildProcessError if a file is missing, since splits would then be uneven."""
    lacking = [job.file for job in jobs if not (config.root / job.file).exists()]
    if lacking:
        raise ChildProcessError(
            f"{len(lacking)} files could not be made ({lacking[0]} ...); see {config.root / 'errors.jsonl'}."
        )
    counts: Counter[str] = Counter({split: 0 for split in SPLITS})
    shapes: dict[str, tuple[int, ...]] = {}
    for job in jobs:
        rows = read_rows(config.root / job.file)
        counts[job.split] += len(rows[LABEL])
        shapes = {name: rows[name].shape[1:] for name in SENSORS}
    source: dict[str, Any] = {"command": "vla corpus --bind", **config.identity}
    manifest = BoundManifest(object_classes(), shapes, dict(counts), source)
    write_manifest(config.root, manifest)
    return manifest


def main(argv: Sequence[str]) -> int:
    """`vla corpus --bind`."""
    from vla.cli import parse_config

    make_bound_corpus(parse_config(BindCorpusConfig, argv, verb="corpus --bind"))
    return 0
