"""A process that trains starts itself again with glibc's tunables: once, as it was called, and only where they can help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vla import cli, large_pages
from vla.large_pages import TUNABLES, is_wanted

CALL = "import os, sys; from vla.large_pages import *; restart_with_large_pages(); print(sys.argv, os.environ['GLIBC_TUNABLES'])"


@pytest.fixture
def helpful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine on which they help."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(large_pages, "TRANSPARENT_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(large_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("REMASK_LARGE_PAGES", raising=False)
    return monkeypatch


def test_wanted_where_they_help_and_nowhere_else(helpful: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert is_wanted()
    for name, value in (("GLIBC_TUNABLES", ""), ("REMASK_LARGE_PAGES", "0")):
        with helpful.context() as context:
            context.setenv(name, value)
            assert not is_wanted()
    for library in (("glibc", "2.31"), ("", ""), ("musl", "1.2.5")):
        with helpful.context() as context:
            context.setattr(large_pages.platform, "libc_ver", lambda library=library: library)
            assert not is_wanted()
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert not is_wanted()
    (tmp_path / "enabled").unlink()
    assert not is_wanted()


@pytest.mark.skipif(not is_wanted() and "GLIBC_TUNABLES" not in os.environ, reason="this machine has no use for it")
def test_a_restarted_process_has_its_arguments_and_does_not_restart_again() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "REMASK_LARGE_PAGES")}
    command = [sys.executable, "-c", CALL, "one", "--two=3 4"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout == f"{['-c', 'one', '--two=3 4']} {TUNABLES}\n"


def test_only_the_shell_restarts(helpful: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    helpful.setattr(large_pages.os, "execve", lambda *_: pytest.fail("a call from Python must not replace the process"))
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "training" in capsys.readouterr().out
    restarts = []
    helpful.setattr(large_pages.os, "execve", lambda program, command, environment: restarts.append((command, environment)))
    helpful.setattr(sys, "orig_argv", ["python", "-m", "vla.cli", "train", "--help"])
    helpful.setattr(sys, "argv", ["vla", "train", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    ((command, environment),) = restarts
    assert command == [sys.executable, "-m", "vla.cli", "train", "--help"] and environment["GLIBC_TUNABLES"] == TUNABLES
    helpful.setattr(sys, "argv", ["vla", "experts", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert len(restarts) == 1
