"""Collision geometry of MuJoCo bodies: what an expert needs to know of an object's shape. Computed once per model."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.boxes import Boxes

ENDLESS = 10.0  # m, half the width of a plane without a size


@dataclass(frozen=True, eq=False)
class RigidPart:
    """The collision geoms that move as one with a body, as boxes."""

    body_id: int
    centre_b: np.ndarray  # [3] m, of the box around them, in the body's frame
    half_extents: np.ndarray  # [3] m, of that box, along the body's axes
    shape: Boxes  # the geoms, about that centre
    geom_ids: tuple[int, ...]


def rigid_part(model: Any, body: int) -> RigidPart:
    """Body `body` with those below it that no joint moves against it.

    Raises ValueError if it has no collision geom.
    """
    data = reference_pose(model)
    rotation_wb, position_w = data.xmat[body].reshape(3, 3), data.xpos[body]
    geom_ids = tuple(
        geom
        for geom in range(model.ngeom)
        if (model.geom_contype[geom] or model.geom_conaffinity[geom])
        and rigid_root(model, model.geom_bodyid[geom]) == rigid_root(model, body)
        and is_below(model, model.geom_bodyid[geom], body)
    )
    if not geom_ids:
        raise ValueError(f"Body {model.body(body).name!r} has no collision geom, so it has no box.")
    boxes = [geom_box(model, data, geom).moved(-rotation_wb.T @ position_w, rotation_wb.T) for geom in geom_ids]
    shape = Boxes.joined(boxes)
    ends = np.array([shape.span(axis) for axis in np.eye(3)])  # [axis, low or high, geom]
    lower, upper = ends[:, 0].min(axis=1), ends[:, 1].max(axis=1)
    centre = (lower + upper) / 2
    return RigidPart(body, centre, (upper - lower) / 2, shape.shifted(-centre), geom_ids)


def scenery(model: Any, without_geoms: Collection[int], without_bodies: tuple[str, ...]) -> Boxes:
    """The collision geoms that never move, such as tables, floors and bins, as boxes in the world frame.

    without_geoms: those known by another name; without_bodies: beginnings of the names of bodies to leave out.
    """
    data = reference_pose(model)
    return Boxes.joined(
        geom_box(model, data, geom)
        for geom in range(model.ngeom)
        if (model.geom_contype[geom] or model.geom_conaffinity[geom])
        and rigid_root(model, model.geom_bodyid[geom]) == 0
        and geom not in without_geoms
        and not model.body(model.geom_bodyid[geom]).name.startswith(without_bodies)
    )


def joints_below(model: Any, body: int) -> list[int]:
    """Slides and hinges of the bodies below `body`, its own left out."""
    return [
        joint
        for joint in range(model.njnt)
        if model.jnt_bodyid[joint] != body and is_below(model, model.jnt_bodyid[joint], body)
    ]


def reference_pose(model: Any) -> Any:
    """An mjData in which every body is where the XML puts it."""
    import mujoco

    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    return data


def rigid_root(model: Any, body: int) -> int:
    """The nearest body upwards, `body` included, that has a joint of its own; 0 if there is none."""
    while body > 0 and model.body_jntnum[body] == 0:
        body = model.body_parentid[body]
    return body


def is_below(model: Any, body: int, root: int) -> bool:
    """True if `body` is `root` or one of its descendants."""
    while body > root:  # MuJoCo numbers parents before children
        body = model.body_parentid[body]
    return body == root


def geom_box(model: Any, data: Any, geom: int) -> Boxes:
    """One geom as a box in the world frame: exact for boxes, else the box around it in the geom's own axes."""
    low, high = geom_extent(model, geom)
    rotation = data.geom_xmat[geom].reshape(3, 3)
    centre = data.geom_xpos[geom] + rotation @ ((low + high) / 2)
    return Boxes(centre[None], rotation[None], (high - low)[None] / 2)


def geom_extent(model: Any, geom: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates [3], [3] of a geom about its centre, along its own axes.

    A plane is a slab below its surface. Raises ValueError for a geom of another kind without extent.
    """
    from mujoco import mjtGeom

    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        vertices = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
        return vertices.min(axis=0), vertices.max(axis=0)
    if kind == mjtGeom.mjGEOM_PLANE:
        wide = np.where(size[:2] > 0, size[:2], ENDLESS)
        return np.array([*-wide, -0.1]), np.array([*wide, 0.0])
    if kind == mjtGeom.mjGEOM_SPHERE:
        half = np.full(3, size[0])
    elif kind == mjtGeom.mjGEOM_CAPSULE:
        half = np.array([size[0], size[0], size[1] + size[0]])
    elif kind == mjtGeom.mjGEOM_CYLINDER:
        half = np.array([size[0], size[0], size[1]])
    elif kind in (mjtGeom.mjGEOM_ELLIPSOID, mjtGeom.mjGEOM_BOX):
        half = size.copy()
    else:
        raise ValueError(f"Geom {model.geom(geom).name!r} of type {kind} has no finite extent.")
    return -half, half
