"""Differential privacy of who takes part: noise on the sum of the clients' changes.

    g = (sum_k u_k + z) / K,   z ~ N(0, (sigma S)^2) in each number,   || u_k || <= S

with sigma the noise_multiplier and S the clip_norm

(McMahan, Ramage, Talwar and Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018).
All clients weigh the same, and K is the cohort, whoever answers: the weights tell nothing. The numbers are
float32 and the noise is drawn from the run's seed, as all that a simulation draws: good to measure what
privacy costs, not to publish a model with.
"""

import numpy as np
import torch
from torch import Tensor

from .mean import PseudoGradient


def noisy(gradient: PseudoGradient, deviation: float, rng: np.random.Generator) -> PseudoGradient:
    """With noise of this standard deviation, sigma S / K, on every number."""

    def with_noise(numbers: Tensor) -> Tensor:
        if numbers.numel() == 0:
            return numbers
        noise = rng.standard_normal(numbers.shape, dtype=np.float32)
        return torch.from_numpy(noise).mul_(deviation).add_(numbers)

    return PseudoGradient(gradient.class_ids, with_noise(gradient.rows), with_noise(gradient.extractor))
