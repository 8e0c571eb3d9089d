"""Which residual scales go with which masking."""

from __future__ import annotations

import json
from collections.abc import Collection

from sdp_llm.errors import ConfigError

RESIDUAL_SCALES = ("none", "inverse_coverage", "eval")


def check_residual_scale(maskings: Collection[str], residual_scale: str) -> None:
    """Check `sdp.residual_scale` for a run.

    :param maskings: of its phases.
    :raises ConfigError: nothing but backward masking with another scale than "none".
    """
    if "forward" not in maskings and residual_scale != "none":
        raise ConfigError(
            f"sdp.residual_scale = {json.dumps(residual_scale)}: with backward masking every rank "
            'runs every block, so nothing is missing that a scale could make up for; use "none", '
            'or sdp.masking = "forward"'
        )
