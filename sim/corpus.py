"""Described scenes of LIBERO and robosuite -> parquet: `vla corpus`. The language side's training and test data.

    episodes/libero_90-task_010-train_000003.parquet   finished episodes, whole or absent; removed once packed
    settings.json errors.jsonl                          what was asked for; episodes that raised
    manifest.json train-*.parquet held_out-*.parquet    the corpus (multimodal/corpus_file.py)

Training scenes come from training starts, held-out ones from validation starts; and some layouts of furniture and objects
are held out altogether. Which scenes and texts there are depends on neither the number of workers nor interruptions.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from multimodal.corpus_file import (
    HELD_OUT,
    ROWS_PER_FILE,
    TRAIN,
    DescribedScene,
    Manifest,
    file_name,
    read_scenes,
    write_manifest,
    write_scenes,
)
from sim.corpus_plan import NEW_LAYOUTS, CorpusConfig, Job, find_layouts, jobs_of
from sim.corpus_worker import work
from sim.environment import Environment
from sim.folder_lock import locked
from sim.job_queue import ErrorCount, JobQueue
from sim.packing import check_disk, folder_bytes
from sim.results import append_row, differences
from sim.suites import build_environment
from sim.workers import Died, Done, Failed, WorkerPool, run_jobs

BYTES_PER_SCENE = 15_000  # packed; 10 kB were measured with 128-pixel images and 17 texts


def model_of(job: Job) -> tuple[str, int]:
    """What a process builds for a job."""
    return job.suite, job.task


def make_corpus(config: CorpusConfig, *, build: Callable[..., Environment] = build_environment) -> dict[str, Any]:
    """Describe and pack; returns what corpus.json holds. build: a module-level function (tests give fakes).

    Raises ValueError if the folder holds another corpus or the disk is too small, ChildProcessError if the simulator does
    not run. What is finished stays, and the same command goes on.
    """
    with locked(config.root):
        jobs = open_corpus(config)
        missing = [job for job in jobs if not (config.root / "episodes" / job.file).exists()]
        check_disk(config.root, BYTES_PER_SCENE * sum(job.scenes for job in missing), f"A corpus of {len(missing)} episodes")
        began = time.perf_counter()
        totals = run_episodes(config, jobs, missing, build)
        seconds = time.perf_counter() - began
        report = {**config.identity, **pack(config, jobs), "errors": totals["errors"], "workers": config.workers}
        if totals["scenes"]:
            report |= {"collect_s": round(seconds, 1), "seconds_per_scene": round(seconds / totals["scenes"], 3)}
        (config.root / "corpus.json").write_text(json.dumps(report, indent=1))
        shutil.rmtree(config.root / "episodes")
        print_report(config, report)
        return report


def open_corpus(config: CorpusConfig) -> list[Job]:
    """Make or reopen the folder; every episode of the corpus. Raises ValueError if the folder is another's."""
    root = config.root
    if (root / "manifest.json").exists():
        raise ValueError(f"{root} holds a finished corpus: train on it, or name another --output_dir.")
    jobs = jobs_of(config, find_layouts(config.suites))
    (root / "episodes").mkdir(parents=True, exist_ok=True)
    for partial in (root / "episodes").glob(".*.partial"):  # of a process that was killed while writing
        partial.unlink()
    settings = root / "settings.json"
    if settings.exists():
        changed = differences(json.loads(settings.read_text()), config.identity)
        if changed:
            raise ValueError(f"{root} was begun with other settings: {changed}. Use another --output_dir.")
    settings.write_text(json.dumps(config.identity, indent=1))
    return jobs


def run_episodes(config: CorpusConfig, jobs: Sequence[Job], missing: Sequence[Job], build: Callable) -> Counter[str]:
    """Run the missing episodes in W processes; totals of scenes, texts and errors of this call."""
    totals: Counter[str] = Counter(scenes=0, texts=0, errors=0)
    if not missing:
        return totals
    queue = JobQueue(missing, model_of)
    scenes = sum(job.scenes for job in jobs)
    done = scenes - sum(job.scenes for job in missing)
    with tqdm(total=scenes, initial=done, unit="scene", desc="corpus") as bar:
        errors = ErrorCount(bar.write)

        def finished(job: Job, outcome: Done | Failed | Died) -> None:
            if isinstance(outcome, Done):
                queue.finish(job)
                totals.update(scenes=outcome.result["scenes"], texts=outcome.result["texts"])
                bar.update(outcome.result["scenes"])
                return
            totals.update(errors=1)
            append_row(config.root / "errors.jsonl", {"episode": job.file, "error": str(outcome)})
            errors.add(job.file, outcome)
            queue.fail(job)

        with WorkerPool(min(config.workers, len(missing)), work, (config, build)) as pool:
            run_jobs(pool, queue.next_job, started=lambda facts: None, finished=finished)
    return totals


def pack(config: CorpusConfig, jobs: Sequence[Job]) -> dict[str, Any]:
    """Episodes -> the corpus's files, in the order of jobs; counts for the report."""
    root = config.root
    kinds: Counter[str] = Counter()
    halves: Counter[str] = Counter()
    rows: dict[str, int] = {}
    cameras: tuple[str, ...] = ()
    for split in (TRAIN, HELD_OUT):
        rows[split], number, waiting = 0, 0, []
        paths = [root / "episodes" / job.file for job in jobs if job.split == split]
        for path in (path for path in paths if path.exists()):
            scenes = list(read_scenes(path))
            cameras = cameras or tuple(scenes[0].images)
            waiting += scenes
            kinds.update(text.kind for scene in scenes for text in scene.texts)
            halves.update(f"{split}, {text.half} templates" for scene in scenes for text in scene.texts)
            while len(waiting) >= ROWS_PER_FILE:
                number, waiting = _write_part(root, split, number, waiting, cameras)
            rows[split] += len(scenes)
        if waiting:
            _write_part(root, split, number, waiting, cameras)
    manifest = Manifest(cameras, config.image_size, config.rim, rows, {"command": "vla corpus", **config.identity})
    write_manifest(root, manifest)
    return {
        "rows": rows,
        "texts": sum(kinds.values()),
        "kinds": dict(kinds.most_common()),
        "halves": dict(halves),
        "new_layouts": list(NEW_LAYOUTS),
        "bytes": folder_bytes(root) - folder_bytes(root / "episodes"),
    }


def _write_part(
    root: Path, split: str, number: int, scenes: list[DescribedScene], cameras: Sequence[str]
) -> tuple[int, list[DescribedScene]]:
    """Write one file; the next file's number and the scenes that are left for it."""
    write_scenes(root / file_name(split, number), scenes[:ROWS_PER_FILE], cameras)
    return number + 1, scenes[ROWS_PER_FILE:]


def print_report(config: CorpusConfig, report: dict[str, Any]) -> None:
    kinds = ", ".join(f"{kind} {count}" for kind, count in report["kinds"].items())
    print(f"{report['rows']} scenes, {report['texts']} texts ({kinds}), {report['bytes'] / 1e6:.1f} MB")
    if "collect_s" in report:
        print(f"{report['collect_s']} s, {report['seconds_per_scene']} s a scene with {config.workers} workers")
    print(f"next: vla train-vlm --config_path configs/desk_vlm.yaml --corpus={config.root} --output_dir=RUN")


def main(argv: Sequence[str]) -> int:
    """`vla corpus`; with --bind, the corpus of sim/bound."""
    if "--bind" in argv:
        from sim.bound.corpus import main as main_bound

        return main_bound([argument for argument in argv if argument != "--bind"])
    from vla.cli import parse_config

    make_corpus(parse_config(CorpusConfig, argv, verb="corpus"))
    return 0
