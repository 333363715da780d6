"""What is wrong with a model and its options, by one path for all who ask: every start begins with
it, and ``VLLM.Quantization.check`` is nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vllm_bridge import defaults, diagnosis
from vllm_bridge.engine import elsewhere, isq, notes
from vllm_bridge.engine.config import Config, configure
from vllm_bridge.engine.finding import Finding, errors
from vllm_bridge.engine.plan import Plan, plan
from vllm_bridge.errors import BridgeError
from vllm_bridge.sizing.devices import Device


class Checked(NamedTuple):
    """What an engine would be.

    Args:
        plan: what is known without vLLM
        findings: the plan's, what vLLM says against it, and what is good to know
        config: what vLLM makes of the plan; None where a finding is against it, and for devices of
            another machine
    """

    plan: Plan
    findings: tuple[Finding, ...]
    config: Config | None = None

    def refuse(self) -> None:
        """Raises the first finding that keeps the engine from starting.

        Raises:
            BridgeError: with its reason
        """
        for finding in errors(self.findings):
            raise finding.error()

    def configured(self) -> Config:
        """vLLM's config of an engine that can run, as far as can be known without weights.

        Raises:
            BridgeError: with the reason why it cannot
        """
        self.refuse()
        assert self.config is not None  # noqa: S101 - there is a finding where it is not
        return self.config


def check(
    model: str,
    options: Mapping[str, Any],
    progress: Callable[[str], None] = lambda _: None,
    devices: Sequence[str] | None = None,
    imported: Callable[[], None] = lambda: None,
    machine: Sequence[Device] | None = None,
    is_start: bool = False,
) -> Checked:
    """Looks at all that can be told of an engine before its processes are started. Imports vLLM
    unless the plan has an error already, and sets variables of the environment that are for the
    life of a worker. Nothing is raised.

    Args:
        options: engine options as the user gave them
        progress: told of each phase that begins
        devices: the only ones that the engine may use
        imported: called once vLLM is imported and before anything of it has run
        machine: the devices that it is asked about, where they are not this machine's. Then there
            is no config of vLLM's, which would be of the devices here
        is_start: whether an engine is started next. Then libraries are not asked whether they can
            quantize the model in place: they will do it
    """
    planned = plan(model, options, progress, is_here=machine is None)
    findings = (*planned.findings, *notes.of(planned))
    if errors(planned.findings):
        return Checked(planned, findings)
    try:
        with diagnosis.load_errors(planned.options):
            progress("import")
            if devices is not None:
                defaults.use_devices(devices)
            imported()
            progress("config")
            if machine is not None:
                return Checked(planned, (*findings, *elsewhere.check(planned, machine)))
            config = configure(planned)
            wish, checkpoint = planned.isq, planned.checkpoint
            if wish is not None and not is_start and isq.find(checkpoint, wish) is None:
                isq.try_out(checkpoint, wish)
            return Checked(planned, findings, config)
    except BridgeError as error:
        return Checked(planned, (*findings, Finding.of(error)))
