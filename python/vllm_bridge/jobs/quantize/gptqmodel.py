"""What GPTQ and AWQ share: the library gptqmodel makes both.

It quantizes a decoder layer after the other. Nothing here asks it to stop: when it is told to, it
goes on to the end with the layers that it has.
"""

import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

from vllm_bridge.errors import BridgeError
from vllm_bridge.jobs.quantize import transformers_models
from vllm_bridge.jobs.quantize.calibration import Texts
from vllm_bridge.jobs.quantize.producer import Made, Source, Tell

_LIBRARIES = ("gptqmodel", "transformers", "torch")

# One text after another: texts of other lengths would have to be filled up.
_BATCH = 1


def library() -> Any:
    """gptqmodel, with no more threads than this process has."""
    import torch

    # It reads this when it is imported, and would take a thread for each core and more. It needs
    # two.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, torch.get_num_threads())))
    import gptqmodel

    return gptqmodel


def kernel(config: Any, backend: Any) -> Any:
    """The class that packs layers with this config.

    Raises:
        BridgeError: ``unsupported`` where there is none
    """
    library()
    from gptqmodel.utils.importer import select_quant_linear

    try:
        return select_quant_linear(
            bits=config.runtime_bits,
            group_size=config.group_size,
            desc_act=config.desc_act,
            sym=config.sym,
            device=_device(),
            backend=backend,
            format=config.format,
            quant_method=config.method,
            pack=True,
            pack_dtype=config.pack_dtype,
        )
    except (ValueError, NotImplementedError) as error:  # how it says that it has no kernel
        raise BridgeError(
            "unsupported",
            f"gptqmodel cannot do this here: {error}",
            {"exception": f"{type(error).__name__}: {error}"},
        ) from error


def check(source: Source, config: Any, packed_by: Any) -> None:
    """Refuses a family that gptqmodel does not know, and layers that do not fit the config.

    Raises:
        BridgeError: ``unsupported_model`` or ``unsupported``
    """
    library()
    from gptqmodel.models.auto import check_and_get_model_definition
    from gptqmodel.quantization import METHOD

    model = transformers_models.skeleton(source)
    family = check_and_get_model_definition(source.path)
    tree = family._resolve_effective_module_tree(model, config)
    if tree is None:
        raise BridgeError(
            "unsupported_model",
            f"gptqmodel does not know models of type `{model.config.model_type}`.",
            {"model": source.path, "model_type": model.config.model_type},
            remedy="Choose another format: `compressed-tensors` needs to know less of a model.",
        )
    with family._module_tree_context(tree):
        nodes = family.extract_layers_node()
        is_awq = config.method == METHOD.AWQ
        groups = family.simple_layer_modules(model.config, config, is_awq_quantize=is_awq)
    quantized = {name for group in groups for name in group}
    for layer, inputs, outputs in transformers_models.linear_layers(model):
        node = next((node for node in nodes if layer.startswith(f"{node}.")), None)
        if node is None or layer[len(node) + 1 :].partition(".")[2] not in quantized:
            continue
        if is_awq and layer.endswith("qkv_proj"):
            raise BridgeError(
                "unsupported",
                f"gptqmodel makes no AWQ of models with queries, keys and values in one matrix, as "
                f"`{layer}` of `{source.path}` is.",
                {"layer": layer},
                remedy='Use `gptq`, or `compressed-tensors` with `algorithm: "gptq"`.',
            )
        if config.group_size > 0 and inputs % config.group_size:
            raise transformers_models.no_groups(source, layer, inputs, config.group_size)
        fits, error = packed_by.validate(
            bits=config.runtime_bits,
            group_size=config.group_size,
            desc_act=config.desc_act,
            sym=config.sym,
            in_features=inputs,
            out_features=outputs,
            pack_dtype=config.pack_dtype,
        )
        if not fits:
            raise BridgeError(
                "unsupported",
                f"`{layer}` of `{source.path}` cannot be quantized like this: {error}",
                {"layer": layer, "inputs": inputs, "outputs": outputs},
            )


def make(
    source: Source,
    options: Mapping[str, Any],
    config: Any,
    backend: Any,
    texts: Texts | None,
    out: str,
    tell: Tell,
) -> Made:
    """Quantizes and saves.

    Args:
        options: as they are told of the output; what the config has made of them is put in
    """
    assert texts is not None  # noqa: S101 - both formats require them
    model = library().GPTQModel.load(source.path, config, device=_device())
    _write_no_logs()
    rows = texts.ids(model.tokenizer)
    model.layer_callback = _Told(tell, model.model.config.get_text_config().num_hidden_layers)
    model.quantize(
        [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows],
        batch_size=_BATCH,
        backend=backend,
        calibration_data_min_length=0,  # short texts count too
    )
    model.save(out)
    transformers_models.put_together(source, out)
    return Made(
        libraries={name: importlib.metadata.version(name) for name in _LIBRARIES},
        options={name: _plain(getattr(config, name)) for name in options},
    )


def _write_no_logs() -> None:
    """The library would leave files in the current folder, with what it prints."""
    from gptqmodel.looper.loop_processor import LoopProcessor

    LoopProcessor._build_log_file_path = staticmethod(lambda *_: os.devnull)


class _Told:
    """Tells how many layers are quantized."""

    def __init__(self, tell: Tell, layers: int) -> None:
        self._tell, self._layers = tell, layers
        tell("layers", 0, layers)

    def layer_complete(self, layer_idx: int, submodule_finalized: bool) -> None:
        if not submodule_finalized:  # it comes once more when the layer is packed
            self._tell("layers", layer_idx + 1, self._layers)


def invalid(error: Exception) -> BridgeError:
    """For values that the library's own config does not take."""
    return BridgeError(
        "invalid_option",
        f"gptqmodel does not take these options: {error}",
        {"exception": f"{type(error).__name__}: {error}"},
    )


def _device() -> Any:
    import torch
    from gptqmodel.models._const import DEVICE

    return DEVICE.CUDA if torch.cuda.is_available() else DEVICE.CPU


def _plain(value: Any) -> Any:
    """Members of enumerations by their values."""
    return getattr(value, "value", value)
