"""The table of suites, the split of starts, and how LIBERO's files are found and read; builds no simulator."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import libero, rendering
from sim.seeds import FIRST_SEED, SPLIT_SIZE, start
from sim.suites import PROTOCOLS, SUITES, build_environment, get_protocol, get_suite, robot_spec
from vla.interface import RobotSpec


@given(st.lists(st.tuples(st.sampled_from(sorted(FIRST_SEED)), st.integers(0, SPLIT_SIZE - 1)), max_size=20))
def test_different_starts_never_share_a_seed(drawn):
    starts = {start(split, index) for split, index in drawn}
    assert len({each.seed for each in starts}) == len(starts)


def test_splits_own_disjoint_ranges_of_numpys_seeds():
    ranges = sorted((first, first + SPLIT_SIZE) for first in FIRST_SEED.values())
    assert all(end <= following for (_, end), (following, _) in zip(ranges, ranges[1:]))
    assert ranges[0][0] >= 0 and ranges[-1][1] <= 2**32


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("train", -1), ("train", SPLIT_SIZE)])
def test_a_start_outside_its_split_is_refused(split, index):
    with pytest.raises(ValueError, match="allowed"):
        start(split, index)


def test_every_suite_has_a_step_limit_in_every_protocol():
    for suite in SUITES.values():
        assert set(suite.max_steps) == set(PROTOCOLS), suite.name
        assert suite.default_protocol in PROTOCOLS


def test_libero_spatial_is_the_one_suite_whose_limit_the_protocols_dispute():
    disputed = {name: row.max_steps for name, row in SUITES.items() if len(set(row.max_steps.values())) > 1}
    assert disputed == {"libero_spatial": {"openpi": 220, "lerobot": 280}}


def test_a_stored_state_is_not_counted_twice():
    for name, row in SUITES.items():
        for split, most in (("official", 50 if row.backend == "libero" else 10_000), ("validation", 10_000)):
            row.check_starts(split, most)
    with pytest.raises(ValueError, match="51 official episodes of a task of libero_goal: LIBERO stores 50"):
        get_suite("libero_goal").check_starts("official", 51)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_no_demonstration_has_the_fixtures_of_an_official_start(name):
    """Stored states leave fixtures out; `vla collect` takes training starts from 0 on, far fewer than a thousand a task."""
    official = {get_protocol(name).fixture_seed(start("official", index)) for index in range(50)}
    assert len(official) == 50 and not official & {start("train", index).seed for index in range(1000)}
    assert not official & {start("validation", index).seed for index in range(1000)}


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="libero_object"):
        get_suite("libero_objects")
    with pytest.raises(ValueError, match="openpi, lerobot"):
        build_environment("robosuite_lift", protocol="oft")


def test_a_spec_survives_its_dictionary():
    spec = robot_spec(get_suite("libero_object"), 64)
    assert RobotSpec.from_dict(spec.to_dict()) == spec
    assert (spec.state_dim, spec.action_dim) == (8, 7)


def test_libero_tasks_and_instructions_are_liberos(monkeypatch, capsys, remask_home):
    pytest.importorskip("libero")
    libero.write_config(remask_home / "libero_config", libero.libero_folder())
    from libero.libero import benchmark

    for name in (name for name in SUITES if name.startswith("libero_")):
        official = benchmark.get_benchmark(name)()
        tasks = [official.get_task(index) for index in range(official.get_num_tasks())]
        assert SUITES[name].num_tasks == len(tasks)
        assert libero.task_names(name) == [task.name for task in tasks]
        assert [libero.instruction_of(task.name) for task in tasks] == [task.language for task in tasks]


def test_initial_states_are_what_torch_loads():
    pytest.importorskip("libero")
    import torch

    for suite, task in (("libero_object", 3), ("libero_90", 89)):
        name = libero.task_names(suite)[task]
        path = libero.libero_folder() / "init_files" / suite / f"{name}.pruned_init"
        # weights_only=False: numpy arrays pickled by the authors, shipped inside the installed package
        expected = torch.load(path, weights_only=False)
        assert np.array_equal(libero.initial_states(suite, name), expected)


def test_an_initial_state_file_that_asks_for_code_is_refused(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    folder = tmp_path / "init_files" / "libero_object"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "task.pruned_init", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    monkeypatch.setattr(libero, "libero_folder", lambda: tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="print"):
        libero.initial_states("libero_object", "task")


def test_array_unpickler_reads_arrays():
    array = np.arange(6.0).reshape(2, 3)
    assert np.array_equal(libero._ArrayUnpickler(io.BytesIO(pickle.dumps(array, protocol=2))).load(), array)


def test_a_named_folder_without_assets_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("REMASK_LIBERO_ASSETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="scenes"):
        libero.find_assets()


def test_without_egl_and_osmesa_one_error_names_the_packages(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering.sys, "platform", "linux")
    monkeypatch.setattr(rendering, "egl_can_draw", lambda: False)
    monkeypatch.setattr(rendering, "osmesa_is_installed", lambda: False)
    with pytest.raises(RuntimeError, match="libegl1 libgl1-mesa-dri.*libosmesa6"):
        rendering.choose_gl_backend()
    monkeypatch.setattr(rendering, "osmesa_is_installed", lambda: True)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    assert rendering.choose_gl_backend() == "osmesa"
    assert rendering.choose_gl_backend() == "osmesa"  # MUJOCO_GL now says so


def test_the_users_gl_choice_stands(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert rendering.choose_gl_backend() == "osmesa"
