"""`vla doctor`: what is installed, drawn and found on this machine, and what to do about the rest."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version
from rich.markup import escape
from rich.table import Table

from vla.home import remask_home
from vla.show import show

OK, WARN, MISSING = "ok", "warn", "missing"  # warn: something optional or slow; missing: the main job cannot run
COLORS = {OK: "green", WARN: "yellow", MISSING: "red"}

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"  # beside the packages in a checkout only
LOCK_PYTHON = (3, 11)
MAIN_JOB_EXTRAS = ("train", "sim")  # what `vla demo` needs besides the core
GIGABYTE = 10**9
DISK_WANTED = 10 * GIGABYTE  # libero_object's demonstrations, cache and run folders, with room
DISK_NEEDED = 1 * GIGABYTE  # the demo's
MEMORY_WANTED = 8 * GIGABYTE  # two simulator processes (1 GB each), torch, a training run
DRAWING_LIMIT_S = 120  # seconds instead of 1 on a machine that is busy with other runs
DRAWN_SIZE = 128  # pixels

SCENE = """<mujoco><worldbody><light pos="0 0 3"/><geom group="1" type="box" size=".2 .2 .2" rgba="1 0 0 1"/>
<camera name="view" pos="0 -1 1" xyaxes="1 0 0 0 .7 .7"/></worldbody></mujoco>"""


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, how it is, and what the user can do where it is not ok."""

    subject: str
    status: str
    detail: str
    advice: str = ""


def check_python() -> Finding:
    version = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < LOCK_PYTHON:
        return Finding("Python", MISSING, version, "install Python 3.11, then: make PYTHON=python3.11 install")
    if sys.version_info[:2] > LOCK_PYTHON:
        return Finding("Python", WARN, version, "requirements.lock is for Python 3.11; newer ones are not tested daily")
    return Finding("Python", OK, version)


def installed_version(name: str) -> Version | None:
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def unmet(requirements: Sequence[Requirement]) -> list[str]:
    """The requirements that no installed package meets, each with what is there instead."""
    found = {str(requirement): (requirement, installed_version(requirement.name)) for requirement in requirements}
    return [
        f"{text} ({'absent' if version is None else f'here: {version}'})"
        for text, (requirement, version) in found.items()
        if version is None or not requirement.specifier.contains(version, prereleases=True)
    ]


def check_requirements() -> list[Finding]:
    """The core, and the extras of pyproject.toml, as the installed distribution states them."""
    try:
        stated = [Requirement(text) for text in metadata.requires("remask") or []]
    except metadata.PackageNotFoundError:
        return [Finding("Remask", WARN, "not installed, only imported", "make install, or: pip install --no-deps -e .")]
    core = unmet([requirement for requirement in stated if requirement.marker is None])
    findings = [Finding("core packages", OK, "all here")]
    if core:
        findings = [Finding("core packages", MISSING, ", ".join(core), "make install, or: pip install -e .")]
    whole = []
    for extra in metadata.metadata("remask").get_all("Provides-Extra") or []:
        asked = [item for item in stated if item.marker and item.marker.evaluate({"extra": extra})]
        absent = unmet([item for item in asked if item.name != "remask"])
        if not absent:
            whole.append(extra)
            continue
        status = MISSING if extra in MAIN_JOB_EXTRAS else WARN
        advice = f"make install, or: pip install -e '.[{extra}]'"
        findings.append(Finding(f"extra {extra}", status, ", ".join(absent), advice))
    return [*findings, Finding("extras", OK, ", ".join(whole))] if whole else findings


def check_lock(lock: Path = LOCK) -> Finding:
    """Versions against requirements.lock; a difference is a warning, since bounds in pyproject.toml are wider."""
    if not lock.is_file():
        return Finding("lock", WARN, "no requirements.lock beside the packages", "versions unknown; a checkout has it")
    lines = [line.strip() for line in lock.read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    different = [
        f"{name} {installed or 'absent'} (lock: {pinned})"
        for name, pinned in pins.items()
        if (installed := installed_version(name)) != Version(pinned)
    ]
    if not different:
        return Finding("lock", OK, f"all {len(pins)} packages as locked")
    shown = ", ".join(different[:6]) + (f" and {len(different) - 6} more" if len(different) > 6 else "")
    detail = f"{len(different)} of {len(pins)} differ: {shown}"
    return Finding("lock", WARN, detail, "rm -f .venv/.installed; make install")


def check_torch() -> Finding:
    """torch and the accelerator it sees. Imports torch, so never runs in the process that draws."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a CUDA library of the wheel is damaged or gone
        return Finding("torch", MISSING, str(error).splitlines()[0], "make install")
    if not torch.cuda.is_available():
        advice = "the driver is older than torch's CUDA, or hidden: nvidia-smi" if Path("/dev/nvidia0").exists() else ""
        return Finding("torch", WARN if advice else OK, f"{torch.__version__}, on the CPU: no GPU seen", advice)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    named = ", ".join(f"{gpu.name} {gpu.total_memory / GIGABYTE:.0f} GB" for gpu in gpus)
    return Finding("torch", OK, f"{torch.__version__}, CUDA {torch.version.cuda}: {named}")


def draw_a_frame() -> None:
    """Draw a red box through sim.rendering and print the GL backend and milliseconds; runs in a process of its own.

    Raises RuntimeError if the frame is empty.
    """
    import time

    from sim.rendering import Renderer, choose_gl_backend

    backend = choose_gl_backend()
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = Renderer(model, data)
    renderer.frame("view", DRAWN_SIZE)  # opens the context
    start = time.perf_counter()
    frame = renderer.frame("view", DRAWN_SIZE)
    milliseconds = 1e3 * (time.perf_counter() - start)
    renderer.close()
    if int(frame[..., 0].max()) == int(frame[..., 0].min()):
        raise RuntimeError(f"{backend} drew an empty frame")
    print(f"{backend}: {DRAWN_SIZE} x {DRAWN_SIZE} in {milliseconds:.1f} ms")


def check_drawing() -> Finding:
    """In a child process: a broken driver aborts rather than raises, and EGL beside CUDA aborts on some drivers."""
    command = [sys.executable, "-c", "from sim.doctor import draw_a_frame; draw_a_frame()"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=DRAWING_LIMIT_S)
    except subprocess.TimeoutExpired:
        return Finding("rendering", MISSING, f"no frame within {DRAWING_LIMIT_S} s", "try: MUJOCO_GL=osmesa vla doctor")
    if child.returncode == 0:
        return Finding("rendering", OK, child.stdout.strip().splitlines()[-1])
    said = child.stderr.strip().splitlines()
    last = said[-1] if said else f"the drawing process ended with {child.returncode}"
    advice = "Debian, Ubuntu: apt-get install libegl1 libgl1-mesa-dri libopengl0 (or libosmesa6)"
    if os.environ.get("MUJOCO_GL"):
        advice = f"unset MUJOCO_GL (now {os.environ['MUJOCO_GL']!r}); {advice}"
    return Finding("rendering", MISSING, last, advice)


def check_libero() -> Finding:
    from sim.libero import ASSET_VARIABLES, find_assets

    advice = f"suites of robosuite need none; for LIBERO, set {ASSET_VARIABLES[0]} to its assets folder"
    try:
        folder = find_assets()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        return Finding("LIBERO assets", WARN, str(error), advice)
    if folder is None:
        return Finding("LIBERO assets", WARN, "none yet: downloaded from the hub at the first use", advice)
    return Finding("LIBERO assets", OK, str(folder))


def check_disk() -> Finding:
    """Free space where REMASK_HOME is, or will be."""
    home = remask_home().absolute()
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / GIGABYTE:.0f} GB free at {home}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", MISSING, f"{existing} cannot be written", "set REMASK_HOME to a folder of yours")
    if free >= DISK_WANTED:
        return Finding("disk", OK, detail)
    return Finding("disk", WARN if free >= DISK_NEEDED else MISSING, detail, "set REMASK_HOME to a larger disk")


def check_machine() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{cores} cores, {memory / GIGABYTE:.0f} GB of memory"
    if memory < MEMORY_WANTED:
        return Finding("machine", WARN, detail, "use --workers=1 and a smaller --batch_size")
    if cores < 2:
        return Finding("machine", WARN, detail, "use --workers=1; everything takes twice as long")
    return Finding("machine", OK, detail)


CHECKS: tuple[Callable[[], Finding | list[Finding]], ...] = (
    check_python,
    check_requirements,
    check_lock,
    check_torch,
    check_drawing,
    check_libero,
    check_disk,
    check_machine,
)


def examine() -> list[Finding]:
    findings: list[Finding] = []
    for check in CHECKS:
        found = check()
        findings += found if isinstance(found, list) else [found]
    return findings


def findings_table(findings: Sequence[Finding]) -> Table:
    table = Table(show_lines=False, box=None, pad_edge=False)
    for column in ("", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        color = COLORS[finding.status]
        table.add_row(f"[{color}]{finding.status}[/]", finding.subject, escape(finding.detail), escape(finding.advice))
    return table


def main(argv: Sequence[str]) -> int:
    """Print the table; 1 if something that the main job needs is missing. Raises ValueError on any argument."""
    if argv and argv[0] in ("-h", "--help"):
        print("vla doctor: looks at this machine and says what to do for each thing missing. It takes no arguments.")
        return 0
    if argv:
        raise ValueError(f"vla doctor takes no arguments; got {list(argv)}.")
    findings = examine()
    show(findings_table(findings))
    missing = [finding.subject for finding in findings if finding.status == MISSING]
    print(f"\nmissing: {', '.join(missing)}" if missing else "\nready: vla demo")
    return 1 if missing else 0
