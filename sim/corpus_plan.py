"""Which episodes the corpus is made of: settings, layouts, and how scenes are dealt to them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multimodal.corpus_file import HELD_OUT, TRAIN
from sim.scene_reader import layout_name
from sim.suites import SUITES, get_suite
from vla.home import remask_home

# Layouts that no training scene has; each category of theirs occurs in others.
NEW_LAYOUTS = (
    *("KITCHEN_SCENE5", "KITCHEN_SCENE10", "LIVING_ROOM_SCENE3", "LIVING_ROOM_SCENE6", "STUDY_SCENE2"),
    *("libero_object_6", "libero_object_9"),
)
WORDLESS = ("robosuite_can", "robosuite_door")  # suites of whose things sim/language/lexicon.py knows no words
TASKS_PER_LAYOUT = 3  # each costs a model build of two seconds; the scenes are rearranged anyway
STARTS = {TRAIN: "train", HELD_OUT: "validation"}  # split of the corpus -> range of sim/seeds.py


@dataclass(frozen=True)
class CorpusConfig:
    """Settings of `vla corpus`."""

    output_dir: Path | None = None  # default: REMASK_HOME/datasets/corpus
    suites: list[str] = field(default_factory=lambda: [name for name in SUITES if name not in WORDLESS])
    scenes: int = 6000  # training scenes, each with one image per camera
    held_out_scenes: int = 600  # half of them of layouts that no training scene has
    texts_per_scene: int = 17
    scenes_per_episode: int = 5
    stride: int = 20  # control periods between two scenes of an episode
    image_size: int = 128  # pixels
    rim: int = 8  # pixels at each border that nothing is told of, so that training may crop them away
    jpeg_quality: int = 92
    workers: int = 2  # simulator processes

    def __post_init__(self) -> None:
        for name in ("scenes", "held_out_scenes", "texts_per_scene", "scenes_per_episode", "stride", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: at least 1.")
        if not 0 <= 4 * self.rim < self.image_size:
            raise ValueError(f"--rim={self.rim}: from 0 to less than a quarter of image_size {self.image_size}.")
        for suite in self.suites:
            get_suite(suite)
            if suite in WORDLESS:
                raise ValueError(f"--suites: sim/language/lexicon.py has no words for the things of {suite}; leave it out.")

    @property
    def root(self) -> Path:
        return Path(self.output_dir or remask_home() / "datasets" / "corpus").expanduser()

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed collection must share with its beginning."""
        return {name: value for name, value in vars(self).items() if name not in ("output_dir", "workers")}


@dataclass(frozen=True)
class Job:
    """One episode."""

    suite: str
    task: int
    split: str
    index: int  # of the start
    is_new_layout: bool
    scenes: int

    @property
    def file(self) -> str:
        return f"{self.suite}-task_{self.task:03d}-{self.split}_{self.index:06d}.parquet"


def jobs_of(config: CorpusConfig, layouts: dict[str, list[tuple[str, int]]]) -> list[Job]:
    """Every episode, scenes dealt evenly to layouts and in turn to their tasks.

    layouts: layout -> its (suite, task)s. Raises ValueError if nothing is left to train on.
    """
    known = {name: tasks[:TASKS_PER_LAYOUT] for name, tasks in layouts.items() if name not in NEW_LAYOUTS}
    new = {name: tasks[:TASKS_PER_LAYOUT] for name, tasks in layouts.items() if name in NEW_LAYOUTS}
    if not known:
        raise ValueError(f"--suites={config.suites} has held-out layouts only ({', '.join(new)}); add another suite.")
    share = config.held_out_scenes // 2 if new else 0
    return [
        *_deal(known, config.scenes, TRAIN, False, config.scenes_per_episode),
        *_deal(known, config.held_out_scenes - share, HELD_OUT, False, config.scenes_per_episode),
        *_deal(new, share, HELD_OUT, True, config.scenes_per_episode),
    ]


def _deal(layouts: dict[str, list[tuple[str, int]]], scenes: int, split: str, is_new: bool, length: int) -> list[Job]:
    jobs, names = [], sorted(layouts)
    for number in range(-(-scenes // length)):
        turn, place = divmod(number, len(names))
        tasks = layouts[names[place]]
        suite, task = tasks[turn % len(tasks)]
        jobs.append(Job(suite, task, split, turn // len(tasks), is_new, min(length, scenes - number * length)))
    return jobs


def find_layouts(suites: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """Layout -> the (suite, task)s that show it; reads LIBERO's task table, builds nothing."""
    layouts: dict[str, list[tuple[str, int]]] = {}
    for suite in suites:
        names = [""] * get_suite(suite).num_tasks
        if get_suite(suite).backend == "libero":
            from sim.libero import task_names

            names = task_names(suite)
        for task, name in enumerate(names):
            layouts.setdefault(layout_name(suite, task, name), []).append((suite, task))
    return layouts


