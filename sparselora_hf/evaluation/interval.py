"""Shares with their uncertainty."""

import math
from statistics import NormalDist

__all__ = ["pass_at_k", "wilson"]


def wilson(share: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        share: mean of ``total`` values between 0 and 1; for values that are neither 0 nor 1 the interval is too wide
            rather than too narrow.
        total: number of values.
        confidence: probability that the interval covers.

    Returns:
        Lower and upper end; (0, 1) without values.
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k answers drawn from the samples is correct (arXiv 2107.03374, section 2.1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
