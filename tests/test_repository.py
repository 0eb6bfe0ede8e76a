"""Laws of the repository itself: which way imports point, what an import costs, and what the lock covers."""

import ast
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from sim.report.readme import split_blocks

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("multimodal", "vla", "serve", "sim")  # each imports itself and those before it
MAX_LINES = 400

# What a robot needs to talk to a server or to run an exported policy, and what a simulator process needs to run an episode.
TORCH_FREE = (
    "multimodal.bind.corpus_file",
    "multimodal.bind.sensors",
    "multimodal.corpus_file",
    "multimodal.config",
    "multimodal.numpy_images",
    "multimodal.dialogue",
    "multimodal.onnx_encoder",
    "multimodal.onnx_folder",
    "multimodal.onnx_generate",
    "multimodal.onnx_runner",
    "multimodal.onnx_vlm",
    "multimodal.pretrained.text",
    "multimodal.questions",
    "multimodal.tokenizer",
    "vla.action_tokenizer",
    "vla.decision",
    "vla.numpy_decoding",
    "vla.onnx_heads",
    "vla.onnx_manifest",
    "vla.onnx_policy",
    "vla.policy_folder",
    "vla.transforms",
    "vla.unmasking",
    "vla.interface",
    "vla.home",
    "vla.chunking",
    "vla.rotations",
    "vla.normalization",
    "vla.cli",
    "multimodal.sampling",
    "vla.lerobot_dataset",
    "serve.client",
    "serve.errors",
    "serve.request",
    "serve.generation",
    "serve.answer_text",
    "serve.scheduler",
    "serve.tree",
    "serve.verify",
    "serve.client_wires",
    "serve.client_grpc",
    "serve.realtime",
    "sim.watch",
    "sim.rollout",
    "sim.environment",
    "sim.suites",
    "sim.seeds",
    "sim.libero",
    "sim.robosuite_env",
    "sim.rendering",
    "sim.results",
    "sim.workers",
    "sim.episode_worker",
    "sim.demonstration",
    "sim.collect",
    "sim.evaluate",
    "sim.compare",
    "sim.perturbations.effect",
    "sim.perturbations.kinds",
    "sim.perturbations.perturbed_environment",
    "sim.perturbations.picture",
    "sim.shards",
    "sim.merge_evaluations",
    "sim.report.verb",
    "sim.scaling.fit",
    "sim.scaling.verb",
    "sim.video",
    "sim.packing",
    "sim.folder_lock",
    "sim.gym_env",
    "sim.libero_hdf5",
    "sim.import_dataset",
    "sim.experts.programs",
    "sim.bound.corpus",
    "sim.bound.sample",
    "sim.bound.worker",
    "sim.corpus",
    "sim.corpus_plan",
    "sim.corpus_worker",
    "sim.corpus_episode",
    "sim.scene_state",
    "sim.scene_facts",
    "sim.scene_reader",
    "sim.scene_shuffle",
    "sim.language.texts",
)
HEAVY = {"torch", "lerobot", "libero", "robosuite", "mujoco", "transformers", "timm", "open_clip"}

UNLOCKED = {"parity"}  # extras that `make` does not install: rivals to compare with

DISTRIBUTIONS = {  # import name -> distribution, where they differ
    "PIL": "pillow",
    "OpenGL": "pyopengl",
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_tools": "grpcio-tools",
    "libero": "hf-libero",
    "open_clip": "open-clip-torch",
    "yaml": "pyyaml",
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported_names(path: Path, top_level_only: bool = False) -> list[str]:
    """Every module that the file imports; by default anywhere in it, functions included."""
    names = []
    for node in tree_of(path).body if top_level_only else ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return names


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_packages_below_it(package: str):
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imported_names(path)
        if name.split(".")[0] in (*above, "tests") or name.startswith(".")
    ]
    assert not wrong, f"{package} may import {PACKAGES[: PACKAGES.index(package) + 1]}, by absolute name: {wrong}"


IMPORT_EACH = """
import importlib, json, sys

loaded = {}
for name in sys.argv[1:]:
    before = set(sys.modules)
    importlib.import_module(name)
    loaded[name] = sorted({module.split(".")[0] for module in set(sys.modules) - before})
print(json.dumps(loaded))
"""


def test_torch_free_modules_import_without_torch():
    """Nor without a simulator: a robot's client and `vla --help` start in a fraction of a second."""
    modules = [name for name in TORCH_FREE if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()]
    loaded = json.loads(run_python(IMPORT_EACH, *modules))
    heavy = {name: found for name, tops in loaded.items() if (found := sorted(set(tops) & HEAVY))}
    assert not heavy, f"these import heavy packages, or one of ours that does: {heavy}"


IMPORT_OURS = """
import importlib, logging, os, random, sys

def state():
    numbers = numpy.random.get_state()[1].tolist()
    return dict(os.environ), list(logging.getLogger().handlers), random.getstate(), numbers

others, ours = (names.split(",") for names in sys.argv[1:])
for name in others:
    importlib.import_module(name)
import numpy
before = state()
for name in ours:
    importlib.import_module(name)
names = ("os.environ", "log handlers", "random", "numpy.random")
changed = [name for name, old, new in zip(names, before, state()) if old != new]
assert not changed, f"importing our modules changed {changed}"
"""


def test_an_import_does_nothing():
    """No environment variable, log handler, random state, printed line comes from importing our modules.

    What the libraries do at their import is theirs, so they are imported first.
    """
    paths = [path for path in sources(*PACKAGES) if importable(path)]
    others = {name for path in paths for name in imported_names(path, top_level_only=True)}
    others = {name for name in others if name.split(".")[0] not in (*PACKAGES, "__future__")}
    assert run_python(IMPORT_OURS, ",".join(sorted(others)), ",".join(map(module_name, paths))) == ""


def importable(path: Path) -> bool:
    """False for a module whose own top-level imports need an optional package that is not installed here."""
    tops = {name.split(".")[0] for name in imported_names(path, top_level_only=True)}
    return all(importlib.util.find_spec(top) is not None for top in tops)


def test_package_files_are_empty():
    files = [path for path in sources(*PACKAGES) if path.name == "__init__.py"]
    filled = [str(path.relative_to(ROOT)) for path in files if path.read_text().strip()]
    assert not filled, f"__init__.py files stay empty; move the code into a named module: {filled}"


def test_every_folder_of_modules_is_a_package():
    bare = {path.parent.relative_to(ROOT) for path in sources(*PACKAGES) if not (path.parent / "__init__.py").exists()}
    assert not bare, f"folders without __init__.py are left out of the distribution: {sorted(map(str, bare))}"


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources(*PACKAGES, "tests")
        if (count := len(path.read_text().splitlines())) > MAX_LINES and not path.stem.endswith(("_pb2", "_pb2_grpc"))
    }
    assert not long, f"over {MAX_LINES} lines; cut along a subject: {long}"


def test_a_module_begins_with_its_subject():
    silent = [
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES)
        if path.name != "__init__.py" and "_pb2" not in path.stem and not ast.get_docstring(tree_of(path))
    ]
    assert not silent, f"no module docstring: {silent}"


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_every_dependency_of_the_project():
    lock = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals, f"requirements.lock: {line!r} is no pin; write name==version."
            lock[normalised(name)] = Version(version)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [project["build-system"]["requires"], project["project"]["dependencies"]]
    groups += [group for name, group in project["project"]["optional-dependencies"].items() if name not in UNLOCKED]
    for requirement in (Requirement(text) for group in groups for text in group):
        if requirement.name == "remask":
            continue
        pinned = lock.get(normalised(requirement.name))
        assert pinned is not None, f"{requirement} of pyproject.toml is not in requirements.lock"
        assert pinned in requirement.specifier, f"pyproject.toml asks for {requirement}; requirements.lock has {pinned}"


def test_every_import_is_a_declared_dependency():
    """A package we import is named in pyproject.toml, not only brought along by another."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        normalised(Requirement(text).name)
        for group in (project["dependencies"], *project["optional-dependencies"].values())
        for text in group
    }
    known = set(sys.stdlib_module_names) | set(PACKAGES) | {"tests"}
    undeclared = {
        f"{path.relative_to(ROOT)}: {top}"
        for path in sources(*PACKAGES)
        for top in (name.split(".")[0] for name in imported_names(path))
        if top and top not in known and normalised(DISTRIBUTIONS.get(top, top)) not in declared
    }
    assert not undeclared, f"imported, but not in pyproject.toml: {sorted(undeclared)}"


def test_no_path_of_one_machine_is_in_the_repository():
    patterns = re.compile(r"(?<![\w.])/(?:home/\w|work/|Users/\w|root/)")
    suffixes = {".py", ".toml", ".md", ".yaml", ".lock", ".proto", ""}
    tracked = [ROOT / name for name in ("Makefile", "pyproject.toml", "requirements.lock", "README.md", ".ci/run")]
    tracked += [path for folder in (*PACKAGES, "tests", "configs", "docs") for path in (ROOT / folder).rglob("*")]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked
        if path.is_file() and path.suffix in suffixes and path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if patterns.search(line)
    ]
    assert not found, f"a path of one machine: {found}"


LIBERO_TESTS = """
import pytest

def test_libero_scene():
    pytest.skip("no assets")

@pytest.mark.libero
def test_marked():
    pytest.skip("no assets")

def test_other():
    pytest.skip("nothing to see")
"""


@pytest.mark.parametrize(("required", "counts"), [("0", "3 skipped"), ("1", "2 failed, 1 skipped")])
def test_a_skipped_libero_test_fails_where_libero_is_required(tmp_path: Path, required: str, counts: str):
    (tmp_path / "test_example.py").write_text(LIBERO_TESTS)
    environment = {**os.environ, "REMASK_REQUIRE_LIBERO": required, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "--rootdir", str(tmp_path), str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert counts in finished.stdout.splitlines()[-1], finished.stdout


def test_no_document_holds_a_placeholder() -> None:
    """No empty block of a report, and no cell or sentence that still waits for its figure."""
    waiting = re.compile(r"\b(TODO|TBD|FIXME|XXX)\b|\|\s*[A-Z]{5,}\s*\||[;,:] [A-Z]{5,} \(\[")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text()
        found = [line for line in text.splitlines() if waiting.search(line)]
        empty = [name for name, block in split_blocks(text) if name is not None and not block.strip()]
        assert not found and not empty, (path.name, found, empty)
