"""The models of the Hugging Face hub, and those of them that are here.

What asks the hub or reads disks runs in a thread, so that the worker hears of it when nobody waits
any more.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_bridge.rpc.call import Call
from vllm_bridge.tools.model import ModelParams
from vllm_bridge.tools.progress import telling

if TYPE_CHECKING:
    from vllm_bridge.hub.download import Progress


class ModelsParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``models``."""

    download_dir: str | None = None


class DeleteParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``delete``."""

    model: str
    revision: str | None = None
    download_dir: str | None = None


class SearchParams(msgspec.Struct, forbid_unknown_fields=True):
    """The params of ``search``."""

    query: str
    limit: int = 20
    author: str | None = None
    filter: str | None = None
    hf_token: str | None = None


async def pull(call: Call, params: ModelParams) -> dict[str, Any]:
    """Downloads a model and tells how far it is, whenever it has come further."""
    return await asyncio.to_thread(_pull, params, telling(call))


def _pull(params: ModelParams, told: Callable[["Progress"], None]) -> dict[str, Any]:
    from vllm_bridge.checkpoints import models
    from vllm_bridge.hub import download
    from vllm_bridge.hub.look_up import look_up
    from vllm_bridge.params import check_option_names

    check_option_names(params.options)
    name = models.find(params.model, params.options)
    if isinstance(name, str):
        return {"path": name, "repository": None, "commit": None}
    repository = look_up(name, params.options)
    path = download.pull(repository, params.options, told)
    return {"path": path, "repository": repository.id, "commit": repository.commit}


async def models(_call: Call, params: ModelsParams) -> list[dict[str, Any]]:
    """What was downloaded."""
    from vllm_bridge.hub import cache

    found = await asyncio.to_thread(cache.models, {"download_dir": params.download_dir})
    return [model.to_wire() for model in found]


async def delete(_call: Call, params: DeleteParams) -> dict[str, int]:
    """Removes what was downloaded of a model."""
    from vllm_bridge.hub import cache

    where = {"download_dir": params.download_dir}
    freed = await asyncio.to_thread(cache.delete, params.model, where, params.revision)
    return {"freed": freed}


async def search(_call: Call, params: SearchParams) -> list[dict[str, Any]]:
    """Models that the hub has."""
    from vllm_bridge.hub.search import search

    def found() -> list[Any]:
        return search(
            params.query,
            params.limit,
            filters=[params.filter] if params.filter else [],
            author=params.author,
            options={"hf_token": params.hf_token},
        )

    return [model.to_wire() for model in await asyncio.to_thread(found)]


METHODS: dict[str, Any] = {
    "pull": (ModelParams, pull),
    "models": (ModelsParams, models),
    "delete": (DeleteParams, delete),
    "search": (SearchParams, search),
}
