"""What stands between a robot's observation and a model's input; training and inference share it. numpy only.

Actions have their own pair, `ActionTokenizer.encode` and `decode_expectation`; image scaling and augmentation happen on
the device, in `multimodal.images`.
"""

from dataclasses import dataclass

import numpy as np

from vla.data import Batch
from vla.interface import Observation, RobotSpec, check_observation
from vla.normalization import Statistics, denormalize, normalize


@dataclass(frozen=True)
class ModelInputs:
    """One observation as a policy sees it."""

    images: np.ndarray  # uint8 [C, H, W, 3], cameras in the order of RobotSpec.cameras
    state: np.ndarray  # float32 [S], normalised
    instruction: str  # see `clean_instruction`


@dataclass(frozen=True)
class BatchInputs:
    """B observations of a training batch as a policy sees them; row by row `ModelInputs`."""

    images: np.ndarray  # uint8 [B, C, H, W, 3]
    state: np.ndarray  # float32 [B, S], normalised
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Transforms:
    """The pipeline of one robot; `statistics` are those of the state over the training frames."""

    spec: RobotSpec
    statistics: Statistics

    def forward(self, observation: Observation) -> ModelInputs:
        """Raises ValueError naming what the observation lacks."""
        check_observation(observation, self.spec)
        return ModelInputs(
            images=np.stack([observation.images[camera] for camera in self.spec.cameras]),
            state=normalize(observation.state, self.statistics),
            instruction=clean_instruction(observation.instruction),
        )

    def inverse(self, inputs: ModelInputs) -> Observation:
        """The observation again, but for letter case, and for state values that normalisation clipped."""
        images = {camera: inputs.images[index] for index, camera in enumerate(self.spec.cameras)}
        return Observation(images, denormalize(inputs.state, self.statistics), inputs.instruction)

    def forward_batch(self, batch: Batch) -> BatchInputs:
        """`forward` of every row of a batch whose windows were cut with cameras=spec.cameras."""
        size = self.spec.image_size
        expected = (len(self.spec.cameras), size, size, 3)
        if batch.images.shape[1:] != expected or batch.state.shape[1:] != (self.spec.state_dim,):
            raise ValueError(
                f"Batch has images {batch.images.shape} and state {batch.state.shape}; expected [B, *{expected}] and "
                f"[B, {self.spec.state_dim}]. Cut the windows with cameras={self.spec.cameras}."
            )
        return BatchInputs(
            images=batch.images,
            state=normalize(batch.state, self.statistics),
            instructions=tuple(clean_instruction(text) for text in batch.instructions),
        )


def clean_instruction(text: str) -> str:
    """Lower case, single spaces: what the text tokenizer is trained on and what it is asked."""
    return " ".join(text.lower().split())
