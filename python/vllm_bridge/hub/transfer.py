"""The bytes of files on the hub, asked for again where they do not come."""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from vllm_bridge.errors import BridgeError
from vllm_bridge.hub.repository import File, Repository

# So many times, the hub is asked again after it failed without a byte, each time after a pause of
# twice as many seconds as before.
_TRIES: Final = 5
_PAUSE = 1.0


class StoppedError(Exception):
    """What was under way is not wanted any more."""


def chunks(
    repository: Repository, file: File, options: Mapping[str, Any], start: int, end: int
) -> Iterator[bytes]:
    """What a file holds from one byte to another, as it comes.

    Raises:
        ConnectionError: if less came
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = build_hf_headers(token=options.get("hf_token"))
    headers["Accept-Encoding"] = "identity"
    if (start, end) != (0, file.size):
        headers["Range"] = f"bytes={start}-{end - 1}"
    with http_stream_backoff(
        "GET",
        hf_hub_url(repository.id, file.path, revision=repository.commit),
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
        retry_on_status_codes=(429,),
    ) as response:
        hf_raise_for_status(response)
        # Who does not know ranges sends all of the file.
        at = start if response.status_code == 206 else 0
        for chunk in response.iter_bytes():
            if at + len(chunk) > start:
                yield chunk[max(start - at, 0) :]
            at += len(chunk)
            if at > end:
                return
    if at < end:
        raise ConnectionError(f"the connection ended after {at} of {end} bytes")


def patiently(run: Callable[[], None], count: Callable[[], int], stop: threading.Event) -> None:
    """Runs what may fail for a moment until it does not.

    Args:
        count: how many bytes came so far; as long as there are more each time, there is no end to
            the patience
        stop: ends it

    Raises:
        StoppedError: if it was stopped
    """
    tries = 0
    while True:
        before = count()
        try:
            run()
        except Exception as error:
            tries = 0 if count() > before else tries + 1
            if tries > _TRIES or not _may_pass(error):
                raise
            if stop.wait(_PAUSE * 2 ** max(tries - 1, 0)):
                raise StoppedError from error
        else:
            return


def _may_pass(error: Exception) -> bool:
    """Whether a failure may be over in a moment: the hub's own, or one of the network."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, BridgeError | OfflineModeIsEnabled | StoppedError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status >= 500 or status == 408)
    return not isinstance(error, OSError) or isinstance(error, ConnectionError)
