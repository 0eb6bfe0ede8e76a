"""`vla export --encoder.factory`: one graph gives the unit embeddings of encoder, merged adapters and head, without torch."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import multimodal.onnx_compare
from multimodal.bind.interface import Box, check_inputs
from multimodal.config import DecoderConfig, get_preset
from multimodal.decoder import Decoder, arange_positions
from multimodal.export_encoder import EmbeddingGraph, EncoderExport, TowerEncoder, export_encoder, merge_adapters
from multimodal.onnx_encoder import OnnxEncoder, load_onnx_encoder
from multimodal.vision import VisionTower
from vla.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
BOX = Box(0.0, 1.0, "of full brightness", 1 / 255)


@pytest.mark.parametrize("box", [Box(0.0, 0.1, "m", 0.1 / 255), Box(-2.1179039, 2.64, "normalised", 1 / 57)])
def test_what_is_clamped_into_a_box_is_within_it_for_both_twins(box: Box):
    """Bounds are rounded to the inputs' type by both; as float64, 0.1 is less than as float32."""
    inputs = box.clamp(5 * torch.randn(2, 3))
    inputs[0, 0], inputs[0, 1] = box.low, box.high
    check_inputs(box, "depth", inputs)
    manifest = SimpleNamespace(box=asdict(box), shape=[3], modality="depth")
    port = SimpleNamespace(name="inputs", dtype="float32")
    encoder = OnnxEncoder(manifest, SimpleNamespace(inputs=[port], run=lambda given: {"embedding": given["inputs"]}))
    np.testing.assert_array_equal(encoder.embed(inputs.numpy()), inputs.numpy())
    with pytest.raises(ValueError, match="allowed"):
        encoder.embed(np.nextafter(np.full((1, 3), box.high, np.float32), np.float32(9)))


class Shift(nn.Module):
    """An adapter: weight + a low-rank product."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(len(weight), 2)), nn.Parameter(torch.randn(2, weight[0].numel()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.3 * (self.up @ self.down).reshape(weight.shape)


class Frames(nn.Module):
    """The tower of a preset, for one image a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = VisionTower(get_preset("debug").vision)

    def forward(self, images: Tensor) -> Tensor:
        return self.tower(images[:, None])


class Waves(nn.Module):
    """Signals [B, 4, 6] through the shared decoder and torch's own attention; takes the batch's length by len, as ours do."""

    modality, dimension, logit_scale = "imu", 8, 14.0
    box = Box(-2.0, 2.0, "g", 4 / 255)

    def __init__(self) -> None:
        super().__init__()
        config = DecoderConfig(hidden_size=8, num_layers=1, num_heads=2, mlp_size=12, positions="learned", max_positions=4)
        self.enter, self.decoder = nn.Linear(6, 8), Decoder(config)
        self.attention = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)

    def embed(self, inputs: Tensor) -> Tensor:
        x = self.enter(inputs)
        x = self.attention(self.decoder(x, None, arange_positions(len(x), 0, x.shape[1], x.device)))
        return nn.functional.normalize(x.mean(1), dim=-1)


def images_export() -> EncoderExport:
    """Named by the command line, too: tower, adapters on two convolutions, calibrated head."""
    torch.manual_seed(0)
    tower = Frames().eval()
    convolutions = [module for module in tower.modules() if isinstance(module, nn.Conv2d)]
    for layer in convolutions[1:3]:
        parametrize.register_parametrization(layer, "weight", Shift(layer.weight))
    encoder = TowerEncoder(tower, BOX, tower.tower.width, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.2)).eval()
    head = nn.Sequential(nn.Linear(encoder.dimension, 24), nn.GELU(), nn.Linear(24, 12)).eval()
    return EncoderExport(encoder, torch.rand(4, 3, 32, 32), head, {"results": "none"})


def waves_export() -> EncoderExport:
    torch.manual_seed(0)
    return EncoderExport(Waves().eval(), torch.rand(3, 4, 6) * 4 - 2)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    for name, asked in (("image", images_export()), ("imu", waves_export())):
        export_encoder(asked, root / name)
    return {name: root / name for name in ("image", "imu")}


@pytest.mark.parametrize(("name", "make"), [("image", images_export), ("imu", waves_export)])
def test_embeddings_are_the_encoders_in_batches_of_any_size(exports, name, make):
    asked, exported = make(), load_onnx_encoder(exports[name], threads=1)
    with torch.no_grad():
        wanted = asked.encoder.embed(asked.examples)
        if asked.head is not None:
            wanted = nn.functional.normalize(asked.head(wanted), dim=-1)
    for count in (1, 2, len(wanted)):
        got = exported.embed(asked.examples[:count].numpy())
        np.testing.assert_allclose(got, wanted[:count].numpy(), atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)
    assert (exported.modality, exported.dimension, exported.logit_scale) == (name, wanted.shape[1], asked.encoder.logit_scale)


def test_the_manifest_holds_box_parity_and_what_was_merged(exports):
    manifest = json.loads((exports["image"] / "manifest.json").read_text())
    assert manifest["box"] == {"low": 0.0, "high": 1.0, "unit": "of full brightness", "step": 1 / 255, "norm": "linf"}
    assert max(part["max_abs"] for part in manifest["parity"]["graphs"]) < 1e-4 and manifest["source"] == {"results": "none"}
    assert len(manifest["adapters"]) == 3 and manifest["adapters"][-1] == "head Sequential"
    assert {path.name for path in exports["image"].iterdir()} == {"manifest.json", "encoder.onnx"}


def test_merging_leaves_the_original_its_adapters():
    module = EmbeddingGraph(images_export().encoder, None)
    merged, names = merge_adapters(module)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert len(names) == 2 and torch.equal(merged(images), module(images))
        assert not any(map(parametrize.is_parametrized, merged.modules()))
        assert any(map(parametrize.is_parametrized, module.modules()))
        before = module(images)
        next(part for part in module.modules() if isinstance(part, Shift)).up.add_(1.0)
        assert not torch.equal(module(images), before) and torch.equal(merged(images), before)


@pytest.mark.parametrize(
    "inputs", [np.full((1, 4, 6), 2.1), np.full((1, 4, 6), np.nan), np.zeros((1, 4, 5)), np.zeros((0, 4, 6))]
)
def test_what_is_outside_the_box_is_refused(exports, inputs):
    with pytest.raises(ValueError, match="imu inputs"):
        load_onnx_encoder(exports["imu"], threads=1).embed(inputs)


def test_the_gate_refuses_another_encoder(tmp_path, monkeypatch):
    asked = waves_export()
    write = multimodal.onnx_compare.write_graph

    def spoilt(graph, folder, precision):
        path = write(graph, folder, precision)
        asked.encoder.enter.bias.data += 0.1  # what was written is not what is compared
        return path

    monkeypatch.setattr(multimodal.onnx_compare, "write_graph", spoilt)
    with pytest.raises(ValueError, match="is not the imu encoder Waves: encoder: embedding"):
        export_encoder(asked, tmp_path / "export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_lower_precisions_are_close(tmp_path, precision):
    parity = export_encoder(waves_export(), tmp_path / "export", precision)
    assert min(part.cosine for part in parity.graphs) > 0.999 and max(part.max_abs for part in parity.graphs) > 1e-5


def test_what_is_no_encoder_is_refused(tmp_path):
    asked = images_export()
    with pytest.raises(ValueError, match="Frames is no ModalityEncoder: it lacks modality"):
        export_encoder(replace(asked, encoder=Frames()), tmp_path / "export")
    with pytest.raises(ValueError, match="training mode"):
        export_encoder(replace(asked, head=nn.Linear(2, 2)), tmp_path / "export")
    with pytest.raises(ValueError, match="allowed: \\[0, 1\\]"):
        export_encoder(replace(asked, examples=asked.examples + 1), tmp_path / "export")
    with pytest.raises(ValueError, match="at least 2 examples"):
        export_encoder(replace(asked, examples=asked.examples[:1]), tmp_path / "export")


WITHOUT_TORCH = """
import json, sys
import numpy as np
from multimodal.onnx_encoder import load_onnx_encoder

encoder = load_onnx_encoder(sys.argv[1], threads=1)
embedding = encoder.embed(np.zeros((2, 4, 6), np.float32))
found = {name.split(".")[0] for name, module in sys.modules.items() if "site-packages" in str(getattr(module, "__file__", ""))}
print(json.dumps({"shape": embedding.shape, "packages": sorted(found)}))
"""


def test_the_folder_alone_embeds_without_torch(exports):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(exports["imu"])]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    said = json.loads(finished.stdout)
    assert said["shape"] == [2, 8] and not {"torch", "transformers", "timm", "draccus", "tokenizers"} & set(said["packages"])


def test_the_verb_takes_a_factory(tmp_path, capsys):
    words = ["export", "--encoder.factory=tests.test_onnx_encoder:waves_export", f"--output_dir={tmp_path / 'export'}"]
    assert cli(words) == 0 and "load_onnx_encoder" in capsys.readouterr().out
    assert load_onnx_encoder(tmp_path / "export", threads=1).modality == "imu"
