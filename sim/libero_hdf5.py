"""LIBERO's own demonstration files (*_demo.hdf5, 50 per task) -> episodes in the conventions of sim/libero.py.

What such a file holds (LIBERO scripts/create_dataset.py): data/demo_N/actions [T, 7], states [T, 1 + nq + nv],
obs/agentview_rgb and obs/eye_in_hand_rgb [T, 128, 128, 3], obs/ee_states [T, 6] (position, axis-angle),
obs/gripper_states [T, 2]. Two traps:

- Pictures are in OpenGL's row order; everyone who trains on them turns them by 180 degrees, as sim/libero.py does.
- create_dataset.py records the observation after the action of the same row: obs[t] shows the world in which action[t + 1]
  was decided. Files that were played again by OpenVLA's script pair each action with the observation before it. Which of
  the two a file is can be read off obs/joint_states: they lie nearer to states[t + 1] or to states[t].
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sim.libero import instruction_of
from sim.suites import SUITES, robot_spec
from vla.episodes import Episode
from vla.interface import RobotSpec

if TYPE_CHECKING:
    import h5py

IMAGES = {"base": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
STATES = ("ee_states", "gripper_states")
ARM_JOINTS = slice(1, 8)  # of a flattened state: time, then qpos, the arm's seven joints first
SUFFIX = "_demo"


def task_name(path: Path) -> str:
    """LIBERO's name of the task that a file demonstrates."""
    return path.stem.removesuffix(SUFFIX)


def find_files(source: Path) -> list[Path]:
    """The demonstration files of a folder, or the one file. Raises FileNotFoundError if there is none."""
    files = sorted(source.glob("*.hdf5")) if source.is_dir() else [source] if source.is_file() else []
    if not files:
        raise FileNotFoundError(f"No *.hdf5 at {source}; LIBERO's data sets come as one folder per suite, one file per task.")
    return files


def file_spec(path: Path) -> RobotSpec:
    """The robot of a file, with the size of its pictures."""
    import h5py

    with h5py.File(path) as file:
        demo = file["data"][_demonstrations(file, path)[0]]
        height, width = demo["obs"][IMAGES["base"]].shape[1:3]
    if height != width:
        raise ValueError(f"{path} has pictures of {height} x {width} pixels; LIBERO's are square.")
    return robot_spec(SUITES["libero_object"], int(height))


def count_frames(path: Path) -> int:
    """Rows of all demonstrations of a file."""
    import h5py

    with h5py.File(path) as file:
        return sum(len(file["data"][name]["actions"]) for name in _demonstrations(file, path))


def read_file(path: Path, task: int) -> Iterator[Episode]:
    """The demonstrations of a file in the order of their numbers, as those of task `task`.

    Raises ValueError if the file is no LIBERO data set, or was recorded without pictures.
    """
    import h5py

    with h5py.File(path) as file:
        convention = file["data"].attrs.get("macros_image_convention", "opengl")
        for name in _demonstrations(file, path):
            demo = file["data"][name]
            action = demo["actions"][()].astype(np.float32)
            state = np.concatenate([demo["obs"][key][()] for key in STATES], axis=1).astype(np.float32)
            images = {camera: _turned(demo["obs"][key][()], convention) for camera, key in IMAGES.items()}
            late = observations_follow_actions(demo["obs"]["joint_states"][()], demo["states"][()])
            seen, done = (slice(None, -1), slice(1, None)) if late else (slice(None), slice(None))
            yield Episode(
                images={camera: frames[seen] for camera, frames in images.items()},
                state=state[seen],
                action=action[done],
                instruction=instruction_of(task_name(path)),
                task=task,
                meta={"file": path.name, "demonstration": name},
            )


def observations_follow_actions(joints: np.ndarray, states: np.ndarray) -> bool:
    """Whether row t of the observations shows the world after action t rather than before it.

    joints: observed arm joints [T, 7]; states: the simulator's state before each action [T, 1 + nq + nv]. A demonstration
    of one row counts as LIBERO's own kind, after.
    """
    before = np.abs(joints[:-1] - states[:-1, ARM_JOINTS]).sum()
    after = np.abs(joints[:-1] - states[1:, ARM_JOINTS]).sum()
    return bool(after <= before)


def _turned(frames: np.ndarray, convention: str) -> np.ndarray:
    """Frames [T, H, W, 3] as sim/libero.py gives them: OpenGL's rows turned by 180 degrees."""
    rows = -1 if convention == "opengl" else 1  # "opencv": its rows were already put upright
    return np.ascontiguousarray(frames[:, ::rows, ::-1])


def _demonstrations(file: "h5py.File", path: Path) -> list[str]:
    """Names of the groups in data/, by number."""
    names = sorted(file.get("data", {}), key=lambda name: (len(name), name))
    wanted = {"actions", "states", "obs", *(f"obs/{key}" for key in (*IMAGES.values(), *STATES, "joint_states"))}
    missing = sorted(key for key in wanted if key not in file["data"][names[0]]) if names else ["data/demo_0"]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it is no LIBERO data set with pictures. LIBERO's scripts/create_dataset.py "
            "adds them with --use-camera-obs."
        )
    return names
