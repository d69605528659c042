"""The wheel and the sdist: what they hold, and the commands of an installed wheel, outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from lpc_lightning.cli import main

ROOT = Path(__file__).parents[1]
PARTS = ("lpc_lightning", "callbacks", "evaluation", "configs")
HOSTILE = "raise RuntimeError('a command has imported a package of the user')\n"

FORKS = """
import json, os, runpy, sys
import lpc_lightning.__main__  # once for all commands: the imports take seconds

program, end, *commands = sys.argv[1:]
for command in commands:
    if not os.fork():
        sys.argv = [program, *json.loads(command)]
        runpy.run_path(program, run_name="__main__")
        sys.exit()
    if code := os.waitstatus_to_exitcode(os.wait()[1]):
        sys.exit(code)
    print(end, flush=True)
"""
"""Runs a Python program with several command lines, and prints a line behind the output of each."""
END = "--- end of this command ---"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program without the checkout on its path."""
    hidden = ("PYTHONPATH", "PYTHONWARNINGS", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def build(kind: str, source: Path, folder: Path) -> Path:
    """A wheel or an sdist of a source tree, made by setuptools."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    return folder / run(sys.executable, "-W", "ignore", "-c", code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, which holds folders where the checkout has links."""
    folder = tmp_path_factory.mktemp("unpacked")
    # Not `tarfile`: its safe filter is missing in early releases of Python 3.11, and later ones warn without it.
    subprocess.run(["tar", "-xzf", str(sdist), "-C", str(folder)], check=True)
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "lpc_lightning"
    expected = {
        f"lpc_lightning/{path.relative_to(package)}"
        for folder in (package, *(package / part for part in PARTS[1:]))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names == expected
    data = ("evaluation/report/assets/page.html", "policy/tiny_tokenizer.json", "py.typed", "configs/trainer/cpu.yaml")
    for name in data:
        assert f"lpc_lightning/{name}" in names


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment that holds the wheel, and finds its dependencies in this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    places = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # Folders on the path, whose own .pth files are not read: an editable install of the checkout is not seen.
    (Path(places) / "dependencies.pth").write_text("\n".join(sorted(shared)))
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    run(sys.executable, *install, cwd=folder)
    return folder / "bin"


def run_commands(programs: Path, *commands: list[str], cwd: Path) -> list[str]:
    """Run the installed `lpc-lightning` once for each list of arguments, and return what each has printed."""
    program, python = programs / "lpc-lightning", programs / "python"
    assert program.read_text().startswith(f"#!{python}\n")
    assert os.access(program, os.X_OK)
    # `-P`: as for a program, the working directory is not on the path.
    *outputs, rest = run(python, "-P", "-c", FORKS, program, END, *map(json.dumps, commands), cwd=cwd).split(END)
    assert not rest.strip()
    return outputs


def test_installed_commands_beside_hostile_folders(installed: Path, tmp_path: Path) -> None:
    for name in ("callbacks", "evaluation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(HOSTILE)
    python = installed / "python"
    where = "import lpc_lightning, lpc_lightning.evaluation as e; print(lpc_lightning.__file__, e.__file__)"
    for file in run(python, "-c", where, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed.parent)

    places = [f"--data.cache_dir={tmp_path / 'cache'}", "--data.train_pairs=16", "--data.validation_pairs=4"]
    bar = "--trainer.enable_progress_bar=false"
    fit = ["fit", "--config=configs/experiment/tiny.yaml", "--latent=configs/latent/marginal.yaml", *places, bar]
    version = tmp_path / "runs" / "version_0"
    found = [f"--config={version / 'config.yaml'}", f"--ckpt_path={version / 'checkpoints' / 'best.ckpt'}"]
    _, fitted, validated = run_commands(
        installed,
        ["configs", "--output", "configs"],
        [*fit, "--trainer.max_steps=2"],
        ["validate", *found],
        cwd=tmp_path,
    )
    config = yaml.safe_load((tmp_path / "configs" / "experiment" / "tiny.yaml").read_text())
    assert config == yaml.safe_load((ROOT / "configs" / "experiment" / "tiny.yaml").read_text())
    assert "Run folder: " in fitted
    assert "val/rewards/accuracies" in validated
    assert "usage: lpc-lightning evaluate" in run(python, "-m", "lpc_lightning", "evaluate", "--help", cwd=tmp_path)


def test_configs_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "configs"
    main(["configs", "--output", str(folder)])
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*") if path.is_file()}
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == shipped
    changed, mine = folder / "trainer" / "cpu.yaml", folder / "mine.yaml"
    changed.write_text("devices: 2\n")
    mine.write_text("a: 1\n")
    with pytest.raises(SystemExit, match="1"):
        main(["configs", "--output", str(folder)])
    assert "Give another folder, or --overwrite to replace them." in capsys.readouterr().err
    assert changed.read_text() == "devices: 2\n"
    main(["configs", "--output", str(folder), "--overwrite"])
    assert changed.read_bytes() == (ROOT / "configs" / "trainer" / "cpu.yaml").read_bytes()
    assert mine.read_text() == "a: 1\n"
