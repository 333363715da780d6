"""SqueezeLLM: a table of 8 or 16 values for each row of a matrix, and with "dense-and-sparse" the
weights that no table suits beside it.

Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization", 2023 (https://arxiv.org/abs/2306.07629).
Checkpoints are as its own ``pack.py`` writes them.
"""
