"""LoRA adapters: checked and loaded before a request that names one goes to vLLM.

vLLM loads an adapter in the step that first needs it, where a fault ends the engine, and some
adapters that do not fit it takes without a word. So an adapter is looked at here, and loaded by a
call of its own, whose faults are errors and nothing else.
"""

import asyncio
import contextlib
import os
import typing
from typing import Annotated, Any

import msgspec

from vllm_bridge import json_files
from vllm_bridge.checkpoints import adapter
from vllm_bridge.checkpoints.adapter import CONFIG, WEIGHTS
from vllm_bridge.errors import BridgeError, did_you_mean
from vllm_bridge.hub import errors as hub_errors
from vllm_bridge.registry import find
from vllm_bridge.rpc.table import NoParams

# What the model's hidden states go into, and what makes them.
_FROM_HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_TO_HIDDEN = ("o_proj", "down_proj")

# What a model and the one that an adapter was made for must have in common.
_SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")


class LoRA(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A *LoRA request* of the protocol, with the fields of vLLM's ``LoRARequest``."""

    lora_name: Annotated[str, msgspec.Meta(min_length=1)]
    lora_int_id: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    lora_path: Annotated[str, msgspec.Meta(min_length=1)]
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class LoadLoRAParams(msgspec.Struct, forbid_unknown_fields=True):
    lora_request: LoRA


class UnloadLoRAParams(msgspec.Struct, forbid_unknown_fields=True):
    lora_name: str


class _Known(typing.NamedTuple):
    """An adapter that was loaded, and vLLM's own request for it.

    Args:
        version: tells adapters apart that had the same name of the registry one after the other
    """

    lora: LoRA
    request: Any
    version: tuple[str, float] | None


class LoRAs:
    """The adapters of an engine.

    Args:
        llm: the ``AsyncLLM``
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._known: dict[str, _Known] = {}
        self._loads = 0
        self._lock = asyncio.Lock()

    async def request(self, lora: LoRA | None) -> Any:
        """vLLM's ``LoRARequest``, for an adapter that is loaded by now.

        Raises:
            BridgeError: ``unsupported`` for an engine without adapters, ``model_not_found``,
                ``invalid_checkpoint``, ``invalid_option``, or what is wrong with the hub
        """
        if lora is None:
            return None
        self._check_enabled()
        known = self._known.get(lora.lora_name)
        if known is None or _is_to_load(lora, known):
            async with self._lock:
                # Another request may have loaded it meanwhile.
                known = self._known.get(lora.lora_name)
                if known is None or _is_to_load(lora, known):
                    known = await self._load(lora, known)
        if _identity(known.lora) != _identity(lora):
            raise BridgeError(
                "invalid_option",
                f"The name `{lora.lora_name}` is that of the adapter {known.lora.lora_path} "
                f"(id {known.lora.lora_int_id}). Unload it first, take another name, or give "
                "`load_inplace: true`.",
                {"option": "lora_name"},
            )
        # vLLM may have dropped it meanwhile, and would read it again.
        _check_files(lora, known.request.lora_path)
        return known.request

    async def load(self, params: LoadLoRAParams) -> None:
        await self.request(params.lora_request)

    async def unload(self, params: UnloadLoRAParams) -> bool:
        """Whether there was one of that name."""
        self._check_enabled()
        async with self._lock:
            known = self._known.pop(params.lora_name, None)
            if known is not None:
                await self._llm.remove_lora(known.lora.lora_int_id)
        return known is not None

    async def list(self, _params: NoParams) -> list[LoRA]:
        """Those that vLLM holds now."""
        self._check_enabled()
        held = await self._llm.list_loras()
        return [known.lora for known in self._known.values() if known.lora.lora_int_id in held]

    def _check_enabled(self) -> None:
        if self._llm.vllm_config.lora_config is None:
            raise BridgeError(
                "unsupported",
                "For adapters, an engine must be started with `enable_lora: true`.",
                {"option": "enable_lora"},
            )

    async def _load(self, lora: LoRA, replaced: _Known | None) -> _Known:
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        other = next(
            (
                name
                for name, known in self._known.items()
                if known.lora.lora_int_id == lora.lora_int_id and name != lora.lora_name
            ),
            None,
        )
        if other is not None:
            raise BridgeError(
                "invalid_option",
                f"The id {lora.lora_int_id} is that of the adapter `{other}`.",
                {"option": "lora_int_id"},
            )
        version = _version(lora)
        folder = await asyncio.to_thread(self._checked_folder, lora)
        self._loads += 1
        request = LoRARequest(
            # vLLM knows cached prompts by the name and the path of their adapter, and this one's
            # files may be others than those that were loaded under both before.
            lora_name=f"{lora.lora_name} {self._loads}",
            lora_int_id=lora.lora_int_id,
            lora_path=folder,
            base_model_name=lora.base_model_name,
            load_inplace=True,
            is_3d_lora_weight=lora.is_3d_lora_weight,
        )
        if replaced is not None:
            del self._known[lora.lora_name]
            await self._llm.remove_lora(replaced.lora.lora_int_id)
        try:
            await self._llm.add_lora(request)
        except EngineDeadError:
            raise
        except Exception as error:
            # Half of it may be there.
            with contextlib.suppress(Exception):
                await self._llm.remove_lora(lora.lora_int_id)
            text = str(error).removeprefix("Call to add_lora method failed: ")
            raise _unfit(lora, folder, f"vLLM says: {text}") from error
        request.load_inplace = False
        known = self._known[lora.lora_name] = _Known(
            msgspec.structs.replace(lora, load_inplace=False), request, version
        )
        return known

    def _checked_folder(self, lora: LoRA) -> str:
        config = self._llm.vllm_config
        folder = _folder(lora, config.model_config.hf_token)
        _check_files(lora, folder)
        _check_config(lora, folder, config.lora_config)
        # The parts of models for several media have hidden states of their own.
        if not config.model_config.is_multimodal_model:
            _check_shapes(lora, folder, config.model_config.get_hidden_size())
            _check_base(lora, folder, config.model_config.hf_config)
        return folder


# Each is given the engine's adapters.
METHODS = {
    "load_lora": (LoadLoRAParams, LoRAs.load),
    "unload_lora": (UnloadLoRAParams, LoRAs.unload),
    "list_loras": (NoParams, LoRAs.list),
}


def _is_to_load(lora: LoRA, known: _Known) -> bool:
    """Whether an adapter is to take the place of the one that was loaded by its name."""
    is_same = _identity(lora) == _identity(known.lora)
    return lora.load_inplace or (is_same and _version(lora) != known.version)


def _version(lora: LoRA) -> tuple[str, float] | None:
    """What an adapter of the registry is known by, where its name is one: when another was
    registered by that, the next request is for it."""
    if os.path.isdir(os.path.expanduser(lora.lora_path)):
        return None
    entry = find.adapter(lora.lora_path)
    return None if entry is None else (entry.path, entry.registered_at)


def _identity(lora: LoRA) -> tuple[int, str]:
    return lora.lora_int_id, lora.lora_path


def _folder(lora: LoRA, token: str | bool | None) -> str:
    """The adapter's folder: by its path, its name of the registry, or downloaded from the hub."""
    path = os.path.expanduser(lora.lora_path)
    if os.path.isdir(path):
        return os.path.abspath(path)
    details: dict[str, Any] = {"lora_path": lora.lora_path}
    if path.startswith((".", "/")):
        raise BridgeError("model_not_found", f"There is no folder `{lora.lora_path}`.", details)
    if (entry := find.adapter(path)) is not None:
        return entry.path

    from huggingface_hub import snapshot_download

    try:
        with hub_errors.told(path, token=token):
            return str(snapshot_download(path, token=token, allow_patterns=[CONFIG, *WEIGHTS]))
    except BridgeError as error:
        meant = find.meant(path)
        remedy = did_you_mean(meant) + error.remedy
        details = error.details | details | {"nearest": meant}
        raise BridgeError(error.reason, error.what, details, remedy) from error


def _check_files(lora: LoRA, folder: str) -> None:
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        raise BridgeError(
            "model_not_found",
            f"`{lora.lora_path}` has no `{CONFIG}`: there is no adapter in it.",
            {"lora_path": lora.lora_path},
        )
    if not any(os.path.isfile(os.path.join(folder, name)) for name in WEIGHTS):
        raise BridgeError(
            "invalid_checkpoint",
            f"`{lora.lora_path}` has an `{CONFIG}` and no weights ({WEIGHTS[0]}). Was the "
            "download finished?",
            {"lora_path": lora.lora_path},
        )


def _check_config(lora: LoRA, folder: str, lora_config: Any) -> None:
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    try:
        peft = PEFTHelper.from_local_dir(folder, None)
        rank = max([peft.r, *peft.rank_pattern.values()])
    except (OSError, ValueError, TypeError, ArithmeticError) as error:
        raise BridgeError(
            "invalid_checkpoint",
            f"The `{CONFIG}` of `{lora.lora_path}` is not one that vLLM can read: {error}.",
            {"lora_path": lora.lora_path},
        ) from error
    if rank > lora_config.max_lora_rank:
        enough = next((most for most in typing.get_args(MaxLoRARanks) if most >= rank), None)
        advice = (
            f"Start the engine with `max_lora_rank: {enough}`."
            if enough
            else "vLLM has no `max_lora_rank` for it."
        )
        raise BridgeError(
            "invalid_option",
            f"The adapter `{lora.lora_name}` has rank {rank}, and this engine takes adapters up "
            f"to rank {lora_config.max_lora_rank}. {advice}",
            {"option": "max_lora_rank", "rank": rank, "max_lora_rank": lora_config.max_lora_rank},
        )
    try:
        peft.validate_legal(lora_config)
    except ValueError as error:
        raise BridgeError(
            "unsupported",
            f"vLLM does not support adapters such as `{lora.lora_name}`: {error}",
            {"lora_path": lora.lora_path},
        ) from error


def _check_shapes(lora: LoRA, folder: str, hidden: int) -> None:
    """Refuses an adapter of a smaller model, which vLLM would lay into a corner of this one."""
    from safetensors import SafetensorError, safe_open

    path = os.path.join(folder, WEIGHTS[0])
    if not os.path.isfile(path):
        return  # older formats tell shapes only with the weights
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BridgeError(
            "invalid_checkpoint", f"`{path}` is damaged: {error}.", {"lora_path": lora.lora_path}
        ) from error
    for name, shape in shapes.items():
        match name.split("."):
            case parts if "experts" in parts:
                continue  # some models' experts work in a smaller space
            case [*_, module, "lora_A", "weight"] if module in _FROM_HIDDEN:
                size = shape[-1]
            case [*_, module, "lora_B", "weight"] if module in _TO_HIDDEN:
                size = shape[0]
            case _:
                continue
        # What is too large vLLM refuses itself.
        if size < hidden:
            raise _unfit(
                lora,
                folder,
                f"It was made for a hidden size of {size} (`{name}`), and the model's is {hidden}.",
            )


def _check_base(lora: LoRA, folder: str, config: Any) -> None:
    """Refuses an adapter of another model, as far as that one is here to compare. The same model
    in another format is as good as the one that the adapter was trained over."""
    base = adapter.read(folder).base_model
    try:
        place = base if base is None or os.path.isdir(base) else find.path_or_name(base)
        other = {} if place is None else json_files.read(os.path.join(place, "config.json"))
    except (OSError, ValueError, BridgeError):
        return
    differs = [
        f"`{name}` {other[name]} and {here}"
        for name in _SHAPE
        if name in other and (here := getattr(config, name, None)) not in (None, other[name])
    ]
    if differs:
        raise _unfit(lora, folder, f"The two have {', '.join(differs)}.")


def _unfit(lora: LoRA, folder: str, why: str) -> BridgeError:
    base = adapter.read(folder).base_model
    made_for = f" It was made for `{base}`." if base else ""
    return BridgeError(
        "invalid_checkpoint",
        f"The adapter `{lora.lora_name}` does not fit this engine's model.{made_for} {why}",
        {"lora_path": lora.lora_path, "base_model": base},
    )
