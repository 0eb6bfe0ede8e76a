"""After somebody moved cameras or lights in a MuJoCo model: let the renderer see it, the simulation untouched."""

from typing import Any


def refresh_views(arm: Any) -> None:
    """Recompute the world poses of cameras and lights, and nothing else, for an Arm (sim.robosuite_env)."""
    import mujoco

    for data in (arm.data, arm.observed.data):
        mujoco.mj_camlight(arm.model, data)
