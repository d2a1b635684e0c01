"""Commands: exit codes, messages and JSON. What they compute is tested where it is computed."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hilum import cli
from hilum.errors import (
    CheckpointError,
    ContractError,
    DiskFull,
    GeometryError,
    HilumError,
    InputError,
    Interrupted,
    LabelsError,
    ScanRefused,
    StoreError,
    TrainingDiverged,
    UsageError,
)
from hilum.pretrain.presets import RECIPES

# ---- every way to end


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("u"), 2),
        (InputError("i"), 3),
        (ScanRefused("gap", "6 mm"), 3),
        (GeometryError("g"), 3),
        (StoreError("s"), 3),
        (CheckpointError("c"), 3),
        (ContractError("c"), 3),
        (LabelsError("l"), 3),
        (TrainingDiverged("t"), 3),
        (DiskFull("d"), 3),
        (Interrupted("stopped", 143), 143),
    ],
)
def test_errors_of_ours_end_with_one_line_and_their_code(hilum, monkeypatch, error, code):
    assert isinstance(error, HilumError)

    def app() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    found, out, err = hilum()
    assert found == code
    assert out == ""
    assert err == f"hilum: {error}\n"


def test_a_bug_of_ours_shows_its_trace(hilum, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: 1 / 0)
    code, _, err = hilum()
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "this is a bug of ours" in err


def test_ctrl_c_memory_and_a_closed_pipe(hilum, monkeypatch):
    for error, code, message in (
        (KeyboardInterrupt(), 130, "Run the same command again"),
        (SystemExit(130), 130, "Run the same command again"),  # as Typer ends on Ctrl-C
        (MemoryError(), 7, "out of memory; try a smaller batch"),
        (BrokenPipeError(), 0, ""),
    ):

        def app(error=error) -> None:
            raise error

        monkeypatch.setattr(cli, "app", app)
        found, _, err = hilum()
        assert found == code
        assert message in err
        assert "Traceback" not in err


# ---- usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "--colour"], "No such option: --colour"),
        (["scann"], "No such command 'scann'"),
        (["prepare", "somewhere"], "Missing option '--out'"),
        (["phantom", "-o", "x", "--num-patients", "many"], "Invalid value for '--num-patients'"),
    ],
)
def test_misuse_is_exit_code_two(hilum, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = hilum(*arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_usage_errors_of_ours(hilum, tmp_path):
    code, _, err = hilum("pretrain", "huge", "--data", tmp_path, "-o", tmp_path / "run")
    assert (code, "no recipe 'huge'; known: tiny" in err) == (2, True)
    code, _, err = hilum("pretrain", "tiny", "--data", tmp_path, "-o", tmp_path / "run", "--set", "run.step=3")
    assert (code, "'run.step=3' is no setting (known here: steps" in err) == (2, True)
    code, _, err = hilum("phantom", "-o", tmp_path / "p", "--format", "png")
    assert (code, "form 'png' is unknown" in err) == (2, True)


def test_help_of_every_command(hilum):
    commands = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    assert {"demo", "phantom", "scan", "prepare", "pretrain", "embed", "probe", "inspect", "show", "info"} <= commands
    code, out, _ = hilum("--help")
    assert code == 0
    for command in commands:
        assert command in out
        code, text, _ = hilum(command, "--help")
        assert code == 0
        assert "Usage: " in text
        assert max(map(len, text.splitlines())) <= 100, command
    assert "Exit codes: 0 done" in out


def test_every_command_has_json_and_help_texts():
    commands = list(typer.main.get_command(cli.app).commands.values())  # type: ignore[attr-defined]
    for command in commands:
        assert command.help
        if hasattr(command, "commands"):  # a group: its commands follow
            commands += command.commands.values()
            continue
        names = {name for parameter in command.params for name in parameter.opts}
        assert "--json" in names, command.name
        missing = [p.name for p in command.params if not getattr(p, "help", None)]
        assert missing == [], command.name


def test_recipes_are_shown_without_a_store_and_without_torch():
    """Processor time, which a busy machine does not stretch; the best of two."""
    code = """
import resource, sys
from hilum.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = {"torch", "numpy", "pyarrow"} & sys.modules.keys()
print("\\n", used.ru_utime + used.ru_stime, *heavy)
"""
    for arguments, expected in ((["--list"], "curia2-g-512"), (["--show", "curia2-b"], "regulariser_weight")):
        seconds = []
        for _ in range(2):
            command = [sys.executable, "-c", code, "pretrain", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            used, *heavy = done.stdout.splitlines()[-1].split()
            assert heavy == []
            assert expected in done.stdout
            seconds.append(float(used))
        assert min(seconds) < 0.5


def test_recipes_as_json(hilum):
    code, out, _ = hilum("pretrain", "--list", "--json")
    assert (code, [recipe["name"] for recipe in json.loads(out)["recipes"]]) == (0, list(RECIPES))
    code, out, _ = hilum("pretrain", "--show", "ablation/5", "--set", "run.seed=3", "--json")
    record = json.loads(out)
    (lr,) = [line for line in record["settings"] if line["setting"] == "optimiser.lr"]
    assert (code, lr["value"], lr["origin"]) == (0, 1e-3, "paper")
    assert (record["base"], record["differs"]) == ("ablation/5", ["run.seed: 0 ≠ 3"])
    code, _, err = hilum("pretrain", "--show", "huge")
    assert (code, "no recipe 'huge'; known: tiny" in err) == (2, True)
    code, _, err = hilum("pretrain", "tiny")
    assert (code, "pretrain needs a recipe, --data STORE and --out FOLDER" in err) == (2, True)


def test_the_commands_of_the_page_on_recipes_run(hilum, tmp_path, monkeypatch):
    """docs/pretrain.md: its TOML file, and every command that needs no store."""
    page = (Path(__file__).parents[1] / "docs" / "pretrain.md").read_text(encoding="utf-8")
    (toml,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(toml)
    commands = [shlex.split(line, comments=True)[1:] for line in page.splitlines() if line.startswith("    hilum ")]
    runnable = [a for a in commands if "--data" not in a and a[0] in ("pretrain", "plan")]
    assert len(runnable) >= 6
    for arguments in runnable:
        code, out, err = hilum(*arguments)
        assert (code, err) == (0, ""), arguments
        assert out


# ---- input refused


def test_inputs_that_do_not_serve(hilum, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    run = ["-o", tmp_path / "run"]
    for path in (tmp_path / "absent", tmp_path / "file", tmp_path / "empty"):
        code, _, err = hilum("pretrain", "tiny", "--data", path, *run)
        assert code == 3, err
        assert err.startswith("hilum: ")
        assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
    code, _, err = hilum("scan", tmp_path / "absent")
    assert code in (2, 3)
    assert "absent" in err
    code, _, err = hilum("info", tmp_path / "empty")
    assert (code, "is no encoder" in err) == (2, True)


# ---- output


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    from hilum.archive.phantom import write_phantom

    out = tmp_path_factory.mktemp("cli") / "phantom"
    write_phantom(out, num_patients=1, num_slices=8, matrix=32, num_workers=1)
    return out


def test_phantom_and_scan_print_one_json_object(hilum, archive, tmp_path):
    code, out, _ = hilum(
        "phantom", "-o", tmp_path / "p", "--num-patients", 1, "--num-slices", 8, "--matrix", 32, "--json"
    )
    assert code == 0
    assert json.loads(out)["num_series"] == 2
    code, out, err = hilum("scan", archive / "scans", "-o", tmp_path / "l.parquet", "--json", "--quiet")
    counts = json.loads(out)
    assert (code, err) == (0, "")
    refused = sum(row["files"] for row in counts["refused"].values())
    assert counts["num_files_used"] + refused == counts["num_files"]
    assert (tmp_path / "l.parquet").is_file()


def test_scan_prints_a_table_without_json(hilum, archive):
    code, out, _ = hilum("scan", archive / "scans")
    assert code == 0
    assert out.startswith("used: 2 scans in 16 of 19 files\n")
    assert "localizer" in out
    assert "secondary_capture" in out


def test_inspect_ends_well_when_it_can_say_what_is_wrong(hilum, archive, tmp_path):
    """Exit code 0 for a refused scan, too; 3 when there is nothing to look at."""
    broken = next(p for p in (archive / "scans").iterdir() if p.name == "broken.dcm")
    code, out, err = hilum("inspect", broken, "--json", "--quiet")
    (record,) = json.loads(out)["scans"]
    assert (code, err, record["verdict"]) == (0, "", "refused")
    code, out, _ = hilum("inspect", archive / "scans" / "PHANTOM0000" / "ct", "-o", tmp_path / "page.html", "-q")
    assert code == 0
    assert "USED" in out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 100
    assert out.endswith("page.html: a page with pictures\n")
    assert "data:image/png" in (tmp_path / "page.html").read_text()
    code, _, err = hilum("inspect", tmp_path / "absent")
    assert (code, "is missing; expected a file, a folder, or STORE:KEY" in err) == (3, True)
    code, _, err = hilum("inspect", tmp_path / "absent:0123")
    assert code == 3


def test_show_writes_a_page(hilum, archive, tmp_path):
    hilum("scan", archive / "scans", "-o", tmp_path / "l.parquet", "-q")
    code, out, _ = hilum(
        "show", tmp_path / "l.parquet", "-o", tmp_path / "p.html", "--archive", archive / "scans", "-q"
    )
    assert (code, out) == (0, f"{tmp_path / 'p.html'}: 19 files, 2 scans used\n")
    code, out, _ = hilum("show", tmp_path / "l.parquet", "-o", tmp_path / "p.html", "--json")
    assert (code, json.loads(out)["num_files"]) == (0, 19)
    code, _, err = hilum("show", archive / "labels.csv", "-o", tmp_path / "p.html")
    assert (code, "is no Parquet file, so neither ledger nor store" in err) == (3, True)


def test_left_out_scans_are_exit_code_four(hilum, archive, tmp_path):
    """A broken file is a fault, unlike a localizer."""
    code, out, _ = hilum("prepare", archive / "scans", "-o", tmp_path / "store", "--num-workers", 1, "--json")
    assert code == 4
    assert json.loads(out)["num_volumes"] == 2
    clean = archive / "scans" / "PHANTOM0000"
    assert hilum("prepare", clean, "-o", tmp_path / "clean", "--num-workers", 1)[0] == 0


def test_info(hilum, tmp_path):
    import torch

    from hilum.encode.contract import Contract
    from hilum.encode.encoder import write_encoder
    from hilum.encode.vit import ViT, ViTConfig

    torch.manual_seed(0)
    contract = Contract(size_px=32)
    write_encoder(tmp_path / "e", ViT(ViTConfig(size="nano", patch=(8, 8), image=(32, 32))), contract, {})
    code, out, _ = hilum("info", tmp_path / "e", "--json")
    record = json.loads(out)
    assert (code, record["contract_hash"], record["model"]["size"]) == (0, contract.hash, "nano")
    code, out, _ = hilum("info", tmp_path / "e")
    assert contract.hash in out
    assert "cut to -1000 to 2000 HU" in out


def test_the_installed_command_works():
    """The entry point and `python -m hilum` are the same program."""
    done = subprocess.run(
        [sys.executable, "-m", "hilum", "info", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("hilum: no encoder 'nowhere'; expected a folder")
