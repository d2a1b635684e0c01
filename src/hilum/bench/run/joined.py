"""Several encoders as one: their vectors of a case side by side, from the features that each has on disk.

    hilum bench run … --model flat=F --model deep=D --model both=flat+deep

Says whether two encoders know different things. Heads on vectors only: patch tokens of two encoders lie on two grids.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hilum.bench.run.features import CaseFeatures, FeatureCache, Vector
from hilum.bench.task import Case, Task
from hilum.encode.encoder import Encoder
from hilum.errors import UsageError
from hilum.records import hash_json
from hilum.terminal import Progress, few

BESIDE = "|"  # between the features of the parts, where they differ: "class|mean"


@dataclass(frozen=True, kw_only=True)
class JoinedContract:
    """What results.json says of a joined model. `joined`: label → contract hash of each part."""

    joined: dict[str, str]
    pooling: str

    @property
    def hash(self) -> str:
        return hash_json([self.joined, self.pooling])


@dataclass(frozen=True)
class JoinedEncoder:
    """The facts of several encoders under one name, as `Encoder` has them of one."""

    name: str
    parts: tuple[Encoder, ...]

    @property
    def contract(self) -> JoinedContract:
        pooled = list(dict.fromkeys(part.contract.pooling for part in self.parts))
        pooling = pooled[0] if len(pooled) == 1 else BESIDE.join(part.contract.pooling for part in self.parts)
        return JoinedContract(joined={part.name: part.contract.hash for part in self.parts}, pooling=pooling)

    @property
    def weights_hash(self) -> str:
        return hash_json([part.weights_hash for part in self.parts])

    @property
    def precision(self) -> str:
        return "+".join(dict.fromkeys(part.precision for part in self.parts))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device


@dataclass(frozen=True, kw_only=True)
class JoinedFeatures:
    """Features of the same cases by several encoders, with what heads and the runner ask of `CaseFeatures`.

    learnt  of each case, whether the common scale of its part is taken from it: the cases of training, else all
    """

    parts: tuple[CaseFeatures, ...]
    learnt: list[bool]

    @property
    def keys(self) -> list[str]:
        """What was encoded of each case, by all."""
        return [hash_json(keys) for keys in zip(*(part.keys for part in self.parts))]

    @property
    def reasons(self) -> list[str]:
        """A case that one of the encoders refuses has no features."""
        return [next((reason for reason in found if reason), "") for found in zip(*(p.reasons for p in self.parts))]

    def vectors(self, pooling: str) -> Vector:
        """(N, D) the parts one after the other, each multiplied by one number, so that all are equally long (root mean
        square over the cases of training) and a channel has size 1 on average: k-NN, retrieval and heads that do not scale
        columns see each part alike. Heads that scale columns see no difference.

        pooling  as `CaseFeatures.vectors`, for all parts or for each with BESIDE between
        """
        each = pooling.split(BESIDE) if BESIDE in pooling else [pooling] * len(self.parts)
        found = [part.vectors(one) for part, one in zip(self.parts, each, strict=True)]
        rows, width = np.flatnonzero(self.learnt), sum(x.shape[1] for x in found)
        lengths = [np.sqrt((x[rows].astype(np.float64) ** 2).sum(1).mean()) for x in found]
        wanted = np.sqrt(width / len(found))
        joined: Vector = np.hstack([x * np.float32(wanted / max(n, 1e-12)) for x, n in zip(found, lengths)])
        return joined

    def sequence(self) -> Any:
        raise UsageError("a joined model has no patch tokens; expected a head on vectors")

    def take(self, numbers: Iterable[int]) -> "JoinedFeatures":
        chosen = list(numbers)
        some = [self.learnt[n] for n in chosen]
        parts = tuple(part.take(chosen) for part in self.parts)
        return replace(self, parts=parts, learnt=some if any(some) else [True] * len(chosen))


@dataclass(frozen=True)
class JoinedCache:
    """The caches of several encoders as one."""

    encoder: JoinedEncoder
    caches: tuple[FeatureCache, ...]

    def features(
        self, task: Task, cases: Sequence[Case], *, tokens: bool = False, progress: Progress | None = None
    ) -> JoinedFeatures:
        """As `FeatureCache.features`, of all; what a part has on disk is not encoded again."""
        if tokens:
            raise UsageError(f"{self.encoder.name} joins several encoders and has no patch tokens")
        parts = tuple(cache.features(task, cases, progress=progress) for cache in self.caches)
        learnt = [case.split == "train" for case in cases]
        return JoinedFeatures(parts=parts, learnt=learnt if any(learnt) else [True] * len(cases))


def join_models(label: str, source: str, known: Mapping[str, FeatureCache]) -> JoinedCache | None:
    """ "flat+deep" → the models of these labels as one; None where no part is a label, so that it names an encoder.

    known  the models of this run, by label
    UsageError when only some are.
    """
    names = source.split("+")
    there = [name for name in names if name in known]
    if len(names) < 2 or not there:
        return None
    if missing := [name for name in names if name not in known]:
        raise UsageError(
            f"{label or source} joins models of this run, and {few(missing)} is none of them; give it by --model LABEL=MODEL, "
            f"too. There are: {few(list(known))}"
        )
    if len(set(names)) < len(names):
        raise UsageError(f"{label or source} joins a model with itself; expected different ones")
    caches = tuple(known[name] for name in names)
    return JoinedCache(JoinedEncoder(label or source, tuple(cache.encoder for cache in caches)), caches)
