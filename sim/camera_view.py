"""Which geoms a camera can see: a conservative test of bounding boxes against the view frustum, mirrors included."""

from typing import Any

import numpy as np

MARGIN = 1.02  # the frustum is widened by 2 % against rounding at its border
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)  # [8, 3]


class CameraView:
    """Answers for one MuJoCo model and its data. Every geom that changes a pixel of a square picture is answered with True."""

    def __init__(self, model: Any, data: Any):
        from mujoco import mjtGeom

        self._model = model
        self._data = data
        centre, half = model.geom_aabb[:, None, :3], model.geom_aabb[:, None, 3:]
        self._corners_g = centre + half * CORNERS  # [G, 8, 3] m, geom frame
        self._endless = (model.geom_type == mjtGeom.mjGEOM_PLANE) | (model.geom_type == mjtGeom.mjGEOM_HFIELD)
        material = model.geom_matid
        reflectance = np.where(material >= 0, model.mat_reflectance[np.maximum(material, 0)] if model.nmat else 0, 0)
        flat = (model.geom_type == mjtGeom.mjGEOM_PLANE) | (model.geom_type == mjtGeom.mjGEOM_BOX)
        self._mirrors = np.flatnonzero((reflectance > 0) & flat & (model.geom_group == 1))
        self._has_shadows = bool(model.light_castshadow.any())

    def contains_geoms(self, camera_id: int) -> np.ndarray:
        """bool [G]: the geom's box reaches into the camera's view, directly or in a mirror (reflective plane or box top).

        All True if a light casts shadows, since an unseen geom's shadow may be seen.
        """
        model, data = self._model, self._data
        if self._has_shadows:
            return np.ones(model.ngeom, bool)
        rotations = data.geom_xmat.reshape(-1, 3, 3)
        corners_w = self._corners_g @ rotations.transpose(0, 2, 1) + data.geom_xpos[:, None]
        seen = self._endless | self._in_frustum(corners_w, camera_id)
        for mirror in self._mirrors:
            if not seen[mirror]:
                continue
            normal = rotations[mirror][:, 2]
            height = 0.0 if self._endless[mirror] else model.geom_size[mirror, 2]
            surface = data.geom_xpos[mirror] + height * normal
            distance = (corners_w - surface) @ normal
            seen |= self._in_frustum(corners_w - 2 * distance[..., None] * normal, camera_id)
        return seen

    def _in_frustum(self, corners_w: np.ndarray, camera_id: int) -> np.ndarray:
        """bool [G]: the corners [G, 8, 3] do not all lie beyond one of the frustum's four sides or behind the camera."""
        rotation = self._data.cam_xmat[camera_id].reshape(3, 3)
        x, y, z = np.moveaxis((corners_w - self._data.cam_xpos[camera_id]) @ rotation, -1, 0)  # camera looks along -z
        slope = MARGIN * np.tan(np.radians(self._model.cam_fovy[camera_id]) / 2)
        limit = -z * slope
        outside = [(x > limit).all(1), (x < -limit).all(1), (y > limit).all(1), (y < -limit).all(1), (z > 0).all(1)]
        return ~np.any(outside, axis=0)
