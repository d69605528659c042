"""Sentences on settings that a parser refuses, in place of its text.

The parser's text shows how it tries one type after the other, in up to sixteen lines.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pkgutil import resolve_name

from jsonargparse import ArgumentParser
from torch.optim import Optimizer

from lpc_lightning.files.yaml_files import SUFFIXES

KEY = re.compile(r'Parser key "([\w.]+)"')
NO_CLASS = re.compile(r"Expected a dot import path string: (.*)")
SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
CLASS = re.compile(r"\b(?:\w+\.)+[A-Z]\w*")
CLASS_PATH = re.compile(r"given class_path '([\w.]+)'")
UNKNOWN = re.compile(r"Option '([^']+)' is not accepted(?:\. Got value: Namespace\(class_path='([\w.]+)')?")
UNRECOGNIZED = re.compile(r"unrecognized arguments: --([^\s=]+)")
IN_FILE = re.compile(r"(?:Subcommand '\w+' does not accept option|Option) '([^']+)'(?: is not accepted)?")
"""Name that is no setting in a config file, outside classes."""
UNKNOWN_LETTER = re.compile(r"unrecognized arguments: (-[^-\s]\S*)")
UNNAMED = re.compile(r"unrecognized arguments: ([^-\s]\S*)")
NO_VALUE = re.compile(r"argument (?:-\w/)?(--\S+): expected (?:one|at least one) argument")
MISSING = re.compile(r"the following arguments are required: (.*)")
SEVERAL = re.compile(r"Multiple subclasses with name (\w+)\..*: (.*)\.")
NOT_IMPORTED = re.compile(
    r"given class_path '([\w.]+)':\s+(No module named .*|cannot import .*|module .* has no attribute .*)"
)
VALUE = re.compile(r"Expected a (.+)\. Got value: (.*)|Subtypes: \[(.*)\](?s:.*?)Given value: (.*)")
LITERAL = re.compile(r"typing\.Literal\[([^]]*)\]")
LIST = re.compile(r"\blist\[[^][]*\]")
OWN = "lpc_lightning."
PLAIN = {"int": "an integer", "float": "a number", "bool": "true, false", "str": "a text", "NoneType": "null"}
"""Values that a setting may take, by type."""
FOLDERS = {
    "policy": "policy",
    "latent": "latent",
    "model": "algorithm",
    "data": "data",
    "callbacks": "callbacks",
    "trainer.logger": "logger",
}
"""Folder in `configs` with the files of a setting."""
EXAMPLES = {"model.optimizer": "torch.optim.AdamW"}
"""Class of a setting, for one whose classes the parser does not state."""


def explain_setting(message: str, settings: Iterable[str], required: Iterable[str], command: str) -> str | None:
    """Return a sentence with the setting, what was found and what is expected.

    Args:
        message: The parser's text.
        settings: All settings outside classes, as `trainer.max_steps`.
        required: Those that have no default.
        command: The command, as `lpc-lightning fit`.

    Returns:
        None if the text is about something else.
    """
    explained = _unrecognized(message, settings, command) or _unnamed(message, required)
    explained = explained or _not_given(message, command) or _incomplete(message, command)
    for explain in EXPLANATIONS:
        explained = explained or explain(message)
    return explained


def _unrecognized(message: str, settings: Iterable[str], command: str) -> str | None:
    """Explain a name that is no setting, in a flag or a config file, with the nearest one."""
    found, dashes = UNRECOGNIZED.match(message), "--"
    if found is None:
        found, dashes = IN_FILE.fullmatch(message), ""
    if found is None:
        return None
    names = list(settings)
    near = _near(found[1], names)
    if not near:
        # A setting of a class is not among them, its group is.
        group, _, rest = found[1].partition(".")
        near = [f"{each}.{rest}" for each in _near(group, sorted({name.partition(".")[0] for name in names})) if rest]
    advice = f", did you mean {dashes}{near[0]}?" if near else f". `{command} --help` lists the settings."
    return f"{dashes}{found[1]}: found no such setting{advice}"


def _unnamed(message: str, required: Iterable[str]) -> str | None:
    """Explain a value that belongs to no setting."""
    found = UNNAMED.match(message)
    if found is None:
        return None
    name = "config" if found[1].endswith(SUFFIXES) else next(iter(required), None)
    example = f", as in `--{name} {found[1]}`" if name else ""
    return f"found {found[1]} without a setting, expected its name before it{example}."


def _incomplete(message: str, command: str) -> str | None:
    """Explain an option of one letter that is not known, or an option without a value."""
    if found := UNKNOWN_LETTER.match(message):
        return f"{found[1]}: found no such setting. `{command} --help` lists the settings."
    if found := NO_VALUE.fullmatch(message):
        return f"{found[1]}: found no value, expected one after it. `{command} --help` lists the settings."
    return None


def _not_given(message: str, command: str) -> str | None:
    """Explain settings without a default that are not given. Those of a run have the subcommand before their name."""
    found = MISSING.fullmatch(message)
    if found is None:
        return None
    run, dot, _ = found[1].partition(".")
    if dot:
        names = found[1].replace(f"{run}.", "")
        return f"{names}: found none, expected values or a file with them: `--config configs/experiment/tiny.yaml`."
    return f"{found[1]}: found none, expected a value. `{command} --help` lists the settings."


def _unknown_class(message: str) -> str | None:
    """Explain a value that is no class, with the known classes."""
    found = NO_CLASS.search(message)
    if found is None:
        return None
    before = message[: found.start()]
    place = ".".join(KEY.findall(before))
    # Types of the setting itself stand behind its key, those of the setting that holds it before.
    types = SUBTYPES.search(KEY.split(before)[-1])
    paths = [] if types is None else [path for path in CLASS.findall(types[1]) if not path.startswith(NO_CHOICES)]
    plain = [] if types is None else [PLAIN[name] for name in ("int", "float", "bool") if f"'{name}'" in types[1]]
    if plain and not paths:
        return f"{place}: found {found[1]}, expected {_one_of(plain)}."
    bases = [resolve_name(path) for path in paths]
    classes = [each for base in bases for each in list(_subclasses(base)) or [base]]
    known = sorted({each.__name__ for each in classes})
    own = sorted({each.__name__ for each in classes if each.__module__.startswith(OWN)})
    file = f"a file (configs/{FOLDERS[place]}/)" if place in FOLDERS else "a file"
    names = "".join(f"{name}, " for name in [file, *plain, *(own or known)])
    example = EXAMPLES.get(place, "my_package.MyClass")
    return f"{place}: found {found[1]}, expected {names}or the import path of a class (`{example}`)."


NO_CHOICES = ("collections.abc.", "torch.Tensor", "typing.")
"""Beginnings of the paths of types whose subclasses are not offered."""


def _ambiguous_class(message: str) -> str | None:
    found = SEVERAL.search(message)
    if found is None:
        return None
    return f"{_place(message, found)}: found {found[1]}, the name of several classes, expected one of {found[2]}."


def _class_not_imported(message: str) -> str | None:
    found = NOT_IMPORTED.search(message)
    if found is None:
        return None
    return (
        f"{_place(message, found)}: found {found[1]}, which cannot be imported ({found[2]}), expected a class of an "
        "installed package. For a package in the working directory, use `python -m lpc_lightning` in place of "
        "`lpc-lightning`."
    )


def _missing_setting(message: str) -> str | None:
    found = MISSING.search(message)
    name = None if found is None else _class(message, found)
    if found is None or name is None:
        return None
    place = _place(message, found)
    file = f", or take a file of configs/{FOLDERS[place]}/" if place in FOLDERS else ""
    flags = " ".join(f"--{place}.{each.strip()}" for each in found[1].split(","))
    return f"{place}: found no {found[1]} for {name.rpartition('.')[2]}, expected `{flags}` with a value{file}."


def _unknown_setting(message: str) -> str | None:
    """Explain a setting that a class does not have, with those that it has."""
    found = UNKNOWN.search(message) or UNRECOGNIZED.search(message)
    name = None if found is None else _class(message, found)
    if found is None or name is None:
        return None
    kind = resolve_name(name)
    settings = ArgumentParser(exit_on_error=False).add_class_arguments(kind, fail_untyped=False)
    # A group is set by its own flag, and the module gives an optimizer its parameters.
    is_optimizer = isinstance(kind, type) and issubclass(kind, Optimizer)
    names = [each for each in settings if each not in FOLDERS and not (is_optimizer and each == "params")]
    near = _near(found[1], names)
    expected = f"did you mean {near[0]}?" if near else f"expected {_one_of(names)}."
    place = _place(message, found)
    return f"{place}.{found[1]}: {name.rpartition('.')[2]} has no setting {found[1]}, {expected}"


def _wrong_value(message: str) -> str | None:
    """Explain a value of the wrong type, if all types of the setting are plain."""
    *_, inner = KEY.split(message)
    found = VALUE.search(inner)
    if found is None:
        return None
    types, value = found[1] or found[3], found[2] or found[4]
    words = [PLAIN.get(name) for name in re.findall(r"<class '([\w.]+)'>", types)]
    choices = [each.strip(" '\"") for literal in LITERAL.findall(types) for each in literal.split(",")]
    choices += [f"a list, as in [{value}]"] if LIST.search(types) else []
    rest = LIST.sub("", LITERAL.sub("", re.sub(r"<class '[\w.]+'>", "", types)))
    if None in words or rest.strip(" ,"):
        return None
    expected = _one_of([*dict.fromkeys([*choices, *filter(None, words)])])
    return f"{'.'.join(KEY.findall(message))}: found {value}, expected {expected}."


EXPLANATIONS = (
    _unknown_class,
    _ambiguous_class,
    _class_not_imported,
    _missing_setting,
    _unknown_setting,
    _wrong_value,
)
"""Functions from the parser's text to a sentence, or None if it is about something else."""


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}" if len(names) > 1 else names[0]


def _place(message: str, found: re.Match[str]) -> str:
    return ".".join(KEY.findall(message[: found.start()]))


def _class(message: str, found: re.Match[str]) -> str | None:
    """Return the class of the settings in which the parser found a fault. None outside classes."""
    named = found[2] if found.re.groups > 1 else None
    return named or next(reversed(CLASS_PATH.findall(message[: found.start()])), None)


def _near(name: str, names: Sequence[str]) -> list[str]:
    return get_close_matches(name, names, n=1)


def _subclasses(base: type) -> Iterator[type]:
    """Yield the subclasses that can be built, of those that are imported."""
    subclasses: list[type] = base.__subclasses__()
    for each in subclasses:
        if not inspect.isabstract(each):
            yield each
        yield from _subclasses(each)
