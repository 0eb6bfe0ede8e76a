"""`vla export`: the gate passes what equals the policy and nothing else, and the folder alone, without torch, is the policy."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import multimodal.onnx_compare
import vla.onnx_parity
from multimodal.layers import RMSNorm
from multimodal.onnx_runner import OnnxRunner
from multimodal.onnx_writer import OPSET, OnnxGraph, halved, quantise, write_graph
from sim.compare_policies import ComparePoliciesConfig
from sim.policy_source import PolicySource, load_source
from tests.exporting import SharedGraphs, write_checkpoint
from tests.reaching import SPEC
from vla.cli import VERBS, parse_config
from vla.cli import main as cli
from vla.decision import known_actions
from vla.export import CheckData, ClosedLoop, ExportConfig, ExportSource, closed_loop_arguments, export_policy
from vla.frame_cache import FrameCache
from vla.heads import HEADS
from vla.interface import Observation
from vla.onnx_graphs import STEP_KINDS, policy_graphs
from vla.onnx_parity import Case, is_tie, measure, real_observations
from vla.onnx_policy import OnnxPolicy, load_onnx_policy
from vla.policy import PolicyAssets, TorchPolicy, load_policy
from vla.policy_folder import open_policy
from vla.unmasking import DecodeConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data") / "cache"


@pytest.fixture(scope="module")
def checkpoints(data, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {head: write_checkpoint(root / head, data, head) for head in HEADS}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> SharedGraphs:
    return SharedGraphs(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def exports(checkpoints, data, shared, tmp_path_factory) -> dict[str, Path]:
    """Every head exported through the gate."""
    root = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        for head, checkpoint in checkpoints.items():
            patch.setattr(multimodal.onnx_compare, "write_graph", shared.of(head))
            export_policy(settings(checkpoint, root / head, data))
    return {head: root / head for head in HEADS}


def settings(checkpoint: Path, output: Path, data: Path | None, **changes) -> ExportConfig:
    return ExportConfig(policy=ExportSource(str(checkpoint)), output_dir=output, dataset=CheckData(data), **changes)


def observations(data: Path, texts: tuple[str, ...]) -> list[Observation]:
    cache = FrameCache.open(data)
    return [
        Observation({camera: np.array(cache.images[camera][9 * row]) for camera in SPEC.cameras}, np.array(cache.state[row]), text)
        for row, text in enumerate(texts)
    ]


TEXTS = ("go to the bright side", "", "go", "Go to  the BRIGHT side", "an unknown word")  # of several lengths


@pytest.mark.parametrize("head", HEADS)
def test_every_head_passes_the_gate_and_says_so(exports, head):
    manifest = json.loads((exports[head] / "manifest.json").read_text())
    chunks = manifest["parity"]["chunks"]
    assert chunks["identical"] >= 64 and chunks["identical"] + chunks["ties"] == chunks["observations"]
    assert chunks["max_abs"] < 2e-4 and max(part["max_abs"] for part in manifest["parity"]["graphs"]) < 5e-5
    assert manifest["opset"] == OPSET == onnx.load(exports[head] / "step.onnx").opset_import[0].version
    assert {"manifest.json", "tokenizer.json", "vision.onnx", "prefill.onnx", "step.onnx"} == {
        path.name for path in exports[head].iterdir()
    }
    assert all(b"/tests/" not in path.read_bytes() and bytes(ROOT) not in path.read_bytes() for path in exports[head].iterdir())


@pytest.mark.parametrize("head", HEADS)
def test_chunks_equal_torchs_for_any_batch_text_seed_and_known_beginning(exports, checkpoints, data, head):
    decode = {"rounds": 3, "threshold": 2.0, "token_temperature": 0.7, "order_temperature": 1.0, "remask": "remdm", "euler_steps": 3}
    there, here = (open_policy(folder[head], decode=decode, threads=1) for folder in (checkpoints, exports))
    assert isinstance(there, TorchPolicy) and isinstance(here, OnnxPolicy)
    assert there.spec == here.spec and there.action_horizon == here.action_horizon
    known = [None, np.array([[0.1, -0.02, 1.0], [0.3, 0.01, -1.0]], dtype=np.float32), None, None, np.zeros((4, 3), np.float32)]
    seeds = [3, 1, 4, 1, 5]
    wanted = there.act(observations(data, TEXTS), known=known, seeds=seeds)
    together = here.act(observations(data, TEXTS), known=known, seeds=seeds)
    for row, observation in enumerate(observations(data, TEXTS)):
        (alone,) = here.act([observation], known=[known[row]], seeds=[seeds[row]])
        for chunk in (together[row], alone):
            np.testing.assert_allclose(chunk.actions, wanted[row].actions, atol=1e-4)
            assert chunk.info["rounds"] == wanted[row].info["rounds"]
            if "confidence" in wanted[row].info:
                np.testing.assert_allclose(chunk.info["confidence"], wanted[row].info["confidence"], atol=1e-4)
        if known[row] is not None:
            assert np.array_equal(together[row].actions[: len(known[row])], known[row])


ACT_WITHOUT_TORCH = """
import json, sys
import numpy as np
from vla.interface import Observation
from vla.policy_folder import open_policy
from vla.unmasking import DecodeConfig

policy = open_policy(sys.argv[1], threads=1)
frames = np.load(sys.argv[2])
images = {camera: frames[camera] for camera in policy.spec.cameras}
(chunk,) = policy.act([Observation(images, frames["state"], "go to the bright side")])
ours = {"vla", "multimodal"}
found = {name.split(".")[0] for name, module in sys.modules.items() if "site-packages" in str(getattr(module, "__file__", ""))}
print(json.dumps({"actions": chunk.actions.tolist(), "packages": sorted(found - ours), "torch": "torch" in sys.modules}))
"""


def test_the_folder_alone_acts_without_torch(exports, checkpoints, data, tmp_path):
    head = "discrete_diffusion"
    (observation,) = observations(data, TEXTS[:1])
    np.savez(tmp_path / "frame.npz", state=observation.state, **observation.images)
    folder = shutil.copytree(exports[head], tmp_path / "moved")
    command = [sys.executable, "-c", ACT_WITHOUT_TORCH, str(folder), str(tmp_path / "frame.npz")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout)
    (wanted,) = load_policy(checkpoints[head]).act([observation])
    np.testing.assert_allclose(answer["actions"], wanted.actions, atol=1e-5)
    heavy = {"torch", "torchvision", "transformers", "timm", "onnx", "onnxscript", "draccus", "PIL", "safetensors", "scipy"}
    assert not answer["torch"] and not heavy & set(answer["packages"]), answer["packages"]
    assert {"numpy", "onnxruntime", "tokenizers"} <= set(answer["packages"])


def test_an_evaluation_takes_an_exported_folder(exports):
    policy = load_source(PolicySource(path=str(exports["parallel"]), decode={"rounds": 2}), workers=1)
    assert isinstance(policy, OnnxPolicy) and policy.decode.rounds == 2 and len(policy.content_hash) == 16


# -------------------------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize(
    ("head", "parameter", "failing"),
    [
        ("discrete_diffusion", "action_head.weight", "step: logits"),
        ("discrete_diffusion", "vlm.decoder.blocks.0.attention.key.weight", "prefill: keys.0"),
        ("flow", "vlm.projector.bias", "vision: image_tokens"),
    ],
)
def test_a_graph_of_other_weights_is_refused_and_named(exports, checkpoints, head, parameter, failing):
    reference = load_policy(checkpoints[head])
    tensor = reference.model.get_parameter(parameter)
    tensor.data += 1e-2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    failures = measure(reference, load_onnx_policy(exports[head], threads=1), [], []).failures
    assert any(failure.startswith(failing) for failure in failures)


def test_chunks_decoded_otherwise_are_refused(exports, checkpoints, data, tmp_path):
    """Equal graphs are not enough: here the manifest's tokenizer is not the policy's."""
    folder = shutil.copytree(exports["discrete_diffusion"], tmp_path / "other")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["action_tokenizer"]["high"][0] *= 1.05
    (folder / "manifest.json").write_text(json.dumps(manifest))
    exported = load_onnx_policy(folder, threads=1)
    real = real_observations(FrameCache.open(data), exported, 64)
    failures = measure(load_policy(checkpoints["discrete_diffusion"]), exported, *real).failures
    assert len(failures) == 1 and "chunks differ" in failures[0]


def test_what_fails_the_gate_leaves_the_old_export_alone(exports, checkpoints, data, shared, tmp_path, monkeypatch):
    output = shutil.copytree(exports["l1"], tmp_path / "export")
    monkeypatch.setattr(multimodal.onnx_compare, "write_graph", shared.of("flow"))
    monkeypatch.setattr(multimodal.onnx_compare, "MAX_ABS", 0.0)
    with pytest.raises(ValueError, match="is not the policy: vision: image_tokens"):
        export_policy(settings(checkpoints["flow"], output, data))
    assert load_onnx_policy(output).manifest.head["type"] == "l1" and [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_failed_closed_loop_leaves_the_old_export_alone(exports, checkpoints, data, shared, tmp_path, monkeypatch):
    """The new one is whole while it is compared, so that a simulator can load it."""
    output = shutil.copytree(exports["l1"], tmp_path / "export")
    monkeypatch.setattr(multimodal.onnx_compare, "write_graph", shared.of("flow"))
    asked = []

    def compared(argv: list[str]) -> int:
        asked.append(load_onnx_policy(parse_config(ComparePoliciesConfig, argv).other.path).manifest.head["type"])
        return 1

    monkeypatch.setattr("sim.compare_policies.main", compared)
    with pytest.raises(ValueError, match="is not the policy: it solves fewer starts"):
        export_policy(settings(checkpoints["flow"], output, data, check="closed_loop"))
    assert asked == ["flow"] and load_onnx_policy(output).manifest.head["type"] == "l1"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_only_what_torch_breaks_both_ways_is_a_tie(checkpoints, data):
    """All but the last step is known, and there the two gripper ids get one logit from different weights."""
    assets, _ = PolicyAssets.load(checkpoints["discrete_diffusion"])
    model, (observation,) = load_policy(checkpoints["discrete_diffusion"]).model, observations(data, TEXTS[:1])
    policy = TorchPolicy(replace(assets, decode=DecodeConfig(rounds=1)), model)
    minus, end = assets.action_tokenizer.valid_range(2)
    known = known_actions([np.full((3, 3), 0.1, np.float32)], 4, 3)
    noisy = torch.as_tensor(assets.action_tokenizer.encode(known.actions))
    noisy[:, 3] = assets.action_tokenizer.mask_id
    with torch.inference_mode():
        hidden = model.action_hidden(noisy.flatten(1), model.prefill(*policy.embed([observation])))[0, -1]
    weight = model.action_head.weight.data
    other = torch.randn(len(hidden), generator=torch.Generator().manual_seed(0))
    weight[end - 1] = weight[minus] + other - hidden * (other @ hidden) / (hidden @ hidden)
    decision = policy.decide([observation], known, [0])

    def case(slot: int, token: int, action: float) -> Case:
        tokens, actions = decision.tokens[0].copy(), decision.actions[0].copy()
        tokens[3, slot], actions[3, slot] = token, action
        return Case(observation, known, 0, actions, tokens)

    assert is_tie(policy, case(2, minus, -1.0)) and is_tie(policy, case(2, end - 1, 1.0))
    motion = decision.tokens[0, 3, 0]
    assert not is_tie(policy, case(0, motion + (1 if motion < 20 else -1), decision.actions[0, 3, 0]))


# ------------------------------------------------------------------------------------------------------- lower precisions


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_step_of_lower_precision_is_close_and_smaller(exports, checkpoints, tmp_path, precision):
    model = load_policy(checkpoints["discrete_diffusion"]).model
    graph = policy_graphs(halved(model) if precision == "float16" else model, "discrete_diffusion")[2]
    path = write_graph(graph, tmp_path, precision)
    runner, whole = OnnxRunner(path, threads=1), OnnxRunner(exports["discrete_diffusion"] / "step.onnx", threads=1)
    generator = np.random.default_rng(0)
    values = {"tokens": generator.integers(0, 33, (3, 12)), "is_real": np.arange(20) < np.array([[20], [15], [9]])}
    for port in runner.inputs:
        if port.name not in values:
            values[port.name] = generator.normal(size=(3, *port.shape[1:2], 20, *port.shape[3:])).astype(port.dtype)
    wide = {name: value.astype(np.float32) if value.dtype == np.float16 else value for name, value in values.items()}
    got, wanted = runner.run(values)["logits"].ravel(), whole.run(wide)["logits"].ravel()
    assert got @ wanted / np.sqrt((got @ got) * (wanted @ wanted)) > 0.999
    assert got.dtype == np.float32 and not np.array_equal(got, wanted)
    assert path.stat().st_size < whole_size(exports) and len(list(tmp_path.iterdir())) == 1
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    linears = 2 * 6  # query, key, value, output, gate, up of two layers; down and the head are spared
    assert kinds.count("MatMulInteger") == (linears if precision == "int8" else 0)


def whole_size(exports: dict[str, Path]) -> int:
    return (exports["discrete_diffusion"] / "step.onnx").stat().st_size


def test_a_norm_is_one_operator_of_onnxruntime(tmp_path):
    norm, x = RMSNorm(8, 1e-6), torch.randn(3, 8)
    norm.weight.data.uniform_(0.5, 2.0)
    path = write_graph(OnnxGraph("norm", norm, {"x": x}, ("y",), {"x": {0: "batch"}}), tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node] == ["SimplifiedLayerNormalization"]
    np.testing.assert_allclose(OnnxRunner(path, threads=1).run({"x": x.numpy()})["y"], norm(x).detach().numpy(), atol=1e-6)


@pytest.mark.check
@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("head", ["discrete_diffusion", "flow"])
def test_exports_of_lower_precision_act_nearly_alike(checkpoints, data, tmp_path, head, precision):
    """Measured, not gated at 0.01: an untrained policy is sure of nothing, so a rounding error moves whole tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vla.onnx_parity, "ACTION_L1", 0.2)
        parity = export_policy(settings(checkpoints[head], tmp_path / "export", data, precision=precision))
    assert parity.precision == precision and min(part.cosine for part in parity.graphs) > 0.999
    assert load_onnx_policy(tmp_path / "export").manifest.precision == precision


def test_weights_in_a_file_beside_the_graph_survive_quantisation(exports, tmp_path):
    """What a model over 2 GB is saved as."""
    model = onnx.load(exports["parallel"] / "step.onnx")
    path = tmp_path / "step.onnx"
    onnx.save(model, path, save_as_external_data=True, location="step.onnx.data", size_threshold=0)
    before = (tmp_path / "step.onnx.data").stat().st_size
    quantise(path)
    assert {file.name for file in tmp_path.iterdir()} == {"step.onnx", "step.onnx.data"}
    assert (tmp_path / "step.onnx.data").stat().st_size < before and OnnxRunner(path, threads=1).inputs[0].name == "tokens"


def test_half_precision_keeps_tables_of_angles_whole(checkpoints):
    model = load_policy(checkpoints["flow"]).model
    half = halved(model)
    assert next(half.parameters()).dtype == torch.float16 and next(model.parameters()).dtype == torch.float32
    for tables in ((half.vlm.decoder.rotary.inverse_frequency, model.vlm.decoder.rotary.inverse_frequency),
                   (half.step_slots.frequencies, model.step_slots.frequencies)):  # fmt: skip
        assert torch.equal(*tables)


# ------------------------------------------------------------------------------------------------------------ the command


def test_the_verb_exports_and_what_cannot_be_exported_is_one_line(exports, checkpoints, data, shared, tmp_path, capsys, monkeypatch):
    source, output = f"--policy.path={checkpoints['parallel']}", f"--output_dir={tmp_path / 'export'}"
    good = [source, output, f"--dataset.root={data}"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    mistakes = {
        "float32, float16, int8": [*good, "--precision=float64"],
        "observations, graphs, closed_loop": [*good, "--check=never"],
        "--dataset.root=FOLDER": [source, output],
        "at least 64": [*good, "--dataset.observations=8"],
        "exported policy already": [f"--policy.path={exports['parallel']}", output],
        "choose a new folder": [source, f"--output_dir={tmp_path / 'full'}"],
        "--policy.path=RUN": [output],
        "--output_dir=FOLDER": [source],
        "No checkpoint at": [f"--policy.path={tmp_path}", output, f"--dataset.root={data}"],
    }
    for message, arguments in mistakes.items():
        assert cli(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "export").exists() and (tmp_path / "full" / "thesis.txt").exists()
    monkeypatch.setattr(multimodal.onnx_compare, "write_graph", shared.of("parallel"))
    assert cli(["export", *good]) == 0
    printed = capsys.readouterr().out
    assert "80 real observations" in printed and f"vla eval --policy.path={tmp_path / 'export'}" in printed
    assert cli(["export", source, output, "--check=graphs"]) == 0  # replaces the first; no data set needed
    assert load_onnx_policy(tmp_path / "export").manifest.parity["chunks"] is None


def test_a_missing_package_is_named(checkpoints, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("multimodal.onnx_writer.PACKAGES", ("onnx", "no_such_exporter"))
    assert cli(["export", f"--policy.path={checkpoints['l1']}", f"--output_dir={tmp_path / 'export'}"]) == 2
    assert "needs no_such_exporter: pip install 'remask[export]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "No checkpoint at|No ONNX policy at"),
        (lambda folder: (folder / "manifest.json").write_text('{"version": 1}'), "format None, this version reads"),
        (lambda folder: (folder / "manifest.json").write_text("[1"), "not JSON"),
        (lambda folder: (folder / "step.onnx").unlink(), "lacks step.onnx"),
        (lambda folder: (folder / "step.onnx").write_bytes(b"x" + (folder / "step.onnx").read_bytes()), "sha256 differs"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(exports, tmp_path, change, message):
    folder = shutil.copytree(exports["l1"], tmp_path / "export")
    change(folder)
    for load in (open_policy, load_onnx_policy):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load(folder)


def test_what_is_no_graph_is_refused_with_the_reason(tmp_path):
    (tmp_path / "step.onnx").write_bytes(b"no protobuf")
    with pytest.raises(ValueError, match="cannot load .*step.onnx"):
        OnnxRunner(tmp_path / "step.onnx")


def test_a_device_that_is_not_there_is_refused(exports):
    with pytest.raises(ValueError, match="cannot run on 'tpu' here; it can on cpu"):
        open_policy(exports["l1"], device="tpu")


def test_the_closed_loop_is_a_comparison_on_the_same_starts():
    """The verb that it is handed to understands what it is asked."""
    loop = ClosedLoop(suite="libero_object", tasks=[0, 3], episodes=5, workers=1)
    config = ExportConfig(policy=ExportSource("CHECKPOINT"), output_dir=Path("EXPORT"), check="closed_loop", closed_loop=loop)
    asked = parse_config(ComparePoliciesConfig, closed_loop_arguments(config, Path("NEW")))
    assert (asked.policy.path, asked.other.path) == ("CHECKPOINT", "NEW") and asked.max_batch == 1 and asked.resume
    assert (asked.suite, asked.tasks, asked.episodes, asked.workers) == ("libero_object", [0, 3], 5, 1)
    assert VERBS["compare-policies"].target == "sim.compare_policies:main"


def test_every_head_has_a_step_graph():
    assert STEP_KINDS.keys() == HEADS.keys()


def test_a_data_set_of_another_robot_is_refused(exports, data):
    policy = load_onnx_policy(exports["l1"], threads=1)
    cache = FrameCache.open(data)
    with pytest.raises(ValueError, match="holds 80 frames .* needs 81"):
        real_observations(cache, policy, 81)
    with pytest.raises(ValueError, match="equal image size"):
        real_observations(replace(cache, spec=replace(SPEC, state_names=("a", "b", "c"))), policy, 64)
