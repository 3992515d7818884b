"""What was measured: DimensionEstimate at each block boundary, gathered in a DimensionProfile. Needs no torch."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from gelora_plugins import json_files
from gelora_plugins.errors import PlanError
from gelora_plugins.layout import ModelLayout
from gelora_plugins.text import html_table, printable

MIN_POINTS = 50  # below this the 95 % interval of TwoNN is wider than +-28 % of the value


@dataclass(frozen=True)
class DimensionEstimate:
    """The intrinsic dimension of one set of points.

    Attributes:
        value: the dimension, a positive number; None when the points have none (see `degenerate`).
        std_error: standard error of `value`, or None where the estimator has none.
        interval: 95 % confidence interval (low, high), or None where the estimator has none.
        num_points: how many distinct points the estimate rests on.
        degenerate: why there is no dimension (the points coincide, say); empty when there is one.
        replicates: values that the estimate could have had with other documents, as random halves of the points show
            them; empty where the estimator gives none. Their standard deviation is the standard error. In one profile,
            number b comes from the same documents at every boundary.
        warning: one sentence on why the value needs care; usually empty.
    """

    value: float | None
    num_points: int
    std_error: float | None = None
    interval: tuple[float, float] | None = None
    degenerate: str = ""
    replicates: tuple[float, ...] = ()
    warning: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) == (self.degenerate == ""):
            raise PlanError("A dimension estimate has either a value or the reason why there is none.")
        if self.value is not None and not (math.isfinite(self.value) and self.value > 0):
            raise PlanError(f"An intrinsic dimension of {self.value!r} was found; expected a positive finite number.")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise PlanError(f"The interval {self.interval!r} is not (low, high).")
        if self.replicates:
            if self.value is None:
                raise PlanError("An estimate without a value has replicates; expected none.")
            wrong = [x for x in self.replicates if not (json_files.is_number(x) and x > 0)]
            if wrong or len(self.replicates) < 2:
                raise PlanError(
                    f"The replicates of an estimate are {len(self.replicates)} values"
                    + (f", one of them {wrong[0]!r:.80}" if wrong else "")
                    + "; expected none, or at least two positive finite numbers."
                )

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.interval is None:
            return f"{self.value:.1f}"
        return f"{self.value:.1f} [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Inverse of `dataclasses.asdict`. Raises PlanError for anything else."""
        get = json_files.reader(data, "estimate")
        interval = get("interval", list, null=True)
        if interval is not None:
            if len(interval) != 2 or not all(json_files.is_number(x) for x in interval):
                raise PlanError(f"estimate.interval is {interval!r}; expected two numbers.")
            interval = (float(interval[0]), float(interval[1]))
        return cls(
            value=get("value", float, null=True),
            num_points=get("num_points", int),
            std_error=get("std_error", float, null=True),
            interval=interval,
            degenerate=get("degenerate", str),
            replicates=tuple(get("replicates", list)),
            warning=get("warning", str),
        )


@dataclass(frozen=True)
class DimensionProfile:
    """Intrinsic dimension at every block boundary of one model on one probe set; enough to plan without the model.

    Attributes:
        layout: the blocks that the boundaries lie between.
        estimates: one per boundary, in the order of `layout.num_boundaries`.
        estimator, pooling: names of what measured them.
        seed: seed of the choice of documents.
        num_documents: distinct documents that were read.
        num_repeated_inputs: documents dropped before the forward pass, because the same input was already there.
        num_repeated_points: points dropped at every boundary, because they coincide with another at one of them.
        num_tokens: tokens that went through the backbone, padding not counted.
        seconds: wall time of the measurement.
        data_fingerprint: SHA-256 over the token ids of the documents that were read.
        standardise: whether each coordinate was divided by its standard deviation.
        target_std_error: the standard error that every growth was to be known to, or None where documents were not
            read in growing numbers.
        options: those that the measurement followed, by name; None in profiles from before they were recorded.
        model_name: what the model was loaded as, or None where that is not known.
        model_fingerprint: see `provenance.model_fingerprint`; None where there is none.
        num_rows: of the training set; None where it has no length, and in profiles from before this was recorded.
        num_targets: tokens of those rows that have a label, or rows where a row has one label, as the rows that were
            read let expect; None where they do not say. Texts that are tokenised for the probe count up to
            `probe_max_length`.
    """

    layout: ModelLayout
    estimates: tuple[DimensionEstimate, ...]
    estimator: str
    pooling: str
    seed: int
    num_documents: int
    num_repeated_inputs: int
    num_repeated_points: int
    num_tokens: int
    seconds: float
    data_fingerprint: str
    standardise: bool = False
    target_std_error: float | None = None
    options: dict[str, Any] | None = None
    model_name: str | None = None
    model_fingerprint: str | None = None
    num_rows: int | None = None
    num_targets: int | None = None

    def __post_init__(self) -> None:
        if len(self.estimates) != self.layout.num_boundaries:
            raise PlanError(
                f"{len(self.estimates)} dimensions for a model of {self.layout.num_boundaries} block boundaries."
            )
        counts = sorted({len(estimate.replicates) for estimate in self.estimates} - {0})
        if len(counts) > 1:
            raise PlanError(
                f"Boundaries have {' and '.join(map(str, counts))} replicates; expected the same number at every "
                "boundary that has any."
            )
        if self.target_std_error is not None and not self.target_std_error > 0:
            raise PlanError(f"target_std_error is {self.target_std_error!r}; expected a positive number or None.")
        for name, value in (self.options or {}).items():
            if not (value is None or isinstance(value, bool | str) or json_files.is_number(value)):
                raise PlanError(f"The option {name} of a profile is {value!r:.80}; expected a number, a word or None.")

    def __repr__(self) -> str:
        """Short, for a prompt or a notebook; `to_dict` has all of it."""
        known = [estimate.value for estimate in self.estimates if estimate.value is not None]
        values = f", {min(known):.1f} to {max(known):.1f}" if known else ""
        return (
            f"<DimensionProfile {printable(self.estimator)}: {len(self.estimates)} boundaries{values}; "
            f"{self.num_documents:,} documents>"
        )

    def _repr_html_(self) -> str:
        """The dimension at every boundary as a table, which a notebook shows."""
        boundaries = zip(self.layout.blocks, self.layout.block_boundaries(), strict=True)
        into = {before: block.name for block, (before, _) in boundaries}
        rows = [(str(b), into.get(b, "-"), str(estimate)) for b, estimate in enumerate(self.estimates)]
        caption = (
            f"Intrinsic dimension of {self.num_documents:,} documents, with its 95 % interval: {self.estimator}, "
            f"{self.pooling} pooling."
        )
        return html_table(caption, ("boundary", "leads into", "dimension"), rows)

    def growth(self) -> tuple[float | None, ...]:
        """d_{i+1} - d_i for each block i, in the order of `layout.blocks`.

        None where the block's input has no dimension: a single point has no growth to measure from, and
        counting it as 0 would give that block the largest rank of the network.
        """
        return growth([estimate.value for estimate in self.estimates], self.layout)

    def growth_std_errors(self) -> tuple[float | None, ...]:
        """Standard error of the growth over each block, in the order of `layout.blocks`.

        The standard deviation of the difference of the replicates: what the same documents do to both boundaries
        cancels. None where a boundary of the block has no replicates, or where there is no growth.
        """
        return tuple(
            None
            if not self.estimates[before].replicates or not self.estimates[after].replicates
            else statistics.stdev(
                b - a for a, b in zip(self.estimates[before].replicates, self.estimates[after].replicates, strict=True)
            )
            for before, after in self.layout.block_boundaries()
        )

    def redraws(self) -> Iterator[Self]:
        """This profile as other draws of the documents would have it, one for each replicate; none without any.

        Redraw b has value + (replicate b - mean of the replicates) at each boundary. All else, standard errors too,
        stays as measured, and so does the value where there are no replicates.
        """
        means = [statistics.fmean(e.replicates) if e.replicates else 0.0 for e in self.estimates]
        for b in range(max((len(estimate.replicates) for estimate in self.estimates), default=0)):
            yield replace(
                self,
                estimates=tuple(
                    _moved(estimate, estimate.replicates[b] - mean) if estimate.replicates else estimate
                    for estimate, mean in zip(self.estimates, means, strict=True)
                ),
            )

    def notes(self) -> tuple[str, ...]:
        """What a reader must know before trusting the numbers, one sentence each."""
        notes = []
        if self.num_repeated_inputs:
            notes.append(f"{self.num_repeated_inputs} repeated inputs were left out before measuring.")
        if self.num_repeated_points:
            notes.append(
                f"{self.num_repeated_points} points that coincide with another were left out at every boundary."
            )
        notes += [
            f"Boundary {boundary} has no dimension: {estimate.degenerate} The block after it gets the smallest need."
            for boundary, estimate in enumerate(self.estimates)
            if estimate.degenerate
        ]
        for warning in dict.fromkeys(estimate.warning for estimate in self.estimates if estimate.warning):
            boundaries = [str(i) for i, estimate in enumerate(self.estimates) if estimate.warning == warning]
            notes.append(f"{'Boundary' if len(boundaries) == 1 else 'Boundaries'} {', '.join(boundaries)}: {warning}")
        if self.target_std_error is not None:
            notes.append(self._target_note(self.target_std_error))
        return tuple(notes)

    def _target_note(self, target: float) -> str:
        known = [error for error in self.growth_std_errors() if error is not None]
        if not known:
            return f"The estimator {self.estimator} gives no standard errors, so target_std_error had no effect."
        if max(known) <= target:
            return f"The growth of every block is known to a standard error of {max(known):.2f} ({target:g} was asked)."
        return (
            f"The target_std_error of {target:g} was not reached: the largest standard error of a growth is "
            f"{max(known):.2f} with all {self.num_documents:,} documents. Raise probe_samples, or give more data."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, with the schema number."""
        return {"schema": json_files.SCHEMA, "kind": "dimension_profile", **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Inverse of `to_dict`. Raises PlanError when a value is missing, of the wrong type or out of range."""
        get = json_files.reader(data, "profile", kind="dimension_profile", keys=[field.name for field in fields(cls)])
        return cls(
            layout=ModelLayout.from_dict(get("layout", dict)),
            estimates=tuple(DimensionEstimate.from_dict(e) for e in get("estimates", list)),
            estimator=get("estimator", str),
            pooling=get("pooling", str),
            seed=get("seed", int),
            num_documents=get("num_documents", int),
            num_repeated_inputs=get("num_repeated_inputs", int),
            num_repeated_points=get("num_repeated_points", int),
            num_tokens=get("num_tokens", int),
            seconds=get("seconds", float),
            data_fingerprint=get("data_fingerprint", str),
            standardise=get("standardise", bool),
            target_std_error=get("target_std_error", float, null=True),
            options=get("options", dict, null=True, since=True),
            model_name=get("model_name", str, null=True, since=True),
            model_fingerprint=get("model_fingerprint", str, null=True, since=True),
            num_rows=get("num_rows", int, null=True, since=True),
            num_targets=get("num_targets", int, null=True, since=True),
        )


def growth(dimensions: Sequence[float | None], layout: ModelLayout) -> tuple[float | None, ...]:
    """Difference of `dimensions` (one per boundary) over each block; None where the block's input has none."""
    result: list[float | None] = []
    for before, after in layout.block_boundaries():
        d_in, d_out = dimensions[before], dimensions[after]
        result.append(None if d_in is None or d_out is None else d_out - d_in)
    return tuple(result)


def _moved(estimate: DimensionEstimate, by: float) -> DimensionEstimate:
    """`estimate` with `by` added to its value, which stays positive."""
    assert estimate.value is not None
    return replace(estimate, value=max(estimate.value + by, estimate.value / 1000))
