"""Settings that several losses share."""

import math


def check_beta(beta: float) -> None:
    """Refuse a beta under which a loss would ask for the opposite, for nothing, or for no number.

    Raises:
        ValueError: It is not above 0, or not finite.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: found {beta}, expected a number above 0.")
