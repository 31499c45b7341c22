"""Find the YAML files that the package ships, and the user's own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

CONFIG_FOLDER = Path(__file__).parents[1] / "configs"
PROGRAM = "lightning-nested"


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIG_FOLDER.glob("*.yaml"))}


def shipped_rides() -> dict[str, Path]:
    """Return the configurations of ``ride``, by name."""
    return {path.stem: path for path in sorted((CONFIG_FOLDER / "ride").glob("*.yaml"))}


def resolve_config(value: str, shipped: dict[str, Path] | None = None) -> str:
    """Return the file that ``--config value`` means.

    An existing file comes first, then a shipped configuration of that name, with or without ``.yaml``. A value
    that cannot be such a name (an address, a file in a folder, YAML text) is left to the parser.

    Raises:
        ValueError: Another name; the message has close matches and all names.

    Example:
        >>> Path(resolve_config("digits")).name
        'digits.yaml'
    """
    shipped = shipped_configs() if shipped is None else shipped
    name = re.sub(r"\.ya?ml$", "", value)
    if Path(value).is_file() or not re.fullmatch(r"[\w.-]+", value):
        return value
    if name not in shipped:
        for command, names in (("ride", shipped_rides()), ("fit", shipped_configs())):
            if name in names:
                cure = f"{PROGRAM} {command} --config {name}"
                raise ValueError(f"`--config {name}` belongs to another command: {cure}")
        raise ValueError(
            f"`--config` must be a file or a configuration of the package ({', '.join(shipped)}). "
            f"Got {value!r}{close_matches(name, shipped)}"
        )
    return str(shipped[name])


def resolve_configs(arguments: Iterable[str], shipped: dict[str, Path] | None = None) -> list[str]:
    """Resolve the value of each ``--config``, in any of the forms argparse accepts, as :func:`resolve_config`."""
    resolved: list[str] = []
    expects_value = False
    for argument in arguments:
        joined = re.match(r"(--config=|-c=?)(?=[^-=])", argument)
        if expects_value:
            resolved.append(resolve_config(argument, shipped))
        elif joined:
            resolved.append(joined[0] + resolve_config(argument[joined.end() :], shipped))
        else:
            resolved.append(argument)
        expects_value = not expects_value and argument in ("-c", "--config")
    return resolved


def close_matches(word: str, known: Iterable[str]) -> str:
    """Return a question to end an error with, or nothing if no known word is close or begins with this one.

    Example:
        >>> close_matches("digit", ["digits", "cifar10"])
        '. Did you mean digits?'
    """
    # Compared without case: `imageclassifer` is one slip away from `ImageClassifier`, not three.
    by_lower = {name.lower(): name for name in known}
    begins = [name for name in by_lower if len(word) > 2 and name.startswith(word.lower())]
    close = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    names = [by_lower[name] for name in dict.fromkeys([*begins[:3], *close])]
    return f". Did you mean {' or '.join(names[:3])}?" if names else ""
