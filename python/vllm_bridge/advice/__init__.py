"""Which format of a model suits a purpose and a device. Imports neither torch nor vLLM."""
