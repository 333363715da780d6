"""Prompts with images: from bytes and URLs to what a model's processor takes."""

import asyncio
from collections.abc import Mapping
from typing import Any

from vllm_bridge.errors import BridgeError


async def take_images(prompt: Any, renderer: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """The prompt without its images, and the images as vLLM takes them, decoded and as RGB.

    Args:
        prompt: as it came; one with images has ``multi_modal_data``, a map of ``image`` to a list
            of files (bytes) and URLs (strings)
        renderer: vLLM's
        config: vLLM's ``ModelConfig``

    Raises:
        BridgeError: ``unsupported`` for a model without images, ``invalid_prompt``
    """
    if not isinstance(prompt, dict) or "multi_modal_data" not in prompt:
        return prompt, {}
    match prompt:
        case {"multi_modal_data": {"image": [_, *_] as images} as data, **rest} if len(
            data
        ) == 1 and all(isinstance(image, bytes | str) for image in images):
            pass
        case _:
            raise BridgeError(
                "invalid_prompt",
                "`multi_modal_data` is a map with `image`, a list of bytes and URLs.",
            )
    _check_count(len(images), renderer, config)
    if not rest.keys() <= {"prompt", "prompt_token_ids"}:
        raise BridgeError(
            "invalid_prompt", "Images go with a prompt of text or of tokens, and nothing else."
        )
    loaded = await asyncio.gather(*(_load(*item, config) for item in enumerate(images)))
    return (
        rest if "prompt_token_ids" in rest else rest.get("prompt"),
        {"multi_modal_data": {"image": loaded}},
    )


async def render_images(renderer: Any, prompt: Mapping[str, Any], tokenize: Any) -> Any:
    """The prompt, ready for the engine.

    Args:
        renderer: vLLM's
        prompt: parsed by vLLM, with images
        tokenize: vLLM's ``TokenizeParams``

    Raises:
        BridgeError: ``invalid_prompt``, where images and their places do not match
        VLLMClientError: vLLM's own
    """
    from vllm.exceptions import VLLMClientError

    wanted = len(prompt["multi_modal_data"]["image"])
    try:
        rendered = (await renderer.render_cmpl_async([prompt], tokenize))[0]
    except VLLMClientError:
        raise
    except Exception as error:  # Processors have no exceptions of their own.
        raise _mismatch(wanted, str(error)) from error
    found = len(rendered["mm_placeholders"].get("image", ()))
    if found != wanted:
        raise _mismatch(wanted, f"it has {found} places")
    return rendered


def _mismatch(wanted: int, why: str) -> BridgeError:
    return BridgeError(
        "invalid_prompt",
        f"The model's processor does not take this prompt with {wanted} image(s): {why}. A prompt "
        "has one place for each of its images, written the way the model was trained with, such "
        "as `<image>`; `chat` writes it by itself.",
        {"images": wanted},
    )


def _check_count(count: int, renderer: Any, config: Any) -> None:
    limits = (
        renderer.get_mm_processor().info.allowed_mm_limits if config.is_multimodal_model else {}
    )
    if "image" not in limits:
        raise BridgeError(
            "unsupported",
            f"This model ({config.architecture}) takes no images. Leave `multi_modal_data` out, or "
            "start an engine with a model that takes them.",
            {"architecture": config.architecture},
        )
    if count > limits["image"]:
        raise BridgeError(
            "invalid_prompt",
            f"The prompt has {count} images; this engine takes at most {limits['image']} in one "
            "prompt, by the model or by the option `limit_mm_per_prompt`.",
            {"images": count, "limit": limits["image"], "option": "limit_mm_per_prompt"},
        )


async def _load(index: int, image: bytes | str, config: Any) -> Any:
    """One image, by vLLM's own loaders: they know which formats are safe to read, how many
    pixels and bytes are too many, and which hosts and folders a URL may name."""
    import vllm.envs as envs
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
    from vllm.multimodal.media.image import ImageMediaIO

    multimodal = config.multimodal_config
    kwargs = multimodal.media_io_kwargs or {}
    try:
        if isinstance(image, bytes):
            return await asyncio.to_thread(
                ImageMediaIO(**kwargs.get("image", {})).load_bytes, image
            )
        connector = MEDIA_CONNECTOR_REGISTRY.load(
            envs.VLLM_MEDIA_CONNECTOR,
            media_io_kwargs=kwargs,
            allowed_local_media_path=config.allowed_local_media_path,
            allowed_media_domains=config.allowed_media_domains,
        )
        return await connector.fetch_image_async(image)
    except Exception as error:  # Of Pillow and of HTTP, of many kinds.
        what = f"the URL {image[:80]!r}" if isinstance(image, str) else f"{len(image)} bytes"
        raise BridgeError(
            "invalid_prompt",
            f"Image {index} ({what}) cannot be read: {str(error) or type(error).__name__}",
            {"image_index": index},
        ) from error
