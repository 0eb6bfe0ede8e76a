"""The robosuite tasks behind our suites: environment, instruction, bodies, goal. A table; imports no simulator."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CAN = 3  # robosuite's number of the can among PickPlace's objects and bins
JointTargets = Mapping[str, tuple[float, float]]  # predicate -> joint values that fulfil it


@dataclass(frozen=True)
class RobosuiteTask:
    """What a suite of ours is in robosuite."""

    environment: str  # robosuite's name
    instruction: str
    bodies: Mapping[str, str]  # name in the World -> MuJoCo body
    goal: tuple[tuple[str, ...], ...]
    joint_targets: Mapping[str, JointTargets] = field(default_factory=dict)  # see Arm
    options: Mapping[str, Any] = field(default_factory=dict)  # of robosuite.make, besides `make_options`


# The door counts as open from 0.3 rad (Door._check_success). Of robosuite's two doors it is the one with a fixed handle: no
# skill of the experts turns a handle to free a latch.
DOOR_JOINTS = {"door": {"open": (0.3, np.inf), "close": (-np.inf, 0.02)}}
TASKS = {
    "robosuite_lift": RobosuiteTask("Lift", "lift the red cube", {"cube": "cube_main"}, (("lifted", "cube"),)),
    "robosuite_stack": RobosuiteTask(
        "Stack",
        "stack the red cube on the green cube",
        {"cubeA": "cubeA_main", "cubeB": "cubeB_main"},
        (("on", "cubeA", "cubeB"),),
    ),
    "robosuite_can": RobosuiteTask(
        "PickPlaceCan", "put the can into its bin", {"can": "Can_main"}, (("in", "can", "can_bin"),)
    ),
    "robosuite_door": RobosuiteTask(
        "Door", "open the door", {"door": "Door_main"}, (("open", "door"),), DOOR_JOINTS, {"use_latch": False}
    ),
}
