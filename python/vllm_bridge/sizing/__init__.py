"""How much memory a model takes, and whether a device has it. Imports neither torch nor vLLM."""
