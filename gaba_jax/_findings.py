"""What was measured before training, as numbers, a table and a recommendation."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gaba_jax import controller
from gaba_jax._statistics import largest_to_smallest

_WIDTH = 80
_LEAST_WIDTH = 60
_LEAST_RATIO = 10  # a convention: from here on a task counts as drowned
_LEAST_BATCHES = 5  # with fewer the interval of a cosine says little
_CONFLICT = -0.1  # a cosine nearer to 0 changes little


class Diagnosis(NamedTuple):
    """What :func:`gaba_jax.diagnose` found in N batches. ``print`` it.

    Batches on which a gradient is not finite are left out.

    Attributes:
      task_names: K names.
      losses: [N, K] float32.
      norms: [N, K] float32, gradient norms on the measured parameters.
      cosines: [N, K, K] float32, between those gradients.
      noise: [K], the part of the squared norm that is minibatch noise, over all batches; NaN where
        it is not known, more than 1 where the halves of the batches contradict each other.
      paths: the dotted names of the leaves, in tree order.
      shapes: of the leaves.
      shared: [leaves] bool, whether a leaf counts as shared.
      measured: [leaves] bool, whether norms are taken on it.
      leaf_norms: [leaves, K], each task's norm on it, the median over the batches.
      nonfinite_count: batches left out.
    """

    task_names: tuple[str, ...]
    losses: np.ndarray
    norms: np.ndarray
    cosines: np.ndarray
    noise: np.ndarray
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shared: np.ndarray
    measured: np.ndarray
    leaf_norms: np.ndarray
    nonfinite_count: int

    @property
    def gradient_ratio(self) -> np.ndarray:
        """[N], the largest norm over the smallest."""
        return np.asarray(largest_to_smallest(jnp.asarray(self.norms)))

    @property
    def share(self) -> np.ndarray:
        """[K], each task's part of the norms, the mean over the batches; sums to 1."""
        return np.asarray(controller.share(self.norms)).mean(axis=0)

    @property
    def conflict_rate(self) -> np.ndarray:
        """[K, K], the part of the batches in which the cosine of two tasks is negative."""
        return (self.cosines < 0).mean(axis=0)

    @property
    def cosine_interval(self) -> np.ndarray:
        r"""[2, K, K], the ends of a 95 % interval of the mean cosine over the N batches.

        .. math:: \bar c \pm t_{N-1}\, s / \sqrt{N}

        s is the standard deviation of the N cosines, and t is Student's quantile. The ends are NaN
        if N < 5: there are not enough batches to tell.
        """
        cosines = np.asarray(self.cosines, np.float64)
        count = len(cosines)
        if count < _LEAST_BATCHES:
            return np.full([2, *cosines.shape[1:]], np.nan)
        free = count - 1
        quantile = 1.96 + 2.37 / free + 2.82 / free**2 + 3 / free**3  # to 1e-3
        half = quantile * cosines.std(axis=0, ddof=1) / np.sqrt(count)
        return np.clip(cosines.mean(axis=0) + np.stack([-half, half]), -1, 1)

    @property
    def conflicts(self) -> list[tuple[str, str]]:
        """The pairs of tasks whose whole :attr:`cosine_interval` is below -0.1, the worst first."""
        high = self.cosine_interval[1]
        pairs = itertools.combinations(range(len(self.task_names)), 2)
        worst = sorted((high[i, j], i, j) for i, j in pairs if high[i, j] < _CONFLICT)
        return [(self.task_names[i], self.task_names[j]) for _, i, j in worst]

    @property
    def recommendation(self) -> str:
        """The one choice to start with, as code where there is any; :attr:`reasons` say why."""
        if not self.measured.any():
            return "nothing to balance: the tasks share no parameter"
        count, apart = len(self.task_names), self._apart() >= _LEAST_RATIO
        if self.conflicts:
            rule = f"weighting.upgrad({count})"
            rule = f"balance({f'weighting.normalized({rule})' if apart else rule})"
        elif apart:
            rule = f"equalize({count})"
        else:
            return "uniform weights: train on the sum of the losses, nothing to add"
        return f"balance with optax.chain({rule}, optax.adamw(1e-3))"

    @property
    def reasons(self) -> list[str]:
        """Why, in the first sentence; then what to know about the measurement."""
        if not self.measured.any():
            return [
                "On no parameter that is measured do two tasks have a gradient.",
                "If one should be shared, look for a stop_gradient, or name it with "
                "shared=only(...).",
            ]
        ratio, norms = self._apart(), self._loudness()
        silent, noise = self._on_silence(), self._on_noise()
        pulls = ""
        if ratio >= _LEAST_RATIO:
            loud, quiet = (self.task_names[at(norms)] for at in (np.nanargmax, np.nanargmin))
            pulls = f"'{loud}' pulls {_number(ratio)}x harder than '{quiet}' on what they share"
        if self.conflicts:
            (a, b), rest = self.conflicts[0], pulls or "weights by norms do not change that"
            why = [f"'{a}' and '{b}' pull against each other, and {rest}."]
        elif pulls:
            why = [f"{pulls}, so the quieter one may go unheard."]
        elif silent:
            why = []
        else:
            why = [
                f"The gradient norms are {_number(ratio)}x apart, less than {_LEAST_RATIO}x: no "
                "task drowns another."
            ]
        return [*why, *silent, *noise]

    def _loudness(self) -> np.ndarray:
        """[K], the median norm over the batches in which a task has a gradient, NaN for none."""
        own = (norms[norms > 0] for norms in self.norms.T)
        return np.array([np.median(norms) if len(norms) else np.nan for norms in own])

    def _apart(self) -> float:
        """The median gradient ratio, or where tasks lack a gradient that of the others."""
        ratio = np.median(self.gradient_ratio)
        if np.isinf(ratio):
            norms = self._loudness()
            ratio = np.nanmax(norms) / np.nanmin(norms)
        return float(ratio)

    def _on_silence(self) -> list[str]:
        absent = (self.norms == 0).mean(axis=0)
        silent = [name for name, part in zip(self.task_names, absent, strict=True) if part >= 0.5]
        if not silent:
            return []
        return [
            f"{_listed(silent)} had no gradient on what they share in half of the batches or more, "
            "and no weight makes up for that: look for batches without labels, or saturated units."
        ]

    def _on_noise(self) -> list[str]:
        noisy = [n for n, part in zip(self.task_names, self.noise, strict=True) if part > 0.5]
        if not noisy:
            return []
        return [
            f"More than half of the squared norm of {_listed(noisy)} is minibatch noise, which "
            "lifts its norm and draws its cosines to 0."
        ]

    def table(self, *, leaves: bool = False, width: int = _WIDTH) -> str:
        """The findings as text.

        Args:
          leaves: with a line per parameter leaf, default False.
          width: columns that no line goes beyond, default 80, at least 60.

        Returns:
          Lines of text; names that are too long are shortened in the middle.
        """
        sizes = np.array([int(np.prod(shape)) for shape in self.shapes], int)
        count, kept = len(self.losses), self.shared
        only = "" if (self.measured == kept).all() else f", {self.measured.sum()} of them measured"
        about = (
            f"{len(self.task_names)} tasks, "
            f"{'1 batch' if count == 1 else f'medians over {count} batches'}; "
            f"shared: {kept.sum()} of {len(kept)} leaves{only} "
            f"({sizes[kept].sum():,} of {sizes.sum():,} parameters)"
        )
        if self.nonfinite_count:
            about += f"; {self.nonfinite_count} more left out: a gradient was not finite"
        width = max(width, _LEAST_WIDTH)
        parts = [_wrapped(about, width)]
        if self.measured.any():
            parts += [self._tasks(width), self._ratio(width), self._cosines(width)]
        if leaves:
            parts.append(self._leaves(width))
        advice = [_wrapped(f"Recommendation: {self.recommendation}", width)]
        why, *more = self.reasons
        advice += [_wrapped(f"Why: {why}", width)]
        advice += [_wrapped(each, width, "- ", "  ") for each in more]
        return "\n\n".join([*parts, "\n".join(advice)])

    def __str__(self) -> str:
        """The table without the leaves."""
        return self.table()

    def _tasks(self, width: int) -> str:
        columns = [np.median(self.losses, axis=0), np.median(self.norms, axis=0)]
        rows = [
            [
                name,
                *(_number(column[i]) for column in columns),
                *(_percent(part[i]) for part in (self.share, np.minimum(self.noise, 1))),
            ]
            for i, name in enumerate(self.task_names)
        ]
        table = _table(["task", "loss", "gradient norm", "share", "noise"], rows, width)
        if np.isnan(self.noise).any():
            note = "noise -: without a gradient, or of batches that do not split into halves"
            table += f"\n{_wrapped(note, width)}"
        return table

    def _ratio(self, width: int) -> str:
        ratio = self.gradient_ratio
        low, high = _number(ratio.min()), _number(ratio.max())
        middle = f"gradient ratio, largest / smallest norm: median {_number(np.median(ratio))}"
        return _wrapped(f"{middle}, from {low} to {high}" if len(ratio) > 1 else middle, width)

    def _cosines(self, width: int) -> str:
        rows = [
            [name, *(f"{value:.2f}" for value in cosines)]
            for name, cosines in zip(self.task_names, self.cosines.mean(axis=0), strict=True)
        ]
        table = _table(["mean cosine", *self.task_names], rows, width)
        return f"{table}\n{_wrapped(self._conflict(), width)}"

    def _conflict(self) -> str:
        """What the interval of the pair that is nearest to conflict says."""
        if len(self.cosines) < _LEAST_BATCHES:
            return f"conflict: not enough batches to tell, {_LEAST_BATCHES} at least"
        above = np.triu_indices(len(self.task_names), 1)
        low, high = (ends[above] for ends in self.cosine_interval)
        certain = high.min() < _CONFLICT
        at = np.argmin(high if certain else low)
        verdict = "yes" if certain else "not certain" if low[at] < _CONFLICT else "none"
        a, b = (shortened(self.task_names[index[at]], 24) for index in above)
        more = f"; {len(self.conflicts) - 1} more" if len(self.conflicts) > 1 else ""
        mean = self.cosines.mean(axis=0)[above][at]
        return (
            f"conflict, cosine < {_CONFLICT}: {verdict}; '{a}' and '{b}' {mean:.2f}, 95 % interval "
            f"{low[at]:.2f} to {high[at]:.2f}{more}"
        )

    def _leaves(self, width: int) -> str:
        rows = [
            [
                path,
                "x".join(map(str, shape)) or "scalar",
                "yes" if shared else "no",
                *map(_number, norms),
            ]
            for path, shape, shared, norms in zip(
                self.paths, self.shapes, self.shared, self.leaf_norms, strict=True
            )
        ]
        return _table(["leaf", "shape", "shared", *self.task_names], rows, width, labels=3)


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int, labels: int = 1
) -> str:
    """Columns of text; those that do not fit side by side follow below, with the labels again."""
    first, other = 32 if labels > 1 else 24, 13
    cells = [[shortened(cell, other) for cell in row[1:]] for row in (header, *rows)]
    others = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    if width < _WIDTH:  # in a narrow table names give way, to as many columns as leave them 20
        rooms = [width - sum(others[:count]) for count in range(len(others), labels - 1, -1)]
        first = min(first, max(13, next((room for room in rooms if room >= 20), rooms[-1])))
    cells = [
        [shortened(row[0], first), *cell] for row, cell in zip((header, *rows), cells, strict=True)
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    blocks: list[list[int]] = []
    room = 0
    for i in range(labels, len(header)):
        if widths[i] + 2 > room:
            blocks.append(list(range(labels)))
            room = width - sum(widths[:labels]) - 2 * (labels - 1)
        blocks[-1].append(i)
        room -= widths[i] + 2
    return "\n\n".join(
        "\n".join(
            "  ".join(
                row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in block
            ).rstrip()
            for row in cells
        )
        for block in blocks
    )


def shortened(text: str, width: int) -> str:
    """The text in ``width`` letters, without its middle where it is longer."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> str:
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def _percent(part: float) -> str:
    if np.isnan(part):
        return "-"
    if 0 < part < 1e-4:
        return "< 0.01 %"
    return f"{100 * part:.2g} %" if part < 0.1 else f"{100 * part:.0f} %"
