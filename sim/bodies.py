"""Collision boxes of MuJoCo bodies: what an expert needs to know of an object's size. Computed once per model."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class BodyBox:
    """A body's collision box, fixed in the body's frame."""

    body_id: int
    centre_b: np.ndarray  # [3] m, in the body frame
    half_extents: np.ndarray  # [3] m
    geom_ids: frozenset[int]  # its collision geoms, those of its child bodies included


def body_box(model: Any, name: str) -> BodyBox:
    """The box around the collision geoms of body `name` and of the bodies below it, with their joints at zero.

    Raises ValueError if the body has no collision geom.
    """
    import mujoco

    data = mujoco.MjData(model)  # the model's reference pose, so that child bodies are where the XML puts them
    mujoco.mj_kinematics(model, data)
    root = model.body(name).id
    rotation_wb, position_w = data.xmat[root].reshape(3, 3), data.xpos[root]
    lower, upper, geom_ids = np.full(3, np.inf), np.full(3, -np.inf), []
    for geom in range(model.ngeom):
        collides = model.geom_contype[geom] or model.geom_conaffinity[geom]
        if not collides or not is_below(model, model.geom_bodyid[geom], root):
            continue
        geom_ids.append(geom)
        rotation_bg = rotation_wb.T @ data.geom_xmat[geom].reshape(3, 3)
        centre_b = rotation_wb.T @ (data.geom_xpos[geom] - position_w)
        low, high = geom_extent(model, geom, rotation_bg)
        lower, upper = np.minimum(lower, centre_b + low), np.maximum(upper, centre_b + high)
    if not geom_ids:
        raise ValueError(f"Body {name!r} has no collision geom, so it has no box.")
    return BodyBox(root, (lower + upper) / 2, (upper - lower) / 2, frozenset(geom_ids))


def is_below(model: Any, body: int, root: int) -> bool:
    """True if `body` is `root` or one of its descendants."""
    while body > root:  # MuJoCo numbers parents before children
        body = model.body_parentid[body]
    return body == root


def geom_extent(model: Any, geom: int, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates [3], [3] of a geom about its centre, in the frame that `rotation` maps into."""
    from mujoco import mjtGeom

    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        vertices = model.mesh_vert[first : first + model.mesh_vertnum[mesh]] @ rotation.T
        return vertices.min(axis=0), vertices.max(axis=0)
    if kind == mjtGeom.mjGEOM_SPHERE:
        half = np.full(3, size[0])
    elif kind == mjtGeom.mjGEOM_CAPSULE:
        half = size[1] * np.abs(rotation[:, 2]) + size[0]
    elif kind == mjtGeom.mjGEOM_CYLINDER:
        half = size[1] * np.abs(rotation[:, 2]) + size[0] * np.sqrt(np.maximum(1 - rotation[:, 2] ** 2, 0))
    elif kind == mjtGeom.mjGEOM_ELLIPSOID:
        half = np.sqrt((rotation * size) ** 2 @ np.ones(3))
    elif kind == mjtGeom.mjGEOM_BOX:
        half = np.abs(rotation) @ size
    else:
        raise ValueError(f"Geom {model.geom(geom).name!r} of type {kind} has no finite extent.")
    return -half, half
