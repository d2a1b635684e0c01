"""`hilum models`, `info`, `pull`, `doctor` and `export`: which encoders there are, what they expect, whether they are whole."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hilum.errors import EXIT_INPUT_REFUSED, UsageError
from hilum.terminal import print_result

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a name of hilum models, or OWNER/NAME.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit; the table's by default.")]
WIDTH = 100


def models(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option(help="Print the tables of docs/models.md.")] = False,
) -> None:
    """Released encoders that hilum reads: size, licence, gate, and which are on this machine."""
    from hilum.encode.released.models import MODELS, is_pulled, model_folder, models_markdown, record_of
    from hilum.terminal import format_table

    if markdown:
        print(models_markdown())
        return
    here = {name: is_pulled(model_folder(name)) for name in MODELS}
    rows = [
        [
            m.name,
            f"{m.dimension}D",
            f"{m.num_parameters / 1e6:,.0f} M",
            m.trained_on,
            m.weights_licence,
            "on request" if m.gated else "open",
            "yes" if here[m.name] else "no",
        ]
        for m in MODELS.values()
    ]
    columns = ["model", "dim", "size", "trained on", "licence of weights", "weights", "here"]
    told = "hilum info MODEL says what a model expects, hilum pull MODEL fetches it."
    record = {"models": [{**record_of(m), "pulled": here[m.name]} for m in MODELS.values()]}
    print_result(record, as_json, f"{format_table(columns, rows, WIDTH)}\n\n{told}")


def info(model: Model, revision: Revision = None, as_json: Json = False) -> None:
    """What a model is, whose it is, what it expects of its input, and how its weights were loaded."""
    from hilum.encode.released.models import find_released, is_pulled, model_folder, record_of

    released = None if Path(model).is_dir() else find_released(model)
    if released is not None and not is_pulled(model_folder(model, revision)):
        from hilum.encode.describe import in_words
        from hilum.settings import hash_json

        record = {**record_of(released), "pulled": False, "contract_hash": hash_json(released.contract)}
        words = in_words(released.contract)
    else:
        record, words = _loaded(model, revision)
    print_result({**record, "contract_in_words": words}, as_json, _info_text(model, record, words))


def _loaded(model: str, revision: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A model that is on this machine: its weights are read, so that their coverage can be told."""
    from hilum.encode.describe import in_words
    from hilum.encode.released.models import find_released, record_of
    from hilum.encode.released.pull import read_pull
    from hilum.encode.zoo import locate, open_folder
    from hilum.settings import to_dict

    folder = locate(model, revision)
    encoder, pulled = open_folder(folder), read_pull(folder)
    released = find_released(str(pulled.get("repo")))
    record = record_of(released) if released is not None else {}
    contract = to_dict(encoder.contract)
    record |= {
        "encoder": encoder.name,
        "folder": str(folder),
        "pulled": bool(pulled),
        "revision": pulled.get("revision"),
        "model": to_dict(encoder.network.config),
        "num_parameters": sum(p.numel() for p in encoder.network.parameters()),
        "contract": contract,
        "contract_hash": encoder.contract.hash,
        "coverage": encoder.report,
    }
    return record, in_words(contract)


def _info_text(model: str, r: dict[str, Any], words: Sequence[str]) -> str:
    licence = (
        [f"{r['weights_licence']}; {'on request at ' + r['page'] if r['gated'] else 'open'}"] if "page" in r else []
    )
    state = [r["folder"]] if "folder" in r else [f"no; fetch it with hilum pull {model}"]
    sections = {
        "model": [r.get("encoder", r.get("name", model)), f"{r['num_parameters'] / 1e6:,.1f} M parameters"],
        "trained on": [r["trained_on"]] if "trained_on" in r else [],
        "weights": licence,
        "code": [r["code_licence"]] if "code_licence" in r else [],
        "from": [f"{r['page']} at {r['revision']}"] if "page" in r else [],
        "paper": [r["paper"]] if "paper" in r else [],
        "here": state,
        "notes": [r[name] for name in ("notes",) if r.get(name)],
        "not verified": [r["unverified"]] if r.get("unverified") else [],
        "coverage": _coverage_words(r["coverage"]) if "coverage" in r else [],
        "intensities": [r["windows_from"]] if "windows_from" in r else [],
        f"contract {r['contract_hash']}": words,
    }
    lines = []
    for title, parts in sections.items():
        if title.startswith("contract "):
            lines += [
                "",
                title,
                *(textwrap.fill(w, WIDTH, initial_indent="  ", subsequent_indent="    ") for w in parts),
            ]
        elif parts:
            text = textwrap.fill("; ".join(parts), WIDTH - 14, break_long_words=False, break_on_hyphens=False)
            lines.append(textwrap.indent(text, " " * 14).replace(" " * 14, title.ljust(14), 1))
    return "\n".join(lines)


def _coverage_words(report: dict[str, Any]) -> list[str]:
    """What became of every tensor of the file."""
    from hilum.terminal import few

    if not report:
        return ["drawn, not loaded"]
    words = [
        f"{report['layout']}, hash {report['hash']}",
        f"{report['used']} of {report['num_tensors']} tensors as they are",
    ]
    words += [f"{how}: {count}" for how, count in report["transformed"].items()]
    words += [f"not in the file: {few(report['created'])}"] if report["created"] else []
    words += [f"all zero, as if never trained: {few(report['zeros'])}"] if report["zeros"] else []
    return words


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name of hilum models, or OWNER/NAME of the hub.")],
    revision: Revision = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to make; $HILUM_HOME else.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a model into one folder with hashes; then no network is needed. Needs HF_TOKEN for those on request."""
    from hilum.encode.released.models import find_released
    from hilum.encode.released.pull import pull as run
    from hilum.terminal import Reporter

    if Path(model).is_dir():
        raise UsageError(f"'{model}' is a folder already; hilum info {model} says what is in it")
    released = find_released(model)
    if released is not None and not (quiet or as_json):
        print(
            f"{released.name}: {released.weights_licence}, {'on request at' if released.gated else 'open,'} {released.page}"
        )
    with Reporter(quiet) as progress:
        record = run(model, revision, out, progress)
    size = sum(file["size"] for file in record["files"].values())
    done = "fetched" if record["fetched"] else "was here, every hash is right"
    text = f"{record['folder']}: {len(record['files'])} files, {size / 1e6:,.1f} MB, commit {record['revision'][:12]}, {done}"
    print_result(record, as_json, text)


def doctor(
    model: Model,
    revision: Revision = None,
    write: Annotated[bool, typer.Option("--write", help="Trust it: store its features beside the weights.")] = False,
    scan: Annotated[
        Path | None, typer.Option(help="Only say how VoxelFM's own loader would show this CT, and what that changes.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Is a model still the function it was? Files, coverage, contract, and features of a phantom against stored ones."""
    if scan is not None:
        from hilum.encode.released.voxelfm_upstream import compare_upstream
        from hilum.encode.zoo import load_encoder

        found = compare_upstream(scan, load_encoder(model, revision=revision, device=device))
        print_result(found, as_json, _upstream_text(found))
        return
    from hilum.encode.released.doctor import check_model
    from hilum.terminal import Reporter, wrap_row

    with Reporter(quiet) as progress:
        told = check_model(model, revision=revision, device=device, write=write, progress=progress)
    names = max(len(what) for what, _, _ in told["checks"])
    lines = [
        told["model"],
        *(wrap_row([what, result], [names, 5], detail, WIDTH) for what, result, detail in told["checks"]),
    ]
    if told["images_per_s"] is not None:
        lines.append(f"{told['images_per_s']:,} slices a second on {told['device']}, one at a time")
    lines.append(f"{told['faults']} faults" if told["faults"] else "no faults")
    print_result(told, as_json, "\n".join(lines))
    if told["faults"]:
        raise typer.Exit(EXIT_INPUT_REFUSED)


def _upstream_text(found: dict[str, Any]) -> str:
    """Ours and VoxelFM's own way side by side, a line for each thing that is known of both."""
    from hilum.terminal import format_table

    ours, theirs = found["corrected"], found["upstream"]
    if "refused" in theirs:
        return f"VoxelFM's own loader refuses this scan: {theirs['refused']}"
    rows = [[name, str(ours.get(name, "")), str(theirs[name])] for name in theirs if name != "notes"]
    lines = [format_table(["", "hilum", "VoxelFM's loader"], rows, WIDTH)]
    if "voxels" in found:
        v = found["voxels"]
        lines.append(
            f"{v['share']:.2%} of the voxels differ, by up to {v['largest_hu']:.0f} HU, {v['mean_hu']:.2f} in the mean"
        )
    lines.append(
        f"cosine of the class tokens {found['cosine']['class']:.6f}, of the mean patch tokens {found['cosine']['mean']:.6f}"
    )
    return "\n".join(lines)


def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
    to: Annotated[
        str, typer.Option(help="hf (as transformers saves it), onnx, torch-export; volumes: voxelfm.")
    ] = "hf",
    as_json: Json = False,
) -> None:
    """Write an encoder in a form that others load, compared with the original on a phantom before it counts as written."""
    from hilum.encode.released.export import export as run

    told = run(model, out, to)
    apart = f"tokens differ by {told['max_difference']:.1e}, allowed are {told['tolerance']:.0e}"
    text = f"{out}: {', '.join(told['files'])}; loaded with {told['checked_with']}, {apart}"
    print_result(told, as_json, text)
