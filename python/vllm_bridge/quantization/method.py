"""What a quantization method is here: what this library knows of it beside what vLLM says.

Which methods there are, and which run, is the installed vLLM's to say. A file of ``methods`` adds
what vLLM does not: it declares a subclass of ``Method`` and is found by ``registry``. Nothing here
imports vLLM or torch, so that a checkpoint can be looked at without them.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import activations, scheme
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint, Found


class Format(NamedTuple):
    """A format of checkpoints.

    Args:
        name: what people call it
        config: what such a checkpoint says of itself in its ``quantization_config``
    """

    name: str
    config: Mapping[str, Any]


class Extra(NamedTuple):
    """Packages that vLLM does not bring. Their lock is ``priv/requirements/NAME.txt``.

    Args:
        name: what ``mix vllm.setup --with`` calls them
        modules: what is imported of each, by the name of its distribution
        faster: the same of those without which it runs too, and slower
    """

    name: str
    modules: Mapping[str, str]
    faster: Mapping[str, str] = {}


class Online(NamedTuple):
    """How a method quantizes a plain model while it is loaded.

    Args:
        bytes: what a weight takes at least, at the moment when that is most
        dtype: the ``dtype`` that means the method; None where it has none
        words: what it makes of the weights; it is said of an engine that has such a dtype
        as_read: whether each weight is quantized as it is read, not the whole model at the end
    """

    bytes: float
    words: str
    dtype: str | None = None
    as_read: bool = False


class Bytes(NamedTuple):
    """What a weight takes, with its part of the scales.

    Args:
        disk: in a checkpoint
        memory: once it is loaded, where the device has a kernel for it
    """

    disk: float
    memory: float


class Method:
    """A method of vLLM or of one of its plugins. As it is, one that nothing is known of."""

    # vLLM's name of it.
    name: ClassVar[str] = ""

    # How people write it.
    title: ClassVar[str] = ""

    # The program whose own format it is, where vLLM does not load it.
    made_for: ClassVar[str | None] = None

    # What people and tools call it, in lower case and with `-` for `_`, where that is not vLLM's
    # name in another spelling.
    other_names: ClassVar[tuple[str, ...]] = ()

    extra: ClassVar[Extra | None] = None

    # The usual formats of its checkpoints.
    formats: ClassVar[tuple[Format, ...]] = ()

    # The bits of its weights, beside those of ``formats``.
    bits: ClassVar[tuple[float, ...]] = ()

    # What users should know of it before they choose it; it is in guides/quantization.md.
    note: ClassVar[str] = ""

    # None for methods that only load checkpoints, and those of which only vLLM knows.
    online: ClassVar[Online | None] = None

    # Whether it only loads checkpoints that were quantized with it.
    needs_checkpoint: ClassVar[bool] = False

    # The `load_format` of vLLM's that goes with it.
    load_format: ClassVar[str | None] = None

    # Whether its layers have the shape of the checkpoint's tensors before they hold any.
    has_final_shapes: ClassVar[bool] = True

    # What the sizes of an expert, its inputs and its own, are made multiples of by kernels on GPUs.
    expert_multiples: ClassVar[tuple[int, int]] = (1, 1)

    # Whether the output layer of its checkpoints, which is not quantized, has a copy on CPUs as
    # vLLM's kernels there want it, like that of plain models.
    copies_head: ClassVar[bool] = True

    # Whether its products on CPUs can round activations that the checkpoint leaves as they are, as
    # users say by ``activations``.
    rounds_activations: ClassVar[bool] = False

    # The format whose experts are dequantized on a CPU that has no kernel for them.
    experts: ClassVar[str | None] = None

    # What is to be said of the experts of a mixture that it has quantized online.
    experts_note: ClassVar[str] = ""

    # Why it cannot quantize the experts of a mixture online, where vLLM does not say it in time.
    no_online_experts: ClassVar[str | None] = None

    def is_named(self, name: str) -> bool:
        """Whether vLLM's ``name`` means this method."""
        return name == self.name

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        """What a checkpoint's config says of how it is quantized. It is taken as it is: what is
        wrong with it is told by ``check``."""
        return scheme.usual(config)

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes | None:
        """What a weight of a linear layer takes in a checkpoint with this config; None where that
        is not known."""
        return None

    def online_bytes(self, checkpoint: "Checkpoint", options: Mapping[str, Any]) -> float | None:
        """``Online.bytes``, for this model with these engine options on this device."""
        return None if self.online is None else self.online.bytes

    def online_memory(self, checkpoint: "Checkpoint", options: Mapping[str, Any]) -> float | None:
        """The same once the model is loaded."""
        return self.online_bytes(checkpoint, options)

    def find(self, folder: str, names: Collection[str]) -> "Found | None":
        """Looks whether a folder whose ``config.json`` says nothing of a quantization has a
        checkpoint of this method, by other files of it.

        Args:
            names: of the files in the folder

        Raises:
            BridgeError: ``invalid_checkpoint`` where it has one that is damaged
        """
        return None

    def check(self, checkpoint: "Checkpoint") -> None:
        """Looks at the files of a checkpoint of this method, before vLLM is imported.

        Raises:
            BridgeError: ``invalid_checkpoint`` where they are not what their config says;
                ``unsupported_quantization`` for a checkpoint that is ``made_for`` another program
        """
        if self.made_for is None:
            return
        named = "" if self.title == self.made_for else f"{self.title}, "
        raise BridgeError(
            "unsupported_quantization",
            f"The checkpoint is in {named}the format of {self.made_for}, which vLLM does not load.",
            {"quantization": self.name},
            remedy="Use the plain model, or its AWQ, GPTQ or GGUF variant.",
        )

    def prepare(self, checkpoint: "Checkpoint", arguments: dict[str, Any]) -> str | None:
        """Makes of a checkpoint of this method what vLLM can read, before vLLM's config is made.

        Args:
            arguments: of the engine, by vLLM's names; may be changed

        Returns:
            the folder that vLLM is given for the model, among the temporary files of this process;
            None where vLLM reads the model as the user named it

        Raises:
            BridgeError: ``invalid_checkpoint``, ``unsupported`` or ``invalid_option``
        """
        if self.rounds_activations:
            said = self.scheme(checkpoint.quantization or {})
            if said.activation_bits is None:
                activations.pass_on(arguments)
        return None

    def ready_for_look(self, quant_config: Any, config: Mapping[str, Any], name: str) -> None:
        """Has vLLM's config of one of ``formats`` take a layer for one of it, where that depends on
        the layer's name.

        Args:
            quant_config: vLLM's, made of ``config``
            name: of the layer
        """

    def check_layer(self, config: Any, layer: Any) -> None:
        """Looks at a quantized linear layer as vLLM makes it, before weights are read.

        Args:
            config: vLLM's config of the engine

        Raises:
            BridgeError: ``unsupported_quantization``
        """

    def take_settings(self, checkpoint: "Checkpoint", options: dict[str, Any]) -> str | None:
        """Brings the user's ``quantization_config`` for a plain model to where vLLM looks for it.

        Args:
            options: of the engine; may be changed

        Returns:
            what the settings are called; None where there are none of this method's

        Raises:
            BridgeError: ``invalid_option``
        """
        return None

    def loaded_note(self, config: Any) -> str | None:
        """What users should know of how a loaded engine computes the model's weights.

        Args:
            config: vLLM's config of the engine
        """
        return None

    def install(self) -> None:
        """Gives vLLM what it lacks of the method. Called in each of its processes, possibly more
        than once."""


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Integers with a scale for each group.

    Args:
        bits: of each
        group: how many share a scale; as many as there are where it is not positive
        scale_bits: of a scale, and what else each group has, such as a zero point
    """

    bits: float
    group: int
    scale_bits: float

    def bytes(self) -> Bytes:
        scales = self.scale_bits / self.group if self.group > 0 else 0.0
        each = (self.bits + scales) / 8
        return Bytes(each, each)
