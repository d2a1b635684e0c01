"""How fast patient-level intervals and paired tests of AUROCs are, beside loops over scikit-learn's roc_auc_score.

    python benchmarks/speed/patient_statistics.py [--patients 3000] [--models 18] [--replicates 10000] [--repeats 5] \\
        >> benchmarks/results/statistics_MACHINE_DATE.jsonl

One case a patient, half of them positive, continuous scores. The loops draw patients, take the rows and call roc_auc_score,
the usual way; they do a share of the replicates (100) and are scaled. They take turns with ours, so that a busy machine is
busy for all. Ours must end within 3 s and be at least 50 times as fast as the loop, for intervals and for the paired test.
"""

import argparse
import os
from collections.abc import Callable

import numpy as np
from measure import print_lines, take_turns
from sklearn.metrics import roc_auc_score

from hilum.metrics import auroc, c_index
from hilum.stats import bootstrap_many, delong_test, permutation_test

LOOP = 100
LIMIT_S, LIMIT_RATIO = 3.0, 50.0


def make_steps(patients: int, models: int, replicates: int) -> dict[str, tuple[Callable[[], object], float]]:
    rng = np.random.default_rng(0)
    y = np.arange(patients) % 2
    scores = y + rng.normal(size=patients) + rng.normal(size=(models, patients))
    times = np.stack([rng.exponential(size=patients), y], axis=1)
    clusters = np.arange(patients)

    def loop() -> None:
        for _ in range(LOOP):
            index = rng.integers(patients, size=patients)
            for score in scores:
                roc_auc_score(y[index], score[index])

    def paired_loop() -> None:
        for _ in range(LOOP):
            swap = rng.integers(2, size=patients) == 1
            roc_auc_score(y, np.where(swap, scores[1], scores[0]))
            roc_auc_score(y, np.where(swap, scores[0], scores[1]))

    ranked = np.round(scores[0], 1)
    fast = [(auroc, (y, score)) for score in scores]
    return {
        "replicates/s, AUROCs of all models": (
            lambda: bootstrap_many(fast, clusters=clusters, num_resamples=replicates),
            replicates,
        ),
        "replicates/s, AUROCs of all models, scikit-learn loop": (loop, LOOP),
        "permutations/s, paired test of two AUROCs": (
            lambda: permutation_test(
                auroc, (y, scores[0]), (y, scores[1]), clusters=clusters, num_permutations=replicates
            ),
            replicates,
        ),
        "permutations/s, paired test, scikit-learn loop": (paired_loop, LOOP),
        "replicates/s, one AUROC with ties": (
            lambda: bootstrap_many([(auroc, (y, ranked))], clusters=clusters, num_resamples=replicates),
            replicates,
        ),
        "replicates/s, one C-index, half censored": (
            lambda: bootstrap_many([(c_index, (times, scores[0]))], clusters=clusters, num_resamples=replicates),
            replicates,
        ),
        "DeLong tests/s": (lambda: delong_test(y, scores[0], scores[1]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=3000)
    parser.add_argument("--models", type=int, default=18)
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    load = os.getloadavg()[0]  # above 0: others shared the cores
    results = take_turns(make_steps(given.patients, given.models, given.replicates), given.repeats)
    names = list(results)
    seconds = [given.replicates / rate for rate in results[names[0]]]
    results[f"seconds for {given.replicates} replicates of {given.models} AUROCs (limit {LIMIT_S:g})"] = seconds
    for what, ours, plain in (("intervals", names[0], names[1]), ("paired test", names[2], names[3])):
        ratios = [a / b for a, b in zip(results[ours], results[plain])]
        results[f"{what}: times as fast as the loop (at least {LIMIT_RATIO:g})"] = ratios
    print_lines(
        results,
        num_patients=given.patients,
        num_models=given.models,
        num_replicates=given.replicates,
        load_before=round(load, 2),
    )


if __name__ == "__main__":
    main()
