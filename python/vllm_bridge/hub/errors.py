"""What the hub, its client and the disk say, as errors that tell what to do."""

import errno
from contextlib import AbstractContextManager
from typing import Any, Final

from vllm_bridge.errors import BridgeError, map_exceptions

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def told(
    name: str | None, revision: str | None = None, token: Any = None
) -> AbstractContextManager[None]:
    """Turns what is raised while the hub is asked about a repository into a ``BridgeError``.

    Args:
        name: of the repository; None for a question about all of them
        revision: that was asked for, if one was
        token: the option ``hf_token``
    """
    return map_exceptions(lambda error: _error(error, name, revision, token))


def disk_full(
    folder: str | None, needed: int | None = None, free: int | None = None
) -> BridgeError:
    """
    Args:
        folder: of the downloaded models; None where it is not known which disk it was
        needed: bytes that are still to come
        free: bytes that are left
    """
    place = f"`{folder}`" if folder else "the downloaded models"
    what = f"The disk of {place}, or the quota on it, is full."
    if needed is not None and free is not None:
        what = f"The download needs {_size(needed)}, and `{folder}` has {_size(free)} left."
    return BridgeError(
        "disk_full",
        what,
        {"folder": folder, "needed_bytes": needed, "free_bytes": free},
        remedy="Delete models that are not needed (`mix vllm.models`), or name a folder on another "
        "disk with `download_dir` or `HF_HOME`. What has come already is kept.",
    )


def corrupt(name: str, path: str, expected: str, found: str) -> BridgeError:
    """
    Args:
        path: of the file in the repository
        expected: its checksum or size, by the hub
        found: that of what came
    """
    return BridgeError(
        "download_corrupt",
        f"`{path}` of {name} is not what the hub says it is: it should have {expected}, and what "
        f"came has {found}. It was removed.",
        {"model": name, "file": path, "expected": expected, "found": found},
        remedy="Try again; if it stays so, a proxy or a mirror (`HF_ENDPOINT`) on the way changes "
        "files.",
    )


def _error(error: Exception, name: str | None, revision: str | None, token: Any) -> BridgeError:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # which is why the client looked for it here
    details: dict[str, Any] = {"model": name, "revision": revision}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        details["status"] = status
    match error:
        case errors.GatedRepoError():
            return BridgeError(
                "model_gated",
                f"The owner of {name} must grant access to it.",
                details,
                remedy=f"Ask for it at {_page(name)} and give your token as `hf_token` or "
                "`HF_TOKEN`.",
            )
        case errors.RevisionNotFoundError():
            return BridgeError(
                "model_not_found",
                f"{name} has no revision `{revision}` on the hub.",
                details,
                remedy="Leave `revision` out for the newest, or choose one of those at "
                f"{_page(name)}/tree/main.",
            )
        case errors.RepositoryNotFoundError():
            return BridgeError(
                "model_not_found",
                f"The Hugging Face hub has no model `{name}`, and there is no such folder here.",
                details,
                remedy="Look at the spelling; if it is a private model, give a token that may read "
                "it as `hf_token` or `HF_TOKEN`.",
            )
        case errors.DisabledRepoError():
            return BridgeError(
                "model_not_found",
                f"The hub has closed {name}.",
                details,
                remedy=f"See {_page(name)} for the reason, and use another model.",
            )
        case errors.HFValidationError():
            return BridgeError(
                "model_not_found",
                f"`{name}` is neither a folder here nor a name that a model can have on the hub.",
                details,
                remedy="Give one such as `org/name`.",
            )
        case errors.LocalTokenNotFoundError():
            return BridgeError(
                "hub_unauthorized",
                "`hf_token: true` takes the token of `hf auth login`, and there is none here.",
                details,
                remedy="Log in, or give a token as `hf_token` or `HF_TOKEN`.",
            )
        case errors.OfflineModeIsEnabled() if name is None:
            return BridgeError(
                "hub_unreachable",
                "`HF_HUB_OFFLINE` is set, and only the hub can answer this.",
                details,
                remedy="Unset it. `mix vllm.models` lists what was downloaded.",
            )
        case errors.OfflineModeIsEnabled():
            return BridgeError(
                "hub_unreachable",
                f"`HF_HUB_OFFLINE` is set, and {name} is not among the downloaded models.",
                details,
                remedy="Unset it, fetch the model where there is a network, or give a local "
                "folder.",
            )
        case errors.EntryNotFoundError() if status is not None:
            return BridgeError(
                "model_not_found",
                f"A file of {name} is no longer on the hub.",
                details | {"exception": str(error)},
                remedy="Try again, which looks at what is there now.",
            )
        case errors.HfHubHTTPError() if status is not None:
            return _by_status(error, status, name, token, details)
        case OSError() if error.errno in _FULL:
            return disk_full(error.filename)
        case OSError() if error.filename is not None:
            return BridgeError(
                "cache_not_writable",
                f"`{error.filename}` cannot be written to ({error.strerror}).",
                details | {"file": error.filename},
                remedy="Models are downloaded to the folder that `download_dir` or `HF_HOME` "
                "names: give one that you may write to.",
            )
    return BridgeError(
        "hub_unreachable",
        f"The Hugging Face hub does not answer ({type(error).__name__})"
        + (f", and {name} is not here." if name else "."),
        details | {"exception": f"{type(error).__name__}: {error}"},
        remedy="Check the network and, behind a proxy or a mirror, `HTTPS_PROXY` and `HF_ENDPOINT`"
        + ("; or give a local folder." if name else "."),
    )


def _by_status(
    error: Any, status: int, name: str | None, token: Any, details: dict[str, Any]
) -> BridgeError:
    if status in (401, 403):
        source = (
            "the option `hf_token`" if isinstance(token, str) else "`HF_TOKEN` or `hf auth login`"
        )
        why = "does not know" if status == 401 else f"does not let read {name or 'models'} with"
        return BridgeError(
            "hub_unauthorized",
            f"The hub {why} the token of {source}.",
            details,
            remedy="Make one that may read the model at https://huggingface.co/settings/tokens; "
            "public models need none.",
        )
    if status == 429:
        seconds = _wait(error.response.headers)
        when = f"in {seconds} seconds" if seconds else "in some minutes"
        return BridgeError(
            "rate_limited",
            "The hub was asked too often from here.",
            details | {"retry_after_ms": seconds * 1000 if seconds else None},
            remedy=f"Try again {when}; with a token (`hf_token` or `HF_TOKEN`) more is allowed.",
        )
    return BridgeError(
        "hub_unreachable",
        f"The hub answers with an error of its own ({status}).",
        details | {"exception": str(error)},
        remedy="Try again later, or give a local folder." if name else "Try again later.",
    )


def _wait(headers: Any) -> int | None:
    """After how many seconds the hub may be asked again."""
    from huggingface_hub.utils import parse_ratelimit_headers

    after = headers.get("Retry-After", "")
    if after.isdigit():
        return int(after)
    limit = parse_ratelimit_headers(headers)
    return limit.reset_in_seconds if limit is not None and limit.remaining == 0 else None


def _page(name: str | None) -> str:
    return f"https://huggingface.co/{name}"


def _size(count: int) -> str:
    """As the hub and disks count."""
    return f"{count / 10**9:.1f} GB" if count >= 10**9 else f"{count / 10**6:.1f} MB"
