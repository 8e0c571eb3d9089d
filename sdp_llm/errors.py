"""The errors that end a run with one line instead of a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A wrong config, command line, file or environment.

    The message is one line that names the key or file, its value, the rule it breaks and the fix.
    Entry points print it without a traceback and exit with status 2.
    """


class DamagedCheckpoint(ConfigError):
    """A folder that is no complete checkpoint, or not what was saved: another one may be fine."""


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
