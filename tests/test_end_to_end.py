"""The main job, small and real: collect three demonstrations of lift, train twenty steps, evaluate two episodes."""

import json

from vla.cli import main as cli


def test_collect_train_evaluate_on_lift(tmp_path):
    data, run, evaluation = tmp_path / "data", tmp_path / "run", tmp_path / "evaluation"
    collect = ["collect", "--suite=robosuite_lift", "--episodes_per_task=3", "--workers=1", "--image_size=36"]
    assert cli([*collect, f"--output_dir={data}"]) == 0
    assert (data / "meta" / "info.json").exists() and not list((data / "episodes").glob("*.npz"))
    train = ["train", f"--dataset.root={data}", "--model.preset=debug", "--images.crop=32", "--steps=20"]
    assert cli([*train, "--training.batch_size=8", "--training.device=cpu", f"--output_dir={run}"]) == 0
    assert (run / "training_curve.png").exists()
    evaluate = ["eval", f"--policy.path={run / 'checkpoints/last/policy'}", "--episodes=2", "--workers=1", "--max_steps=16"]
    evaluate += ["--execution_horizon=8"]
    assert cli([*evaluate, "--videos=1", f"--output_dir={evaluation}"]) == 0
    rows = [json.loads(line) for line in (evaluation / "episodes.jsonl").read_text().splitlines()]
    assert [row["episode"] for row in rows] == [0, 1] and not any(row["error"] for row in rows)
    assert all(row["chunks"] == 2 and row["steps"] == 16 for row in rows if not row["success"])
    info = json.loads((evaluation / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2
    assert list(evaluation.glob("videos/**/*.mp4"))
