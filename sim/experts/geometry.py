"""Directions, rotations and the shape of the Panda's hand, for the skills."""

import numpy as np

from sim.boxes import UP, Boxes

DOWN = -UP
HOME_FINGER_AXIS = np.array([0.0, 1.0, 0.0])  # world direction of the fingers in the home pose
HOME_ROTATION = np.stack([np.cross(HOME_FINGER_AXIS, DOWN), HOME_FINGER_AXIS, DOWN], axis=1)

# The hand in the frame of the grip site (x lateral, y along the fingers' motion, z approach), m; from robosuite's Panda
# gripper model. The fingers are modelled without the taper of their tips.
TIP_LENGTH = 0.009  # the finger tips reach this far beyond the grip site
FINGER_ROOT = -0.044
FINGER_HALF_WIDTH = 0.0105
FINGER_DEPTH = 0.026  # of one finger, along its motion
PALM_NEAR, PALM_FAR = -0.031, -0.123
PALM_HALF_WIDTH, PALM_HALF_LENGTH = 0.032, 0.104
SWEEP = 0.25  # m, length of the straight way in to a grasp, palm included
PAD_NEAR, PAD_FAR = -0.012, 0.004  # where the pads are, along the approach
PAD_HALF_WIDTH = 0.008
MAX_OPENING = 0.076  # m, what fits between the pads (0.08 m nominal)

WRIST_NEAR, WRIST_FAR = 0.1, 0.25  # m, from the grip site back along the approach: where the wrist's links are
WRIST_HALF_WIDTH = 0.06
WRIST_DISTANCE = 0.21  # m, from the grip site back along the approach to the wrist's centre
COMFORTABLE_REACH = 0.73  # m, from the shoulder to the wrist's centre; the arm is straight at about 0.78


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def horizontal(vector: np.ndarray, otherwise: np.ndarray = HOME_FINGER_AXIS) -> np.ndarray:
    """The vector's horizontal part, normalised; `otherwise` if it has none."""
    flat = np.array([vector[0], vector[1], 0.0])
    length = np.linalg.norm(flat)
    return flat / length if length > 1e-6 else otherwise


def angle_between_lines(first: np.ndarray, second: np.ndarray) -> float:
    """Angle in [0, pi/2] between two lines given by unit vectors."""
    return float(np.arccos(np.clip(abs(first @ second), 0.0, 1.0)))


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle in [0, pi] of a rotation matrix; at pi one of the two axes. [3] rad"""
    cosine = np.clip((np.trace(rotation) - 1.0) / 2.0, -1.0, 1.0)
    twist = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    sine = np.linalg.norm(twist) / 2.0
    if sine > 1e-6:
        return twist / (2.0 * sine) * np.arctan2(sine, cosine)
    if cosine > 0.0:
        return np.zeros(3)
    column = int(np.argmax(np.diag(rotation)))
    return np.pi * unit(rotation[:, column] + np.eye(3)[column])


def angles_between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Angle in [0, pi] of the rotation between two matrices; broadcasts over leading axes, [..., 3, 3] -> [...]."""
    return np.arccos(np.clip(((first * second).sum(axis=(-2, -1)) - 1.0) / 2.0, -1.0, 1.0))


def tilted(direction_w: np.ndarray, angle: float) -> np.ndarray:
    """An approach that points `angle` rad below the horizontal direction; pi/2 is straight down. [3]"""
    return np.cos(angle) * horizontal(direction_w) + np.sin(angle) * DOWN


def hand_rotations(approach_w: np.ndarray, finger_axes_w: np.ndarray) -> np.ndarray:
    """The hand's rotations [M, 3, 3] for one approach [3] and M finger axes [M, 3], whose part along it is dropped."""
    approach = unit(approach_w)
    axes = finger_axes_w - (finger_axes_w @ approach)[:, None] * approach
    axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    return np.stack([np.cross(axes, approach), axes, np.broadcast_to(approach, axes.shape)], axis=2)


def hand_rotation(approach_w: np.ndarray, finger_axis_w: np.ndarray) -> np.ndarray:
    """The hand's rotation [3, 3] for an approach and a finger axis."""
    return hand_rotations(approach_w, finger_axis_w[None])[0]


def flipped(rotations: np.ndarray) -> np.ndarray:
    """The same pinches with the two fingers exchanged: half a turn about the approach. [..., 3, 3]"""
    return rotations * np.array([-1.0, -1.0, 1.0])


def comfortable(rotations: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Of the two rotations of the hand that make one pinch, the one nearer to the home pose. [M, 3, 3]

    The wrist turns by less than 2 rad to either side of home without coming near its stop; where both are about as far,
    the one nearer to the present rotation [3, 3] stays.
    """
    others = flipped(rotations)
    lead = angles_between(rotations, HOME_ROTATION) - angles_between(others, HOME_ROTATION)
    lead += 0.2 * np.sign(angles_between(rotations, current) - angles_between(others, current))
    return np.where((lead > 0)[:, None, None], others, rotations)


def hand_boxes(positions_w: np.ndarray, rotations_w: np.ndarray, width: float) -> Boxes:
    """Both fingers and the palm at M poses of the grip site, opened to `width`; M boxes of each in turn.

    positions_w [M, 3], rotations_w [M, 3, 3].
    """
    finger_half = np.array([FINGER_HALF_WIDTH, FINGER_DEPTH / 2, (TIP_LENGTH - FINGER_ROOT) / 2])
    palm_half = np.array([PALM_HALF_WIDTH, PALM_HALF_LENGTH, (PALM_NEAR - PALM_FAR) / 2])
    middle = (TIP_LENGTH + FINGER_ROOT) / 2
    side = width / 2 + FINGER_DEPTH / 2
    centres = np.array([[0.0, side, middle], [0.0, -side, middle], [0.0, 0.0, (PALM_NEAR + PALM_FAR) / 2]])
    halves = (finger_half, finger_half, palm_half)
    return Boxes.joined(
        Boxes(positions_w + rotations_w @ centre, rotations_w, np.broadcast_to(half, (len(positions_w), 3)))
        for centre, half in zip(centres, halves)
    )


def swept_boxes(positions_w: np.ndarray, rotations_w: np.ndarray) -> Boxes:
    """What grasping at M poses of the grip site needs free; M boxes of each in turn.

    The open fingers and what they sweep as they close; the palm and its way in, SWEEP long.
    """
    near = PAD_NEAR - 0.008
    fingers = np.array([FINGER_HALF_WIDTH, MAX_OPENING / 2 + FINGER_DEPTH, (TIP_LENGTH - near) / 2])
    palm = np.array([PALM_HALF_WIDTH, PALM_HALF_LENGTH, SWEEP / 2])
    middles = ((TIP_LENGTH + near) / 2, PALM_NEAR - SWEEP / 2)
    return Boxes.joined(
        Boxes(positions_w + middle * rotations_w[:, :, 2], rotations_w, np.broadcast_to(half, (len(positions_w), 3)))
        for middle, half in zip(middles, (fingers, palm))
    )


def hand_at(position_w: np.ndarray, rotation_w: np.ndarray, width: float) -> Boxes:
    """The three boxes of the hand at one pose."""
    return hand_boxes(position_w[None], rotation_w[None], width)


def wrist_at(position_w: np.ndarray, rotation_w: np.ndarray) -> Boxes:
    """One box around the flange and the last two links, for a pose of the grip site."""
    half = np.array([WRIST_HALF_WIDTH, WRIST_HALF_WIDTH, 0.5 * (WRIST_FAR - WRIST_NEAR)])
    return Boxes((position_w - 0.5 * (WRIST_NEAR + WRIST_FAR) * rotation_w[:, 2])[None], rotation_w[None], half[None])


def ramp(value: float, low: float, high: float) -> float:
    """0 below low, 1 above high, linear between."""
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def overreach(shoulder_w: np.ndarray | None, positions_w: np.ndarray, rotations_w: np.ndarray) -> np.ndarray:
    """How far beyond comfortable reach the wrist is at M poses of the grip site: [M] m, 0 within."""
    if shoulder_w is None:
        return np.zeros(len(positions_w))
    wrists = positions_w - WRIST_DISTANCE * rotations_w[:, :, 2]
    return np.maximum(0.0, np.linalg.norm(wrists - shoulder_w, axis=1) - COMFORTABLE_REACH)
