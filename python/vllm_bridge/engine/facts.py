"""What an engine is, before and after it is loaded, for people and programs."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_bridge.engine import notes
from vllm_bridge.engine.check import Checked
from vllm_bridge.engine.config import Config
from vllm_bridge.engine.finding import Finding, errors
from vllm_bridge.engine.plan import Plan
from vllm_bridge.redaction import redact, redact_all
from vllm_bridge.sizing import kv_cache
from vllm_bridge.sizing.devices import Device


def report(checked: Checked, machine: Sequence[Device] | None = None) -> dict[str, Any]:
    """What is sent of a check; see guides/protocol.md.

    Args:
        machine: the devices that it was asked for, where they are not this machine's
    """
    facts = of_plan(checked.plan)
    if machine is not None:
        facts["device"] = machine[0].kind
        if config := checked.plan.checkpoint.config:
            facts["max_model_len"] = kv_cache.max_length(config, checked.plan.options)
    if checked.config is not None:
        facts |= of_config(checked.config)
        if checked.plan.isq is not None:
            facts["quantization"] = checked.plan.method  # vLLM's config is of the plain model
    method, kernel = facts.pop("quantization"), facts.pop("quantization_kernel", None)
    return facts | {
        "method": method,
        "kernel": kernel,
        "ok": not errors(checked.findings),
        "findings": [_finding(finding) for finding in checked.findings],
    }


def of_plan(plan: Plan) -> dict[str, Any]:
    """What is known without vLLM."""
    model_type = plan.checkpoint.config.get("model_type")
    return {
        "model": plan.model,
        "model_type": model_type if isinstance(model_type, str) else None,
        "architecture": plan.checkpoint.architecture,
        "quantization": plan.method,
        "dtype": plan.dtype,
        "loaded_bytes": plan.loaded_bytes,
        "family": notes.family(plan),
        "capabilities": list(notes.capabilities(plan)),
    }


def of_config(config: Config) -> dict[str, Any]:
    """What vLLM's config says."""
    from vllm.platforms import current_platform
    from vllm.version import __version__ as vllm_version

    made = config.vllm_config
    model, parallel, scheduler = made.model_config, made.parallel_config, made.scheduler_config
    return {
        "model_type": model.hf_config.model_type,
        "architecture": model.architecture,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "quantization_config": _quantization_config(model.hf_config),
        "quantization_kernel": config.kernel,
        "kv_cache_dtype": str(made.cache_config.cache_dtype),
        "max_model_len": model.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "scheduling_policy": str(scheduler.policy),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
        "distributed_executor_backend": _name(parallel.distributed_executor_backend),
        "vllm_version": vllm_version,
        "device": current_platform.device_type,
        "runner": model.runner_type,
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "severity": finding.severity,
        "reason": finding.reason,
        "message": redact(finding.message),
        "remedy": redact(finding.remedy),
        "details": redact_all(dict(finding.details)),
    }


def _name(executor: str | type | None) -> str | None:
    return executor.__qualname__ if isinstance(executor, type) else executor


def _quantization_config(hf_config: Any) -> dict[str, Any] | None:
    """The quantization config of a loaded model, as plain data."""
    found = getattr(hf_config, "quantization_config", None)
    if found is None:
        return None
    return dict(found if isinstance(found, Mapping) else found.to_dict())
