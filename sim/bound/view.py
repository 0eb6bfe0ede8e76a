"""Colour, depth and identity pictures of a bound world from a free camera, and points from them.

One GL context serves all models of a process: opening one costs more than drawing a file's worth of pictures.
"""

import atexit
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.bound.scene import FAR, FIELD_OF_VIEW, NEAR, World
from sim.rendering import choose_gl_backend, gl_context

MAX_GEOMS = 100


@dataclass(frozen=True)
class Camera:
    """Looks at a point, as MuJoCo's free camera does."""

    target: tuple[float, float, float]  # m
    distance: float  # m
    azimuth: float  # degrees
    elevation: float  # degrees, negative looks down


@dataclass(frozen=True)
class View:
    """What a camera saw."""

    colour: np.ndarray | None  # uint8 [S, S, 3]
    depth: np.ndarray | None  # m [S, S], along the optical axis
    geoms: np.ndarray | None  # int [S, S], -1 where there is none
    position: np.ndarray  # m [3]
    axes: np.ndarray  # [3, 3]: rows right, down, forward


class Gallery:
    """Draws worlds, one after the other. `hang` takes in a world; `look` draws it as it stands."""

    def __init__(self, size: int) -> None:
        choose_gl_backend()
        self._gl = gl_context(size)
        self._gl.make_current()
        self._context: Any = None
        self._world: World | None = None
        atexit.register(self.close)

    def hang(self, world: World) -> None:
        import mujoco

        if self._context is not None:
            self._context.free()
        self._world = world
        self._scene = mujoco.MjvScene(world.model, maxgeom=MAX_GEOMS)
        self._option, self._camera = mujoco.MjvOption(), mujoco.MjvCamera()
        self._option.sitegroup[:] = 0
        self._context = mujoco.MjrContext(world.model, mujoco.mjtFontScale.mjFONTSCALE_50)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR

    def look(self, camera: Camera, size: int, wanted: tuple[str, ...] = ("colour", "depth")) -> View:
        """What `camera` sees at size x size pixels: colour, or depth and geoms, or all of them."""
        import mujoco

        world, scene = self._world, self._scene
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        self._camera.lookat[:] = camera.target
        self._camera.distance, self._camera.azimuth, self._camera.elevation = camera.distance, camera.azimuth, camera.elevation
        mujoco.mjv_updateScene(
            world.model, world.data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, scene
        )
        colour = depth = geoms = None
        if "colour" in wanted:
            colour, _ = self._draw(size, identities=False)
        if "depth" in wanted:
            flat, depth = self._draw(size, identities=True)  # glass, too, hides what is behind it here
            numbers = flat.astype(np.int64) @ np.array([1, 256, 65536])
            geom_of = np.full(MAX_GEOMS + 1, -1)
            for geom in scene.geoms[: scene.ngeom]:
                geom_of[geom.segid + 1] = geom.objid
            geoms = geom_of[numbers]
        eyes = scene.camera[:2]  # a stereo pair
        forward, up = np.array(eyes[0].forward), np.array(eyes[0].up)
        position = (np.array(eyes[0].pos) + np.array(eyes[1].pos)) / 2
        return View(colour, depth, geoms, position, np.stack([np.cross(forward, up), -up, forward]))

    def _draw(self, size: int, *, identities: bool) -> tuple[np.ndarray, np.ndarray]:
        import mujoco

        flags = self._scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = identities
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = not identities
        viewport = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(viewport, self._scene, self._context)
        colour, inverse = np.empty((size, size, 3), np.uint8), np.empty((size, size), np.float32)
        mujoco.mjr_readPixels(colour, inverse, viewport, self._context)
        return colour[::-1], metres(inverse[::-1])

    def close(self) -> None:
        if self._context is not None:
            self._context.free()
            self._context = None
        if self._gl is not None:
            atexit.unregister(self.close)
            self._gl.free()
            self._gl = None


def metres(inverse: np.ndarray) -> np.ndarray:
    """Depth buffer with 1 at the near plane and 0 at the far one, linear in 1 / depth -> depth in m."""
    return NEAR * FAR / (NEAR + inverse.astype(np.float64) * (FAR - NEAR))


def back_project(view: View, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """World positions [N, 3] in m of pixels (row, column), by their depth."""
    size = len(view.depth)
    focal = size / 2 / np.tan(np.radians(FIELD_OF_VIEW) / 2)
    x, y = (columns + 0.5 - size / 2) / focal, (rows + 0.5 - size / 2) / focal
    rays = np.stack([x, y, np.ones_like(x)], axis=1)  # camera frame, depth 1
    return view.position + (rays * view.depth[rows, columns, None]) @ view.axes
