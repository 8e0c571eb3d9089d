"""The one error that a user's own input can cause."""

from __future__ import annotations


class ConfigError(ValueError):
    """A wrong config, command line, file or environment.

    The message is one line that names the key or file, its value, the rule it breaks and the fix.
    Entry points print it without a traceback and exit with status 2.
    """
