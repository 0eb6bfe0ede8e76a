"""The verbs of the command `vla`, and how a verb reads its settings.

A verb is "module:function", imported when called, so the table ties no package to another and `vla --help` is instant.
"""

import difflib
import importlib
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from vla.large_pages import restart_with_large_pages

T = TypeVar("T")


@dataclass(frozen=True)
class Verb:
    """One line of `vla --help`."""

    target: str  # "module:function", called with the rest of the command line, or with the settings read from it
    summary: str
    example: str
    config: str = ""  # "module:class" of these settings, for verbs of packages below this one, which cannot read a command line
    large_pages: bool = False  # starts itself again with them (vla/large_pages.py)


GROUPS: dict[str, dict[str, Verb]] = {
    "Start here": {
        "demo": Verb("sim.demo:main", "collect, train and evaluate on robosuite lift", "vla demo", large_pages=True),
        "doctor": Verb("sim.doctor:main", "what is installed, rendered, found; what to do for the rest", "vla doctor"),
    },
    "Work": {
        "collect": Verb(
            "sim.collect:main",
            "expert episodes -> LeRobotDataset and frame cache",
            "vla collect --suite=robosuite_lift --episodes_per_task=100 --workers=2",
        ),
        "import": Verb(
            "sim.import_dataset:main",
            "LeRobotDataset v3.0 or LIBERO HDF5 -> frame cache",
            "vla import --source=FOLDER --output_dir=DATA",
        ),
        "train": Verb(
            "vla.train:main",
            "frame cache -> policy",
            "vla train --config_path configs/lift_demo.yaml --dataset.root=DATA --output_dir=RUN",
            large_pages=True,
        ),
        "dagger": Verb(
            "sim.dagger:main",
            "correct a policy where it errs: roll out, label, train on",
            "vla dagger --policy=RUN/checkpoints/last/policy --dataset='[DATA]' --suite=robosuite_lift --rounds=3",
            large_pages=True,
        ),
        "merge": Verb(
            "vla.merge:main",
            "adapters and their published base -> one policy folder",
            "vla merge --policy.path=RUN/checkpoints/last/policy --output_dir=MERGED",
        ),
        "push": Verb(
            "vla.push:main",
            "policy and its model card -> Hugging Face Hub",
            "vla push --policy.path=RUN/checkpoints/last/policy --repo_id=me/policy --results=[EVAL/eval_info.json] --dry_run",
        ),
        "corpus": Verb(
            "sim.corpus:main",
            "simulator scenes with texts that are true of them; --bind: one thing for seven sensors",
            "vla corpus --scenes=6000 --workers=2",
        ),
        "train-bind": Verb(
            "multimodal.bind.binding:run",
            "bound corpus (`vla corpus --bind`) -> encoders of image, video, depth, heat, sound, touch in one space",
            "vla train-bind --corpus=DATA --output_dir=RUN",
            config="multimodal.bind.binding:BindingConfig",
            large_pages=True,
        ),
        "train-vlm": Verb(
            "multimodal.train_vlm:run",
            "corpus -> vision-language model",
            "vla train-vlm --config_path configs/desk_vlm.yaml --corpus=DATA --output_dir=RUN",
            config="multimodal.train_vlm:TrainVLMConfig",
            large_pages=True,
        ),
        "eval": Verb(
            "sim.evaluate:main",
            "policy -> success table, with intervals",
            "vla eval --policy.path=RUN/checkpoints/last/policy --suite=robosuite_lift --episodes=50 --workers=2",
        ),
        "calibrate": Verb(
            "vla.calibrate:main",
            "encoders, or a policy's eyes, made robust to attack (train), judged (eval)",
            "vla calibrate train --task=MODULE:FUNCTION --modality=depth --output_dir=RUN",
            large_pages=True,
        ),
        "serve": Verb(
            "serve.server:main",
            "policy -> HTTP, gRPC, WebSocket, and a page to watch it",
            "vla serve --policy.path=RUN/checkpoints/last/policy",
        ),
        "export": Verb(
            "vla.export:main",
            "policy, vision-language model or encoder -> ONNX folder that runs without torch, checked against torch",
            "vla export --policy.path=RUN/checkpoints/last/policy --output_dir=EXPORT --dataset.root=DATA",
        ),
    },
    "Language": {
        "generate": Verb(
            "serve.generate:main",
            "ask a vision-language model; the answer streams",
            "vla generate --vlm=RUN/checkpoints/last/policy --prompt='What is on the table?' --images=[frame.png]",
        ),
        "ask": Verb(
            "multimodal.onnx_generate:run",
            "ask an exported model (`vla export --vlm.path`), without torch",
            "vla ask --vlm=EXPORT --prompt='What is on the table?' --images=[frame.png]",
            config="multimodal.onnx_generate:AskConfig",
        ),
        "train-draft": Verb(
            "serve.train_draft:main",
            "vision-language model -> draft that makes it answer faster",
            "vla train-draft --vlm=RUN/checkpoints/last/policy --corpus=DATA --output_dir=DRAFT",
            large_pages=True,
        ),
    },
    "Exchange": {
        "convert": Verb(
            "vla.lerobot_plugin.convert:main",
            "policy folder <-> LeRobot policy folder",
            "vla convert --source=RUN/checkpoints/last/policy --output_dir=LEROBOT_POLICY",
        ),
    },
    "Measure": {
        "experts": Verb(
            "sim.experts.measure:main",
            "success of the scripted experts",
            "vla experts --suite=libero_object --episodes=20",
        ),
        "compare": Verb(
            "sim.compare:main",
            "two evaluations on the same starts: paired difference, interval, p-value",
            "vla compare EVALUATION_A EVALUATION_B",
        ),
        "merge-evaluations": Verb(
            "sim.merge_evaluations:main",
            "shards of an evaluation (`vla eval --shard=i/n`) -> one evaluation",
            "vla merge-evaluations --folders='[SHARD_0, SHARD_1]' --output_dir=EVALUATION",
        ),
        "compare-policies": Verb(
            "sim.compare_policies:main",
            "evaluate two policies on the same starts and compare them",
            "vla compare-policies --policy.path=A --other.path=B --suite=robosuite_lift --episodes=50",
        ),
        "perturb-picture": Verb(
            "sim.perturbations.picture:main",
            "one start of a suite under every perturbation, as a picture",
            "vla perturb-picture --suite=libero_object --output=perturbations.png",
        ),
        "report": Verb(
            "sim.report.verb:main",
            "run folders -> the tables and figures of a README, or a check that they agree",
            "vla report --sources='{lift: EVALUATION}' --output_dir=REPORT --readme=README.md --check",
        ),
        "scaling": Verb(
            "sim.scaling.verb:main",
            "loss and success of many runs against parameters, demonstrations and compute",
            "vla scaling --runs='[RUNS]' --output_dir=SCALING",
        ),
        "bench": Verb("vla.cli:bench", "run tests/benchmarks/bench_NAME.py (from a checkout)", "vla bench decoding"),
    },
}
VERBS: dict[str, Verb] = {name: verb for group in GROUPS.values() for name, verb in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code: 0 done, 2 a mistake of the user (one line on stderr), 130 interrupted.

    REMASK_TRACEBACK=1 lets errors through whole.
    """
    from_shell, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name, *rest = argv
    try:
        if name not in VERBS:
            near = difflib.get_close_matches(name, VERBS, n=1)
            raise ValueError(f"no verb {name!r}{f'; did you mean {near[0]!r}?' if near else ''} Verbs: {', '.join(VERBS)}.")
        verb = VERBS[name]
        if verb.large_pages and from_shell:
            restart_with_large_pages()
        settings = parse_config(resolve(verb.config), rest, verb=name) if verb.config else rest
        return resolve(verb.target)(settings) or 0
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("REMASK_TRACEBACK"):
            raise
        print(f"error: {_one_error(error)}", file=sys.stderr)
        return 2


def overview() -> str:
    """What `vla --help` prints."""
    lines = ["Remask: discrete-diffusion robot policies, from demonstrations to success tables.", "", "usage: vla VERB ..."]
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:"]
        for name, verb in verbs.items():
            lines += [f"  {name:<18}{verb.summary}", f"  {'':<18}  $ {verb.example}"]
    lines += [
        "",
        "`vla VERB --help` lists the settings of a verb. Settings come from --config_path FILE.yaml and --name=value, the",
        "latter wins. Data, runs and caches live under REMASK_HOME (default ~/.cache/remask). REMASK_TRACEBACK=1 shows the",
        "traceback of an error.",
    ]
    return "\n".join(lines)


def resolve(target: str) -> Any:
    """One of ours, "module:function". Raises ValueError naming the extra to install if a package is missing."""
    module_name, function = target.split(":")
    try:
        return getattr(importlib.import_module(module_name), function)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this verb needs the Python package {error.name!r}, which is not installed. `make` in a checkout installs "
            f"everything; `vla doctor` lists what is missing."
        ) from error


def bench(argv: Sequence[str]) -> int:
    """Run `main(rest)` of tests/benchmarks/bench_NAME.py. Raises ValueError outside a checkout or for another name."""
    checkout = Path(__file__).resolve().parents[1]
    folder = checkout / "tests" / "benchmarks"
    names = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    if not folder.is_dir():
        raise ValueError("benchmarks are not part of the installed package; run `vla bench` from a checkout (git clone).")
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: vla bench NAME ...\n\nnames: " + ", ".join(names))
        return 0
    if argv[0] not in names:
        raise ValueError(f"no benchmark {argv[0]!r}; there are {', '.join(names) or 'none yet'}.")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return resolve(f"tests.benchmarks.bench_{argv[0]}:main")(list(argv[1:])) or 0


def parse_config(config_class: type[T], argv: Sequence[str], *, verb: str = "VERB") -> T:
    """Settings from `--config_path FILE.yaml` and `--a.b=value`; the command line wins.

    What draccus 0.10 does not say: fields may be nested dataclasses, tuples, lists, dicts (given whole, as YAML:
    `--tasks=[0,1]`, `--table='{a: 1}'`), Path, `X | None` (`null`). A dict on the command line is merged into the file's
    key by key. A Literal has no decoder: declare `str` and check it
    in __post_init__. A nested dataclass of which anything is given starts from its own class's defaults, not from the
    instance that the outer class names. An abbreviated flag would be taken silently, so names are checked here first;
    a ValueError of __post_init__ arrives wrapped and is unwrapped here. A bare `--resume` of a bool field means true.
    `--help` prints every field and leaves with SystemExit(0).
    Raises ValueError of one line for an unknown field or a value of the wrong type, FileNotFoundError for the YAML file.
    """
    import draccus  # 0.3 s, so not at import
    from draccus.utils import DraccusException
    from yaml import YAMLError

    settings = {setting.name: setting for setting in _settings(config_class)}
    if any(argument in ("-h", "--help") for argument in argv):
        print(_settings_help(config_class, settings, verb))
        raise SystemExit(0)
    arguments = _checked_arguments(argv, settings, verb)
    try:
        return draccus.parse(config_class, args=[*arguments, *_outer_defaults(config_class, settings, arguments)])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {error.filename} (--config_path).") from error
    except YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except (DraccusException, AttributeError) as error:
        cause = error.__cause__
        while isinstance(cause, DraccusException):  # of an optional group's field
            cause = cause.__cause__
        own = isinstance(cause, (ValueError, TypeError)) and "instantiate class" in str(error)
        text = " ".join(str(cause if own else error).split())
        raise ValueError(f"{text} (`vla {verb} --help` lists the settings)") from error


@dataclass(frozen=True)
class _Setting:
    """One leaf of a config class."""

    name: str  # dotted
    kind: Any
    default: Any  # MISSING if it must be given
    comment: str  # beside it in the source


def _settings(config_class: type, prefix: str = "", defaults: Any = MISSING) -> Iterator[_Setting]:
    """Every leaf in order, nested dataclasses opened; `defaults`: the instance that an outer class starts from."""
    from draccus.wrappers.docstring import get_attribute_docstring, get_preferred_help_text

    hints = get_type_hints(config_class)
    for field in fields(config_class):
        default = getattr(defaults, field.name, MISSING)
        if default is MISSING:
            default = field.default if field.default_factory is MISSING else field.default_factory()
        kinds = [kind for kind in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(kind)]
        if kinds:
            yield from _settings(kinds[0], f"{prefix}{field.name}.", default)
        else:
            comment = get_preferred_help_text(get_attribute_docstring(config_class, field.name)) or ""
            yield _Setting(prefix + field.name, hints[field.name], default, comment)


def _checked_arguments(argv: Sequence[str], settings: dict[str, _Setting], verb: str) -> list[str]:
    """`--name=value` for every argument, names checked, so that argparse has nothing left to misread."""
    result: list[str] = []
    waiting = list(argv)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--"):
            raise ValueError(f"unexpected argument {flag!r}; settings are written --name=value.")
        if name != "config_path" and name not in settings:
            near = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
            hint = f"; did you mean --{near[0]}?" if near else "."
            raise ValueError(f"no setting --{name}{hint} (`vla {verb} --help` lists them)")
        if not equals:
            if waiting and not waiting[0].startswith("--"):
                value = waiting.pop(0)
            elif name in settings and settings[name].kind is bool:
                value = "true"
            else:
                raise ValueError(f"--{name} needs a value: --{name}=...")
        result.append(f"--{name}={value}")
    return result


def _outer_defaults(config_class: type, settings: dict[str, _Setting], arguments: Sequence[str]) -> list[str]:
    """Arguments for what is not given, in groups of which something is, where the outer class's default is not the group's own."""
    import yaml
    from draccus import encode

    values = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    given = set(values)
    if "config_path" in values:
        settings_of_file = yaml.safe_load(Path(values["config_path"]).expanduser().read_text())
        given |= set(_flat_keys(settings_of_file)) if isinstance(settings_of_file, dict) else set()
    hints = get_type_hints(config_class)
    result = []
    for field in fields(config_class):
        if not is_dataclass(hints[field.name]) or not any(name.startswith(f"{field.name}.") for name in given):
            continue
        for own in _settings(hints[field.name], f"{field.name}."):
            outer = settings[own.name].default
            above = {own.name[:end] for end in range(len(own.name) + 1) if own.name[end : end + 1] in (".", "")}
            if outer is MISSING or outer == own.default or above & given:
                continue
            text = yaml.safe_dump(encode(outer), default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
            result.append(f"--{own.name}={text}")
    return result


def _flat_keys(values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of a YAML file's leaves; those of groups stand as a whole where they hold no mapping."""
    for key, value in values.items():
        yield from _flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]


def _settings_help(config_class: type, settings: dict[str, _Setting], verb: str) -> str:
    """Every setting with its default and the comment beside it in the source."""
    title = (config_class.__doc__ or config_class.__name__).strip().splitlines()[0]
    lines = [title, "", f"usage: vla {verb} [--config_path FILE.yaml] [--name=value ...]", ""]
    for setting in settings.values():
        lines.append(f"  --{setting.name}={_shown(setting)}")
        lines += textwrap.wrap(setting.comment, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _shown(setting: _Setting) -> str:
    """The default as one would type it; the type where there is none."""
    if setting.default is MISSING or setting.default is None:
        kind = str(getattr(setting.kind, "__name__", setting.kind) if isinstance(setting.kind, type) else setting.kind)
        return f"{'<required>' if setting.default is MISSING else 'null'}  ({kind.replace('pathlib.', '')})"
    if isinstance(setting.default, bool):
        return str(setting.default).lower()
    return str(list(setting.default) if isinstance(setting.default, tuple) else setting.default)


def _one_error(error: Exception) -> str:
    """The message; an operating system's error keeps its file name."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


if __name__ == "__main__":
    raise SystemExit(main())
