"""Laws of the command line: every verb resolves late, every mistake is one line that says what to do."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vla import cli
from vla.cli import VERBS, Verb, main, overview, parse_config
from vla.given_function import given_function


@dataclass(frozen=True)
class Inner:
    """A nested group."""

    rate: float = 1e-3  # peak of the schedule
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    """Settings of a test."""

    root: Path  # where the data is
    inner: Inner = Inner(rate=0.5)
    minutes: float | None = None
    resume: bool = False
    kind: str = "word"
    table: dict[str, int] = field(default_factory=dict)
    tasks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("word", "bpe"):
            raise ValueError(f"kind is {self.kind!r}; choose 'word' or 'bpe'.")


HEADED_YAML = """# What this reproduces
# and costs.
root: /data
inner:
  rate: 1e-4   # YAML 1.1 reads this as text; draccus makes it a number
  sizes: [3, 4, 5]
table: {a: 1}
tasks: [0, 1]
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(HEADED_YAML)
    return path


def test_yaml_then_command_line(yaml_file: Path) -> None:
    from_file = Outer(Path("/data"), Inner(1e-4, (3, 4, 5)), table={"a": 1}, tasks=(0, 1))
    assert parse_config(Outer, [f"--config_path={yaml_file}"]) == from_file
    overrides = ["--inner.rate=3e-4", "--resume", "--minutes", "5", "--tasks=null", "--table={b: 2}"]
    changed = parse_config(Outer, ["--config_path", str(yaml_file), *overrides])
    assert changed == Outer(Path("/data"), Inner(3e-4, (3, 4, 5)), 5.0, True, table={"a": 1, "b": 2})


def test_naming_one_setting_of_a_group_leaves_the_others_as_help_shows_them(tmp_path: Path) -> None:
    assert parse_config(Outer, ["--root=/x", "--inner.sizes=[7]"]).inner == Inner(0.5, (7,))
    path = tmp_path / "part.yaml"
    path.write_text("root: /x\ninner: {sizes: [7]}\n")
    assert parse_config(Outer, [f"--config_path={path}"]).inner == Inner(0.5, (7,))
    path.write_text("root: /x\ninner: {rate: 0.25}\n")
    assert parse_config(Outer, [f"--config_path={path}", "--inner.sizes=[7]"]).inner == Inner(0.25, (7,))


def test_negative_numbers_are_values() -> None:
    assert parse_config(Outer, ["--root=/x", "--minutes", "-1.5"]).minutes == -1.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--root=/x", "--bogus=1"], "no setting --bogus"),
        (["--root=/x", "--iner.rate=1"], "did you mean --inner.rate?"),
        (["--roo=/x"], "did you mean --root?"),
        (["--root=/x", "--inner.rate=abc"], "`inner.rate`: Couldn't parse 'abc' into a float"),
        (["--root=/x", "--resume=maybe"], "Couldn't parse 'maybe' into a bool"),
        (["--root=/x", "--kind=char"], "choose 'word' or 'bpe'"),
        (["--root=/x", "--table={a"], "not valid YAML"),
        (["--root=/x", "--minutes"], "--minutes needs a value"),
        (["--root=/x", "stray"], "unexpected argument 'stray'"),
        ([], "Missing required field(s) `root`"),
    ],
)
def test_a_wrong_setting_is_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_config(Outer, argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_yaml_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for text, message in [("inner: {ratte: 3}", "`ratte`"), ("a: [1", "not valid YAML"), ("root: /x\nbogus: 1", "`bogus`")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            parse_config(Outer, [f"--config_path={path}"])
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no file .*none.yaml"):
        parse_config(Outer, [f"--config_path={tmp_path / 'none.yaml'}"])


def test_help_shows_every_setting_default_and_comment(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(Outer, ["--help"], verb="test")
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "Settings of a test." in shown and "usage: vla test" in shown
    for line in ("--root=<required>  (Path)", "--inner.rate=0.5", "peak of the schedule", "--inner.sizes=[1, 2]"):
        assert line in shown
    for line in ("where the data is", "--minutes=null  (float | None)", "--resume=false", "--table={}"):
        assert line in shown


def test_overview_names_every_verb_with_an_example(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == main([]) == 0
    assert capsys.readouterr().out.count(overview()) == 2
    for name, verb in VERBS.items():
        assert verb.summary in overview() and verb.example.startswith(f"vla {name}")


def test_unknown_verb_suggests_the_nearest(capsys: pytest.CaptureFixture) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ValueError("bad camera"), 2, "error: bad camera\n"),
        (FileNotFoundError(2, "No such file", "/x"), 2, "error: No such file: /x\n"),
        (OSError(28, "disk full while writing /x"), 2, "error: disk full while writing /x\n"),
        (FloatingPointError("loss is nan"), 2, "error: loss is nan\n"),
        (KeyboardInterrupt("saved 3"), 130, "interrupted: saved 3\n"),
    ],
)
def test_errors_of_a_verb_are_one_line(
    error: BaseException, code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(argv: list[str]) -> None:
        raise error

    monkeypatch.delenv("REMASK_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, "resolve", lambda target: fail)
    assert main(["train"]) == code
    assert capsys.readouterr().err == shown


def test_traceback_on_request_and_bugs_always(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str]) -> None:
        raise {"user": ValueError, "bug": KeyError}[argv[0]]

    monkeypatch.setattr(cli, "resolve", lambda target: fail)
    monkeypatch.delenv("REMASK_TRACEBACK", raising=False)
    with pytest.raises(KeyError):
        main(["train", "bug"])
    monkeypatch.setenv("REMASK_TRACEBACK", "1")
    with pytest.raises(ValueError):
        main(["train", "user"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(VERBS, "gone", Verb("no_such_package.module:main", "", ""))
    assert main(["gone"]) == 2
    assert "'no_such_package'" in capsys.readouterr().err


def test_bench_lists_names_and_needs_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["bench", "--help"]) == 0
    assert main(["bench", "no_such"]) == 2
    assert "no benchmark 'no_such'" in capsys.readouterr().err
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "vla" / "cli.py"))
    assert main(["bench", "any"]) == 2
    assert "from a checkout" in capsys.readouterr().err


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "draccus", "mujoco")
    code = f"import sys, vla.cli; vla.cli.overview(); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_verb_has_its_module() -> None:
    root = Path(cli.__file__).parents[1]
    for verb in VERBS.values():
        module, function = verb.target.split(":")
        assert f"def {function}(" in (root / f"{module.replace('.', '/')}.py").read_text()


def test_a_users_function_is_found_beside_where_the_command_is_typed_or_its_absence_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a_task_of_mine.py").write_text("def build():\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert given_function("--task", "a_task_of_mine:build")() == 7
    for target, says in (
        ("a_task_of_mine:nothing", "--task=a_task_of_mine:nothing names nothing: .*no attribute"),
        ("no_module_at_all:build", "names nothing: No module"),
        ("a_task_of_mine", "--task is 'a_task_of_mine'; write module:function"),
    ):
        with pytest.raises(ValueError, match=says):
            given_function("--task", target)
