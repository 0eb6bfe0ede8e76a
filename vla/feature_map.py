"""Which features of a data set are a robot's cameras, state and action: found by name, or said in a map."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla.interface import RobotSpec
from vla.lerobot_metadata import DatasetMetadata

# feature of the state, feature of the action: LeRobot's names, then those of openpi's data sets (physical-intelligence/libero)
VECTOR_KEYS = (("observation.state", "action"), ("state", "actions"))
# Words that name the same place of a camera in published data sets.
PLACES = (
    ("base", "agentview", "image", "front", "top", "exterior", "external", "main", "primary", "third", "scene", "high"),
    ("wrist", "hand", "gripper", "eye_in_hand", "image2"),
)


@dataclass(frozen=True)
class FeatureMap:
    """Names of features in one data set."""

    cameras: dict[str, str]  # camera of a RobotSpec -> feature
    state: str
    action: str


def camera_name(feature: str) -> str:
    """The camera that a feature shows: observation.images.front -> front, observation.image -> image."""
    return feature.removeprefix("observation.").removeprefix("images.")


def find_features(
    meta: DatasetMetadata, *, cameras: Mapping[str, str] | None = None, wanted: Sequence[str] | None = None
) -> FeatureMap:
    """The features to read.

    cameras: explicit map, camera -> feature or its last part; default: every camera of the data set under its own name.
    wanted: the cameras there must be, in order. Raises ValueError that lists what is wanted and what there is.
    """
    available = meta.camera_features
    own = {camera_name(feature): feature for feature in available}
    if cameras is None:
        chosen = own if wanted is None else {camera: own[camera] for camera in wanted if camera in own}
    else:
        chosen = {camera: own.get(feature, feature) for camera, feature in cameras.items()}
    missing = [camera for camera in (wanted or chosen) if chosen.get(camera) not in available]
    if missing or not chosen:
        raise ValueError(_camera_error(meta, missing, list(wanted or chosen), available))
    state, action = _vector_features(meta)
    order = chosen if wanted is None else wanted
    return FeatureMap({camera: chosen[camera] for camera in order}, state, action)


def derive_spec(
    meta: DatasetMetadata, features: FeatureMap, *, image_size: int | None = None, control_hz: float | None = None
) -> RobotSpec:
    """The robot as the data set describes it.

    image_size: frames of another shape are fitted to it; needed unless all are square and of one size. control_hz:
    default the data set's fps. A dimension that is only ever -1 or +1, and both, counts as binary (a gripper).
    """
    shapes = {camera: meta.frame_shape(feature) for camera, feature in features.cameras.items()}
    if image_size is None:
        sides = {side for shape in shapes.values() for side in shape}
        if len(sides) > 1:
            raise ValueError(
                f"{meta.root} has frames of {', '.join(f'{c} {h} x {w}' for c, (h, w) in shapes.items())} pixels; a policy "
                "sees squares of one size: give --image_size (frames are scaled to fit, with black bars)."
            )
        (image_size,) = sides
    return RobotSpec(
        name=str(meta.info.get("robot_type") or "unknown"),
        cameras=tuple(features.cameras),
        image_size=image_size,
        state_names=vector_names(meta, features.state),
        action_names=vector_names(meta, features.action),
        binary_actions=binary_dimensions(meta.column(features.action)),
        control_hz=float(control_hz or meta.info["fps"]),
    )


def vector_names(meta: DatasetMetadata, key: str) -> tuple[str, ...]:
    """One name per dimension of a vector feature: the data set's, or its key and a number."""
    (size,) = meta.features[key]["shape"]
    names = meta.features[key].get("names")
    if isinstance(names, dict):  # {"motors": [...]}
        names = [name for value in names.values() for name in (value if isinstance(value, list) else [value])]
    if not isinstance(names, list) or len(names) != size or not all(isinstance(name, str) for name in names):
        return tuple(f"{key.removeprefix('observation.')}_{index}" for index in range(size))
    return tuple(names)


def binary_dimensions(action: np.ndarray) -> tuple[int, ...]:
    """Dimensions of actions [F, D] whose values are -1 and +1, both of them and nothing else."""
    is_sign = (np.abs(action) == 1).all(axis=0)
    return tuple(np.flatnonzero(is_sign & (action.min(axis=0) < action.max(axis=0))).tolist())


def suggested_map(wanted: Sequence[str], available: Sequence[str]) -> dict[str, str]:
    """The likeliest feature for each camera, every feature once; the best pairs first."""
    pairs = sorted(
        ((_likeness(camera, camera_name(feature)), camera, feature) for camera in wanted for feature in available),
        key=lambda pair: (-pair[0], list(available).index(pair[2])),
    )
    found: dict[str, str] = {}
    for _, camera, feature in pairs:
        if camera not in found and feature not in found.values():
            found[camera] = feature
    return {camera: found[camera] for camera in wanted if camera in found}


def _likeness(camera: str, name: str) -> float:
    """3 for the same name, 2 + how alike for the same place, else how alike, 0..1."""
    alike = difflib.SequenceMatcher(None, camera, name).ratio()
    return 3.0 if camera == name else alike + 2.0 * (_place(camera) == _place(name) is not None)


def _place(name: str) -> int | None:
    """Which of PLACES the name speaks of; the longest of its words decides (`eye_in_hand` is no `image`)."""
    words = [(len(word), place) for place, words in enumerate(PLACES) for word in words if word in name.lower()]
    return max(words)[1] if words else None


def _vector_features(meta: DatasetMetadata) -> tuple[str, str]:
    for state, action in VECTOR_KEYS:
        if state in meta.features and action in meta.features:
            for key in (state, action):
                if len(meta.features[key]["shape"]) != 1:
                    raise ValueError(f"{meta.root}: {key} has shape {meta.features[key]['shape']}; expected one dimension.")
            return state, action
    pairs = " or ".join(f"{state!r} and {action!r}" for state, action in VECTOR_KEYS)
    raise ValueError(f"{meta.root} needs the features {pairs}; it has {sorted(meta.features)}. Rename them in the data set.")


def _camera_error(meta: DatasetMetadata, missing: list[str], wanted: list[str], available: list[str]) -> str:
    if not available:
        return f"{meta.root} has no image or video feature; its features are {sorted(meta.features)}."
    guess = suggested_map(wanted, available)
    text = ", ".join(f"{camera}: {feature}" for camera, feature in guess.items())
    return (
        f"{meta.root} has nothing for camera {', '.join(map(repr, missing))}. Wanted: {', '.join(wanted)}. The data set "
        f"has: {', '.join(available)}. Say which is which, probably --cameras='{{{text}}}'."
    )
