"""HQQ: integers of 1 to 8 bits in groups, each with a scale and a zero point that is a float.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023
(https://mobiusml.github.io/hqq_blog); the library ``hqq`` is where its checkpoints come from.
"""
