"""The part of the benchmark's page that says how the numbers were made, and what they mean."""

from typing import Any

from hilum.bench.catalogue.tasks import DATASETS
from hilum.bench.report.results import Results
from hilum.pages import Page

INTERVALS = (
    "A 95 % interval comes from drawing patients again, with replacement, from the patients of the test set (bias-corrected, "
    "and wider for few patients, by Student's t): it says how much the number depends on who happened to be tested. It does "
    "not hold what another training set, another hospital or another label rule would change. The spread over head seeds and "
    "draws of training cases is given apart (seed SD, draw SD)."
)


def add_how(page: Page, results: Results) -> None:
    record = results.record
    page.section("How it was done", INTERVALS)
    _add_tasks(page, results)
    page.text("Models:")
    models = [
        [name, f"`{m['weights'][:16]}`", f"`{m['contract']}`", m["precision"], "random" if m["random"] else "trained"]
        for name, m in record["models"].items()
    ]
    page.table(["model", "weights", "contract", "precision", "weights are"], models)
    if record.get("left_out"):
        page.text("Left out:")
        rows = [[row["task"], row["model"], f"{row['cases']:,}", row["reason"]] for row in record["left_out"]]
        page.table(["task", "model", "cases", "why"], rows)
    page.text("Settings and versions:")
    facts = {**record["settings"], **record["machine"], **record["versions"]}
    page.table(["", ""], [[name.replace("_", " "), _plain(value)] for name, value in facts.items()])
    page.note("Cases and patients are keyed hashes; only the holder of the key can tell who they are.")


def _add_tasks(page: Page, results: Results) -> None:
    rows, rules = [], []
    for name, task in results.tasks.items():
        about = results.record["tasks"][name]
        cases = about["num_cases"]
        licence = DATASETS[task.dataset].licence if task.dataset in DATASETS else ""
        split = " / ".join(f"{cases.get(part, 0):,}" for part in ("train", "val", "test"))
        rows.append(
            [
                name,
                split,
                f"{about['num_patients']:,}",
                f"{about['num_missing']:,}",
                f"`{about['split_hash']}`",
                licence,
            ]
        )
        ours = f" Our choice, since the source leaves it open: {task.our_choice}." if task.our_choice else ""
        rules.append([name, f"{task.label_rule}.{ours}", task.split_rule])
    page.table(["task", "train / val / test", "patients", "missing", "split", "licence of the data"], rows)
    page.table(["task", "label", "split"], rules)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
