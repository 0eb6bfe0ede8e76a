"""`vla calibrate train | eval | policy`: make encoders, or a policy's eyes, robust; and judge them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from vla.cli import parse_config
from vla.given_function import given_function
from vla.home import remask_home

ACTIONS: dict[str, str] = {
    "train": "encoder of a bound task -> calibration (head and adapters)",
    "eval": "frozen and calibrated encoder -> accuracy and retrieval under attack, sanity block, certificate",
    "policy": "policy -> the same policy with a calibrated image tower",
}


def main(argv: Sequence[str]) -> int:
    """`vla calibrate ACTION --name=value ...`. Raises ValueError for another action."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: vla calibrate ACTION [--name=value ...]\n")
        print("\n".join(f"  {name:<8}{summary}" for name, summary in ACTIONS.items()))
        return 0
    action, *rest = argv
    if action not in ACTIONS:
        raise ValueError(f"no action {action!r}; `vla calibrate` does {', '.join(ACTIONS)}.")
    handlers: dict[str, Callable[[Sequence[str]], int]] = {"train": _train, "eval": _evaluate, "policy": _policy}
    return handlers[action](rest)


def _train(argv: Sequence[str]) -> int:
    from multimodal.bind.train_calibration import TrainCalibrationConfig, calibrate

    config = parse_config(TrainCalibrationConfig, argv, verb="calibrate train")
    output = (config.output_dir or remask_home() / "runs" / "calibration").expanduser()
    folder = calibrate(config, _task(config.task, config.task_options), output)
    print(f"calibration: {folder}")
    print(f"next: vla calibrate eval --task={config.task} --modality={config.modality} --calibration={folder}")
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    from multimodal.bind.evaluate_calibration import EvaluateCalibrationConfig, evaluate_calibration

    config = parse_config(EvaluateCalibrationConfig, argv, verb="calibrate eval")
    report = evaluate_calibration(config, _task(config.task, config.task_options))
    folder = (config.output_dir or remask_home() / "evaluations" / f"calibration-{config.modality}").expanduser()
    path = report.write(folder)
    print(report.markdown())
    print(f"wrote {path}, robustness.json, robustness.png")
    return 0 if report.passed else 1


def _policy(argv: Sequence[str]) -> int:
    from vla.calibrate_policy import CalibratePolicyConfig, calibrate_policy

    config = parse_config(CalibratePolicyConfig, argv, verb="calibrate policy")
    folder = calibrate_policy(config)
    print(f"policy: {folder}")
    print(f"next: vla eval --policy.path={folder} --suite=... --attack='{{kind: untargeted, epsilon: 4}}'")
    return 0


def _task(target: str | None, options: dict[str, Any]):
    """The task of "module:function", called with the options. Raises ValueError without one, or if the options are not its."""
    if not target or ":" not in target:
        raise ValueError(f"--task is {target!r}; give \"module:function\", a function that returns a multimodal.bind.task.BindTask.")
    build = given_function("--task", target)
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"{target}{inspect.signature(build)} cannot be called: {error}. Give --task_options='{{name: value}}'."
        ) from error
    return build(**options)
