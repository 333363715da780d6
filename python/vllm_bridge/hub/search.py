"""Looks for models on the hub."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from vllm_bridge.checkpoints import headers
from vllm_bridge.errors import BridgeError
from vllm_bridge.hub import errors, tokens
from vllm_bridge.quantization import registry

# What the hub is asked to tell of each model.
_TOLD: Final = (
    "downloads", "likes", "gated", "private", "tags", "safetensors", "gguf", "lastModified",
    "pipeline_tag",
)  # fmt: skip

SORTS: Final = ("downloads", "likes", "last_modified", "trending_score", "created_at")


@dataclasses.dataclass(frozen=True)
class Found:
    """A model of the hub.

    Args:
        id: ``owner/name``
        downloads: in the last thirty days
        likes: of users of the hub
        size: of its safetensors weights in bytes; None where the hub does not tell, as of GGUF
            files, of which a repository has many
        parameters: how many numbers its weights have; None where the hub does not tell
        method: by which it is quantized, after its tags and its name; None for plain ones
        gated: whether its owner must grant access
        private: whether only its owner sees it
        task: what it is for, as the hub calls it: ``text-generation``, …
        last_modified: ISO 8601; None where the hub does not tell
    """

    id: str
    downloads: int
    likes: int
    size: int | None
    parameters: int | None
    method: str | None
    gated: bool
    private: bool
    task: str | None
    last_modified: str | None

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def search(
    query: str,
    limit: int = 20,
    *,
    filters: Collection[str] = (),
    author: str | None = None,
    sort: str = "downloads",
    options: Mapping[str, Any] | None = None,
) -> list[Found]:
    """Models whose names have ``query`` in them.

    Args:
        query: may be empty
        limit: how many, at most
        filters: tags that they must have, such as ``gguf`` or
            ``base_model:quantized:Qwen/Qwen3-8B`` for what was quantized from a model
        author: whose they are
        sort: what the first has most of; one of ``SORTS``
        options: of which ``hf_token`` counts

    Raises:
        BridgeError: ``invalid_option``, ``hub_unreachable``, ``hub_unauthorized`` or
            ``rate_limited``
    """
    from huggingface_hub import HfApi

    if sort not in SORTS:
        raise BridgeError(
            "invalid_option",
            f"Models cannot be sorted by `{sort}`.",
            {"option": "sort", "value": sort, "allowed": list(SORTS)},
            remedy=f"Give one of {', '.join(SORTS)}.",
        )
    token = (options or {}).get("hf_token")
    tokens.check(token)
    with errors.told(None, token=token):
        models = HfApi(token=token).list_models(
            search=query or None,
            filter=list(filters) or None,
            author=author,
            sort=sort,
            limit=limit,
            expand=list(_TOLD),
        )
        return [_found(model) for model in models]


def _found(model: Any) -> Found:
    counts = model.safetensors.parameters if model.safetensors else {}
    gguf = model.gguf if isinstance(model.gguf, dict) else {}
    parameters = sum(counts.values()) or gguf.get("total")
    modified = model.last_modified
    return Found(
        id=model.id,
        downloads=model.downloads or 0,
        likes=model.likes or 0,
        size=_size(counts),
        parameters=parameters if isinstance(parameters, int) else None,
        method=method_of(model.id, model.tags or ()),
        gated=bool(model.gated),
        private=bool(model.private),
        task=model.pipeline_tag,
        last_modified=modified.isoformat() if modified is not None else None,
    )


def _size(counts: Mapping[str, int]) -> int | None:
    """Bytes of so many numbers of each dtype."""
    if not counts or not counts.keys() <= headers.WIDTH.keys():
        return None
    return sum(count * headers.WIDTH[dtype] for dtype, count in counts.items()) // 8


def method_of(name: str, tags: Sequence[str] = ()) -> str | None:
    """The quantization method of a repository, as its tags or the words of its name have it."""
    words = [*tags, *name.partition("/")[2].replace("_", "-").split("-")]
    for word in words:
        if method := registry.meant_by(word).name:
            return method
    return None
