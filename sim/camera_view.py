"""Which geoms a camera can see: a conservative test of bounding boxes against the view frustum, mirrors included.

A mirror (a reflective plane or box top) makes MuJoCo draw the scene twice and shows what the camera does not see
directly. Where one opaque box stands before the mirror, nothing of it is seen: robosuite's floor is such a mirror, and
its table such a box.
"""

from typing import Any

import numpy as np

MARGIN = 1.02  # the view is widened by 2 %, and boxes that hide are narrowed by it, against rounding at borders
TILES = 8  # a mirror's visible part is known to an eighth of the picture
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)  # [8, 3]
DRAWN_GROUP = 1  # robosuite and LIBERO: visual geoms; group 0 holds collision geoms


class CameraView:
    """Answers for one MuJoCo model and its data; a geom that changes any pixel of a square picture counts as seen."""

    def __init__(self, model: Any, data: Any):
        from mujoco import mjtGeom

        self._model = model
        self._data = data
        centre, half = model.geom_aabb[:, None, :3], model.geom_aabb[:, None, 3:]
        self._corners_g = centre + half * CORNERS  # [G, 8, 3] m, geom frame
        plane, box = model.geom_type == mjtGeom.mjGEOM_PLANE, model.geom_type == mjtGeom.mjGEOM_BOX
        self._endless = plane | (model.geom_type == mjtGeom.mjGEOM_HFIELD)
        materials = [model.mat(index) if index >= 0 else None for index in model.geom_matid]
        reflects = np.array([material is not None and material.reflectance[0] > 0 for material in materials])
        opaque = np.array([material is None or material.rgba[3] == 1 for material in materials])
        drawn = (model.geom_group == DRAWN_GROUP) & (model.geom_rgba[:, 3] > 0)
        self._mirrors = np.flatnonzero((plane | box) & reflects & drawn)
        self._screens = np.flatnonzero(box & opaque & drawn & (model.geom_rgba[:, 3] == 1))
        self._has_shadows = bool(model.light_castshadow.any())

    def contains_geoms(self, camera_id: int) -> np.ndarray:
        """bool [G]: the geom's box reaches into the view, directly or in a mirror that is itself seen.

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
        for mirror in self._mirrors[seen[self._mirrors]]:
            normal = rotations[mirror][:, 2]
            height = 0.0 if self._endless[mirror] else model.geom_size[mirror, 2]
            distance = (corners_w - data.geom_xpos[mirror]) @ normal - height  # [G, 8] m, above the mirror's surface
            window = picture if self._endless[mirror] else self._window(corners_w[mirror], camera_id, picture)
            before = self._screens[(distance[self._screens] > 0).all(axis=1)]
            window = self._unscreened(window, camera_id, before)
            if window is None:
                seen[mirror] = False
            else:
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

    def _unscreened(self, window: np.ndarray, camera_id: int, boxes: np.ndarray) -> np.ndarray | None:
        """The part of the window [2, 2] that no one of these box geoms covers; None if they cover all of it.

        A tile is covered if one box is met by the rays through all its four corners: boxes are convex.
        """
        model, data = self._model, self._data
        x, y = (np.linspace(low, high, TILES + 1) for low, high in window.T)
        rays = np.stack(np.broadcast_arrays(x[:, None], y[None, :], -1.0), axis=-1)  # depth 1 m
        rays_w = rays @ data.cam_xmat[camera_id].reshape(3, 3).T
        rotations = data.geom_xmat[boxes].reshape(-1, 3, 3)
        origin = ((data.cam_xpos[camera_id] - data.geom_xpos[boxes])[:, None] @ rotations)[:, :, None]  # [B, 1, 1, 3]
        direction = np.einsum("xyw,bwl->bxyl", rays_w, rotations)
        direction = np.where(np.abs(direction) < 1e-12, 1e-12, direction)
        half = model.geom_size[boxes][:, None, None] / MARGIN
        first, second = (-half - origin) / direction, (half - origin) / direction
        enters, leaves = np.minimum(first, second).max(axis=-1), np.maximum(first, second).min(axis=-1)
        met = (leaves > enters) & (enters > model.vis.map.znear * model.stat.extent)  # [B, X, Y]
        covered = (met[:, :-1, :-1] & met[:, 1:, :-1] & met[:, :-1, 1:] & met[:, 1:, 1:]).any(axis=0)
        if covered.all():
            return None
        columns, rows = np.flatnonzero(~covered.all(axis=1)), np.flatnonzero(~covered.all(axis=0))
        return np.array([[x[columns[0]], y[rows[0]]], [x[columns[-1] + 1], y[rows[-1] + 1]]])

    def _reaches(self, corners_w: np.ndarray, camera_id: int, window: np.ndarray) -> np.ndarray:
        """bool [G]: the corners [G, 8, 3] do not all lie beyond one side of the window [2, 2] or behind the camera."""
        x, y, z = np.moveaxis(self._in_camera(corners_w, camera_id), -1, 0)
        (left, bottom), (right, top) = window
        outside = [(x > -z * right), (x < -z * left), (y > -z * top), (y < -z * bottom), (z > 0)]
        return ~np.any([side.all(axis=1) for side in outside], axis=0)
