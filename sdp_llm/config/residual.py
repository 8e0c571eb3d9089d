"""Which residual scales go with which masking."""

from __future__ import annotations

import json

from sdp_llm.errors import ConfigError

RESIDUAL_SCALES = ("none", "inverse_coverage", "eval")


def check_residual_scale(masking: str, residual_scale: str) -> None:
    """Check `sdp.residual_scale` for a run, or for a phase of one.

    :raises ConfigError: backward masking with another scale than "none".
    """
    if masking == "backward" and residual_scale != "none":
        raise ConfigError(
            f"sdp.residual_scale = {json.dumps(residual_scale)}: with backward masking every rank "
            'runs every block, so nothing is missing that a scale could make up for; use "none", '
            'or sdp.masking = "forward"'
        )
