"""Laws of the Triton kernels without a GPU: the interpreter's numbers, and what the compiler makes of them for sm_90."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from multimodal.kernels.linear_cross_entropy import has_triton

pytestmark = pytest.mark.skipif(not has_triton(), reason="triton is not installed (it comes with torch for CUDA)")

# Bytes of stack per thread on sm_90 with the blocks of `TILES` and `WARPS`, triton 3.6. A kernel not named here spills nothing.
ALLOWED_SPILLS = {"statistics, every option": 24, "hidden_gradient, every option": 320}


def laws_of(*arguments: str, timeout: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.triton_laws", *arguments]
    root = Path(__file__).resolve().parents[1]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


def check_numbers(laws: dict[str, tuple[float, float]], count: int) -> None:
    wrong = {law: (error, allowed) for law, (error, allowed) in laws.items() if not error <= allowed}
    assert not wrong and len(laws) >= count, (wrong, sorted(laws))


def check_resources(resources: dict[str, dict[str, int]]) -> None:
    spills = {name: found["spilled"] for name, found in resources.items() if found["spilled"] > ALLOWED_SPILLS.get(name, 0)}
    assert not spills, f"bytes spilled per thread: {spills}; choose smaller blocks or more warps in TILES or WARPS"
    for name, found in resources.items():
        assert found["shared"] <= 227 * 1024, (name, found)  # of a Hopper multiprocessor
        assert name.startswith("row") or found["wgmma"] > 0, f"{name} does not use the tensor cores: {found}"


def test_interpreted_kernels_equal_the_reference():
    check_numbers(laws_of("interpret", timeout=600), count=36)


def test_kernels_compile_for_hopper_without_new_spills():
    check_resources(laws_of("compile", timeout=600))


@pytest.mark.check
def test_interpreted_kernels_equal_the_reference_under_every_option():
    check_numbers(laws_of("interpret", "every", timeout=1800), count=60)


@pytest.mark.check
def test_kernels_compile_for_hopper_under_every_option():
    check_resources(laws_of("compile", "every", timeout=3000))
