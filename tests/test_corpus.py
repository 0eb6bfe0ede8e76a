"""Laws of `vla corpus`: splits share no scene, an interrupted collection goes on, the same settings give the same corpus."""

import contextlib
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("robosuite")
pytest.importorskip("pyarrow")

from multimodal.corpus_file import HELD_OUT, TRAIN, read_manifest, read_scenes, split_files
from sim import corpus
from sim.corpus import make_corpus, model_of
from sim.corpus_plan import NEW_LAYOUTS, STARTS, CorpusConfig, find_layouts, jobs_of
from sim.corpus_worker import Describer
from sim.job_queue import JobQueue
from sim.language.lexicon import WORDS
from sim.scene_facts import Facts
from sim.scene_state import Scene
from sim.seeds import start
from sim.suites import SUITES, build_environment
from sim.workers import Died, Done


def config_of(root: Path, **changes: object) -> CorpusConfig:
    settings = dict(suites=["robosuite_stack"], scenes=4, held_out_scenes=2, texts_per_scene=8, scenes_per_episode=2, stride=3)
    return CorpusConfig(root, **{**settings, "image_size": 64, "rim": 4, "workers": 1, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    """A corpus whose first episode was described before the command ran, as an interrupted one leaves it."""
    config = config_of(tmp_path_factory.mktemp("corpus"))
    first = jobs_of(config, find_layouts(config.suites))[0]
    Describer(config, build_environment).describe(first)
    (config.root / "episodes" / f".{first.file}.99.partial").write_text("torn")
    report = make_corpus(config)
    assert report["rows"] == {TRAIN: 4, HELD_OUT: 2} and report["errors"] == 0
    return config


def test_an_episode_whose_process_died_is_described_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    jobs = jobs_of(config, find_layouts(config.suites))
    answers = []

    def run_jobs(pool, next_job, *, started, finished) -> None:
        last = None
        while (job := next_job(last)) is not None:
            last, gone = job, job == jobs[1] and job not in answers
            answers.append(job)
            finished(job, Died(-9) if gone else Done({"scenes": job.scenes, "texts": 1}))

    monkeypatch.setattr(corpus, "WorkerPool", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(corpus, "run_jobs", run_jobs)
    totals = corpus.run_episodes(config, jobs, jobs, build_environment)
    assert totals["scenes"] == sum(job.scenes for job in jobs) and totals["errors"] == 1
    assert sorted(map(jobs.index, answers)) == sorted([*range(len(jobs)), 1])


def rows(config: CorpusConfig, split: str) -> list:
    return [scene for path in split_files(config.root, split) for scene in read_scenes(path)]


def test_an_interrupted_corpus_equals_a_straight_one(finished: CorpusConfig) -> None:
    straight = [
        scene
        for job in jobs_of(finished, find_layouts(finished.suites))
        for scene in Describer(finished, build_environment).scenes(job)
    ]
    assert rows(finished, TRAIN) + rows(finished, HELD_OUT) == straight


def test_splits_share_no_scene_and_no_template(finished: CorpusConfig) -> None:
    seeds = {
        split: {start(STARTS[split], scene.start).seed for scene in rows(finished, split)} for split in (TRAIN, HELD_OUT)
    }
    assert seeds[TRAIN] and seeds[HELD_OUT] and not seeds[TRAIN] & seeds[HELD_OUT]
    halves = {split: {text.half for scene in rows(finished, split) for text in scene.texts} for split in (TRAIN, HELD_OUT)}
    assert halves == {TRAIN: {"training"}, HELD_OUT: {"training", "held_out"}}


def test_truth_is_stored_with_the_texts(finished: CorpusConfig) -> None:
    for scene in rows(finished, TRAIN):
        facts = Facts(Scene.from_dict(json.loads(scene.truth)))
        for text in scene.texts:
            if text.family == "count" and "cubes" in text.turns[0][0] and "red" not in text.turns[0][0]:
                assert text.turns[0][1].lower() in ("zero", "one", "two")[: 1 + len(facts.clear)]


def test_a_finished_or_another_corpus_is_not_overwritten(finished: CorpusConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finished corpus"):
        make_corpus(finished)
    other = config_of(tmp_path)
    (tmp_path / "episodes").mkdir()
    (tmp_path / "settings.json").write_text(json.dumps({**other.identity, "stride": 99}))
    with pytest.raises(ValueError, match="stride was 99, is 3"):
        make_corpus(other)


def test_the_manifest_tells_the_rim_and_how_it_was_made(finished: CorpusConfig) -> None:
    manifest = read_manifest(finished.root)
    assert (manifest.cameras, manifest.image_size, manifest.rim) == (("base", "wrist"), 64, 4)
    assert manifest.source["stride"] == 3 and not (finished.root / "episodes").exists()


def test_scenes_are_dealt_evenly_and_new_layouts_are_never_trained_on() -> None:
    layouts = {f"layout_{index}": [("robosuite_lift", 0)] for index in range(4)} | {
        name: [("libero_90", 0), ("libero_90", 1)] for name in NEW_LAYOUTS[:2]
    }
    jobs = jobs_of(CorpusConfig(scenes=103, held_out_scenes=40, scenes_per_episode=5), layouts)
    of = {split: [job for job in jobs if job.split == split] for split in (TRAIN, HELD_OUT)}
    assert sum(job.scenes for job in of[TRAIN]) == 103 and sum(job.scenes for job in of[HELD_OUT]) == 40
    assert not any(job.is_new_layout or job.suite == "libero_90" for job in of[TRAIN])
    assert sum(job.scenes for job in of[HELD_OUT] if job.is_new_layout) == 20
    with pytest.raises(ValueError, match="held-out layouts only"):
        jobs_of(CorpusConfig(), {NEW_LAYOUTS[0]: [("libero_90", 0)]})


def test_no_episode_is_run_twice() -> None:
    """Of real layouts: file names differ, and a worker keeps to the task it has built."""
    pytest.importorskip("libero")
    config = CorpusConfig(scenes=600, held_out_scenes=100)
    jobs = jobs_of(config, find_layouts(config.suites))
    assert len({job.file for job in jobs}) == len(jobs)
    schedule = JobQueue(jobs, model_of)
    job, order = schedule.next_job(None), []
    while job is not None:
        order.append(job)
        schedule.finish(job)
        job = schedule.next_job(job)
    assert sorted(order, key=lambda job: job.file) == sorted(jobs, key=lambda job: job.file)
    changes = sum((a.suite, a.task) != (b.suite, b.task) for a, b in zip(order, order[1:]))
    assert changes == len({(job.suite, job.task) for job in jobs}) - 1


def test_whatever_new_layouts_show_is_known_from_others() -> None:
    """By LIBERO's task files: each category of a held-out layout occurs in a training layout, and each has words."""
    pytest.importorskip("libero")
    from sim.libero import libero_folder, task_names

    def categories(suite: str, task: int) -> set[str]:
        text = (libero_folder() / "bddl_files" / suite / f"{task_names(suite)[task]}.bddl").read_text()
        blocks = re.findall(r"\(:(?:objects|fixtures)(.*?)\n  \)", text, re.DOTALL)
        found = {line.split(" - ")[1].strip() for block in blocks for line in block.splitlines() if " - " in line}
        return {name for name in found if not name.endswith("table") and name != "floor"}

    layouts = find_layouts([name for name, suite in SUITES.items() if suite.backend == "libero"])
    assert set(NEW_LAYOUTS) < set(layouts)
    known = set().union(*(categories(*task) for name, tasks in layouts.items() if name not in NEW_LAYOUTS for task in tasks))
    new = set().union(*(categories(*task) for name in NEW_LAYOUTS for task in layouts[name]))
    assert new <= known and known <= set(WORDS), (new - known, known - set(WORDS))
