"""How sure is it? Tests and intervals in which the image is the unit.

Decisions of one image resemble each other, and so do its objects: 64 patches of an image may say
as much as one. Only images are independent of each other. So nothing here ever divides an image.

The *test* of "the choice has nothing to do with X" flips the signs of whole images
(exchangeability blocks of independent and symmetric errors, Winkler et al. 2015, NeuroImage 123; a
wild bootstrap of the score). Image i adds to the joint table (bins x experts) ``J_i``; if X does
not matter, it is expected to add ``n_i w^T``, its things times the mean weights. What it adds
beyond that, ``D_i = J_i - n_i w^T``, has the expectation 0, whatever hangs together within the
image, how many decisions it has, and whether X differs between images, within them or both. Each
test statistic is compared with that of ``sum_i s_i D_i``, where ``s_i`` are random signs; as the
mean weights come from the same images, what the flipped images add to all bins together is taken
out again, in proportion to the things in each bin. For the same reason ``D_i`` falls short by the
image's own share ``h_i`` of all things: with one image alone nothing is left. What is flipped is
``D_i / sqrt(1 - h_i)`` (HC2 of MacKinnon and White 1985, J. Econometrics 29). Exchanging images
instead needs images of equal structure: it can say nothing of a level or a position, of which each
image has the same, and images differ in their numbers of objects.

A *cell* with less than expected has few images, or none, whose sign could make a difference: every
flip falls short of it. There the p-value is at least twice the tail of a binomial distribution, of
as many things as scatter like the flips.

*Given* something (the pyramid level, say), the same within each of its values: things of a level
are compared with the mean weights of that level. An image has one sign for all of its levels. A
value that lives on fewer than :data:`MIN_IMAGES` images (by ``1 / sum h_i^2``) cannot tell what it
has in common from what one image has: its things are left out of all numbers, and counted.

The statistic is ``sum D^2 / (2 N n_b w_e)``, the mutual information to second order. Its mean over
the flips is the information that is found by chance, the more, the more alike the decisions of an
image are; a cell with few things, where the second order is not enough, adds what a Poisson
distribution of the same relative variance does.

*Intervals* (95 %) come from a bootstrap over images. The plug-in estimate of an information is too
high, and the bootstrap's, of a sample of a sample, is so twice. The bias is the jackknife's over
images, or, if that is more, the share of the chance level by which the estimate falls short of all
that is possible (the adjustment of Vinh et al. 2010, JMLR 11), as the jackknife finds too little
where most cells are empty. The quantiles of the bootstrap are moved so that their mean lies at the
estimate without its bias, and cut off at 0. So the interval is one of the information itself, and
lies below the plug-in estimate where that is mostly bias. Shares have percentile intervals: all
that is possible where fewer than :data:`MIN_IMAGES` images have any of it, and wider by the rule of
three where all images agree. Differences of accuracy have those of a score test, which is exact
enough with few images that change.

A *family* of tests, those of one layer, is corrected together by the largest statistic of each
flip (Westfall and Young 1993, max-T, single step), as all tests flip the same images. Statistics
are made comparable by the gamma distribution with the mean and the variance of their flips.

Letters: N images, P flips or resamples, K entries, E experts, B bins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import betainc, xlogy

#: Ends of the intervals.
QUANTILES = (0.025, 0.975)
#: Fewer images have no interval worth the name: none is given, but for informations, where it is
#: everything possible. Nor can so few be a stratum of a test.
MIN_IMAGES = 5
#: Something that was seen in none of n images can still concern 3 / n of them (95 %).
RULE_OF_THREE = 3
TOO_FEW = 'too few images for an interval'
# Equal up to the order of summation; far below any information that matters.
_ROUNDING = 1e-9
# Entries that are multiplied at once.
_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Information:
    """Mutual information of bins and experts, and how sure it is. Nats."""

    mi: float  #: The plug-in estimate
    chance: float  #: Mean of the flips: what would be seen without any association
    p_value: float  #: ``(1 + n) / (1 + permutations)``, where n flips reach the statistic
    interval: tuple[float, float]  #: 95 %, of the information without the bias of its estimate
    #: The smaller one of the entropies of the bins and of the experts, which bounds ``mi``
    mi_max: float
    permutations: int  #: How many flips were tried
    num_units: int  #: Decisions that took part
    num_images: int  #: Images that were flipped
    left_out: float  #: Share of the things in strata of too few images, of which nothing is told
    strength: float  #: The statistic, comparable between tests: minus the log of a tail probability
    flipped: np.ndarray  #: float64 (P,), the same of each flip

    def as_dict(self, p_adjusted: float) -> dict:
        """For JSON.

        Args:
            p_adjusted: Of :func:`adjusted`.
        """
        hidden = ('strength', 'flipped')
        numbers = {key: getattr(self, key) for key in Information.__annotations__}
        numbers = {key: value for key, value in numbers.items() if key not in hidden}
        return {**numbers, 'interval': list(self.interval), 'p_adjusted': p_adjusted}


@dataclass(frozen=True, eq=False)
class Cells:
    """What is known of the cells of a joint table."""

    p: np.ndarray  #: float64 (B, E), two-sided p-values of the cells, by the same flips
    #: float64 (2, B, E), ends of the intervals of ``bin_given_expert`` and ``expert_given_bin``;
    #: None of fewer than :data:`MIN_IMAGES` images
    bin_given_expert: np.ndarray | None
    expert_given_bin: np.ndarray | None


def nothing(permutations: int) -> Information:
    """What is known without any decision."""
    return Information(0, 0, 1, (0, 0), 0, permutations, 0, 0, 0, 0, np.zeros(permutations))


def adjusted(found: Sequence[Information]) -> list[float]:
    """The p-values of a family of tests, corrected for their number.

    Args:
        found: The tests, with the same number of flips and the same seed.
    """
    if not found:
        return []
    largest = np.max([one.flipped for one in found], axis=0)
    return [float((1 + (largest >= one.strength).sum()) / (1 + len(largest))) for one in found]


def information(
    images: np.ndarray,
    rows: np.ndarray,
    strata: np.ndarray,
    sums: np.ndarray,
    num_units: int,
    permutations: int,
    seed: int,
    cells: bool = False,
) -> tuple[Information, Cells | None]:
    """The information between bins and experts, given the stratum.

    Args:
        images: int64 (K,), number of the image in the data set.
        rows: int64 (K,), the bin, sorted within each stratum.
        strata: int64 (K,), ascending.
        sums: float (K, E), weights of the experts in that bin of that image, not all 0.
        num_units: How many decisions there are.
        permutations: P, of the flips, and of the bootstrap.
        seed: Of both. The same image has the same signs in every test.
        cells: Whether single cells are wanted; of one stratum alone.
    """
    sums = np.asarray(sums, np.float64)
    taken = _with_enough_images(images, strata, sums.sum(1))
    left_out = 1 - float(sums[taken].sum() / sums.sum())
    if not taken.any():
        possible = math.log(min(len(np.unique(rows)), sums.shape[1]))
        empty = replace(nothing(permutations), interval=(0.0, possible), mi_max=possible)
        return replace(empty, left_out=1.0), None
    images, rows, strata, sums = (x[taken] for x in (images, rows, strata, sums))
    known, images = np.unique(images, return_inverse=True)
    signs = _signs(int(known[-1]) + 1, permutations, seed)[known]
    times = resampled_images(len(known), permutations, seed)
    total, of_image = sums.sum(), np.bincount(images, sums.sum(1))
    statistic, flipped, chance = 0.0, np.zeros(permutations), 0.0
    # Sums of n log n, whose differences are entropies and informations: of all images, without
    # each of them, and of the resamples.
    mi, entropy_bins, entropy_experts = 0.0, 0.0, 0.0
    without, resampled = np.zeros(len(known)), np.zeros(permutations)
    mass = np.zeros(permutations)
    p, tables, variances, of_bins, of_experts = [], [], [], [], []
    for stratum in _runs(strata):
        inside, where, bins = sums[stratum], images[stratum], rows[stratum]
        columns, columns_P = inside.sum(0), weighted(times, where, inside)
        ones, place = np.unique(where, return_inverse=True)
        own = np.zeros((len(ones), inside.shape[1]))
        np.add.at(own, place, inside)
        mean = columns / columns.sum()
        excess = inside - inside.sum(1, keepdims=True) * mean
        held = np.bincount(where, inside.sum(1), len(known)) / columns.sum()
        # One image alone has no excess that could grow.
        grown = excess / np.sqrt(np.where(held < 1 - _ROUNDING, 1 - held, 1))[where, None]
        grown_P = weighted(signs, where, grown)
        by_chance = []
        for run in _runs(bins):
            table, table_P = inside[run].sum(0), weighted(times, where[run], inside[run])
            expected = np.where(mean > 0, table.sum() * mean, np.inf)
            seen, share = excess[run].sum(0), table.sum() / columns.sum()
            flips = weighted(signs, where[run], grown[run]) - share * grown_P
            spread = flips**2 / expected
            statistic += (seen**2 / expected).sum()
            flipped += spread.sum(1)
            by_chance.append((spread.mean(0), expected))
            mi += _n_log_n(table)
            np.add.at(without, where[run], _n_log_n(_less(table, inside[run])) - _n_log_n(table))
            resampled += _n_log_n(table_P)
            entropy_bins -= xlogy(table.sum(), share)
            if cells:
                reached = np.abs(flips) >= np.abs(seen) - _ROUNDING * total
                p.append((1 + reached.sum(0)) / (1 + permutations))
                tables.append(table)
                variances.append((flips**2).mean(0))
                num, of_bin = len(np.unique(where[run])), (table.sum(), table_P.sum(1)[:, None])
                of_experts.append(_ends((table, table_P), of_bin, np.full(len(mean), num)))
                of_bins.append(_ends((table, table_P), (columns, columns_P), (own > 0).sum(0)))
        chance += _deviance(*map(np.array, zip(*by_chance, strict=True)))
        mi -= _n_log_n(columns)
        without[ones] -= _n_log_n(_less(columns, own)) - _n_log_n(columns)
        resampled -= _n_log_n(columns_P)
        entropy_experts -= _n_log_n(columns)
        mass += columns_P.sum(1)
    without = (without + mi) / np.maximum(total - of_image, _ROUNDING * total)
    mi = max(0.0, float(mi / total))
    mi_max = max(0.0, float(min(entropy_bins, entropy_experts) / total))
    statistic, flipped, chance = (
        _without_rounding(x / (2 * total)) for x in (statistic, flipped, chance)
    )
    chance = min(float(chance), mi_max)
    bias = (len(known) - 1) * float(without.mean() - mi)
    if chance < mi_max:
        bias = max(bias, chance * (mi_max - mi) / (mi_max - chance))
    # A flip of all images, or of none, is the data again, but for the order of summation.
    tails = _tails(np.append(flipped, statistic * (1 - _ROUNDING)), flipped)
    found = Information(
        mi=mi,
        chance=chance,
        p_value=float((1 + (flipped >= statistic * (1 - _ROUNDING)).sum()) / (1 + permutations)),
        interval=_interval(mi - bias, resampled / mass, mi_max, len(known)),
        mi_max=mi_max,
        permutations=permutations,
        num_units=num_units,
        num_images=len(known),
        left_out=left_out,
        strength=float(tails[-1]),
        flipped=tails[:-1],
    )
    if not cells:
        return found, None
    ends = (np.stack(of_bins, axis=1), np.stack(of_experts, axis=1))
    p = np.maximum(p, _p_of_too_few(np.array(tables), np.array(variances)))
    return found, Cells(p, *(ends if len(known) >= MIN_IMAGES else (None, None)))


def _with_enough_images(images: np.ndarray, strata: np.ndarray, things: np.ndarray) -> np.ndarray:
    """bool (K,), entries of a stratum that at least :data:`MIN_IMAGES` share; all of a single one.

    One image that has nearly everything counts as hardly more than itself.
    """
    _, stratum = np.unique(strata, return_inverse=True)
    (of, _), pair = np.unique([stratum, images], axis=1, return_inverse=True)
    of_pair = np.bincount(pair.ravel(), things)
    squares, total = np.bincount(of, of_pair**2), np.bincount(of, of_pair)
    enough = total**2 >= MIN_IMAGES * (1 - _ROUNDING) * squares
    return enough[stratum] if len(enough) > 1 else np.ones(len(stratum), bool)


def interval(resampled: np.ndarray, around: float, num_images: int) -> list[float] | None:
    """The 95 % interval of an estimate without the bias that a bootstrap has (as that of AP has).

    Args:
        resampled: (P,); NaN takes no part.
        around: The estimate, where the mean of the resamples is moved to.
        num_images: That were resampled.

    Returns:
        Low and high; None if nothing but NaN was resampled, or of fewer than :data:`MIN_IMAGES`.
    """
    known = resampled[~np.isnan(resampled)]
    if not len(known) or num_images < MIN_IMAGES:
        return None
    return np.quantile(known - known.mean() + around, QUANTILES).tolist()


def paired_interval(before: np.ndarray, after: np.ndarray) -> list[float] | None:
    """The 95 % score interval of the difference of two shares of the same images.

    It also knows what a bootstrap cannot: that changes which no image shows may just be rare. Each
    end is the difference that a two-sided test would just reject (Tango 1998, Statistics in
    Medicine 17).

    Args:
        before, after: bool (N,), whether an image counts.

    Returns:
        Low and high; None of fewer than :data:`MIN_IMAGES`.
    """
    n = len(before)
    if n < MIN_IMAGES:
        return None
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())

    def beyond(delta: float) -> float:
        """How far the test is from rejecting; negative if it rejects."""
        # The likeliest share of losses, of all with this difference.
        b = (2 * n - gained + lost) * delta - gained - lost
        root = math.sqrt(max(b**2 + 8 * n * lost * delta * (1 - delta), 0.0))
        loss = (root - b) / (4 * n)
        variance = max(n * (2 * loss + delta * (1 - delta)), 0.0)
        return z**2 * variance - (gained - lost - n * delta) ** 2

    z, value = stats.norm.ppf(QUANTILES[1]), (gained - lost) / n
    ends = []
    for end in (-1.0, 1.0):
        # At the difference itself the variance can be 0, but next to it a test never rejects.
        start = value + _ROUNDING * (end - value)
        ends.append(end if beyond(end) >= 0 else float(brentq(beyond, end, start)))
    return ends


def _interval(
    centre: float, resampled: np.ndarray, mi_max: float, num_images: int
) -> tuple[float, float]:
    if num_images < MIN_IMAGES:
        return 0.0, mi_max
    low, high = interval(resampled, centre, num_images)
    return max(0.0, low), max(0.0, high)


def _ends(
    part: tuple[np.ndarray, np.ndarray],
    of: tuple[np.ndarray, np.ndarray],
    num_images: np.ndarray,
) -> np.ndarray:
    """(2, E): the intervals of shares; those of nothing are 0.

    Where all images agree, a bootstrap cannot know that others exist: those may have nothing of it,
    or nothing else. It is no choice if all experts have the same of all images.

    Args:
        part: The numerators: (E,) of the data, and (P, E) of the resamples.
        of: The denominators, likewise.
        num_images: (E,), how many images have any of the latter.
    """
    share, resampled = (x / np.where(y > 0, y, 1) for x, y in zip(part, of, strict=True))
    # A resample without any such image says nothing.
    low, high = np.quantile(np.where(of[1] > 0, resampled, share), QUANTILES, axis=0)
    agree, some = high - low < 1e-12, num_images > 0
    if agree[some].all() and (not some.any() or np.ptp(share[some]) < 1e-12):
        agree = ~some
    unseen = np.where(agree & some, np.minimum(1, RULE_OF_THREE / np.maximum(num_images, 1)), 0)
    unseen[some & (num_images < MIN_IMAGES)] = 1
    return np.stack([low * (1 - unseen), high + (1 - high) * unseen])


def _n_log_n(table: np.ndarray) -> np.ndarray:
    """``sum n log n - (sum n) log (sum n)`` over the last axis."""
    number = table.sum(-1)
    return xlogy(table, table).sum(-1) - xlogy(number, number)


def _less(table: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The table (E,) without each part (n, E), rounding apart."""
    return np.maximum(table - parts, 0)


def _deviance(spread: np.ndarray, expected: np.ndarray) -> float:
    """What a table (B, E) adds to ``2 N mi`` by chance, if ``spread`` is its mean chi-squared.

    ``2 (n log(n / m) - n + m)`` has the mean 1, as chi-squared has, for a Poisson distribution of
    large mean m, and another one for a small m. If the weights scatter by v times what single
    things would, cells are like those of ``expected / v`` things.
    """
    scatter = spread[np.isfinite(expected)].mean()
    if scatter <= 0:
        return 0.0
    return float((spread * np.interp(np.log(expected / scatter), *_poisson_deviance())).sum())


@lru_cache(maxsize=1)
def _poisson_deviance() -> tuple[np.ndarray, np.ndarray]:
    """Logs of means m, and the mean deviances there."""
    m = np.geomspace(1e-6, 1e3, 200)
    n = np.arange(1500)
    deviance = 2 * (xlogy(n, n) - xlogy(n, m[:, None]) - n + m[:, None])
    return np.log(m), (stats.poisson.pmf(n, m[:, None]) * deviance).sum(1)


def _p_of_too_few(table: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Two-sided p-values of the cells with less than expected; 0 of all others.

    By the smaller one of two binomial tails, which both are above the hypergeometric one: of the
    things of the bin, and of those of the expert. Things that scatter by v times what single ones
    would count as 1 / v each; by the bin or the whole table, whatever scatters more, as a bin that
    has the usual expert alone does not show how it scatters.

    Args:
        table: (B, E), what is seen.
        variance: (B, E), of the flips.
    """
    total = table.sum()
    bins, experts = table.sum(1, keepdims=True), table.sum(0)
    expected = bins * experts / total
    fair = expected * (1 - bins / total) * (1 - experts / total)
    if fair.sum() <= 0 or variance.sum() <= 0:  # one bin, one expert, or no choice at all
        return np.zeros_like(table)
    of_bin = variance.sum(1, keepdims=True) / np.maximum(fair.sum(1, keepdims=True), _ROUNDING)
    scatter = np.maximum(of_bin, variance.sum() / fair.sum())

    def tail(number: np.ndarray, share: np.ndarray) -> np.ndarray:
        others = np.maximum((number - table) / scatter, _ROUNDING)
        return betainc(others, table / scatter + 1, 1 - share)

    tails = np.minimum(tail(bins, experts / total), tail(experts, bins / total))
    return np.where(table < expected, np.minimum(2 * tails, 1), 0)


def _tails(values: np.ndarray, flipped: np.ndarray) -> np.ndarray:
    """Minus the log of the probability of that much by chance; 0 without any variance."""
    mean, variance = flipped.mean(), flipped.var()
    if variance <= (_ROUNDING * mean) ** 2 or mean <= 0:
        return np.zeros_like(values)
    return -stats.gamma.logsf(values, mean**2 / variance, scale=variance / mean)


def _without_rounding(values: np.ndarray) -> np.ndarray:
    return np.where(values < _ROUNDING, 0.0, values)


def weighted(factors: np.ndarray, images: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(P, E): for each of P columns of factors (N, P), the weighted sum of values (K, E)."""
    total = np.zeros((factors.shape[1], values.shape[1]))
    for start in range(0, len(values), _CHUNK):
        part = slice(start, start + _CHUNK)
        total += factors[images[part]].astype(np.float64).T @ values[part]
    return total


def _runs(values: np.ndarray) -> list[slice]:
    """Where values (K,) stay the same."""
    places = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [slice(*pair) for pair in pairwise(places)]


@lru_cache(maxsize=2)
def _signs(count: int, flips: int, seed: int) -> np.ndarray:
    """int8 (count, flips) of +1 and -1; row i is the same whatever the count."""
    width = -(-flips // 32) * 4  # whole words, so that rows begin where they would anyway
    drawn = np.frombuffer(np.random.default_rng(seed).bytes(count * width), np.uint8)
    bits = np.unpackbits(drawn.reshape(count, width), axis=1, count=flips)
    return 2 * bits.astype(np.int8) - 1


@lru_cache(maxsize=2)
def resampled_images(count: int, times: int, seed: int = 0) -> np.ndarray:
    """int16 (count, times): how often each of so many images is drawn, with replacement."""
    rng = np.random.default_rng([seed, 1])
    drawn = np.zeros((count, times), np.int16)
    for column in drawn.T:
        column[:] = np.bincount(rng.integers(0, count, count), minlength=count)
    return drawn
