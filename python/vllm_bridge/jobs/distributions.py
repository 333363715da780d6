"""What a model expects next at each place of a text, as it is kept in a file, and how far two
models are apart there.

The formulas are those of llama.cpp's ``llama-perplexity --kl-divergence`` (its
``tools/perplexity/README.md``), with p the reference's probabilities and q the other's, at each of
n places:

- perplexity: exp(-1/n Σ ln q(token that follows))
- KL divergence at a place: Σ p ln(p / q) over the vocabulary, in nats; its mean with the standard
  error of a mean, and its 99th percentile over the places
- context: the mean divergence of the reference's own mean over all places, which is what a model
  loses that knows nothing of the text before a place
- same top: the share of places where both give the same token the highest probability

Vocabularies of up to ``FULL`` tokens are kept whole. Of larger ones each model keeps its ``KEPT``
likeliest tokens at each place. Then the divergence is that of the distributions in which all tokens
that not both have kept are one. By the chain rule of relative entropy (Cover and Thomas, Elements
of Information Theory, theorem 2.5.3)

    KL(p | q) = KL(lumped p | lumped q) + p(rest) · KL(p within the rest | q within the rest)

so that what is told is never too much, and what it misses is the reference's probability of the
rest, which ``Divergence.rest`` tells, times the divergence within it.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# The largest vocabulary that is kept whole, and how many tokens are kept of others.
FULL: Final = 4096
KEPT: Final = 512

# Places that are looked at together.
_ROWS: Final = 256

# The least that a model is taken to give to what it has not kept, below what 32 bits can tell.
_LEAST: Final = 1e-7

_ARRAYS: Final = ("tokens", "lengths", "chosen", "ids", "logprobs")


@dataclasses.dataclass(frozen=True)
class Distributions:
    """What a model expects at the places of a text.

    Args:
        tokens: of all windows of the text, one window after another
        lengths: how many tokens each window has; the first of each is not expected by anything
        chosen: the logarithms of the probabilities of the tokens that follow
        ids: the likeliest tokens of each place, the likeliest first
        logprobs: the logarithms of their probabilities
        vocabulary: how many tokens the model has
        figures: what else was measured, for the wire
    """

    tokens: "npt.NDArray[np.uint32]"
    lengths: "npt.NDArray[np.uint32]"
    chosen: "npt.NDArray[np.float32]"
    ids: "npt.NDArray[np.uint32]"
    logprobs: "npt.NDArray[np.float32]"
    vocabulary: int
    figures: dict[str, Any]

    @property
    def is_whole(self) -> bool:
        """Whether no token was left out."""
        return bool(self.ids.shape[1] >= self.vocabulary)

    def save(self, path: str) -> None:
        from safetensors.numpy import save_file

        said = json.dumps({"vocabulary": self.vocabulary, "figures": self.figures})
        save_file({name: getattr(self, name) for name in _ARRAYS}, path, {"measured": said})

    @classmethod
    def load(cls, path: str) -> "Distributions":
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:
            said = json.loads(file.metadata()["measured"])
            return cls(**{name: file.get_tensor(name) for name in _ARRAYS}, **said)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far a model is from its reference.

    Args:
        mean: KL divergence in nats
        error: the standard error of the mean
        p99: what one place of a hundred exceeds
        same_top: the share of places with the same likeliest token
        rest: the mean probability that the reference gives to tokens that not both have kept
    """

    mean: float
    error: float
    p99: float
    same_top: float
    rest: float


def perplexity(measured: Distributions) -> float:
    """How many tokens the model is undecided between, on average."""
    import numpy as np

    with np.errstate(over="ignore"):
        return float(np.exp(-measured.chosen.mean(dtype=np.float64)))


def bits_per_byte(measured: Distributions, size: float) -> float:
    """What a byte of the text takes when it is coded by what the model expects (Gao et al., The
    Pile, section 3.1), which can be compared between models with different tokenizers.

    Args:
        size: the bytes of the tokens that are expected by something
    """
    import numpy as np

    return float(-measured.chosen.sum(dtype=np.float64) / np.log(2) / size)


def divergence(reference: Distributions, other: Distributions) -> Divergence:
    """How far ``other`` is from ``reference``; both have the same tokens."""
    import numpy as np

    found = [_of_rows(reference, other, rows) for rows in _slices(len(reference.chosen))]
    kl, rest = (np.concatenate(columns) for columns in zip(*found, strict=True))
    with np.errstate(invalid="ignore"):
        return Divergence(
            mean=float(kl.mean()),
            error=float(kl.std(ddof=1) / np.sqrt(len(kl))) if len(kl) > 1 else 0.0,
            p99=float(np.quantile(kl, 0.99)),
            same_top=float((reference.ids[:, 0] == other.ids[:, 0]).mean()),
            rest=float(rest.mean()),
        )


def context(reference: Distributions) -> float:
    """How much a model would lose, in nats, that expects the same at each place: what ``reference``
    expects on average. It knows which tokens are frequent, and of the text before a place nothing.
    """
    import numpy as np

    p = np.exp(reference.logprobs.astype(np.float64))
    count = len(p)
    mean = np.bincount(reference.ids.ravel(), p.ravel(), minlength=reference.vocabulary) / count
    found = []
    for rows in _slices(count):
        q = mean[reference.ids[rows]]
        with np.errstate(divide="ignore", invalid="ignore"):
            kl = np.where(p[rows] > 0, p[rows] * np.log(p[rows] / q), 0.0).sum(1)
            rest_p, rest_q = (np.maximum(1 - one.sum(1), _LEAST) for one in (p[rows], q))
            found.append(kl if reference.is_whole else kl + rest_p * np.log(rest_p / rest_q))
    return float(np.concatenate(found).mean())


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, count, _ROWS))


def _of_rows(reference: Distributions, other: Distributions, rows: slice) -> tuple[Any, Any]:
    """Divergence and rest at some places."""
    import numpy as np

    ours, theirs = (_keyed(one, rows) for one in (reference, other))
    _, at, there = np.intersect1d(ours[0], theirs[0], assume_unique=True, return_indices=True)
    log_p, log_q = ours[1][at], theirs[1][there]
    p, q = np.exp(log_p), np.exp(log_q)
    row, count = at // reference.ids.shape[1], len(reference.ids[rows])
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    kl, kept_p, kept_q = (np.bincount(row, of, minlength=count) for of in (terms, p, q))
    if reference.is_whole and other.is_whole and reference.vocabulary == other.vocabulary:
        return kl, np.zeros(count)
    rest_p, rest_q = 1 - kept_p, np.maximum(1 - kept_q, _LEAST)
    rest_p = np.where(rest_p > _LEAST, rest_p, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl += np.where(rest_p > 0, rest_p * np.log(rest_p / rest_q), 0.0)
    # Below zero is what 32 bits leave.
    return np.maximum(kl, 0.0), rest_p


def _keyed(one: Distributions, rows: slice) -> tuple[Any, Any]:
    """Each token of these places under a number of its own, and its log-probability."""
    import numpy as np

    ids = one.ids[rows].astype(np.int64)
    keys = ids + (np.arange(len(ids)) << 32)[:, None]
    return keys.ravel(), one.logprobs[rows].astype(np.float64).ravel()
