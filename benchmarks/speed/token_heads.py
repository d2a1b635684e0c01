"""Attention heads over volumes of 25,000 tokens: cases a minute, peak memory, and what lanes and folding save.

    python benchmarks/speed/token_heads.py [--tokens 25000] [--width 768] [--volumes 8 32] >> RESULTS

Each measurement is a process of its own, so that its peak memory is its own. It trains VoxelFM's one-query probe (hidden 1024),
3 seeds × 3 learning rates, for one epoch without validation, from `.b2nd` files.

Memory is compared from 8 volumes on, a full batch: of fewer, no piece is as large as `max_floats` allows.

    streamed     as the head does it: read from disk, all lanes over one reading
    in memory    the same, the fewer volumes read beforehand and held
    one by one   nine heads of one lane, one after the other, streamed, on the fewer volumes
    plain        the probe as torch layers (every token projected, nn.MultiheadAttention), one lane on one volume in memory;
                 its cases a minute are those of nine such, one after the other
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import print_lines
from torch import nn

from hilum.encode.table.patches import Patches, write_patches
from hilum.probe.heads.attention import QFormerHead
from hilum.probe.heads.lanes import fit_lanes
from hilum.probe.heads.task_loss import TaskLoss
from hilum.probe.heads.tokens import TokenFile, TokenSequence

SEEDS, RATES = 3, (1e-4, 3e-4, 1e-3)


def make_files(folder: Path, num: int, tokens: int, width: int) -> list[Path]:
    """Files of random tokens; four different ones, linked as often as wanted."""
    paths = []
    for n in range(num):
        path = folder / f"{n:04d}.b2nd"
        if n < 4:
            drawn = np.random.default_rng(n).normal(size=(25, tokens // 25, 1, width)).astype(np.float16)
            write_patches(path, Patches(drawn, (25, tokens // 25, 1), np.eye(4), None, (), {}))
        else:
            path.hardlink_to(folder / f"{n % 4:04d}.b2nd")
        paths.append(path)
    return paths


def train(X: TokenSequence, seeds: int, rates: tuple[float, ...], first: int = 0) -> None:
    y = np.arange(len(X)) % 2
    head = QFormerHead(seed=first, seeds=seeds, learning_rates=rates, epochs=1, batch_size=8)
    network = head._network(X.width, 2)
    settings = head._settings(X, X.width)
    target = TaskLoss("classification", y, np.arange(2), 0.0, 1.0)
    loss, score = target.loss, target.score
    if len(rates) > 1:
        # `stop` takes one learning rate; a validation of one case chooses among several.
        one = TaskLoss("classification", y[:1], np.arange(2), 0.0, 1.0)
        lanes = settings.lanes_at_once
        fit_lanes(network, head._data(X, lanes), head._data(X[:1], lanes), settings, loss=loss, score=one.score)
    else:
        fit_lanes(network, head._data(X, 1), None, settings, loss=loss, score=score, stop=1)


class Plain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.project, self.query = nn.Linear(width, 1024), nn.Parameter(torch.randn(1, 1, 1024))
        self.attention, self.last = nn.MultiheadAttention(1024, 4, dropout=0.1, batch_first=True), nn.Linear(1024, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.project(x), 0.5)
        return self.last(nn.functional.dropout(self.attention(self.query, x, x, need_weights=False)[0][:, 0], 0.5))


def plain(X: TokenSequence) -> None:
    cases = [torch.from_numpy(case.tokens).float()[None] for case in X]
    model = Plain(X.width)
    optim = torch.optim.AdamW(model.parameters(), RATES[0])
    for n, case in enumerate(cases):
        nn.functional.cross_entropy(model(case), torch.tensor([n % 2])).backward()
    optim.step()


def one(way: str, paths: list[Path]) -> dict[str, float]:
    """Cases a minute and peak memory of this process, beyond what it had before it began."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    X = TokenSequence([TokenFile(path=path) for path in paths])
    start = time.perf_counter()
    if way == "in memory":
        X = TokenSequence([X[n] for n in range(len(X))])
    if way == "plain":
        plain(X)
    elif way == "one by one":
        for seed in range(SEEDS):
            for rate in RATES:
                train(X, 1, (rate,), seed)
    else:
        train(X, SEEDS, RATES)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds *= SEEDS * len(RATES) if way == "plain" else 1
    return {"cases": 60 * len(X) / seconds, "MiB": (peak - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=25_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--volumes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen.one[0], [Path(p) for p in chosen.one[1:]])))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder), max(chosen.volumes), chosen.tokens, chosen.width)
        few = min(chosen.volumes)
        plan = [("streamed", n) for n in chosen.volumes] + [("in memory", few), ("one by one", few), ("plain", 1)]
        results = {}
        for way, num in plan:
            command = [sys.executable, __file__, "--one", way, *map(str, paths[:num])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            results[f"{way}, {num} volumes, cases/min"] = [found["cases"]]
            results[f"{way}, {num} volumes, peak MiB"] = [found["MiB"]]
    print_lines(results, tokens=chosen.tokens, width=chosen.width, lanes=SEEDS * len(RATES))


if __name__ == "__main__":
    main()
