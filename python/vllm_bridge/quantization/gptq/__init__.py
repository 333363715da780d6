"""GPTQ in all its formats: what vLLM's own method refuses or has no kernel for. Needs vLLM."""
