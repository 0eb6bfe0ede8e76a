"""Calibrations compared: modality x where the weights are x objective; clean, AutoAttack and naive accuracy, share trained, seconds.

Each arm is one process with one thread, `--concurrent` of them at a time. A finished arm's row is kept, and a second call goes
on from there. Every arm of a modality is judged on the same samples: those of the test split, which chose nothing, or with
`--split validation` those that placement and objective may be chosen on. `--headline` runs the full AutoAttack (100 steps, 9
targets, FAB, 5000 queries) on at least 256 samples for three seeds.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sim.results import differences
from tests.benchmarks.harness import parser, report
from vla.cli import resolve
from vla.home import remask_home
from vla.large_pages import environment

PLACEMENTS = ("frozen", "head", "adapters", "head+adapters")
# settings that all arms of a table share
SHARED = ("task", "task_options", "split", "partner", "steps", "inner_steps", "rank", "epsilon", "samples", "headline")
COLUMNS = (
    "modality", "placement", "objective", "seed", "clean %", "AutoAttack %", "95 % low", "95 % high", "worst case %", "naive says %",
    "gain over frozen", "worst gain", "clean change", "trainable", "% of tower", "% of model", "seconds", "flags",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    modality: str
    placement: str
    objective: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.modality}-{self.placement}-{self.objective}-{self.seed}"


def plan(options: argparse.Namespace) -> list[Arm]:
    """Frozen once a modality and seed; every placement with each objective; all objectives for `--ablate` in its last placement."""
    arms = []
    for seed in options.seeds:
        for modality in options.modalities:
            for placement in options.placements:
                every = modality == options.ablate and placement == options.placements[-1]
                objectives = options.every_objective if every else options.objectives
                arms += [Arm(modality, placement, name, seed) for name in (["-"] if placement == "frozen" else objectives)]
    return arms


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--task", default="tests.drawn_shapes:build_task", help="module:function of a BindTask")
    arguments.add_argument("--task_options", type=json.loads, default={}, help="what that function is called with, as JSON")
    arguments.add_argument("--split", default="test", choices=["validation", "test"], help="samples that judge")
    arguments.add_argument("--modalities", nargs="+", default=["heat", "image"])
    arguments.add_argument("--placements", nargs="+", default=list(PLACEMENTS), choices=PLACEMENTS)
    arguments.add_argument("--objectives", nargs="+", default=["combined"])
    arguments.add_argument("--ablate", default="", help="modality that runs every objective, in the last of the placements")
    arguments.add_argument("--every_objective", nargs="+", default=["ce", "l2", "nce", "comp_sum", "combined", "consistent"])
    arguments.add_argument("--partner", default="image", help="modality of the same samples that `consistent` keeps near")
    arguments.add_argument("--steps", type=int, default=400, help="training steps of 64 samples")
    arguments.add_argument("--inner_steps", type=int, default=5, help="of the PGD in every training step")
    arguments.add_argument("--rank", type=int, default=3, help="of the low-rank adapters")
    arguments.add_argument("--epsilon", type=float, default=4.0, help="255ths, in the modality's unit; training and judgement")
    arguments.add_argument("--samples", type=int, default=128)
    arguments.add_argument("--seeds", type=int, nargs="+", help="default: 0, of a headline 0 1 2")
    arguments.add_argument("--headline", action="store_true", help="full AutoAttack, 256 samples at least")
    arguments.add_argument("--concurrent", type=int, default=1)
    arguments.add_argument("--root", type=Path, default=None, help="where finished arms are kept")
    arguments.add_argument("--arm", default="", help="run this one arm (JSON) and write its row; for the processes that this starts")
    options = arguments.parse_args(argv)
    options.seeds = options.seeds or ([0, 1, 2] if options.headline else [0])
    options.samples = max(256, options.samples) if options.headline else options.samples
    kind = "headline" if options.headline else "reduced"
    name = f"calibration-{options.task.replace(':', '.')}-{options.epsilon:g}-{options.steps}x{options.inner_steps}-{kind}-{options.split}"
    root = options.root or remask_home() / "bench" / name
    if options.arm:
        run_arm(Arm(**json.loads(options.arm)), options, root)
        return 0
    arms = plan(options)
    check_partner(arms, options.partner)
    check_root(root, options)
    began = time.perf_counter()
    run_all(arms, list(sys.argv[1:] if argv is None else argv), root, options.concurrent)
    found = [json.loads((root / f"{arm.name}.json").read_text()) for arm in arms]
    check_encoders(found)
    settings = {name: getattr(options, name) for name in SHARED}
    report(
        "calibration", COLUMNS, [row_of(entry, found) for entry in found], options.output, **settings, reference=kind,
        minutes=(time.perf_counter() - began) / 60,
    )  # fmt: skip
    return 0


def check_partner(arms: Sequence[Arm], partner: str) -> None:
    """Raise ValueError, before hours of other arms, if one is to be kept near its own modality or has an unknown objective."""
    from multimodal.bind.objectives import named_objective

    trained = [arm for arm in arms if arm.placement != "frozen"]
    wrong = [arm.name for arm in trained if named_objective(arm.objective).consistency and arm.modality == partner]
    if wrong:
        raise ValueError(f"{wrong} would be kept near their own modality: give --partner, another one than {partner!r}.")


def check_root(root: Path, options: argparse.Namespace) -> None:
    """Raise ValueError if the finished arms in `root` were made with other settings than these."""
    settings, now = root / "settings.json", {name: getattr(options, name) for name in SHARED}
    changed = differences(json.loads(settings.read_text()), now) if settings.exists() else ""
    if changed:
        raise ValueError(f"{root} holds arms of another table: {changed}. Give another --root, or remove it.")
    root.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(now, indent=1))


def check_encoders(found: Sequence[dict]) -> None:
    """Raise ValueError if the arms of a modality began at different encoders: a path such as checkpoints/last moves."""
    for modality in {entry["modality"] for entry in found}:
        arms = {f"{e['placement']}-{e['objective']}-{e['seed']}": e["encoder"] for e in found if e["modality"] == modality}
        if len(set(arms.values())) > 1:
            raise ValueError(f"Arms of {modality} began at different encoders: {arms}. Name a checkpoint that stays, and another --root.")


def run_all(arms: Sequence[Arm], argv: list[str], root: Path, concurrent: int) -> None:
    """Every arm that has no row yet, `concurrent` at a time. Raises ChildProcessError if one fails."""
    waiting = [arm for arm in arms if not (root / f"{arm.name}.json").exists()]
    command = [sys.executable, "-m", "tests.benchmarks.bench_calibration", *argv, "--root", str(root)]

    def run_one(arm: Arm) -> str:
        """Its name if it failed, else nothing."""
        code = subprocess.run([*command, "--arm", json.dumps(vars(arm))], env=environment(), check=False).returncode
        print(f"{arm.name}: {'done' if code == 0 else 'FAILED'}", flush=True)
        return arm.name if code else ""

    with ThreadPoolExecutor(concurrent) as pool:
        try:
            failed = [name for name in tqdm(pool.map(run_one, waiting), total=len(waiting), desc="arms") if name]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # else each waiting arm would still be started
            raise
    if failed:
        raise ChildProcessError(f"{failed} failed; see the output above. Finished arms are in {root}.")


def run_arm(arm: Arm, options: argparse.Namespace, root: Path) -> None:
    """Train if there is something to train, judge, write root/NAME.json."""
    import torch

    from multimodal.bind.adapters import NO_ADAPTERS, AdapterConfig
    from multimodal.bind.calibration import CalibratedEncoder, InnerAttackConfig, PlacementConfig, load_calibration
    from multimodal.bind.classifier import Classifier
    from multimodal.bind.evaluate_calibration import sample
    from multimodal.bind.objectives import named_objective
    from multimodal.bind.reference_attacks import REDUCED, AutoAttackConfig
    from multimodal.bind.robustness import AttackSuite, share_of
    from multimodal.bind.task import count_weights, trunk_of, weights_hash
    from multimodal.bind.train_calibration import TrainCalibrationConfig, calibrate, task_weights
    from multimodal.schedule import TrainingConfig
    from multimodal.training_state import last_checkpoint, read_position

    torch.set_num_threads(options.threads)
    task = resolve(options.task)(**options.task_options)
    frozen = task.check(arm.modality)
    adapters = AdapterConfig(lora_rank=options.rank, tune_norms=True) if "adapters" in arm.placement else NO_ADAPTERS
    placement = PlacementConfig("linear" if "head" in arm.placement else "none", adapters=adapters)
    encoder, trainable, seconds = frozen, 0, 0.0
    if arm.placement != "frozen":
        training = TrainingConfig(
            steps=options.steps, batch_size=64, learning_rate=3e-3, warmup_steps=options.steps // 10, weight_decay=1e-4, ema_decay=0.0,
            beta2=0.999, device="cpu", threads=options.threads, seed=arm.seed, save_every=options.steps,
        )  # fmt: skip
        folder, objective = root / "runs" / arm.name, named_objective(arm.objective)
        config = TrainCalibrationConfig(
            modality=arm.modality, placement=placement, objective=objective, training=training,
            partner=options.partner if objective.consistency else None, attack=InnerAttackConfig(options.epsilon, options.inner_steps),
            resume=last_checkpoint(folder) is not None,
        )  # fmt: skip
        calibrated: CalibratedEncoder = load_calibration(calibrate(config, task, folder), frozen)
        trainable, encoder = calibrated.num_trainable, calibrated.merged()
        # the run's own clock: an arm that was stopped while it judged does not train again
        seconds = read_position(last_checkpoint(folder) / "training_state").elapsed
    model, original = (Classifier(each, task.centers).eval() for each in (encoder, frozen))
    bound, flags = task.splits[options.split], []
    inputs, labels = sample(bound, arm.modality, ~task.is_unseen(bound), 0, options.samples)
    suite = AttackSuite(auto=AutoAttackConfig() if options.headline else REDUCED)
    transfer = None if arm.placement == "frozen" else original
    survived = suite.run(model, inputs, labels, frozen.box.radius(options.epsilon), arm.seed, transfer, flags)
    shares = {name: share_of(values).to_dict() for name, values in survived.items()}  # in order: which found the rest
    entry = {
        **vars(arm), "shares": shares, "trainable": trainable, "tower": count_weights(trunk_of(frozen)), "model": task_weights(task),
        "seconds": seconds, "flags": flags, "encoder": weights_hash(frozen),
    }  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{arm.name}.json").write_text(json.dumps(entry, indent=1))


def row_of(entry: dict, found: Sequence[dict]) -> list:
    """COLUMNS of one arm, beside the frozen encoder of its modality, if that was run: of its seed, or of the first."""
    shares = entry["shares"]
    clean, auto = shares["clean"]["share"], shares["autoattack"]
    same = [each for each in found if (each["modality"], each["placement"]) == (entry["modality"], "frozen")]
    same.sort(key=lambda each: (each["seed"] != entry["seed"], each["seed"]))
    frozen = same[0]["shares"] if same else None
    gain = 100 * (auto["share"] - frozen["autoattack"]["share"]) if frozen else float("nan")
    worst = 100 * (shares["worst"]["share"] - frozen["worst"]["share"]) if frozen else float("nan")
    change = 100 * (clean - frozen["clean"]["share"]) if frozen else float("nan")
    return [
        entry["modality"], entry["placement"], entry["objective"], entry["seed"], 100 * clean, 100 * auto["share"], 100 * auto["low"],
        100 * auto["high"], 100 * shares["worst"]["share"], 100 * shares["naive"]["share"], gain, worst, change, entry["trainable"],
        100 * entry["trainable"] / entry["tower"], 100 * entry["trainable"] / entry["model"], entry["seconds"],
        "; ".join(entry["flags"]),
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
