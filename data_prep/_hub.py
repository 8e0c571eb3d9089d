"""Waiting for a hub that does not answer, instead of ending a run of a day."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from data_prep._common import note

# Waits between attempts to reach the hub, each of which huggingface_hub has tried for some 20
# seconds: about half an hour in all, since a run over night should survive an outage.
_PATIENCE = (5, 10, 20, 40, *([60] * 30))
_T = TypeVar("_T")


class HubUnreachable(OSError):
    """The hub did not answer for as long as was waited for it."""


def is_transient(error: BaseException) -> bool:
    """Whether an error is the network's and may pass, rather than a file's or a name's."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    if type(error) is FileNotFoundError:
        # What `datasets` makes of a hub that does not answer for a README.
        return "LocalEntryNotFoundError" in str(error)
    return isinstance(error, (httpx.TransportError, ConnectionError, TimeoutError))


def patiently(read: Callable[[], Iterator[_T]], what: str) -> Iterator[_T]:
    """Yield what ``read()`` yields; if the hub fails, start again and go on after the last value.

    :param read: Yields the same values each time.
    :param what: Named while waiting.
    :raises HubUnreachable: The hub keeps failing for as long as ``_PATIENCE`` lasts.
    """
    waits = iter(_PATIENCE)
    done = 0
    while True:
        try:
            for number, value in enumerate(read()):
                if number == done:
                    done += 1
                    waits = iter(_PATIENCE)
                    yield value
            return
        except Exception as error:
            if not is_transient(error):
                raise
            wait = next(waits, None)
            if wait is None:
                raise HubUnreachable(
                    f"the hub did not give {what} for half an hour: {one_line(error)}"
                ) from error
            note(f"waiting {wait} s for the hub to give {what}: {one_line(error)}")
            time.sleep(wait)


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
