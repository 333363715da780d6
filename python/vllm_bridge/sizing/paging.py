"""The pages of a KV cache: how vLLM brings layers of different kinds into one pool of blocks.

After ``v1/core/kv_cache_utils.py`` of vLLM 0.32, for the layouts in which each layer has a region
of its own, which are those of its backends for CPUs and, by default, for GPUs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vllm_bridge.sizing.layers import Kind

# Kinds that keep every token, and so may share the ids of their blocks whatever their sizes are.
EVERY_TOKEN = ("full", "mla", "indexer")


class Pages(NamedTuple):
    """The pages of one layer.

    Args:
        kind: of the layer
        block_size: tokens in a page
        size: bytes of a page
        window: tokens that are kept; None for all
        states: pages of a sequence, where it has a state in the place of tokens
    """

    kind: Kind
    block_size: int
    size: int
    window: int | None = None
    states: int = 0

    def blocks(self, tokens: int, in_flight: int, encoder_tokens: int) -> int:
        """How many pages a sequence of ``tokens`` tokens takes at most
        (``max_memory_usage_bytes``)."""
        if self.kind == "mamba":
            return self.states
        if self.kind == "cross":
            return math.ceil(encoder_tokens / self.block_size)
        if self.window is None:
            return math.ceil(tokens / self.block_size)
        if self.kind == "chunked":
            return math.ceil(min(self.window + in_flight, tokens) / self.block_size)
        # A window may begin in the middle of a block.
        return math.ceil(min(self.window - 1 + in_flight, tokens) / self.block_size) + 1


Group = Mapping[int, Pages]


def groups(layers: Mapping[int, Pages]) -> tuple[Group, ...]:
    """The layers that share the ids of their blocks, by their numbers
    (``get_kv_cache_groups``)."""
    if not layers:
        return ()
    if _is_uniform(layers.values()):
        return (layers,)
    return tuple(_of_one_size(_unified(layers)))


def _is_uniform(layers: Iterable[Pages]) -> bool:
    first, *others = layers
    if first.kind in EVERY_TOKEN:
        return all(one.kind in EVERY_TOKEN and one.block_size == first.block_size for one in others)
    return all(
        (one.kind, one.window, one.block_size) == (first.kind, first.window, first.block_size)
        for one in others
    )


def _unified(layers: Mapping[int, Pages]) -> Mapping[int, Pages]:
    """With pages of one size: larger blocks where that comes out even, else room that is not used
    (``unify_kv_cache_spec_page_size``)."""
    largest = max(pages.size for pages in layers.values())

    def enlarged(pages: Pages) -> Pages:
        times, rest = divmod(largest, pages.size)
        if rest or pages.kind == "mamba":
            return pages._replace(size=largest)
        return pages._replace(size=largest, block_size=pages.block_size * times)

    return {number: enlarged(pages) for number, pages in layers.items()}


def _of_one_size(layers: Mapping[int, Pages]) -> Iterable[Group]:
    """Groups with the same number of layers, as many as there are of the rarest kind
    (``_get_kv_cache_groups_uniform_page_size``)."""
    kinds: dict[Pages, list[int]] = {}
    for number, pages in layers.items():
        kinds.setdefault(pages, []).append(number)
    counts = [len(numbers) for numbers in kinds.values()]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    for pages, numbers in kinds.items():
        count = math.ceil(len(numbers) / size)
        for index in range(count):
            yield dict.fromkeys(numbers[index::count], pages)


def bytes_per_block(groups: Sequence[Group], numbers: Iterable[int]) -> int:
    """What a block takes on a rank that has the layers of these numbers."""
    here = set(numbers)
    return max(
        (sum(pages.size for number, pages in group.items() if number in here) for group in groups),
        default=0,
    )


def aligned(block_size: int, kernel: int, state: int, per_token: int) -> int:
    """The block size of a model with states beside attention: so large that a page of tokens has
    room for a state (``Platform._align_hybrid_block_size``).

    Args:
        kernel: of what number of tokens blocks are multiples
        state: bytes of a state
        per_token: bytes of a token, in one layer
    """
    unit = max(kernel, block_size)
    size = unit * math.ceil(state / (unit * per_token))
    return max(block_size, kernel * math.ceil(size / kernel))


def shares(blocks: int, ranks: int) -> list[range]:
    """The blocks of layers that each pipeline rank has (``distributed/utils.get_pp_indices``)."""
    counts = [blocks // ranks] * ranks
    for index in range(2, blocks % ranks + 2):
        counts[-index] += 1
    ends = [sum(counts[: index + 1]) for index in range(ranks)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
