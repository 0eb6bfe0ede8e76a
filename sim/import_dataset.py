"""Other people's demonstrations -> frame cache, and LeRobotDataset if wanted: `vla import`.

Reads LeRobotDataset v3.0 (image and video features, openpi's feature names too) and LIBERO's HDF5 files. Whatever comes in
is made to fit one RobotSpec: cameras by name or by an explicit map, square frames of one size, one rate.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sim import libero_hdf5
from sim.libero import instruction_of, task_names
from sim.suites import SUITES, get_suite
from vla.episodes import Episode
from vla.feature_map import derive_spec, find_features
from vla.frame_cache import FrameCache
from vla.interface import RobotSpec
from vla.lerobot_dataset import build_frame_cache, episodes_of, fit_frames, resolve, write_frame_cache
from vla.lerobot_metadata import DatasetMetadata
from vla.transforms import clean_instruction

STILL = 1e-4  # length of an action's motion below which the robot was told to stand, action units; OpenVLA's threshold


@dataclass(frozen=True)
class ImportConfig:
    """Settings of `vla import`."""

    source: Path  # LeRobotDataset v3.0 folder, LIBERO *.hdf5 file or a folder of them
    output_dir: Path  # new folder
    cameras: dict[str, str] | None = None  # camera -> feature, '{base: image, wrist: wrist_image}'; default: all, own names
    like: Path | None = None  # data set, frame cache or policy whose cameras, sizes and names these data shall have
    image_size: int | None = None  # pixels; other frames are scaled to fit, with black bars
    control_hz: float | None = None  # default: what the data set says (openpi's LIBERO says 10 and is 20)
    suite: str | None = None  # keep only this suite's instructions, numbered as the suite numbers its tasks
    drop_noops: bool = False  # leave out steps that neither move nor change the gripper, as OpenVLA does
    episodes: int | None = None  # at most so many, for a trial; of each file for HDF5
    dataset: bool = False  # write a LeRobotDataset v3.0 too, with the cache inside


@dataclass(frozen=True)
class Source:
    """Demonstrations that can be read, and the robot they were made to fit."""

    spec: RobotSpec
    num_frames: int  # about
    description: str
    episodes: Iterator[Episode]


def import_dataset(config: ImportConfig) -> Path:
    """Import as configured; returns the folder to train on.

    Raises FileNotFoundError or ValueError naming what the data lack and the setting that mends it; FileExistsError if
    output_dir holds anything. What was half-written is removed.
    """
    output = config.output_dir.expanduser()
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; an import goes to a new folder.")
    source = open_source(config)
    episodes = source.episodes
    if config.drop_noops:
        episodes = (without_noops(episode, source.spec.binary_actions) for episode in episodes)
    episodes = tqdm(episodes, unit="episode", desc=source.description)
    if not config.dataset:
        write_frame_cache(output, source.spec, episodes, source.num_frames, source.description)
        return output
    from vla.lerobot_writer import write_dataset

    if output.exists():
        output.rmdir()  # empty; lerobot makes its own
    write_dataset(output, source.spec, episodes)
    build_frame_cache(output, output / "cache")
    return output


def open_source(config: ImportConfig) -> Source:
    """What `config.source` holds, by its files."""
    path = config.source.expanduser()
    if (path / "meta" / "info.json").is_file():
        return _open_lerobot(path, config)
    if path.suffix == ".hdf5" or (path.is_dir() and any(path.glob("*.hdf5"))):
        return _open_libero(path, config)
    raise FileNotFoundError(
        f"{path} holds neither a LeRobotDataset (meta/info.json) nor LIBERO demonstrations (*.hdf5). A data set of the hub "
        "comes here with: hf download --repo-type dataset OWNER/NAME --local-dir FOLDER"
    )


def _open_lerobot(path: Path, config: ImportConfig) -> Source:
    meta = DatasetMetadata.open(path)
    if config.like is not None:
        spec, features = resolve(meta, spec=_fitted_spec(config), cameras=config.cameras)
        _check_rate(config, spec, float(meta.info["fps"]))
    elif meta.spec is not None and config.cameras is None:
        spec, features = resolve(meta, spec=_changed(meta.spec, config))
    else:
        features = find_features(meta, cameras=config.cameras)
        spec = derive_spec(meta, features, image_size=config.image_size, control_hz=config.control_hz)
    episodes = episodes_of(meta, spec, features)
    if config.suite is not None:
        episodes = _of_suite(episodes, config.suite)
    return Source(spec, meta.num_frames, f"LeRobotDataset {meta.root.name}", islice(episodes, config.episodes))


def _of_suite(episodes: Iterator[Episode], suite: str) -> Iterator[Episode]:
    """Those that follow an instruction of the suite, with its task numbers; where scenes share one, the first scene's."""
    instructions = [clean_instruction(instruction_of(name)) for name in _official_tasks(suite)]
    found = False
    for episode in episodes:
        text = clean_instruction(episode.instruction)
        if text in instructions:
            found = True
            yield replace(episode, task=instructions.index(text))
    if not found:
        raise ValueError(f"No episode has an instruction of {suite}, such as {instructions[0]!r}.")


def _open_libero(path: Path, config: ImportConfig) -> Source:
    if config.cameras is not None:
        raise ValueError(f"LIBERO's files always hold the cameras {', '.join(libero_hdf5.IMAGES)}; leave --cameras out.")
    files = libero_hdf5.find_files(path)
    numbers = _task_numbers(files, config.suite)
    spec = libero_hdf5.file_spec(files[0])
    if config.like is not None:
        wanted = _fitted_spec(config)
        same = (wanted.state_names, wanted.action_names) == (spec.state_names, spec.action_names)
        if not same or not set(wanted.cameras) <= set(spec.cameras):
            raise ValueError(f"{config.like} is about another robot than LIBERO's: {wanted}.")
        _check_rate(config, wanted, spec.control_hz)
        spec = wanted
    spec = _changed(spec, config)
    frames = sum(map(libero_hdf5.count_frames, numbers))
    return Source(spec, frames, f"LIBERO {path.name}", _libero_episodes(numbers, spec, config.episodes))


def _libero_episodes(numbers: dict[Path, int], spec: RobotSpec, most: int | None) -> Iterator[Episode]:
    for file, task in numbers.items():
        for episode in islice(libero_hdf5.read_file(file, task), most):
            images = {camera: fit_frames(episode.images[camera], spec.image_size) for camera in spec.cameras}
            yield replace(episode, images=images)


def _task_numbers(files: list[Path], suite: str | None) -> dict[Path, int]:
    """Each file's task number in its suite; numbers by file name if no suite of LIBERO has these tasks."""
    names = [libero_hdf5.task_name(file) for file in files]
    if suite is not None:
        official = _official_tasks(suite)
        numbers = {file: official.index(name) for file, name in zip(files, names, strict=True) if name in official}
        if not numbers:
            raise ValueError(f"No file is about a task of {suite}, such as {official[0]}; there is {names[0]}.")
        return numbers
    for candidate in (row.name for row in SUITES.values() if row.backend == "libero"):
        official = task_names(candidate)
        if set(names) <= set(official):
            return {file: official.index(name) for file, name in zip(files, names, strict=True)}
    print(f"No suite of LIBERO has all of these {len(files)} tasks; they are numbered by file name.")
    return {file: number for number, file in enumerate(files)}


def _official_tasks(suite: str) -> list[str]:
    if get_suite(suite).backend != "libero":
        names = ", ".join(row.name for row in SUITES.values() if row.backend == "libero")
        raise ValueError(f"--suite={suite} is no suite of LIBERO; those are {names}.")
    return task_names(suite)


def without_noops(episode: Episode, binary: tuple[int, ...]) -> Episode:
    """The episode without steps whose motion is shorter than STILL and whose binary dimensions are those of the last step kept.

    Observations of the steps that stay are left as they were: the robot stood still in between. OpenVLA instead plays the
    remaining actions again. Raises ValueError if nothing is left.
    """
    is_motion = ~np.isin(np.arange(episode.action.shape[1]), binary)
    moves = np.linalg.norm(episode.action[:, is_motion], axis=1) >= STILL
    kept: list[int] = []
    for step, action in enumerate(episode.action):
        changed = bool(kept) and not np.array_equal(action[~is_motion], episode.action[kept[-1]][~is_motion])
        if moves[step] or changed:
            kept.append(step)
    if not kept:
        raise ValueError(f"An episode of {episode.instruction!r} has no step that moves; import without --drop_noops.")
    images = {camera: frames[kept] for camera, frames in episode.images.items()}
    return replace(episode, images=images, state=episode.state[kept], action=episode.action[kept])


def _fitted_spec(config: ImportConfig) -> RobotSpec:
    return _changed(spec_of(config.like.expanduser()), config)


def _changed(spec: RobotSpec, config: ImportConfig) -> RobotSpec:
    return replace(spec, image_size=config.image_size or spec.image_size, control_hz=config.control_hz or spec.control_hz)


def _check_rate(config: ImportConfig, spec: RobotSpec, fps: float) -> None:
    if fps != spec.control_hz and config.control_hz is None:
        raise ValueError(
            f"{config.source} runs at {fps:g} Hz, {config.like} at {spec.control_hz:g} Hz: a chunk would mean two different "
            f"motions. If the stated rate is wrong, say so: --control_hz={spec.control_hz:g}."
        )


def spec_of(path: Path) -> RobotSpec:
    """The robot of a policy folder, a data set of ours or a frame cache. Raises FileNotFoundError if it is none of these."""
    for file, keys in ((path / "schema.json", ()), (path / "meta" / "remask.json", ("spec",))):
        if file.is_file():
            values = json.loads(file.read_text())
            return RobotSpec.from_dict(values[keys[0]] if keys else values)
    return FrameCache.open(path).spec


def main(argv: list[str]) -> None:
    """`vla import`."""
    from vla.cli import parse_config

    config = parse_config(ImportConfig, argv, verb="import")
    folder = import_dataset(config)
    cache = FrameCache.open(folder)
    spec = cache.spec
    print(
        f"{cache.num_episodes} episodes, {cache.num_frames} frames, {len(cache.instructions)} instructions; cameras "
        f"{', '.join(spec.cameras)} of {spec.image_size} pixels, state {spec.state_dim}, action {spec.action_dim} (binary: "
        f"{', '.join(spec.action_names[index] for index in spec.binary_actions) or 'none'}), {spec.control_hz:g} Hz.\n"
        f"next: vla train --dataset.root={folder}"
    )
