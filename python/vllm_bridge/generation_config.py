"""The model's own defaults for sampling parameters, its ``generation_config.json``.

vLLM takes them unseen and puts them into every request that does not say otherwise, which then
fails. Here they are checked when the engine starts, by the rules for what requests give.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from vllm_bridge import json_files
from vllm_bridge.errors import BridgeError
from vllm_bridge.params import SamplingParamsFactory

NAME = "generation_config.json"

# What sampling parameters are called there, if not like vLLM's.
_OTHER_NAMES = {"max_new_tokens": "max_tokens"}

_REMEDY = 'Correct it, or do without the file: `generation_config: "vllm"`.'


def check(folder: str | None, arguments: Mapping[str, Any]) -> None:
    """Looks at the defaults before vLLM reads them. Imports vLLM.

    Args:
        folder: the model's; None for one of the hub
        arguments: of the engine

    Raises:
        BridgeError: ``invalid_checkpoint`` with the file and the field, or ``invalid_option`` for
            one of ``override_generation_config``
    """
    overrides = arguments.get("override_generation_config") or {}
    _check_values(overrides, _refused_override)
    path, values = read(folder, arguments)
    _check_values({n: v for n, v in values.items() if n not in overrides}, _refusal_of(path))


def check_downloaded(model_config: Any) -> None:
    """The same for the defaults of a model of the hub, from vLLM's config of it."""
    _check_values(model_config.get_diff_sampling_param(), _refusal_of(NAME))


def read(folder: str | None, options: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The file with the defaults, and what it says: nothing where there is none.

    Args:
        folder: see ``check``
        options: of the engine

    Raises:
        BridgeError: ``invalid_checkpoint`` where it cannot be read
    """
    source = options.get("generation_config") or "auto"
    if source == "auto":
        source = options.get("hf_config_path") or folder
    path = os.path.join(source, NAME) if isinstance(source, str) and source != "vllm" else ""
    if not os.path.exists(path):
        return path, {}
    return path, json_files.read_or_refuse(path, "invalid_checkpoint", {"file": path}, _REMEDY)


def _check_values(
    values: Mapping[str, Any], refused: Callable[[str, Any, str], BridgeError]
) -> None:
    factory = SamplingParamsFactory({})
    for name, value in values.items():
        parameter = _OTHER_NAMES.get(name, name)
        if parameter not in factory.names or value is None:
            continue
        try:
            factory.make({parameter: value})
        except BridgeError as error:
            raise refused(name, value, "; ".join(error.details["errors"])) from error
        except Exception as error:  # vLLM raises what it pleases
            raise refused(name, value, str(error.args[0])) from error


def _refusal_of(path: str) -> Callable[[str, Any, str], BridgeError]:
    def refused(name: str, value: Any, why: str) -> BridgeError:
        return BridgeError(
            "invalid_checkpoint",
            f"`{path}` gives `{name}` as {value!r}: {why.rstrip('.')}.",
            {"file": path, "field": name, "value": value},
            remedy=_REMEDY,
        )

    return refused


def _refused_override(name: str, value: Any, why: str) -> BridgeError:
    return BridgeError(
        "invalid_option",
        f"`override_generation_config` gives `{name}` as {value!r}: {why.rstrip('.')}.",
        {"option": "override_generation_config", "field": name, "value": value},
        remedy="Leave it out, or give it another value.",
    )
