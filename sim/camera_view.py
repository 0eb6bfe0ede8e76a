"""Which geoms a camera can see: a conservative test of bounding boxes against the view frustum, mirrors included."""

from typing import Any

import numpy as np

MARGIN = 1.02  # the frustum is widened by 2 % against rounding at its border
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)  # [8, 3]


class CameraView:
    """Answers for one MuJoCo model and its data; a geom that changes any pixel of a square picture counts as seen."""

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
        """bool [G]: the geom's box reaches into the view, directly or in a mirror (a reflective plane or box top).

        All True if a light casts shadows, since an unseen geom's shadow may be seen.
        """
        model, data = self._model, self._data
        if self._has_shadows:
            return np.ones(model.ngeom, bool)
        rotations = data.geom_xmat.reshape(-1, 3, 3)
        corners_w = self._corners_g @ rotations.transpose(0, 2, 1) + data.geom_xpos[:, None]
        slope = MARGIN * np.tan(np.radians(model.cam_fovy[camera_id]) / 2)
        picture = np.array([[-slope, -slope], [slope, slope]])
        seen = self._endless | self._reaches(corners_w, camera_id, picture)
        for mirror in self._mirrors:
            if not seen[mirror]:
                continue
            normal = rotations[mirror][:, 2]
            height = 0.0 if self._endless[mirror] else model.geom_size[mirror, 2]
            surface = data.geom_xpos[mirror] + height * normal
            distance = (corners_w - surface) @ normal
            window = picture if self._endless[mirror] else self._window(corners_w[mirror], camera_id, picture)
            seen |= self._reaches(corners_w - 2 * distance[..., None] * normal, camera_id, window)
        return seen

    def _in_camera(self, points_w: np.ndarray, camera_id: int) -> np.ndarray:
        """Points [..., 3] in the camera's frame: x right, y up, looking along -z."""
        return (points_w - self._data.cam_xpos[camera_id]) @ self._data.cam_xmat[camera_id].reshape(3, 3)

    def _window(self, corners_w: np.ndarray, camera_id: int, picture: np.ndarray) -> np.ndarray:
        """[2, 2] lowest and highest x, y slopes that a box [8, 3] covers; all of `picture` if it reaches behind."""
        corners = self._in_camera(corners_w, camera_id)
        if corners[:, 2].max() > -1e-6:
            return picture
        slopes = corners[:, :2] / -corners[:, 2:]
        border = (MARGIN - 1) * picture[1]
        return np.clip([slopes.min(axis=0) - border, slopes.max(axis=0) + border], *picture)

    def _reaches(self, corners_w: np.ndarray, camera_id: int, window: np.ndarray) -> np.ndarray:
        """bool [G]: the corners [G, 8, 3] do not all lie beyond one side of the window [2, 2] or behind the camera."""
        x, y, z = np.moveaxis(self._in_camera(corners_w, camera_id), -1, 0)
        (left, bottom), (right, top) = window
        outside = [(x > -z * right), (x < -z * left), (y > -z * top), (y < -z * bottom), (z > 0)]
        return ~np.any([side.all(axis=1) for side in outside], axis=0)
