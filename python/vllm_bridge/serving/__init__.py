"""vLLM's own HTTP API on the engine of this worker, without a socket of its own."""
