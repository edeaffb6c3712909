r"""Measures of an embedding space, as functions of vectors and of resampling weights.

Every function takes ``weights`` (b, n): how often each of the n vectors counts in each of b resamples. A row of ones
is the sample itself. Each returns b values. Vectors are normalised by the caller, see :func:`normalised`; one that is
zero stays so, and distances are right for it, too.

Where a measure looks at pairs of distinct vectors, a vector drawn twice is not paired with itself: copies at distance
0 would pull every resample towards a collapsed space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import entr, hyp0f1
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

_BLOCK_CELLS = 1 << 20


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Return the vectors (n, d) with length 1, float64; zero vectors stay zero.

    Raises:
        ValueError: If a value is not finite.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise ValueError(f"vector {row} has a value that is not finite; the encoder gave no usable vector")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean of values (n,)."""
    return weights @ values / weights.sum(axis=1)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ||a_i − b_i||² of paired rows (n,); its mean over relevant pairs is the alignment (Wang & Isola, 2020)."""
    return np.square(a - b).sum(axis=1)


# --- pairs of distinct vectors ----------------------------------------------------------------------------------------


@dataclass
class PairMeans:
    """Weighted sums over pairs of distinct vectors, which add up where sets of vectors are joined.

    Attributes:
        kernel: Σ w_i w_j exp(−t ||x_i − x_j||²), (b,).
        squared: Σ w_i w_j (x_i · x_j)², (b,).
        total: Σ w_i w_j, (b,).
        t: The t of the kernel.
    """

    kernel: np.ndarray
    squared: np.ndarray
    total: np.ndarray
    t: float

    def __add__(self, other: PairMeans) -> PairMeans:
        """Join two sets of pairs."""
        return PairMeans(self.kernel + other.kernel, self.squared + other.squared, self.total + other.total, self.t)

    @property
    def uniformity(self) -> np.ndarray:
        """Log mean exp(−t ||x − y||²), Wang & Isola (arXiv 2005.10242); 0 for one point, lower is more uniform."""
        return np.log(self.kernel / self.total)

    @property
    def second_moment(self) -> np.ndarray:
        """Mean squared cosine; 1/d where directions are uniform."""
        return self.squared / self.total


def pair_means(
    a: np.ndarray, weights_a: np.ndarray, t: float, b: np.ndarray | None = None, weights_b: np.ndarray | None = None
) -> PairMeans:
    """Sum over all ordered pairs of distinct vectors of one set, or over all pairs from two sets; exact, in blocks.

    Args:
        a: (n, d), normalised.
        weights_a: (r, n).
        t: Of the kernel exp(−t ||x − y||²).
        b: (m, d), the other set; None for the pairs within ``a``.
        weights_b: (r, m).
    """
    within = b is None or weights_b is None
    if b is None or weights_b is None:
        b, weights_b = a, weights_a
    squares_a, squares_b = np.square(a).sum(axis=1), np.square(b).sum(axis=1)
    kernel, squared = np.zeros(len(weights_a)), np.zeros(len(weights_a))
    size = max(_BLOCK_CELLS // max(len(b), 1), 1)
    for start in range(0, len(a), size):
        stop = min(start + size, len(a))
        cosines = a[start:stop] @ b.T
        distances = squares_a[start:stop, None] + squares_b - 2 * cosines
        np.maximum(distances, 0, out=distances)
        for sums, cells in ((kernel, np.exp(-t * distances)), (squared, np.square(cosines))):
            if within:
                cells[np.arange(stop - start), np.arange(start, stop)] = 0
            sums += np.einsum("rn,rn->r", weights_a[:, start:stop] @ cells, weights_b)
    total = weights_a.sum(axis=1) * weights_b.sum(axis=1)
    if within:
        total = total - np.square(weights_a).sum(axis=1)
    return PairMeans(kernel, squared, total, t)


def uniform_sphere(dim: int, t: float = 2.0) -> float:
    """Return the uniformity of the uniform distribution on the sphere in ``dim`` dimensions: its lowest value."""
    return float(-2 * t + np.log(hyp0f1(dim / 2, t * t)))


def mean_cosine(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean cosine of distinct pairs, exactly: (||Σ x||² − Σ ||x||²) / (n (n − 1)) (Ethayarajh, 2019)."""
    own = np.square(weights)
    pairs = np.square(weights @ vectors).sum(axis=1) - own @ np.square(vectors).sum(axis=1)
    return pairs / (np.square(weights.sum(axis=1)) - own.sum(axis=1))


def mean_norm(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the length of the mean vector: 0 where directions cancel, 1 for one point."""
    return np.linalg.norm(weights @ vectors, axis=1) / weights.sum(axis=1)


def tower_gap(a: np.ndarray, weights_a: np.ndarray, b: np.ndarray, weights_b: np.ndarray) -> np.ndarray:
    """Return the distance of the means of two sets of vectors."""
    means = [w @ x / w.sum(axis=1, keepdims=True) for x, w in ((a, weights_a), (b, weights_b))]
    return np.linalg.norm(means[0] - means[1], axis=1)


# --- directions -------------------------------------------------------------------------------------------------------


def isotropy(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return min Z(c) / max Z(c), Z(c) = Σ exp(c · x), over the eigenvectors ±c of XᵀX (Mu & Viswanath, 2018).

    An eigenvector's sign means nothing, so both are taken. Resampling leaves the eigenvectors as they are.
    """
    along = vectors @ np.linalg.eigh(vectors.T @ vectors)[1]
    sums = np.concatenate([weights @ np.exp(along), weights @ np.exp(-along)], axis=1)
    return sums.min(axis=1) / sums.max(axis=1)


def effective_rank(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return exp(−Σ p log p), p = σ / Σ σ, of the singular values of the vectors (RankMe, arXiv 2210.02885).

    Resampling leaves the singular directions as they are and draws anew how much of each there is: drawn anew
    themselves, they would give way to the repeated vectors, and the rank would come out too low.
    """
    along = vectors @ np.linalg.eigh(vectors.T @ vectors)[1]
    singular = np.sqrt(weights @ np.square(along))
    shares = singular / singular.sum(axis=1, keepdims=True)
    return np.exp(entr(shares).sum(axis=1))


def spectrum(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of variance along each principal component, (r, d), largest first; directions as they are.

    All shares are 0 where the vectors are all the same.
    """
    middle = vectors.mean(axis=0)
    values, directions = np.linalg.eigh((vectors - middle).T @ (vectors - middle))
    along = (vectors - middle) @ directions[:, np.argsort(-values, kind="stable")]
    total = weights.sum(axis=1, keepdims=True)
    variance = weights @ np.square(along) / total - np.square(weights @ along / total)
    # below this is what rounding leaves of a constant
    variance = np.where(variance > 1e-24, variance, 0)
    whole = variance.sum(axis=1, keepdims=True)
    return variance / np.where(whole > 0, whole, 1)


def told_apart(a: np.ndarray, b: np.ndarray, *, folds: int = 5, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Tell by a linear classifier which of two sets each vector is from; chance is .5, for both count equally.

    The larger set is cut, at random, to the size of the smaller. Logistic regression, cross-validated: each vector is
    judged by a classifier that did not see it.

    Returns:
        For each vector of ``a`` and ``b`` 1 where it was told right, 0 where wrong, NaN where it was not used.
    """
    size = min(len(a), len(b))
    if size < 2:
        return np.full(len(a), np.nan), np.full(len(b), np.nan)
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.permutation(len(x))[:size]) for x in (a, b)]
    # coordinates of about 1, which is what the classifier's penalty is made for
    vectors = np.concatenate([a[rows[0]], b[rows[1]]]) * np.sqrt(a.shape[1])
    labels = np.repeat([0, 1], size)
    split = StratifiedKFold(min(folds, size), shuffle=True, random_state=seed)
    right = cross_val_predict(LogisticRegression(max_iter=1000), vectors, labels, cv=split) == labels
    told = []
    for x, chosen, judged in zip((a, b), rows, (right[:size], right[size:]), strict=True):
        told.append(np.full(len(x), np.nan))
        told[-1][chosen] = judged
    return told[0], told[1]


def weighted_quantile(values: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """Return the smallest value that at least ``share`` of the weight does not exceed, (r,)."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[:, order], axis=1)
    reached = (below >= share * below[:, -1:]).argmax(axis=1)
    return values[order][reached]
