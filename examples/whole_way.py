"""The whole way with Python calls, small enough for a minute: python examples/whole_way.py FOLDER"""

import sys
from pathlib import Path

from hilum import api
from hilum.pretrain.presets import load_recipe
from hilum.settings import override

out = Path(sys.argv[1] if len(sys.argv) > 1 else "whole_way")


def main() -> None:
    api.phantom(out / "phantom", num_patients=10, num_slices=16, matrix=64)
    api.prepare(out / "phantom" / "scans", out / "store")

    recipe = override(load_recipe("tiny"), ["run.steps=5", "run.batch_size=8", "model.size=nano"])
    api.pretrain(recipe, out / "store", out / "run")

    api.embed(
        out / "phantom" / "scans",
        model=str(out / "run" / "export"),
        out=out / "organs.parquet",
        level="region",
        masks=out / "phantom" / "series.csv",
    )
    result = api.probe(out / "organs.parquet", None, target="region")
    for row in result.table():
        print(f"{row['metric']}: {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})")


if __name__ == "__main__":  # phantom and prepare start worker processes
    main()
