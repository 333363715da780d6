"""Layers whose weights stay packed: small integers with scales (``grouped``) or with tables of
values (``tables``). Needs torch, and not vLLM."""
