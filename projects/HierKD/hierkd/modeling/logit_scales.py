"""The range of the learned factors on cosines: tau_c (Eq. 1) and tau_m (Eq. 4)."""

from __future__ import annotations

__all__ = ["LOGIT_SCALE_RANGE", "check_logit_scale"]

# Below 1 a softmax over cosines is flat, and below 0 it prefers what is least alike; from 1000 on
# a hundredth of cosine decides everything. [ours; the release has no limit, CLIP's upper one, 100,
# is where tau_c starts]
LOGIT_SCALE_RANGE = (1.0, 1000.0)


def check_logit_scale(start: float, limits: tuple[float, float], node: str) -> None:
    """Check a range and the value that starts in it.

    Args:
        start: the initial value.
        limits: least and greatest value, both positive.
        node: of the config, for the message.

    Raises:
        ValueError: the limits are not 0 < least <= greatest, or the value is not between them.
    """
    if len(limits) != 2 or not 0 < limits[0] <= limits[1] < float("inf"):
        raise ValueError(
            f"{node}.LOGIT_SCALE_RANGE must be two numbers, 0 < least <= greatest, got {limits}"
        )
    if not limits[0] <= start <= limits[1]:
        raise ValueError(
            f"{node}.LOGIT_SCALE is {start}, outside of {node}.LOGIT_SCALE_RANGE {limits}"
        )
