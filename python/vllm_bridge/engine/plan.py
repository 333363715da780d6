"""What is known of an engine before there are processes of it: from the options, the files of the
model and the metadata of packages. Imports neither torch nor vLLM, so that it takes a fraction of a
second.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vllm_bridge import diagnosis, generation_config, memory, quantization, versions
from vllm_bridge.checkpoints import families, files, fit
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.models import check_beside, check_model, is_elsewhere
from vllm_bridge.engine import isq, parallel
from vllm_bridge.engine.finding import Finding
from vllm_bridge.engine.isq import Wish
from vllm_bridge.errors import BridgeError, map_exceptions
from vllm_bridge.params import check_option_names
from vllm_bridge.quantization import naming, online, registry
from vllm_bridge.registry import find as named

# Options that name what is used in the place of a part of the model. It may be on the hub although
# the model is not.
BESIDE = ("tokenizer", "hf_config_path")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What would be started.

    Args:
        model: as the user named it
        options: for vLLM, by its names of them; not looked at yet beyond what ``findings`` says
        checkpoint: what the model's files say; empty where they could not be looked at
        method: the quantization method, vLLM's name as far as one is known without vLLM; None for
            a model that is and stays plain
        online_dtype: the user's ``dtype``, where it means to quantize the model while it is loaded
        dtype: what the model computes in: as asked, else what its config says
        loaded_bytes: the least that the weights take in memory; 0 where that is not known
        isq: how the model is quantized before it is loaded; None where it is loaded as it is
        findings: in the order in which they would be met
    """

    model: str
    options: Mapping[str, Any]
    checkpoint: Checkpoint
    method: str | None
    online_dtype: str | None
    dtype: str | None
    loaded_bytes: int
    isq: Wish | None = None
    findings: tuple[Finding, ...] = ()


def plan(
    model: str,
    options: Mapping[str, Any],
    progress: Callable[[str], None] = lambda _: None,
    *,
    is_here: bool = True,
) -> Plan:
    """Looks at the model and the options. What is wrong with them is in the plan, all of it that
    can be told; nothing is raised.

    Args:
        options: engine options as the user gave them
        progress: told of a phase that may take long, such as ``"hub"``
        is_here: whether it is to run on this machine, whose memory counts then
    """
    findings: list[Finding] = []
    left = dict(options)
    checkpoint, dtype, wish, loaded_bytes = Checkpoint(), None, None, 0
    with _collected(findings):
        versions.check_versions()
    with _collected(findings):
        check_option_names(left)
    with _collected(findings):
        wish = isq.take(left)
    with _collected(findings):
        dtype = online.take_dtype(left)
    with _collected(findings):
        checkpoint = check_model(model, left, progress)
    _take_place(model, left)
    with _collected(findings):
        _find_beside(left)
    for name in BESIDE:
        with _collected(findings):
            check_beside(name, left)
    with _collected(findings):
        families.check(checkpoint, left)
    with _collected(findings):
        parallel.check(checkpoint, left)
    with _collected(findings):
        isq.check(checkpoint, wish)
    with _collected(findings):
        online.check(checkpoint, dtype)
    with _collected(findings):
        naming.check_known(checkpoint, left)
    with _collected(findings):
        quantization.check(checkpoint)
    with _collected(findings):
        generation_config.read(checkpoint.folder, left)
    with _collected(findings):
        findings += _strays(checkpoint)
    with _collected(findings):
        # What will be made of the model is looked at once it is there.
        loaded_bytes = fit.loaded_bytes(checkpoint, left) if wish is None else 0
        if is_here and wish is None and versions.is_cpu_build():
            fit.check_memory(checkpoint, left, memory.available_cpu(), "memory")
    if checkpoint.load_format is not None:
        left["load_format"] = checkpoint.load_format
    asked = left.get("quantization")
    named = checkpoint.quant_method or (asked if isinstance(asked, str) else None)
    return Plan(
        model=model,
        options=left,
        checkpoint=checkpoint,
        method=wish.kind.format if wish else named and (registry.meant_by(named).name or named),
        online_dtype=dtype,
        dtype=_dtype(checkpoint, left),
        loaded_bytes=loaded_bytes,
        isq=wish,
        findings=tuple(findings),
    )


def _take_place(model: str, options: dict[str, Any]) -> None:
    """Takes out what says where on the hub a model is, once its files are known: vLLM gets those,
    and the revision is not one of another tokenizer."""
    options.pop("subfolder", None)
    if not os.path.exists(model) and not is_elsewhere(model):
        options.pop("revision", None)


def _find_beside(options: dict[str, Any]) -> None:
    """Puts the path in the place of a name of the registry where something else than the model is
    named by one: a tokenizer, a draft model. vLLM knows no such names."""
    for name in BESIDE:
        if isinstance(given := options.get(name), str):
            options[name] = _found(given)
    draft = options.get("speculative_config")
    if isinstance(draft, dict) and isinstance(given := draft.get("model"), str):
        options["speculative_config"] = draft | {"model": _found(given)}


def _found(name: str) -> str:
    return name if os.path.exists(name) else named.path_or_name(name) or name


@contextlib.contextmanager
def _collected(findings: list[Finding]) -> Iterator[None]:
    try:
        with map_exceptions(diagnosis.load_error):
            yield
    except BridgeError as error:
        finding = Finding.of(error)
        if finding not in findings:  # several look at the same field
            findings.append(finding)


def _strays(checkpoint: Checkpoint) -> Iterator[Finding]:
    if checkpoint.load_format not in files.LOAD_FORMATS:
        return
    paths = [os.path.join(checkpoint.folder or "", name) for name in checkpoint.files]
    for path, names in files.strays(paths).items():
        stray = BridgeError(
            "invalid_checkpoint",
            f"{len(names)} tensors in `{path}` are not read: the model's index gives them to other "
            f"files. One is `{min(names)}`.",
            {"file": path, "tensors": sorted(names)},
            "Look whether the file belongs to the model.",
        )
        yield Finding.of(stray, "warning")


def _dtype(checkpoint: Checkpoint, options: Mapping[str, Any]) -> str | None:
    asked = options.get("dtype")
    if isinstance(asked, str) and asked != "auto":
        return asked
    return checkpoint.dtype
