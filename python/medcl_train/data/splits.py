"""Splits by subject: who is labelled, who is in the unlabelled pool, who validates, who tests.

Seeds: test and validation are the first subjects of RandomState(split_seed).permutation(sorted
subjects), the rest is the pool; the labelled subjects are the first of RandomState(100 + seed)
.permutation(pool). So draws are nested in one seed (1 in 2 in 4), draws of different seeds share
test set and pool, and the generator is one whose stream NumPy has frozen.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path

import numpy as np

from .atomic import write_atomic
from .cases import Case, subjects_of
from .errors import DataError

# Label fractions of IDEAL's tables, as subjects: 1, 2, 8, 80 of ACDC's 80 and 1, 2, 4, 10 of 10.
FRACTIONS = {"acdc": (0.0125, 0.025, 0.10, 1.0), "mmwhs": (0.10, 0.20, 0.40, 1.0)}
ACDC_TEST = tuple(f"patient{first + i:03d}" for first in (7, 27, 47, 67, 87) for i in range(4))
PARTS = ("labeled", "unlabeled", "val", "test")


def label_counts(pool_size: int, fractions: Iterable[float]) -> tuple[int, ...]:
    """Subjects per label fraction: rounded up, at least 1. (0.0125 of 80 is 1.)"""
    # The subtraction keeps 0.07 * 100 = 7.000000000000001 at 7.
    return tuple(max(1, math.ceil(fraction * pool_size - 1e-9)) for fraction in fractions)


@dataclass(frozen=True)
class Split:
    """Subjects of each part.

    `unlabeled` is the whole training pool and holds the labelled subjects too (their labels are
    not used there); pool, `val` and `test` never share a subject. Raises DataError otherwise.
    """

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    seed: int | None = 0
    name: str = ""

    def __post_init__(self):
        for part in PARTS:
            subjects = tuple(getattr(self, part))
            object.__setattr__(self, part, subjects)
            if len(set(subjects)) != len(subjects):
                raise DataError(
                    f"split {self.name!r}: {part} lists a subject twice. Fix: make the split anew"
                )
        for a, b in (("unlabeled", "val"), ("unlabeled", "test"), ("val", "test"),
                     ("labeled", "val"), ("labeled", "test")):  # fmt: skip
            both = sorted(set(getattr(self, a)) & set(getattr(self, b)))
            if both:
                raise DataError(
                    f"split {self.name!r}: {', '.join(both)} in both {a} and {b}; a subject must "
                    "be in one part only. Fix: make the split with make_split"
                )
        stray = sorted(set(self.labeled) - set(self.unlabeled))
        if stray:
            raise DataError(
                f"split {self.name!r}: labelled {', '.join(stray)} not in the pool `unlabeled`, "
                "which holds all training subjects. Fix: add them there"
            )

    @property
    def sha256(self) -> str:
        """Hash of all fields; stored in the file and worth logging with every result."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def select(self, items: Sequence, part: str) -> list:
        """The cases or volumes of a part, in their order.

        Raises:
            DataError: a subject of the part has no case among `items`.
        """
        if part not in PARTS:
            raise ValueError(f"part must be one of {PARTS}; got {part!r}")
        wanted = set(getattr(self, part))
        chosen = [i for i in items if (i if isinstance(i, Case) else i.case).subject in wanted]
        lost = wanted - {(i if isinstance(i, Case) else i.case).subject for i in chosen}
        if lost:
            raise DataError(
                f"split {self.name!r}: no case of {', '.join(sorted(lost))} ({part}) among the "
                f"{len(items)} given. Fix: use the data the split was made for, or make a new split"
            )
        return chosen

    def save(self, path: Path | str) -> Path:
        """Write as JSON with its sha256, atomically."""
        text = json.dumps({**asdict(self), "sha256": self.sha256}, indent=1) + "\n"
        return write_atomic(path, lambda stream: stream.write(text.encode()), what="split file")

    @classmethod
    def load(cls, path: Path | str) -> "Split":
        """Read a split file; refuses one that was changed by hand or by accident."""
        try:
            values = json.loads(Path(path).read_text())
            written = values.pop("sha256")
            split = cls(**values)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError.at(
                path,
                expected="a split file",
                found=f"{type(error).__name__}: {error}",
                fix="make it anew with make_split(...).save(path)",
            ) from error
        if split.sha256 != written:
            raise DataError.at(
                path,
                expected=f"contents with sha256 {written}",
                found=split.sha256,
                fix="the file was changed after it was written: restore it or make a new split",
            )
        return split


def _default_parts(cases: Sequence[Case], subjects: Sequence[str]):
    """(test, val) where the dataset has a usual protocol, else a fifth and a tenth."""
    dataset = cases[0].meta.get("dataset") if cases else None
    if dataset == "ssl4mis":
        lists = {case.subject: case.meta["split"] for case in cases}
        return (
            [s for s in subjects if lists[s] == "test"],
            [s for s in subjects if lists[s] == "val"],
        )
    if dataset == "acdc" and len(subjects) >= 100 and set(ACDC_TEST) <= set(subjects):
        return list(ACDC_TEST), []
    if dataset == "mmwhs":
        test = [s for s in subjects if 1011 <= int(s.rsplit("_", 1)[-1]) <= 1020]
        if len(test) == 10 and len(subjects) >= 20:
            return test, []
    if dataset == "msd" and len(subjects) >= 100:
        return 20, 5
    return max(1, round(len(subjects) / 5)), max(1, round(len(subjects) / 10))


def _take(wanted, free: list[str], what: str) -> list[str]:
    """Resolve a count or a list of subjects against the free ones, and remove them there."""
    if isinstance(wanted, Integral):
        if wanted < 0 or wanted >= len(free):
            raise DataError(
                f"make_split: {what}={wanted} leaves no training subject of {len(free)} labelled "
                f"ones. Fix: ask for fewer, or add subjects"
            )
        chosen = free[: int(wanted)]
    else:
        chosen = list(wanted)
        lost = sorted(set(chosen) - set(free))
        if lost:
            raise DataError(
                f"make_split: {what} names {', '.join(lost)}, which is no free subject with "
                "labels. Fix: check the names; a subject cannot be in two parts"
            )
    free[:] = [subject for subject in free if subject not in set(chosen)]
    return chosen


def make_split(
    cases: Iterable[Case],
    labeled_num: int | float,
    seed: int | None = 0,
    *,
    val: int | Sequence[str] | None = None,
    test: int | Sequence[str] | None = None,
    split_seed: int = 0,
    name: str | None = None,
) -> Split:
    """Split by subject.

    Args:
        cases: all cases; a subject with a case without label can only be in the unlabelled pool.
        labeled_num: labelled subjects (int), or a fraction of the pool (float in (0, 1]).
        seed: of the labelled draw; None takes the first subjects in the order of the cases, as
            SSL4MIS takes the first of its list.
        val, test: numbers of subjects or their names. None: the dataset's protocol (ACDC with all
            100 patients: the 20 test ids of Chaitanya et al., pool of 80; MM-WHS: 1011-1020;
            SSL4MIS: its lists; hippocampus: 20 and 5), else a fifth and a tenth.
        split_seed: of the choice of test and validation subjects, independent of `seed`.
    """
    cases = list(cases)
    if not cases:
        raise DataError("make_split: no case. Fix: check the folder given to find_cases")
    unlabelled = {case.subject for case in cases if case.label is None}
    subjects = subjects_of(cases)
    order = np.random.RandomState(split_seed).permutation(len(subjects))
    free = [subjects[i] for i in order if subjects[i] not in unlabelled]
    default_test, default_val = _default_parts(cases, [s for s in subjects if s in set(free)])
    named_first = [(test, default_test, "test"), (val, default_val, "val")]
    parts = {}
    # Names before counts, so that a count cannot take a subject that the other part names.
    for given, default, what in sorted(
        named_first, key=lambda row: isinstance(row[1] if row[0] is None else row[0], Integral)
    ):
        parts[what] = _take(default if given is None else given, free, what)
    labelled_pool = list(free)
    if seed is None:
        first_seen = list(dict.fromkeys(case.subject for case in cases))
        labelled_pool.sort(key=first_seen.index)
    else:
        draw = np.random.RandomState(100 + seed).permutation(len(free))
        labelled_pool = [free[i] for i in draw]
    count = labeled_num
    if isinstance(labeled_num, float):
        if not 0 < labeled_num <= 1:
            raise ValueError(f"labeled_num as a fraction must be in (0, 1]; got {labeled_num}")
        count = label_counts(len(labelled_pool), (labeled_num,))[0]
    if not 1 <= count <= len(labelled_pool):
        raise DataError(
            f"make_split: {count} labelled subjects asked for, the pool has {len(labelled_pool)} "
            f"with labels ({len(parts['val'])} validation and {len(parts['test'])} test subjects "
            "taken out). Fix: ask for 1 up to that number"
        )
    pool = sorted({*free, *unlabelled} - set(parts["val"]) - set(parts["test"]))
    dataset = cases[0].meta.get("dataset", "data")
    return Split(
        labeled=tuple(labelled_pool[:count]),
        unlabeled=tuple(pool),
        val=tuple(parts["val"]),
        test=tuple(parts["test"]),
        seed=seed,
        name=name or f"{dataset}-{count}of{len(pool)}-seed{seed}",
    )
