"""Checkpoint -> a folder of ONNX graphs that is a policy by itself, behind a gate that compares the two (`vla export`).

The verb exports three things: policies (here), vision-language models (multimodal/export_vlm.py) and encoders
(multimodal/export_encoder.py).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from multimodal.checkpoint import replaced_folder
from multimodal.config import check_choice
from multimodal.onnx_compare import print_graphs, write_graphs
from multimodal.onnx_folder import TOKENIZER, check_new_folder, file_hashes
from multimodal.onnx_writer import OPSET, PACKAGES, PRECISIONS, check_packages, halved
from vla.frame_cache import FrameCache
from vla.onnx_graphs import policy_graphs
from vla.onnx_manifest import OnnxManifest, is_onnx_policy
from vla.onnx_parity import IDENTICAL, Parity, measure, real_observations
from vla.onnx_policy import load_onnx_policy
from vla.policy import TorchPolicy, load_policy, package_versions

CHECKS = ("observations", "graphs", "closed_loop")


@dataclass(frozen=True)
class ExportSource:
    """Which model."""

    path: str = ""  # checkpoint folder, e.g. RUN/checkpoints/last/policy; a vlm may be a published model's folder


@dataclass(frozen=True)
class EncoderSource:
    """Which encoder."""

    factory: str = ""  # module:function, called without arguments, which gives a multimodal.onnx_encoder.EncoderExport


@dataclass(frozen=True)
class CheckData:
    """Real observations for the gate, or questions about real images."""

    root: Path | None = None  # data set folder or its frame cache; for a vlm a corpus (`vla corpus`)
    observations: int = 80  # at least 64 must give identical tokens (float32)


@dataclass(frozen=True)
class ClosedLoop:
    """The paired evaluation of --check=closed_loop."""

    suite: str = "robosuite_lift"
    tasks: list[int] | None = None  # default: all
    episodes: int = 10  # per task, on the same starts for both
    workers: int = 2  # simulator processes


@dataclass(frozen=True)
class ExportConfig:
    """Settings of `vla export`."""

    policy: ExportSource = field(default_factory=ExportSource)
    vlm: ExportSource = field(default_factory=ExportSource)  # instead of a policy
    encoder: EncoderSource = field(default_factory=EncoderSource)  # instead of a policy
    output_dir: Path | None = None  # a new folder, or an earlier export, which is replaced once the new one has passed
    precision: str = "float32"  # float32 | float16 | int8
    check: str = "observations"  # observations | graphs (no data set needed) | closed_loop: observations, then simulation
    dataset: CheckData = field(default_factory=CheckData)
    closed_loop: ClosedLoop = field(default_factory=ClosedLoop)

    def __post_init__(self) -> None:
        check_choice("ExportConfig", "precision", self.precision, PRECISIONS)
        check_choice("ExportConfig", "check", self.check, CHECKS)
        if self.dataset.observations < IDENTICAL:
            raise ValueError(f"dataset.observations is {self.dataset.observations}; the check needs at least {IDENTICAL}.")


def export_policy(config: ExportConfig) -> Parity:
    """Write the folder if the gate passes. Raises ValueError saying what failed, and then leaves no folder behind."""
    source, output, cache = checked_paths(config)
    policy = load_policy(source)
    with replaced_folder(output) as folder:
        manifest = write_folder(policy, folder, config.precision)
        exported = load_onnx_policy(folder)
        observations, known = real_observations(cache, exported, config.dataset.observations) if cache else ([], [])
        parity = measure(policy, exported, observations, known)
        print_parity(parity)
        if parity.failures:
            raise ValueError(f"the {config.precision} export of {source} is not the policy: {'; '.join(parity.failures)}.")
        replace(manifest, parity=parity.to_dict()).save(folder)
        if config.check == "closed_loop" and compare_in_simulation(config, folder):
            raise ValueError(f"the {config.precision} export of {source} is not the policy: it solves fewer starts, see above.")
    return parity


def write_folder(policy: TorchPolicy, folder: Path, precision: str) -> OnnxManifest:
    """Graphs, tokenizer and a manifest without parity; the folder exists."""
    assets = policy.assets
    (folder / TOKENIZER).write_text(assets.text_tokenizer.to_json())
    model = halved(policy.model) if precision == "float16" else policy.model
    graphs = write_graphs(policy_graphs(model, assets.head.type), folder, precision)
    manifest = OnnxManifest(
        precision=precision,
        opset=OPSET,
        text_length=assets.model.text_length,
        action_horizon=assets.model.action_horizon,
        head=asdict(assets.head),
        decode=asdict(assets.decode),
        images=asdict(assets.images),
        spec=assets.spec.to_dict(),
        statistics=assets.statistics.to_dict(),
        action_tokenizer=assets.action_tokenizer.to_dict(),
        graphs=graphs,
        files=file_hashes(folder),
        source={"checkpoint": policy.content_hash, "provenance": assets.provenance},
        versions=package_versions(PACKAGES),
        parity={},
        prompt=asdict(assets.model.prompt) if assets.model.prompt.pad_token else {},
    )
    manifest.save(folder)
    return manifest


def checked_paths(config: ExportConfig) -> tuple[Path, Path, FrameCache | None]:
    """Checkpoint, output folder and open frame cache (None where no data set is wanted), before anything slow is done."""
    check_packages()
    if not config.policy.path:
        raise ValueError("Which model? Give --policy.path=RUN/checkpoints/last/policy, --vlm.path or --encoder.factory.")
    source, output = Path(config.policy.path).expanduser(), checked_output(config)
    if is_onnx_policy(source):
        raise ValueError(f"{source} is an exported policy already; give the checkpoint that it was made from.")
    check_new_folder(output)
    if config.check == "graphs":
        return source, output, None
    if config.dataset.root is None:
        raise ValueError(
            "The check decodes real observations: give --dataset.root=FOLDER (made by `vla collect`), or --check=graphs to "
            "compare the graphs on random numbers only."
        )
    return source, output, FrameCache.open(config.dataset.root)


def print_parity(parity: Parity) -> None:
    """The worst output of every graph, and the chunks."""
    print_graphs(parity.graphs, parity.precision)
    if parity.chunks is not None:
        chunks = parity.chunks
        parts = [f"{chunks.identical} chunks identical"]
        parts += [f"{chunks.ties} on a tie that torch breaks both ways"] if chunks.ties else []
        parts += [f"{chunks.same_tokens:.2%} of the tokens"] if chunks.same_tokens is not None else []
        parts += [f"unit actions {chunks.l1:.1e} off in the mean, {chunks.max_abs:.1e} at most"]
        print(f"{chunks.observations} real observations: {'; '.join(parts)}")


def compare_in_simulation(config: ExportConfig, folder: Path) -> int:
    """The exit code of `vla compare-policies`, found in the table of verbs: nothing here imports a simulator."""
    from vla.cli import VERBS, resolve

    return resolve(VERBS["compare-policies"].target)(closed_loop_arguments(config, folder))


def closed_loop_arguments(config: ExportConfig, folder: Path) -> list[str]:
    """What `vla compare-policies` is asked: the checkpoint and its export, which is in `folder`, on the same starts."""
    loop = config.closed_loop
    arguments = [f"--policy.path={config.policy.path}", f"--other.path={folder}", f"--suite={loop.suite}"]
    arguments += [f"--episodes={loop.episodes}", f"--workers={loop.workers}", "--max_batch=1", "--resume=true"]
    return arguments + ([] if loop.tasks is None else [f"--tasks={json.dumps(loop.tasks)}"])


def main(argv: Sequence[str]) -> int:
    """`vla export`."""
    from vla.cli import parse_config

    config = parse_config(ExportConfig, argv, verb="export")
    asked = {"policy": config.policy.path, "vlm": config.vlm.path, "encoder": config.encoder.factory}
    given = [name for name, value in asked.items() if value]
    if len(given) > 1:
        raise ValueError(f"One model at a time: --{given[0]} and --{given[1]} are both given.")
    if given == ["vlm"]:
        return export_language(config)
    if given == ["encoder"]:
        return export_one_encoder(config)
    export_policy(config)
    print(f"exported: {config.output_dir}\nnext: vla eval --policy.path={config.output_dir} --suite=... --episodes=50")
    return 0


def export_language(config: ExportConfig) -> int:
    """`vla export --vlm.path`."""
    from multimodal.export_vlm import export_vlm

    output = checked_output(config)
    if config.check == "closed_loop":
        raise ValueError("--check=closed_loop compares policies; a vision-language model takes observations or graphs.")
    if config.check == "observations" and config.dataset.root is None:
        raise ValueError(
            "The check asks real questions: give --dataset.root=CORPUS (made by `vla corpus`), or --check=graphs to compare "
            "the graphs on random numbers only."
        )
    corpus = None if config.check == "graphs" else config.dataset.root.expanduser()
    export_vlm(config.vlm.path, output, config.precision, corpus, config.dataset.observations)
    print(f"exported: {output}\nnext: vla ask --vlm={output} --prompt='...' --images=[frame.png]")
    return 0


def export_one_encoder(config: ExportConfig) -> int:
    """`vla export --encoder.factory`."""
    from multimodal.export_encoder import export_encoder
    from vla.given_function import given_function

    output = checked_output(config)
    export_encoder(given_function("--encoder.factory", config.encoder.factory)(), output, config.precision)
    print(f"exported: {output}\nnext: multimodal.onnx_encoder.load_onnx_encoder({str(output)!r}).embed(inputs)")
    return 0


def checked_output(config: ExportConfig) -> Path:
    """Raises ValueError without an output folder."""
    if config.output_dir is None:
        raise ValueError("Where to? Give --output_dir=FOLDER.")
    return config.output_dir.expanduser()
