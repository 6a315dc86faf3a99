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
_LEAST_RATIO = 10  # below it plain weights suffice


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
    def conflicts(self) -> list[tuple[str, str]]:
        """The pairs of tasks whose median cosine is negative, the worst first."""
        middle = np.median(self.cosines, axis=0)
        pairs = itertools.combinations(range(len(self.task_names)), 2)
        worst = sorted((middle[i, j], i, j) for i, j in pairs if middle[i, j] < 0)
        return [(self.task_names[i], self.task_names[j]) for _, i, j in worst]

    @property
    def recommendation(self) -> str:
        """What to do, in a few words; :attr:`reasons` say why."""
        if not self.measured.any():
            return "nothing to balance: the tasks share no parameter"
        if np.median(self.gradient_ratio) < _LEAST_RATIO:
            advice = "plain weights suffice"
        else:
            advice = "balance the tasks"
        return f"{advice}, but expect conflict" if self.conflicts else advice

    @property
    def reasons(self) -> list[str]:
        """The reasons for the recommendation, and what to know about the measurement."""
        if not self.measured.any():
            return [
                "On no parameter that is measured do two tasks have a gradient. If one should be "
                "shared, look for a stop_gradient, or name it with shared=only(...)."
            ]
        return [*self._on_ratio(), *self._on_conflicts(), *self._on_noise()]

    def _on_ratio(self) -> list[str]:
        num_tasks, ratio = len(self.task_names), np.median(self.gradient_ratio)
        norms = np.median(self.norms, axis=0)
        silent = [name for name, norm in zip(self.task_names, norms, strict=True) if norm == 0]
        left = self._left(min_weight=0.0)
        # One without a gradient would be given all the weight by it.
        equalise = left >= _LEAST_RATIO and not silent
        loud, quiet = (self.task_names[at(norms)] for at in (np.argmax, np.argmin))
        if ratio < _LEAST_RATIO:
            reasons = [
                f"The gradient norms are {_number(ratio)}x apart. Below {_LEAST_RATIO}x the tasks "
                "learn side by side with plain weights."
            ]
        else:
            advice = (
                f"balance(weighting.inverse_norm({num_tasks}))"
                if equalise
                else f"gaba({num_tasks}, debias=True, warmup_steps=0, min_weight=0)"
            )
            reasons = [
                f"'{loud}' pulls {_number(ratio)}x harder than '{quiet}' on what they share, and "
                f"at {_LEAST_RATIO}x or more the quieter task hardly learns: try {advice}."
            ]
        if silent:
            reasons.append(
                f"{_listed(silent)} had no gradient there in half of the batches or more: no "
                "weight makes up for that. Look for batches without labels, or saturated units."
            )
        if num_tasks > 2:
            apart = (
                ""
                if silent
                else f" Without a floor it would leave the weighted norms {_number(left)}x apart."
            )
            reasons.append(
                f"For K = {num_tasks} a weight of GABA is at most 1/(K-1) = "
                f"{_number(1 / (num_tasks - 1))}: it holds down the loud tasks, but cannot lift "
                f"quiet ones without limit.{apart} weighting.inverse_norm and, with feedback, "
                "weighting.proportional_integral equalise any number of tasks, but hand one that "
                "has finished nearly all the weight."
            )
        elif not silent and (floored := self._left(min_weight=0.05)) > 1.5:
            reasons.append(
                f"With its default floor, min_weight=0.05, gaba() would leave the weighted norms "
                f"{_number(floored)}x apart. With min_weight=0 they become equal."
            )
        return reasons

    def _left(self, min_weight: float) -> float:
        """The ratio of the weighted norms that GABA tends to under the median norms."""
        norms = np.median(self.norms, axis=0)
        weights = controller.steady_state(norms, min_weight=min_weight)
        return float(largest_to_smallest(jnp.asarray(weights * norms)))

    def _on_conflicts(self) -> list[str]:
        if not self.conflicts:
            return []
        at = self.task_names.index
        pairs = [
            f"'{a}' and '{b}' (median cosine {np.median(self.cosines[:, at(a), at(b)]):.2f}, "
            f"negative in {_percent(self.conflict_rate[at(a), at(b)])} of the batches)"
            for a, b in self.conflicts[:3]
        ]
        more = f", and {len(self.conflicts) - 3} pairs more" if len(self.conflicts) > 3 else ""
        aware = f"weighting.upgrad({len(self.task_names)})"
        if np.median(self.gradient_ratio) >= _LEAST_RATIO:  # one that evens out norms too
            aware = f"weighting.normalized({aware})"
        return [
            f"Against each other pull {'; '.join(pairs)}{more}. Weights by norms even out how hard "
            f"tasks pull, not where to: use a conflict-aware weighting, such as balance({aware}), "
            "or reconsider what is shared."
        ]

    def _on_noise(self) -> list[str]:
        noisy = [n for n, part in zip(self.task_names, self.noise, strict=True) if part > 0.5]
        if not noisy:
            return []
        return [
            f"More than half of the squared norm of {_listed(noisy)} is minibatch noise: its norm "
            "says more of the batch size than of the task, and its cosines are nearer to 0 than "
            "those of the full gradients."
        ]

    def table(self, *, leaves: bool = False) -> str:
        """The findings as text, at most 80 columns wide.

        Args:
          leaves: with a line per parameter leaf, default False.

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
        parts = [_wrapped(about)]
        if self.measured.any():
            parts += [self._tasks(), self._ratio(), self._cosines()]
        if leaves:
            parts.append(self._leaves())
        advice = [_wrapped(f"Recommendation: {self.recommendation}")]
        advice += [_wrapped(reason, "- ", "  ") for reason in self.reasons]
        return "\n\n".join([*parts, "\n".join(advice)])

    def __str__(self) -> str:
        """The table without the leaves."""
        return self.table()

    def _tasks(self) -> str:
        columns = [np.median(self.losses, axis=0), np.median(self.norms, axis=0)]
        rows = [
            [
                name,
                *(_number(column[i]) for column in columns),
                *(_percent(part[i]) for part in (self.share, np.minimum(self.noise, 1))),
            ]
            for i, name in enumerate(self.task_names)
        ]
        table = _table(["task", "loss", "gradient norm", "share", "noise"], rows)
        if np.isnan(self.noise).any():
            table += "\nnoise -: without a gradient, or of batches that do not split into halves"
        return table

    def _ratio(self) -> str:
        ratio = self.gradient_ratio
        low, high = _number(ratio.min()), _number(ratio.max())
        middle = f"gradient ratio, largest / smallest norm: median {_number(np.median(ratio))}"
        return _wrapped(f"{middle}, from {low} to {high}" if len(ratio) > 1 else middle)

    def _cosines(self) -> str:
        middle = np.median(self.cosines, axis=0)
        above = np.triu_indices(len(self.task_names), 1)
        rows = [
            [name, *(f"{value:.2f}" for value in middle[i])]
            for i, name in enumerate(self.task_names)
        ]
        rate = _percent(self.conflict_rate[above].mean())
        return f"{_table(['cosine', *self.task_names], rows)}\nconflict rate, cosine < 0: {rate}"

    def _leaves(self) -> str:
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
        return _table(["leaf", "shape", "shared", *self.task_names], rows, labels=3)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """Columns of text; those that do not fit side by side follow below, with the labels again."""
    first, other = 32 if labels > 1 else 24, 13
    cells = [
        [shortened(cell, first if i == 0 else other) for i, cell in enumerate(row)]
        for row in (header, *rows)
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    blocks: list[list[int]] = []
    room = 0
    for i in range(labels, len(header)):
        if widths[i] + 2 > room:
            blocks.append(list(range(labels)))
            room = _WIDTH - sum(widths[:labels]) - 2 * (labels - 1)
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


def _wrapped(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=rest)


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
