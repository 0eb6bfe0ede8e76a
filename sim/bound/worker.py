"""The simulator process of `vla corpus --bind`: makes the samples of one file after the other."""

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from multimodal.bind.corpus_file import LABEL, START, write_rows
from sim.bound.plan import STARTS, BindCorpusConfig, Job, bodies_of
from sim.bound.sample import take_sample
from sim.bound.scene import build_world
from sim.bound.view import Gallery
from sim.seeds import start
from sim.workers import serve_jobs


def work(connection: Connection, config: BindCorpusConfig) -> None:
    """A simulator process. Imports no torch of ours."""

    def begin() -> tuple[None, Callable[[Job], dict[str, Any]]]:
        gallery = Gallery(config.image_size)
        return None, lambda job: write_file(job, config, gallery)

    serve_jobs(connection, begin)


def write_file(job: Job, config: BindCorpusConfig, gallery: Gallery) -> dict[str, Any]:
    rows = file_rows(job, config, gallery)
    write_rows(config.root / job.file, rows)
    return {"samples": len(rows[LABEL])}


def file_rows(job: Job, config: BindCorpusConfig, gallery: Gallery) -> dict[str, np.ndarray]:
    """The columns of one file: a function of the job and the settings. Each class has a start, and so a body, of its own."""
    samples, labels, starts = [], [], []
    bodies = bodies_of(job.split)
    range_, offset = STARTS[job.split]
    for place, (label, body) in enumerate(bodies):
        begun = start(range_, offset + job.number * len(bodies) + place)
        generator = np.random.default_rng((begun.seed, label))
        world = build_world(body, config, generator)
        gallery.hang(world)
        for _ in range(config.samples_per_shape):
            samples.append(take_sample(world, gallery, config, generator))
            labels.append(label)
            starts.append(begun.index)
    columns = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    return columns | {LABEL: np.array(labels, np.int64), START: np.array(starts, np.int64)}
