"""`hilum bench audit`: is anything of the test cases known from elsewhere, and do features and labels say anything at all?

Looked for: the same patient on two sides of a split or in the pre-training store; the same pixels; slices and scans that
look like copies of another patient's (`hilum.bench.audit.fingerprints`, `hilum.archive.judge.duplicates`); features that are
constant; labels that nothing in the features tells from shuffled ones. Slices of one scan, and of one patient on one side,
resemble each other and are no findings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hilum.archive.judge.duplicates import near_duplicates
from hilum.bench.audit.fingerprints import ALIKE, CANDIDATES, Rows, likeness, nearest, unit
from hilum.bench.audit.images import STORE, Images, Scan, Slice
from hilum.bench.audit.vectors import find_copies
from hilum.errors import UsageError
from hilum.terminal import Progress

BLOCK = 256  # pairs compared, or rows of a product, at once
MOST_EXAMPLES = 5
STANDS_OUT = 0.25  # a copy is at least four times nearer to 1 than the likeness of two patients
PERMUTATIONS = 999
NEIGHBOURS = 5

Kind = Literal[
    "patient", "same pixels", "same scan", "looks alike", "scan looks alike", "alike features", "features", "labels"
]

ADVICE = {
    "patient": "put all cases of a patient on one side, or leave these out of pre-training",
    "same pixels": "keep one of each, on the side of its patient",
    "same scan": "keep one of each, or leave these out of pre-training",
    "looks alike": "look at these pairs: a copy under another name, or one person under two; keep both on one side",
    "scan looks alike": "look at these pairs (64 bits of a volume agree now and then by chance)",
    "alike features": "look at these pairs: the encoder finds them more alike than two patients of the first side",
    "features": "look at how images reach the encoder: window, unit, orientation, an empty region",
    "labels": "check how labels were joined to cases; or this encoder sees nothing of the question",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    where     "train / test", "store / test", …
    affected  test cases (of a pair of other sides: of the second), or columns of features
    examples  pairs of keyed hashes
    leak      whether test scores may profit from it
    """

    task: str
    kind: Kind
    where: str
    affected: int
    of: int
    examples: tuple[str, ...] = ()
    leak: bool = True

    @property
    def advice(self) -> str:
        return ADVICE[self.kind]


def find_leaks(
    images: Images, task: str, store: Images | None = None, progress: Progress | None = None
) -> list[Finding]:
    """Everything that two sides of a task share, and a store with each of them."""
    sides = [side for side in ("train", "val", "test") if any(s.side == side for s in images.scans)]
    pairs = [(images, first, second) for first, second in combinations(sides, 2)]
    if store is not None and store.scans:
        pairs = [(store, STORE, second) for second in sides] + pairs
    found: list[Finding] = []
    for there, first, second in pairs:
        shared: dict[Kind, dict[str, str]] = {
            "patient": _shared(there.scans, images.scans, first, second, "patient"),
            "same scan": _shared(there.scans, images.scans, first, second, "content"),
            "same pixels": _shared(there.slices, images.slices, first, second, "content"),
            "looks alike": _alike_slices(there, images, first, second, progress),
            "scan looks alike": _alike_scans(there.scans, images.scans, first, second),
        }
        cases: list[Slice | Scan] = [*images.scans, *images.slices]
        of = len({one.owner for one in cases if one.side == second})
        told: set[str] = set()
        for kind, owners in shared.items():
            if kind != "patient":  # what is the same also looks the same: each case is told once
                owners = {owner: other for owner, other in owners.items() if owner not in told}
                told |= set(owners)
            if owners:
                examples = tuple(f"{a} ({first}) = {b} ({second})" for b, a in sorted(owners.items())[:MOST_EXAMPLES])
                found.append(
                    Finding(
                        task=task, kind=kind, where=f"{first} / {second}", affected=len(owners), of=of, examples=examples,
                        leak=kind != "scan looks alike",
                    )
                )  # fmt: skip
    return found


def _shared(
    there: Sequence[Slice] | Sequence[Scan], here: Sequence[Slice] | Sequence[Scan], first: str, second: str, name: str
) -> dict[str, str]:
    """Owners on the second side whose patient or content is on the first, with an owner there."""
    known = {getattr(r, name): r.owner for r in there if r.side == first and getattr(r, name)}
    return {r.owner: known[getattr(r, name)] for r in here if r.side == second and getattr(r, name) in known}


def _alike_scans(there: Sequence[Scan], here: Sequence[Scan], first: str, second: str) -> dict[str, str]:
    """Scans of other patients with nearly the same look hash."""
    chosen = [s for s in there if s.side == first and s.look_hash] + [
        s for s in here if s.side == second and s.look_hash
    ]
    names = [f"{n:09d}" for n in range(len(chosen))]
    try:
        near = near_duplicates(names, [s.patient for s in chosen], np.array([s.look_hash for s in chosen], np.uint64))
    except UsageError:  # so many look alike that the hash says nothing about these scans
        return {}
    found = {}
    for pair in near.across_patients:
        one, two = chosen[int(pair.first)], chosen[int(pair.second)]
        if one.side != two.side and one.modality == two.modality:
            found[two.owner] = one.owner
    return found


def _alike_slices(there: Images, here: Images, first: str, second: str, progress: Progress | None) -> dict[str, str]:
    """Owners on the second side with a slice that looks like one of another patient on the first."""
    found: dict[str, str] = {}
    for modality in sorted({s.modality for s in here.slices}):
        offered, asked = there.select(first, modality), here.select(second, modality)
        if not len(offered) or not len(asked):
            continue
        pairs, likenesses = [], []
        for rows, near, _ in nearest(here.waves, asked, there.waves, offered, CANDIDATES):
            pairs.append(np.stack([near, np.repeat(rows[:, None], near.shape[1], 1)], -1))
            likenesses.append(_likenesses(there, here, pairs[-1]))
            if progress:
                progress(sum(map(len, pairs)), len(asked), f"comparing {second} with {first}")
        like = np.concatenate(likenesses)
        for a, b in np.concatenate(pairs)[like >= _copy_from(like)]:
            one, two = there.slices[a], here.slices[b]
            if one.scan != two.scan and not (one.patient and one.patient == two.patient):  # told elsewhere
                found.setdefault(two.owner, one.owner)
    return found


def _copy_from(like: NDArray[np.float32]) -> float:
    """The likeness from which slices count as copies: ALIKE, or more where all slices of a data set look alike.

    like   (N, CANDIDATES) of each slice with its nearest ones. Where one is a copy, the second tells how alike two patients
           are: in the median below 0.5 on three real sets, 0.8 among simple synthetic bodies
    """
    if like.shape[1] < 2:
        return ALIKE
    return max(ALIKE, 1 - STANDS_OUT * (1 - float(np.median(np.sort(like, 1)[:, -2]))))


def _likenesses(there: Images, here: Images, pairs: Rows) -> NDArray[np.float32]:
    """(N, K) likeness of pairs (N, K, 2) of rows."""
    flat = pairs.reshape(-1, 2)
    looks = there.looks, here.looks
    blocks = [flat[n : n + BLOCK] for n in range(0, len(flat), BLOCK)]
    return np.concatenate([likeness(looks[0][b[:, 0]], looks[1][b[:, 1]]) for b in blocks]).reshape(pairs.shape[:2])


def check_copies(
    task: str, vectors: NDArray[np.float32], sides: Sequence[str], owners: Sequence[str], patients: Sequence[str]
) -> list[Finding]:
    """Cases of two sides that an encoder finds more alike than two patients (`hilum.bench.audit.vectors`). No verdict: about
    one in a hundred cases that are no copies is named, too.

    vectors                  (N, D) of all cases
    sides, owners, patients  (N,) train, val or test; keyed hashes of case and patient
    """
    found = []
    rows = {name: [n for n, side in enumerate(sides) if side == name] for name in ("train", "val", "test")}
    for first, second in combinations(rows, 2):
        a, b = rows[first], rows[second]
        copies = find_copies(vectors[a], [patients[n] for n in a], vectors[b], [patients[n] for n in b])
        copies.sort(key=lambda copy: -copy[2])
        if copies:
            pairs = [
                f"{owners[a[one]]} ({first}) ~ {owners[b[two]]} ({second})" for one, two, _ in copies[:MOST_EXAMPLES]
            ]
            found.append(
                Finding(task=task, kind="alike features", where=f"{first} / {second}", affected=len(copies), of=len(b),
                        examples=tuple(pairs), leak=False)
            )  # fmt: skip
    return found


def check_features(task: str, vectors: NDArray[np.float32]) -> list[Finding]:
    """Features that are the same for all cases, or not finite."""
    if len(vectors) < 2:
        return []
    finite = np.isfinite(vectors).all(0)
    constant = np.ptp(np.where(np.isfinite(vectors), vectors, 0), axis=0) == 0
    bad = int(np.count_nonzero(constant | ~finite))
    if not bad:
        return []
    where = "all cases have one vector" if bad == vectors.shape[1] else "the same number, or none, for all cases"
    return [Finding(task=task, kind="features", where=where, affected=bad, of=vectors.shape[1], leak=False)]


def check_labels(
    task: str,
    kind: str,
    vectors: NDArray[np.float32],
    targets: NDArray[np.float64],
    patients: Sequence[str],
    *,
    seed: int = 0,
) -> list[Finding]:
    """Whether the nearest cases of other patients agree in their labels more often than after shuffling.

    vectors   (N, D) of training cases
    targets   (N, T) as `Case.target`: only the first column of survival and retrieval, all of others
    patients  (N,)

    A permutation test of the agreement with NEIGHBOURS neighbours by cosine. Labels are shuffled among patients where every
    patient has one, else among cases. It cannot tell shuffled labels from an encoder that is blind to them.
    """
    values = targets[:, :1] if kind in ("survival", "retrieval") else targets
    near = _neighbours(vectors, patients)
    if near is None:
        return []
    rng = np.random.default_rng(seed)
    names, who = np.unique(np.asarray(patients), return_inverse=True)
    firsts = values[np.unique(who, return_index=True)[1]]
    whole = np.array_equal(firsts[who], values, equal_nan=True)
    classes = kind in ("classification", "retrieval")
    true = _agreement(values, near, classes)
    drawn = []
    for _ in range(PERMUTATIONS):
        shuffled = firsts[rng.permutation(len(firsts))][who] if whole else values[rng.permutation(len(values))]
        drawn.append(_agreement(shuffled, near, classes))
    p_value = (1 + sum(d >= true for d in drawn)) / (PERMUTATIONS + 1)
    if p_value <= 0.05:
        return []
    where = f"neighbours agree no more than after shuffling (p = {p_value:.2f}, {len(names):,} patients)"
    return [Finding(task=task, kind="labels", where=where, affected=len(values), of=len(values), leak=False)]


def _neighbours(vectors: NDArray[np.float32], patients: Sequence[str]) -> Rows | None:
    """(N, NEIGHBOURS) nearest cases of other patients; None with too few patients."""
    _, who = np.unique(np.asarray(patients), return_inverse=True)
    if who.max() < NEIGHBOURS:
        return None
    centred = unit(np.nan_to_num(vectors - vectors.mean(0)))
    near = np.empty((len(centred), NEIGHBOURS), np.intp)
    for start in range(0, len(centred), BLOCK):
        at = np.arange(start, min(start + BLOCK, len(centred)))
        product = centred[at] @ centred.T
        product[who[at][:, None] == who[None, :]] = -np.inf
        near[at] = np.argpartition(-product, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
    return near


def _agreement(values: NDArray[np.float64], near: Rows, classes: bool) -> float:
    """Share of neighbours with the same class; of numbers, minus their mean squared difference. Unknown ones are left out."""
    theirs = values[near]
    if classes:
        return float(np.mean(theirs == values[:, None]))
    return -float(np.nanmean((theirs - values[:, None]) ** 2))
