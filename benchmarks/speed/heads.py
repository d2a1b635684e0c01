"""45 linear heads, 5 seeds × 9 learning rates: `StackedLinear` against a plain torch loop that trains one after another.

    python benchmarks/speed/heads.py [--cases 20000] [--width 768] [--classes 104] [--epochs 20] [--plain 3]

Both see the same standardised features, first weights, order of cases and learning rates. The plain loop trains `--plain`
heads whole, which is timed and multiplied to 45; their accuracy on new cases and validation loss stand beside ours.
"""

import argparse
import time

import numpy as np
import torch
from measure import print_lines
from torch.nn import functional

from hilum.probe.heads.descent import Descent, draw
from hilum.probe.heads.stacked import PROTOCOLS, StackedLinear


def make_cases(num: int, width: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes in a quarter of the directions; features of falling variance, as encoders give them."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(7)
    centres = np.concatenate([fixed.normal(size=(classes, width // 4)), np.zeros((classes, width - width // 4))], 1)
    y = rng.integers(0, classes, num)
    X = (0.32 * centres[y] + rng.normal(size=(num, width))) * np.geomspace(3, 0.1, width)
    return X.astype(np.float32), y


def train_plain(X: torch.Tensor, y: torch.Tensor, seed: int, rate: float, descent: Descent) -> torch.nn.Linear:
    """One head, batch after batch, as everybody writes it."""
    weights, orders = draw(seed, X.shape[1], int(y.max()) + 1, len(X), descent.epochs)
    head = torch.nn.Linear(*weights.shape)
    with torch.no_grad():
        head.weight.copy_(weights.T)
        head.bias.zero_()
    optimiser = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    steps = descent.steps_an_epoch(len(X)) * descent.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps)
    for order in orders:
        for rows in order.split(descent.batch_size):
            optimiser.zero_grad()
            functional.cross_entropy(head(X[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("cases", 20_000), ("width", 768), ("classes", 104), ("epochs", 20), ("plain", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    X, y = make_cases(given.cases, given.width, given.classes, 0)
    X_val, y_val = make_cases(given.cases // 5, given.width, given.classes, 1)
    X_test, y_test = make_cases(given.cases // 5, given.width, given.classes, 2)
    head = StackedLinear(epochs=given.epochs)
    start = time.perf_counter()
    head.fit(X, y, validation=(X_val, y_val))
    stacked = time.perf_counter() - start
    rates = PROTOCOLS["hilum"].rates
    descent = Descent(rates=rates, epochs=given.epochs, batch_size=head.batch_size)
    scale = X.std(0) * given.width**0.5
    rows, val, test = (torch.from_numpy((part - X.mean(0)) / scale) for part in (X, X_val, X_test))
    plain, facts = [], []
    chosen = rates.index(head.learning_rate_)
    for n in range(given.plain):
        seed, rate = n % head.seeds, (chosen if n < 2 else (chosen + n) % len(rates))
        start = time.perf_counter()
        other = train_plain(rows, torch.from_numpy(y), seed, rates[rate], descent)
        plain.append(time.perf_counter() - start)
        with torch.no_grad():
            loss = float(functional.cross_entropy(other(val), torch.from_numpy(y_val)))
            said = other(test).argmax(1).numpy()
        assert head.validation_loss_ is not None
        fact = {
            "seed": seed,
            "rate": rates[rate],
            "loss": (round(loss, 4), round(head.validation_loss_[seed, rate], 4)),
        }
        if rate == chosen:
            ours = head.outputs(X_test)[seed].argmax(1)
            fact |= {"accuracy": (round((said == y_test).mean(), 4), round((ours == y_test).mean(), 4))}
            fact |= {"same answer": round((said == ours).mean(), 4)}
        facts.append(fact)
    whole = len(rates) * head.seeds * float(np.median(plain))
    threads = torch.get_num_threads()
    results = {"stacked seconds": [stacked], "plain seconds, scaled to all heads": [whole], "ratio": [whole / stacked]}
    print_lines(results, heads=len(rates) * head.seeds, plain_heads_timed=given.plain, threads=threads,
                plain_and_ours=facts, **{n: getattr(given, n) for n in ("cases", "width", "classes", "epochs")})  # fmt: skip


if __name__ == "__main__":
    main()
