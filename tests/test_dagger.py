"""Laws of DAgger: labels are the expert's at visited states, mixing spans expert and policy, rounds add up and resume."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sim.dagger
import sim.evaluate
from sim import demonstration
from sim.correction import FOLLOWED, CorrectionSettings, correct
from sim.dagger import DaggerConfig, dagger, dataset_weights, training_settings
from sim.dagger_rounds import round_table
from sim.rollout import rollout
from sim.results import read_rows
from sim.seeds import Start, start
from tests.point_world import CRASH_INDEX, STEP, PointExpert, PointPolicy, PointWorld, build_point_world, point_expert
from vla.data import ActionWindows
from vla.frame_cache import FrameCache, FrameCacheWriter

SETTINGS = CorrectionSettings(
    suite="libero_object", image_size=8, action_horizon=4, execution_horizon=4, max_steps=30, mixing=0.5, folder=Path(".")
)


def run(mixing: float, index: int = 3) -> tuple[demonstration.Demonstration, int]:
    settings = replace(SETTINGS, mixing=mixing)
    expert = PointExpert(hopeless=False)
    return correct(PointWorld(), PointPolicy(), expert, task=1, start=start("train", index), settings=settings)


def test_with_the_expert_always_acting_a_correction_is_a_demonstration():
    episode, chunks = run(1.0)
    expected = demonstration.record(PointWorld(), PointExpert(False), task=1, start=start("train", 3), max_steps=30)
    np.testing.assert_array_equal(episode.action, expected.action)
    np.testing.assert_array_equal(episode.state, expected.state)
    np.testing.assert_array_equal(episode.images["base"], expected.images["base"])
    assert episode.success and chunks == -(-len(episode.action) // 4)


def test_with_the_policy_always_acting_the_states_are_those_of_its_rollout():
    episode, chunks = run(0.0)
    result = rollout(
        PointWorld(), PointPolicy(), task=1, start=start("train", 3), max_steps=30, execution_horizon=4
    )
    travelled = np.cumsum(0.1 * result.actions[:, :3].astype(np.float64), axis=0)
    np.testing.assert_allclose(episode.state[1:], travelled[:-1], atol=1e-6)
    assert chunks == 0 and len(episode.action) == result.steps and episode.success == result.success


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_every_label_is_what_the_expert_does_at_the_state_beside_it(mixing):
    episode, _ = run(mixing)
    world = PointWorld()
    world.reset(1, start("train", 3))
    for state, label in zip(episode.state, episode.action):
        world.position = state.astype(np.float64)
        np.testing.assert_allclose(label, PointExpert(False).action(world.world()), atol=1e-5)


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_a_chunk_of_labels_leads_where_its_later_labels_stand(mixing, tmp_path):
    """Else a correction of one step, repeated because the policy did not take it, would be learnt as a chunk of eight."""
    episode, _ = run(mixing)
    with FrameCacheWriter(tmp_path / "cache", PointWorld().spec) as writer:
        writer.add_episode(
            episode.images, episode.state, episode.action, instruction="", task=1, followed=episode.followed
        )
    windows = ActionWindows(FrameCache.open(tmp_path / "cache"), 8)
    batch = windows.gather(np.arange(len(windows)))
    for row, (actions, pad) in enumerate(zip(batch.actions, batch.is_pad)):
        count = int((~pad).sum())
        assert count >= 1 and not pad[:count].any()
        led_to = episode.state[row] + STEP * np.cumsum(actions[: count - 1, :3], axis=0)
        stands = episode.state[row + 1 : row + count]
        assert (np.abs(led_to - stands) <= STEP * FOLLOWED * np.arange(1, count)[:, None] + 1e-6).all()
    lengths = (~batch.is_pad).sum(axis=1)
    assert (lengths[:-8] == 8).all() if mixing == 1.0 else lengths.min() == 1


@pytest.fixture
def three_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = replace(sim.evaluate.get_suite("libero_object"), num_tasks=3)
    for module in (sim.evaluate, sim.dagger):
        monkeypatch.setattr(module, "get_suite", lambda name: suite)


class Trainings:
    """Stands in for training: each round's policy is less noisy; remembers on what it was trained."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, list[str]]] = []

    def train(self, config: DaggerConfig, run: Path, policy: str, data: list[Path]) -> str:
        number = int(run.parent.name.removeprefix("round_"))
        self.calls.append((f"{run.parent.name}/{run.name}", policy, [path.parent.name for path in data]))
        return f"0.{2 // number}" if run.name == "run" else f"0.{5 - number}"

    @staticmethod
    def load(path: str) -> PointPolicy:
        return PointPolicy(noise=float(path))


def settings(root: Path, **changes) -> DaggerConfig:
    defaults = dict(
        policy="0.4", dataset=[root / "demonstrations"], suite="libero_object", tasks=[0, 1], output_dir=root / "dagger", rounds=2,
        episodes=3, evaluation_episodes=2, workers=1, max_steps=25, execution_horizon=4,
    )  # fmt: skip
    return DaggerConfig(**{**defaults, **changes})


def go(config: DaggerConfig, trainings: Trainings) -> list:
    return dagger(config, build=build_point_world, expert=point_expert, load=trainings.load, train=trainings.train)


def test_rounds_add_their_labels_go_on_from_the_last_policy_and_resume(tmp_path, three_tasks):
    config, trainings = settings(tmp_path), Trainings()
    rounds = go(config, trainings)
    caches = [FrameCache.open(config.root / f"round_{number}" / "corrections") for number in (1, 2)]
    assert [each.labels for each in rounds] == [0, caches[0].num_frames, caches[0].num_frames + caches[1].num_frames]
    assert [cache.num_episodes for cache in caches] == [6, 6]
    alone = tmp_path.name
    expected = [("round_1/run", "0.4", [alone, "round_1"]), ("round_2/run", "0.2", [alone, "round_1", "round_2"])]
    assert trainings.calls == expected
    assert (config.root / "rounds.png").stat().st_size > 0
    assert json.loads((config.root / "rounds.json").read_text())[2]["policy"] == "0.1"
    (config.root / "round_2" / "corrections" / "corrections.json").unlink()  # as if killed while packing
    again = go(config, Trainings())
    assert [replace(each, interval_95=()) for each in again] == [replace(each, interval_95=()) for each in rounds]


def test_several_suites_correct_one_policy_and_every_round_is_over_all_of_them(tmp_path, three_tasks):
    config, trainings = settings(tmp_path, suite=["libero_object", "libero_goal"], rounds=1), Trainings()
    before, after = go(config, trainings)
    folders = [config.root / "round_1" / "corrections" / suite for suite in config.suites]
    assert trainings.calls == [("round_1/run", "0.4", [tmp_path.name, "corrections", "corrections"])], "one policy of both"
    assert after.labels == sum(FrameCache.open(folder).num_frames for folder in folders)
    assert list(after.by_suite) == list(config.suites) and after.episodes == 8
    assert after.successes == sum(solved for solved, _ in after.by_suite.values())
    alone = go(settings(tmp_path, suite="libero_goal", output_dir=tmp_path / "alone", rounds=1), Trainings())
    assert [each.by_suite["libero_goal"] for each in (before, after)] == [(each.successes, each.episodes) for each in alone]
    columns, lines = round_table(json.loads((config.root / "rounds.json").read_text()))
    assert columns[2:4] == list(config.suites) and lines[1][3] == f"{alone[1].successes}/4"
    with pytest.raises(ValueError, match="suite was 'libero_object, libero_goal', is 'libero_goal, libero_object'"):
        go(replace(config, suite=["libero_goal", "libero_object"]), Trainings())
    with pytest.raises(ValueError, match="several different ones"):
        go(replace(config, suite=["libero_goal", "libero_goal"]), Trainings())


def write_cache(folder: Path, frames: int) -> Path:
    with FrameCacheWriter(folder / "cache", PointWorld().spec) as writer:
        images = {name: np.zeros((frames, 8, 8, 3), np.uint8) for name in PointWorld().spec.cameras}
        writer.add_episode(images, np.zeros((frames, 3)), np.zeros((frames, 7)), instruction="", task=0)
    return folder


def test_share_is_that_of_the_corrections_among_all_samples(tmp_path, three_tasks):
    data = [write_cache(tmp_path / name, frames) for name, frames in (("a", 30), ("b", 10), ("c", 2), ("d", 6))]
    config = settings(tmp_path, dataset=data[:2], share=0.2)
    given = training_settings(config, tmp_path / "run", "policy", data).dataset
    assert given.root == data and given.weights == pytest.approx([0.6, 0.2, 0.05, 0.15])
    assert dataset_weights(config, data[:2]) is None, "the control has no corrections to share with"
    assert dataset_weights(replace(config, share=None), data) is None
    with pytest.raises(ValueError, match="share is 1.0; allowed: above 0 and below 1"):
        go(replace(config, share=1.0), Trainings())


def test_a_control_trains_as_often_on_demonstrations_alone_and_may_be_asked_for_later(tmp_path, three_tasks):
    config, trainings = settings(tmp_path), Trainings()
    without = go(config, Trainings())
    rounds = go(replace(config, control=True), trainings)
    alone = [(run, policy, data) for run, policy, data in trainings.calls if run.endswith("control_run")]
    assert alone == [("round_1/control_run", "0.4", [tmp_path.name]), ("round_2/control_run", "0.4", [tmp_path.name])]
    assert [each.successes for each in rounds] == [each.successes for each in without], "the rounds are what they were"
    assert [each.control and each.control.policy for each in rounds] == [None, "0.4", "0.3"]
    for number in (1, 2):
        starts = [
            [(row["task"], row["seed"]) for row in read_rows(config.root / f"round_{number}" / name / "episodes.jsonl")]
            for name in ("evaluation", "control_evaluation")
        ]
        assert sorted(starts[0]) == sorted(starts[1])


def test_a_round_is_not_added_by_other_settings_of_training_than_the_first(tmp_path, three_tasks):
    """Their file may change between two calls: one curve would be of two trainings."""
    (tmp_path / "train.yaml").write_text("decode: {rounds: 6}\ntraining: {steps: 600}\n")
    config = settings(tmp_path, train=tmp_path / "train.yaml", rounds=1)
    go(config, Trainings())
    (tmp_path / "train.yaml").write_text("# a remark more\ndecode: {rounds: 6}\ntraining: {steps: 600}\n")
    assert len(go(replace(config, rounds=2), Trainings())) == 3
    (tmp_path / "train.yaml").write_text("decode: {rounds: 2}\ntraining: {steps: 600}\n")
    with pytest.raises(ValueError, match=r"another run: train.decode was \{'rounds': 6\}, is \{'rounds': 2\}\. Use"):
        go(replace(config, rounds=3), Trainings())


def test_what_cannot_be_trained_on_is_refused_before_the_first_episode(tmp_path, three_tasks):
    """Else a data set's wrong name is found out after hours of corrections."""
    config = settings(tmp_path, policy="policy")
    with pytest.raises(FileNotFoundError, match="demonstrations"):
        dagger(config, build=build_point_world, expert=point_expert, load=Trainings.load)
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        dagger(replace(config, train=Path("nowhere.yaml")), build=build_point_world, expert=point_expert, load=Trainings.load)
    assert not config.root.exists()


class StuckWorld(PointWorld):
    """Whose second start of round 1 cannot be looked at."""

    def reset(self, task: int, start: Start) -> None:
        if start.index == sim.dagger.FIRST_INDEX + sim.dagger.ROUND_STARTS + 1:
            raise ArithmeticError("nothing to see here")
        super().reset(task, start)


def build_stuck_world(suite: str, *, image_size: int | None = None, mesh_detail: float = 1.0, **_: str) -> StuckWorld:
    return StuckWorld(image_size or 8)


def test_a_start_that_always_raises_is_lost_to_its_round_and_no_more(tmp_path, three_tasks):
    config, trainings = settings(tmp_path, rounds=1), Trainings()
    rounds = dagger(config, build=build_stuck_world, expert=point_expert, load=trainings.load, train=trainings.train)
    folder = config.root / "round_1" / "corrections"
    report = json.loads((folder / "corrections.json").read_text())
    assert (report["episodes"], report["lost"]) == (4, 2) and FrameCache.open(folder).num_episodes == 4
    tried = [(row["task"], row["index"]) for row in read_rows(folder / "episodes.jsonl") if row["error"]]
    assert len(tried) == 4 and len(set(tried)) == 2, "each once more"
    assert len(rounds) == 2 and trainings.calls


def test_another_run_s_folder_is_refused_and_so_are_impossible_settings(tmp_path, three_tasks):
    go(settings(tmp_path, rounds=1), Trainings())
    with pytest.raises(ValueError, match="mixing was '0.5', is '0.1'"):
        go(settings(tmp_path, mixing=0.1), Trainings())
    with pytest.raises(ValueError, match="mixing is 1.5; allowed: 0 to 1"):
        go(settings(tmp_path, mixing=1.5), Trainings())
    with pytest.raises(ValueError, match="max_steps is 0; it must be at least 1"):
        go(settings(tmp_path, max_steps=0), Trainings())
    with pytest.raises(ValueError, match="--policy"):
        go(settings(tmp_path, policy=""), Trainings())


def test_corrections_never_share_a_start_with_collected_demonstrations():
    assert sim.dagger.FIRST_INDEX > CRASH_INDEX and sim.dagger.FIRST_INDEX >= 10 * 50_000
