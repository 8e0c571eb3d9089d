"""The errors that end a run with one line instead of a traceback."""

from __future__ import annotations

import re

# What ends a line somewhere, or steers a terminal; with the spaces around it.
_BREAKS = re.compile(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]+\s*")


class ConfigError(ValueError):
    """A wrong config, command line, file or environment.

    The message is one line that names the key or file, its value, the rule it breaks and the fix:
    what ends a line, in a key or in what another library says, becomes a space. Entry points print
    it without a traceback and exit with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_BREAKS.sub(" ", message))


class DamagedCheckpoint(ConfigError):
    """A folder that is no complete checkpoint, or not what was saved: another one may be fine."""


class UnnamedCheckpoint(ConfigError):
    """A checkpoint is complete, and only ``latest`` could not be written to name it."""


class RankLost(RuntimeError):
    """Another rank hangs, failed or is gone; the one-line message names it.

    Entry points exit with status 4, as a rank does that its watchdog ends.
    """


class Interrupted(RuntimeError):
    """All ranks agreed to stop what they were doing together."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the one-line message says why and what to change.

    Entry points exit with status 3.
    """
