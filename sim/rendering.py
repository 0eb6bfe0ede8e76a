"""Camera frames on demand: which GL library draws, and one renderer per model that draws only when asked."""

import atexit
import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sim.camera_view import DRAWN_GROUP, CameraView
from sim.light_meshes import check_mesh_detail, lighten

EGL_PLATFORM_DEVICE_EXT = 0x313F  # EGL_EXT_platform_device
HIDDEN_GROUP = 0  # collision geoms are in it
MAX_GEOMS = 1000  # of a scene, as robosuite
OPAQUE = 0.9  # opacity from which nothing is seen through a geom


def choose_gl_backend() -> str:
    """Decide how MuJoCo draws off screen and set MUJOCO_GL for this process.

    Returns "egl", "osmesa", or what the user set MUJOCO_GL to.

    Must run before mujoco is imported, since mujoco reads the variable then; called again it only repeats the answer.
    Raises RuntimeError naming the Debian packages when neither EGL nor OSMesa can draw.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if chosen:
        return chosen
    if sys.platform != "linux":
        return "default"
    if egl_can_draw():
        backend = "egl"
    elif osmesa_is_installed():
        backend = "osmesa"
    else:
        raise RuntimeError(
            "Cannot draw camera images: neither EGL nor OSMesa works here. Install one of them, on Debian or Ubuntu: "
            "apt-get install libegl1 libgl1-mesa-dri libopengl0   (EGL, preferred)   or   apt-get install libosmesa6."
        )
    os.environ["MUJOCO_GL"] = backend
    os.environ.setdefault("PYOPENGL_PLATFORM", backend)
    return backend


def egl_can_draw() -> bool:
    """True if libEGL finds a device whose display initialises, and PyOpenGL finds a GL library beside it."""
    if not _loads("libOpenGL.so.0", "libGL.so.1"):  # without either, `import mujoco` fails under EGL
        return False
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_address or not display_address:
        return False
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    query_devices = ctypes.CFUNCTYPE(integer, integer, pointer, pointer)(query_address)
    platform_display = ctypes.CFUNCTYPE(pointer, integer, pointer, pointer)(display_address)
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    devices, count = (pointer * 32)(), integer()
    if not query_devices(32, devices, ctypes.byref(count)):
        return False
    for device in devices[: count.value]:
        display = platform_display(EGL_PLATFORM_DEVICE_EXT, device, None)
        if display and egl.eglInitialize(display, None, None):
            return True
    return False


def osmesa_is_installed() -> bool:
    return _loads("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")


def _loads(*libraries: str) -> bool:
    """Whether one of these shared libraries can be loaded."""
    for name in libraries:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def gl_context(size: int) -> Any:
    """A new off-screen GL context, made by the chosen backend even if mujoco was imported before the choice."""
    backend = choose_gl_backend()
    if backend == "egl":
        from mujoco.egl import GLContext
    elif backend == "osmesa":
        from mujoco.osmesa import GLContext
    else:
        from mujoco import GLContext
    return GLContext(size, size)


@dataclass(frozen=True)
class Decoration:
    """A shape in the scene that is drawn and is nothing else: the simulation does not know of it."""

    shape: str  # "box", "sphere" or "cylinder"
    half_extents: np.ndarray  # [3] m along its own axes
    position_w: np.ndarray  # [3] m
    rotation_w: np.ndarray  # [3, 3]
    rgba: np.ndarray  # [4] in [0, 1]


class Renderer:
    """Draws the cameras of one MuJoCo model. The GL context is made at the first frame.

    The frames equal robosuite's and LIBERO's pixel for pixel. A software renderer spends its time on vertices (41 ns
    each, 727 k of them in libero_object; the picture's size hardly matters), so geoms that the camera cannot see are
    left out; and the off-screen buffer is only as large as the largest frame asked for.

    mesh_detail: share of the meshes' triangles that are drawn, in (0, 1]; below 1 frames are only nearly equal (sim.light_meshes).
    """

    def __init__(self, model: Any, data: Any, mesh_detail: float = 1.0):
        check_mesh_detail(mesh_detail)
        self._mesh_detail = mesh_detail
        self._model = model
        self._data = data
        self._context = None
        self._view = CameraView(model, data)
        self.decorations: Sequence[Decoration] = ()  # drawn besides the model, from the next frame on

    def _open(self, size: int) -> None:
        import mujoco

        self._model.vis.global_.offwidth = size
        self._model.vis.global_.offheight = size
        self._gl = gl_context(size)
        self._gl.make_current()
        self._scene = mujoco.MjvScene(self._model, maxgeom=MAX_GEOMS)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = 0
        self._option.geomgroup[DRAWN_GROUP] = 1
        self._site_groups = self._option.sitegroup.copy()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._perturbation = mujoco.MjvPerturb()
        self._context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_50)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        if self._mesh_detail < 1:
            lighten(self._model, self._context, self._mesh_detail)
        atexit.register(self.close)  # runs before mujoco ends EGL, which would make freeing fail

    def frame(self, camera: str, size: int) -> np.ndarray:
        """The camera's picture now, uint8 [size, size, 3], upright.

        Raises ValueError naming the model's cameras if there is none of that name.
        """
        return self._draw(camera, size, identities=False)

    def bodies(self, camera: str, size: int) -> np.ndarray:
        """The MuJoCo body that each pixel of `frame` shows, int32 [size, size], upright; -1 where it shows none.

        Through what is translucent (a microwave's window) the body behind it is seen.
        """
        import mujoco

        pixels = self._draw(camera, size, identities=True).astype(np.int32)
        numbers = pixels @ np.array([1, 256, 65536])  # 0 is the background, i + 1 the geom that MuJoCo calls i in this scene
        body_of = np.full(MAX_GEOMS + 1, -1, np.int32)
        for geom in self._scene.geoms[: self._scene.ngeom]:
            if geom.segid >= 0 and geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                body_of[geom.segid + 1] = self._model.geom_bodyid[geom.objid]
        return body_of[numbers]

    def _draw(self, camera: str, size: int, *, identities: bool) -> np.ndarray:
        """The frame, uint8 [size, size, 3]; with `identities` each geom in a flat colour that is its number."""
        import mujoco

        camera_id = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        if camera_id < 0:
            names = [self._model.camera(index).name for index in range(self._model.ncam)]
            raise ValueError(f"Unknown camera {camera!r}; this scene has {names}.")
        if self._context is None:
            self._open(size)
        self._gl.make_current()
        if size > self._context.offWidth:
            mujoco.mjr_resizeOffscreen(size, size, self._context)
        self._camera.fixedcamid = camera_id
        # robosuite hides sites by a negative opacity, which flat colours would ignore
        self._option.sitegroup[:] = 0 if identities else self._site_groups
        self._update_scene(camera_id)
        if not identities:
            self._add_decorations()
        for flag in (mujoco.mjtRndFlag.mjRND_SEGMENT, mujoco.mjtRndFlag.mjRND_IDCOLOR):
            self._scene.flags[flag] = identities
        if identities:
            for geom in self._scene.geoms[: self._scene.ngeom]:
                if geom.rgba[3] < OPAQUE:
                    geom.segid = -1  # not drawn as an identity
        viewport = mujoco.MjrRect(0, 0, size, size)
        pixels = np.empty((size, size, 3), np.uint8)
        mujoco.mjr_render(viewport, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, None, viewport, self._context)
        return pixels[::-1]  # OpenGL's first row is the bottom one

    def _update_scene(self, camera_id: int) -> None:
        """Collect the geoms in view; the others sit in a group that is not drawn while MuJoCo collects."""
        import mujoco

        groups = self._model.geom_group.copy()
        self._model.geom_group[~self._view.contains_geoms(camera_id)] = HIDDEN_GROUP
        mujoco.mjv_updateScene(
            self._model,
            self._data,
            self._option,
            self._perturbation,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        self._model.geom_group[:] = groups

    def _add_decorations(self) -> None:
        import mujoco

        kinds = {name: getattr(mujoco.mjtGeom, f"mjGEOM_{name.upper()}") for name in ("box", "sphere", "cylinder")}
        for decoration in self.decorations:
            size = decoration.half_extents
            if decoration.shape == "cylinder":
                size = size[[0, 2, 2]]  # MuJoCo: radius, half height
            pose = decoration.position_w, decoration.rotation_w.ravel()
            geom = self._scene.geoms[self._scene.ngeom]
            mujoco.mjv_initGeom(geom, kinds[decoration.shape], size, *pose, decoration.rgba.astype(np.float32))
            self._scene.ngeom += 1

    def upload_textures(self, textures: Sequence[int]) -> None:
        """Show what was written into these textures of the model. A context made later reads them anyway."""
        import mujoco

        if self._context is None:
            return
        self._gl.make_current()
        for texture in textures:
            mujoco.mjr_uploadTexture(self._model, self._context, texture)

    def close(self) -> None:
        """Free the GL context. A later frame opens a new one."""
        if self._context is not None:
            atexit.unregister(self.close)
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._context = None
