"""What every test runs under: one thread, an empty REMASK_HOME, and no LIBERO test skipped where its assets are."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Read by numpy and torch when they are imported, so they are set before any test module is. Two cores, several
# processes per test: more threads only wait for each other.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a network

settings.register_profile("remask", deadline=None)  # a busy machine is no bug
settings.load_profile("remask")


@pytest.fixture(scope="session", autouse=True)
def remask_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """REMASK_HOME of the session and of the processes it starts: an empty folder, never the user's own."""
    from sim.libero import find_assets  # imports numpy, which reads the variables above

    home = tmp_path_factory.mktemp("remask_home")
    assets = find_assets()  # LIBERO's, which may lie in the user's own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMASK_HOME", str(home))
        if assets is not None:
            patch.setenv("REMASK_LIBERO_ASSETS", str(assets))
        yield home


def libero_is_required() -> bool:
    return os.environ.get("REMASK_REQUIRE_LIBERO") == "1"


def is_libero_test(node: pytest.Item | pytest.Collector) -> bool:
    return "libero" in node.nodeid.lower() or any(node.iter_markers("libero"))


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = (
        f"{report.nodeid} was skipped ({reason}), but REMASK_REQUIRE_LIBERO=1 says that LIBERO is here: look at what "
        "REMASK_LIBERO_ASSETS names and at `vla doctor`, or unset REMASK_REQUIRE_LIBERO."
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and is_libero_test(item) and libero_is_required():
        refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    if report.skipped and is_libero_test(collector) and libero_is_required():
        refuse_skip(report)
    return report
