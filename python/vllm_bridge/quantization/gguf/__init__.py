"""GGUF in vLLM: its types of packed weights, and how layers are made of them and computed."""
