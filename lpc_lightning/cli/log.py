"""The log and the warnings of a command."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_only


def set_up_logging() -> None:
    """Set how a command shows warnings and the log: each warning once, those of the log from the first device only."""
    warnings.showwarning = _showing_once(warnings.showwarning)
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]  # set by Lightning when it is imported
    level = logging.WARNING if is_first else logging.ERROR  # a warning would come once from each device
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    # peft asks for the name that transformers has renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "💡" not in record.msg)


def _showing_once(show: Callable[..., None]) -> Callable[..., None]:
    """Return a function that shows each warning once. Python shows it again after any change of the filters."""
    shown = set[tuple[str, type[Warning]]]()

    def showwarning(message: Warning | str, category: type[Warning], *place: Any, **where: Any) -> None:
        if (str(message), category) not in shown:
            shown.add((str(message), category))
            show(message, category, *place, **where)

    return showwarning
