"""Changes of vLLM for CPUs: see ``vllm_bridge.patches``."""
