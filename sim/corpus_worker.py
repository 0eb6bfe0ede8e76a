"""The simulator process of `vla corpus`: runs episodes, describes their scenes, writes one file an episode."""

import io
import json
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from multimodal.corpus_file import HELD_OUT, DescribedScene, Dialogue, write_scenes
from sim.corpus_episode import moments
from sim.corpus_plan import STARTS, CorpusConfig, Job
from sim.environment import Environment
from sim.language.grammar import default_grammar
from sim.language.texts import write_texts
from sim.scene_reader import SceneReader
from sim.seeds import start
from sim.workers import serve_jobs


def work(connection: Connection, config: CorpusConfig, build: Callable[..., Environment]) -> None:
    """A simulator process. Imports no torch of ours."""

    def begin() -> tuple[None, Callable[[Job], dict[str, Any]]]:
        return None, Describer(config, build).describe

    serve_jobs(connection, begin)


class Describer:
    """Runs episodes and writes their files; holds one suite's environment and one task's model at a time."""

    def __init__(self, config: CorpusConfig, build: Callable[..., Environment]) -> None:
        self._config, self._build = config, build
        self._suite: str | None = None
        self._environment: Environment | None = None
        self._reader: SceneReader | None = None
        self._task: int | None = None

    def describe(self, job: Job) -> dict[str, Any]:
        """One episode; returns counts for the report."""
        began = time.perf_counter()
        scenes = list(self.scenes(job))
        path = self._config.root / "episodes" / job.file
        write_scenes(path, scenes, self._environment.spec.cameras)
        texts = sum(len(scene.texts) for scene in scenes)
        return {"scenes": len(scenes), "texts": texts, "wall_s": round(time.perf_counter() - began, 3)}

    def scenes(self, job: Job) -> Iterator[DescribedScene]:
        """The described scenes of an episode, a function of job and settings."""
        config, begin = self._config, start(STARTS[job.split], job.index)
        environment, reader = self._open(job)
        story = moments(environment, reader, task=job.task, start=begin, count=job.scenes, stride=config.stride)
        for period, scene, images in story:
            seed = np.random.SeedSequence((begin.seed, job.task, period)).generate_state(1)[0]
            told = write_texts(
                scene, default_grammar(), count=config.texts_per_scene, held_out=job.split == HELD_OUT, seed=int(seed)
            )
            yield DescribedScene(
                suite=job.suite,
                layout=scene.layout,
                task=job.task,
                start=job.index,
                period=period,
                split=job.split,
                is_new_layout=job.is_new_layout,
                images={camera: encode_jpeg(image, config.jpeg_quality) for camera, image in images.items()},
                texts=tuple(Dialogue(t.kind, t.family, t.half, t.is_exact, t.turns, t.templates) for t in told),
                truth=json.dumps(scene.to_dict(), separators=(",", ":")),
            )

    def _open(self, job: Job) -> tuple[Environment, SceneReader]:
        if job.suite != self._suite:
            if self._environment is not None:
                self._environment.close()
            self._environment, self._suite = self._build(job.suite, image_size=self._config.image_size), job.suite
            self._task = None
        if job.task != self._task:
            self._environment.reset(job.task, start(STARTS[job.split], job.index))  # builds the model that the reader reads
            self._reader = SceneReader(self._environment, suite=job.suite, task=job.task, rim=self._config.rim)
            self._task = job.task
        return self._environment, self._reader


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 [H, W, 3] -> JPEG without chroma subsampling, which would smear a small object's colour."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
