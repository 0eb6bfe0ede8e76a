"""The observation of one robot on openpi's wire: which keys mean what, for server and client.

openpi's LIBERO keys (src/openpi/policies/libero_policy.py): observation/image, observation/wrist_image,
observation/state, prompt. A camera by its own name is observation/images/CAMERA. Beside them, for this server:

    remask/tail        [n, action_dim], the unexecuted actions (real-time chunking)
    remask/delay       int, how many of them the answer must start with; default all
    remask/seed        int
    remask/timeout_ms  number
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from serve.protocol.images import fit_image
from serve.protocol.limits import Limits
from serve.protocol.refusal import Code, Refusal
from serve.protocol.requests import ActRequest, Description, act_request, deadline_after
from vla.interface import ActionChunk, Observation, RobotSpec

IMAGES, STATE, PROMPT = "observation/images/", "observation/state", "prompt"
INFO = ("confidence", "committed", "rounds", "checkpoint")
TAIL, DELAY, SEED, TIMEOUT_MS = "remask/tail", "remask/delay", "remask/seed", "remask/timeout_ms"


def camera_keys(spec: RobotSpec) -> dict[str, str]:
    """openpi's camera keys -> the policy's cameras: the first one, and the wrist's or else the second."""
    keys = {"observation/image": spec.cameras[0]} if spec.cameras else {}
    wrist = "wrist" if "wrist" in spec.cameras else spec.cameras[1] if len(spec.cameras) > 1 else None
    return keys | ({"observation/wrist_image": wrist} if wrist else {})


def request_of(description: Description, limits: Limits, message: Any) -> ActRequest:
    """A message of openpi's client as a request. Other keys are ignored, as openpi does. Raises Refusal."""
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise Refusal.invalid(f"An observation is a map with text keys; got {type(message).__name__}.")
    spec = description.spec
    aliases = camera_keys(spec)
    images = {}
    for key, value in message.items():
        camera = aliases.get(key) or (key.removeprefix(IMAGES) if key.startswith(IMAGES) else None)
        if camera in spec.cameras:
            images[camera] = _image(key, value, spec.image_size, limits)
    for key in (STATE, PROMPT):
        if key not in message:
            raise Refusal.invalid(f"The observation lacks {key!r}; got {sorted(message)[:12]}.")
    prompt = message[PROMPT]
    if not isinstance(prompt, str):
        raise Refusal.invalid(f"{PROMPT!r} is {type(prompt).__name__}; it must be text.")
    timeout_ms = _number(message, TIMEOUT_MS, int | float | np.integer | np.floating)
    return act_request(
        description,
        limits,
        images=images,
        state=_floats(STATE, message[STATE]),
        instruction=prompt,
        tail=None if message.get(TAIL) is None else _floats(TAIL, message[TAIL]),
        delay=_number(message, DELAY, int | np.integer),
        seed=_number(message, SEED, int | np.integer) or 0,
        deadline=deadline_after(None if timeout_ms is None else float(timeout_ms) / 1000, limits),
    )


def message_of(
    observation: Observation, *, known: np.ndarray | None = None, seed: int = 0, timeout_s: float | None = None
) -> dict[str, Any]:
    """Inverse of `request_of`."""
    message: dict[str, Any] = {IMAGES + camera: image for camera, image in observation.images.items()}
    message |= {STATE: observation.state, PROMPT: observation.instruction, SEED: int(seed)}
    if known is not None:
        message[TAIL] = np.asarray(known, dtype=np.float32)
    if timeout_s is not None:
        message[TIMEOUT_MS] = 1000 * timeout_s
    return message


def answer_of(chunk: ActionChunk) -> dict[str, Any]:
    """A chunk as openpi's client reads it: actions, and times; what else the policy says beside them."""
    answer: dict[str, Any] = {"actions": np.asarray(chunk.actions, dtype=np.float32)}
    answer |= {name: chunk.info[name] for name in INFO if name in chunk.info}
    return answer | {"policy_timing": {"infer_ms": float(chunk.info.get("milliseconds", 0.0))}}


def chunk_of(answer: Mapping[str, Any]) -> ActionChunk:
    """Inverse of `answer_of`."""
    info = {name: answer[name] for name in INFO if name in answer}
    return ActionChunk(
        np.array(answer["actions"], dtype=np.float32), info | {"milliseconds": answer["policy_timing"]["infer_ms"]}
    )


def metadata_of(description: Description) -> dict[str, Any]:
    """What a server says when a client connects."""
    spec = description.spec
    return description.to_dict() | {"image_size": spec.image_size, "camera_keys": camera_keys(spec)}


def _image(key: str, value: Any, size: int, limits: Limits) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
        shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise Refusal.invalid(f"{key!r} is {shown}; expected uint8 [height, width, 3].")
    if not 0 < value.shape[0] * value.shape[1] <= limits.pixels:
        raise Refusal(
            Code.TOO_LARGE, f"{key!r} has {value.shape[0]} x {value.shape[1]} pixels; 1 to {limits.pixels} are accepted."
        )
    return fit_image(value, size)


def _floats(key: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise Refusal.invalid(f"{key!r} is ragged: {error}") from error
    if array.dtype.kind not in "fiu":
        raise Refusal.invalid(f"{key!r} is {array.dtype} {list(array.shape)}; expected numbers.")
    return array


def _number(message: Mapping[str, Any], key: str, kinds: Any) -> Any:
    value = message.get(key)
    if value is None:
        return None
    if not isinstance(value, kinds) or isinstance(value, bool | np.bool_):
        raise Refusal.invalid(f"{key!r} is {value!r:.40}; expected a number.")
    return value.item() if isinstance(value, np.generic) else value
