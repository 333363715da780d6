"""What is known of a model before vLLM is imported: whether it is there, whether it is whole,
whether it fits. Only headers are read, and a few small tensors.
"""
