"""Settings of `vla corpus --bind`, and the jobs that the corpus is made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.bind.corpus_file import SPLITS, TEST, TRAIN, UNSEEN, VALIDATION, file_name
from sim.bound.objects import BODIES, Body
from vla.home import remask_home

# split of the corpus -> range of sim/seeds.py and where in it; "test" and "unseen" share one, far apart
STARTS = {TRAIN: ("train", 0), VALIDATION: ("validation", 0), TEST: ("official", 0), UNSEEN: ("official", 500_000_000)}


@dataclass(frozen=True)
class BindCorpusConfig:
    """Settings of `vla corpus --bind`: one object on a table, dropped and poked, seen, heard and felt."""

    output_dir: Path | None = None  # default: REMASK_HOME/datasets/bound
    samples: int = 12480  # of training; each split is rounded up to whole files
    validation_samples: int = 780
    test_samples: int = 1170
    unseen_samples: int = 256  # of the two held-out classes
    samples_per_shape: int = 6  # poses, lights and pokes of one body before its sizes and colours are drawn again
    image_size: int = 40  # pixels of image, depth and thermal, a multiple of 8
    video_size: int = 32  # pixels, a multiple of 8
    video_frames: int = 4  # over the poke, a multiple of 2
    points: int = 256  # of the cloud
    clutter: int = 3  # most things beside the object
    contrast: float = 0.85  # of pictures: 1 as rendered, towards 0 all is one grey
    colour_freedom: float = 0.6  # 0: a material has its usual colour; 1: any colour
    noise: float = 1.0  # factor on every sensor's noise
    tilt: float = 0.35  # share of samples in which the object is dropped on its side
    workers: int = 2  # simulator processes

    def __post_init__(self) -> None:
        counts = ("samples", "validation_samples", "test_samples", "unseen_samples", "samples_per_shape", "points", "workers")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: at least 1.")
        for name, divisor in (("image_size", 8), ("video_size", 8), ("video_frames", 2)):
            if getattr(self, name) < divisor or getattr(self, name) % divisor:
                raise ValueError(f"--{name}={getattr(self, name)}: a multiple of {divisor}, which the patches are cut by.")
        for name in ("contrast", "colour_freedom", "tilt"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"--{name}={getattr(self, name)}: from 0 to 1.")
        if self.clutter < 0 or self.noise < 0:
            raise ValueError(f"--clutter={self.clutter}, --noise={self.noise}: 0 or more.")

    @property
    def root(self) -> Path:
        return Path(self.output_dir or remask_home() / "datasets" / "bound").expanduser()

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed collection must share with its beginning."""
        return {name: value for name, value in vars(self).items() if name not in ("output_dir", "workers")}


@dataclass(frozen=True)
class Job:
    """One file: every class of the split in a shape of its own, `samples_per_shape` samples of each."""

    split: str
    number: int  # of the file

    @property
    def file(self) -> str:
        return file_name(self.split, self.number)


def bodies_of(split: str) -> list[tuple[int, Body]]:
    """(label, body) of the classes that the split has."""
    return [(label, body) for label, body in enumerate(BODIES) if body.is_seen == (split != UNSEEN)]


def jobs_of(config: BindCorpusConfig) -> list[Job]:
    counts = (config.samples, config.validation_samples, config.test_samples, config.unseen_samples)
    jobs = []
    for split, count in zip(SPLITS, counts, strict=True):
        per_file = len(bodies_of(split)) * config.samples_per_shape
        jobs += [Job(split, number) for number in range(-(-count // per_file))]
    return jobs
