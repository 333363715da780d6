"""Models of the Hugging Face hub, of which only the config is read here."""

import os
from collections.abc import Mapping
from typing import Any

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.config import read_config
from vllm_bridge.errors import BridgeError


def look_up(model: str, options: Mapping[str, Any]) -> Checkpoint:
    """Downloads a model's config, unless it is in the cache.

    Raises:
        BridgeError: ``model_not_found``, ``not_a_model``, ``model_gated`` or ``hub_unreachable``
    """
    from huggingface_hub import errors, hf_hub_download

    token = options.get("hf_token")
    revision = options.get("revision")
    where: dict[str, Any] = {
        "repo_id": model,
        "revision": revision,
        "cache_dir": options.get("download_dir"),
        "token": token,
    }
    details = {"model": model, "revision": revision}
    hint = (
        f"`{model}` is not a folder here, so it was looked up on the Hugging Face hub. "
        if "/" not in model or model.count("/") == 1
        else ""
    )
    try:
        _ask_once(where)
        path = hf_hub_download(filename="config.json", **where)
    except errors.GatedRepoError as error:
        raise BridgeError(
            "model_gated",
            f"The owner of {model} must grant access to it.",
            details,
            remedy=(
                f"Ask for it at https://huggingface.co/{model} and give your token as `HF_TOKEN` "
                "or `hf_token`."
            ),
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BridgeError(
            "model_not_found",
            f"{model} has no revision `{revision}` on the hub.",
            details,
            remedy="Name a branch, a tag or a commit of it, or leave `revision` out.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BridgeError(
            "model_not_found",
            hint + "It has no such model.",
            details,
            remedy=(
                "Look at how its name is spelt; if it is a private one, give a token that may read "
                "it as `HF_TOKEN` or `hf_token`."
            ),
        ) from error
    except errors.LocalEntryNotFoundError as error:
        # Also what the hub's client makes of a connection that failed.
        raise BridgeError(
            "hub_unreachable",
            hint
            + "It is not in the cache, and "
            + ("`HF_HUB_OFFLINE` is set." if _is_offline() else "the hub does not answer."),
            details,
            remedy=(
                "Download the model first, or give a local folder."
                if _is_offline()
                else "Check the network, or give a local folder."
            ),
        ) from error
    except errors.EntryNotFoundError as error:
        try:
            hf_hub_download(filename="params.json", **where)
        except Exception:
            raise BridgeError(
                "not_a_model",
                f"{model} on the hub has no `config.json`: it is not a model that vLLM can "
                "load (an adapter, a data set or GGUF files only).",
                details,
                remedy="Name the base model, or download a GGUF file and give its path.",
            ) from error
        return Checkpoint()
    except errors.HFValidationError as error:
        raise BridgeError(
            "model_not_found",
            f"`{model}` is neither a folder nor a model's name.",
            details,
            remedy="A model of the hub is named as `owner/name`.",
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise BridgeError(
            "hub_unreachable",
            hint + "The hub does not answer as it should.",
            details | {"exception": str(error)},
            remedy="Try again later, or give a local folder.",
        ) from error
    return Checkpoint(config=read_config(os.path.dirname(path)))


def _ask_once(where: Mapping[str, Any]) -> None:
    """Finds out whether the hub answers, where it has to: a download makes six attempts, which take
    half a minute. ``HF_HUB_ETAG_TIMEOUT`` says how long this one may take.

    Raises:
        LocalEntryNotFoundError: as a download does
        HfHubHTTPError: what the hub answers
    """
    import huggingface_hub as hub

    repo, revision = where["repo_id"], where["revision"]
    cached = hub.try_to_load_from_cache(repo, "config.json", where["cache_dir"], revision)
    if _is_offline() or isinstance(cached, str):
        return
    url = hub.hf_hub_url(repo, "config.json", revision=revision)
    try:
        hub.get_hf_file_metadata(url, token=where["token"])
    except hub.errors.HfHubHTTPError:
        raise
    except Exception as error:  # what the HTTP client of the day calls it
        raise hub.errors.LocalEntryNotFoundError(str(error)) from error


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
