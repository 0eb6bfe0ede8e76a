"""The sound of a body that is hit: modes of its shape and material, excited by the forces that the simulator computed.

Modal synthesis (van den Doel and Pai, "The sounds of physical shapes", 1998): a mode answers an impulse J with
J exp(-t / tau) sin(2 pi f t); the response to a force history is its convolution with the sum over modes. A soft contact
lasts longer and so excites high modes less: the force is smoothed over the contact's time constant.
"""

import numpy as np

from multimodal.bind.sensors import SAMPLE_RATE
from sim.bound.materials import Material
from sim.bound.objects import MODES
from sim.bound.scene import TIMESTEP

REFERENCE_LENGTH = 0.1  # m
REFERENCE_PITCH = 1000.0  # Hz at which `ring` is given
HIGHEST = 0.45 * SAMPLE_RATE  # Hz, no mode above it is heard


def modes(shape: str, material: Material, length: float, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Frequency [K] in Hz, decay time [K] in s, and loudness [K] of a body's modes; where it is hit is drawn."""
    ratios = np.array(MODES[shape])
    frequency = material.pitch * REFERENCE_LENGTH / length * ratios * generator.uniform(0.985, 1.015, len(ratios))
    decay = np.minimum(material.ring * REFERENCE_PITCH / frequency, 4 * material.ring)
    loudness = generator.uniform(0.3, 1.0, len(ratios)) / np.sqrt(ratios)
    return frequency, decay, np.where(frequency < HIGHEST, loudness, 0.0)


def impulses(contact: np.ndarray) -> np.ndarray:
    """What rings a body: rises of the contact force, N [STEPS] -> N [samples] at SAMPLE_RATE, each at its step's begin."""
    per_step = round(SAMPLE_RATE * TIMESTEP)
    rises = np.maximum(np.diff(contact, prepend=contact[:1]), 0.0)
    train = np.zeros(len(contact) * per_step)
    train[::per_step] = rises
    return train


def ring(train: np.ndarray, frequency: np.ndarray, decay: np.ndarray, loudness: np.ndarray) -> np.ndarray:
    """Convolution of an impulse train [N] with the modes' response, by FFT. Returns [N]."""
    time = np.arange(len(train)) / SAMPLE_RATE
    response = (loudness[:, None] * np.exp(-time / decay[:, None]) * np.sin(2 * np.pi * frequency[:, None] * time)).sum(0)
    size = 2 * len(train)
    return np.fft.irfft(np.fft.rfft(train, size) * np.fft.rfft(response, size), size)[: len(train)]


def ring_reference(train: np.ndarray, frequency: np.ndarray, decay: np.ndarray, loudness: np.ndarray) -> np.ndarray:
    """The definition of `ring`: each impulse adds its own decaying sines."""
    sound = np.zeros(len(train))
    for start in np.flatnonzero(train):
        time = np.arange(len(train) - start) / SAMPLE_RATE
        for pitch, fade, volume in zip(frequency, decay, loudness, strict=True):
            sound[start:] += train[start] * volume * np.exp(-time / fade) * np.sin(2 * np.pi * pitch * time)
    return sound


def synthesise(
    contact: np.ndarray, shape: str, material: Material, length: float, generator: np.random.Generator, noise: float
) -> np.ndarray:
    """Waveform [samples] in [-1, 1] of the force history `contact`, levelled as a recorder does, with the room's noise."""
    width = max(1, round(material.time_constant * SAMPLE_RATE / 8))
    train = np.convolve(impulses(contact), np.ones(width) / width)[: len(contact) * round(SAMPLE_RATE * TIMESTEP)]
    sound = ring(train, *modes(shape, material, length, generator))
    peak = np.abs(sound).max()
    level = generator.uniform(0.5, 0.95) / peak if peak > 0 else 0.0
    return np.clip(sound * level + generator.normal(0.0, 0.01 * noise + 1e-9, len(sound)), -1.0, 1.0)
