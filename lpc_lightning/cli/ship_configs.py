"""The command `configs`: a copy of the config files that come with the package."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from lpc_lightning.errors import ConfigError
from lpc_lightning.files.output_paths import check_folder


def configs(output: str = "configs", overwrite: bool = False) -> Path:
    """Write the shipped config files to a folder, for `--config configs/experiment/...` and for changes of your own.

    Args:
        output: Folder to write.
        overwrite: Replace files that exist already. Other files in the folder are kept.

    Returns:
        The folder.

    Raises:
        ConfigError: A file exists already and `overwrite` is false; nothing is written then.
    """
    folder = Path(output)
    check_folder(folder, "output")
    with as_file(files("lpc_lightning") / "configs") as shipped:
        names = sorted(path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file())
        if not overwrite and (existing := [name for name in names if (folder / name).exists()]):
            raise ConfigError(
                f"output: found {folder / existing[0]} and {len(existing) - 1} more of the files to write, expected "
                "none of them. Give another folder, or --overwrite to replace them."
            )
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shipped / name, folder / name)
    print(f"Wrote {len(names)} files to {folder}.")
    return folder
