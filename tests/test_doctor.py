"""`vla doctor`: each row says how it is, and each row that is not ok says what to do."""

import io
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console

from sim import doctor
from sim.doctor import MISSING, OK, WARN, Finding


def test_a_version_other_than_the_lock_is_named(tmp_path: Path):
    lock = tmp_path / "requirements.lock"
    installed = doctor.installed_version("numpy")
    lock.write_text(f"# comment\nnumpy=={installed}\n")
    assert doctor.check_lock(lock).status == OK
    lock.write_text("numpy==0.1\nno-such-package==1.0\n")
    finding = doctor.check_lock(lock)
    assert finding.status == WARN
    assert f"numpy {installed} (lock: 0.1)" in finding.detail and "no-such-package absent" in finding.detail


def test_unmet_requirements_say_what_is_here_instead():
    here = doctor.installed_version("numpy")
    asked = [Requirement("numpy>=1"), Requirement("numpy<1"), Requirement("no-such-package")]
    assert doctor.unmet(asked) == [f"numpy<1 (here: {here})", "no-such-package (absent)"]
    assert isinstance(here, Version)


def test_whatever_is_not_ok_comes_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MUJOCO_GL", "no such backend")
    monkeypatch.setenv("REMASK_LIBERO_ASSETS", str(tmp_path))
    findings = [doctor.check_drawing(), doctor.check_libero(), doctor.check_lock(tmp_path / "absent")]
    assert [finding.status for finding in findings] == [MISSING, WARN, WARN]
    assert all(finding.advice for finding in findings)


def test_this_machine_is_fit_for_the_main_job():
    unfit = [finding for finding in doctor.examine() if finding.status == MISSING]
    assert not unfit, unfit


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (WARN, 0), (MISSING, 1)])
def test_exit_code_is_one_only_if_something_is_missing(monkeypatch: pytest.MonkeyPatch, status: str, code: int):
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("part", status, "detail", "advice")])
    assert doctor.main([]) == code


def test_the_table_keeps_the_brackets_of_an_extra():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor.findings_table([Finding("extra sim", WARN, "absent", "pip install -e '.[sim]'")]))
    assert "pip install -e '.[sim]'" in console.export_text()
