"""Packages that only some parts need, and the extra of the installation that each belongs to."""

from __future__ import annotations

from importlib import import_module

# Top-level package: extra of pyproject.toml.
EXTRAS = {
    "PIL": "images",
    "gymnasium": "gymnasium",
    "jsonargparse": "cli",
    "matplotlib": "figures",
    "ray": "ray",
    "shtab": "completion",
    "sklearn": "digits",
    "torch_fidelity": "images",
    "torchvision": "images",
    "tqdm": "cli",
}


class MissingExtraError(ModuleNotFoundError):
    """Raised where a package of an extra is missing, or is installed but cannot be imported."""


def require_package(*names: str) -> None:
    """Import packages of an extra, or say in one sentence how to install them.

    Called before the import it is about, and early where hours of training would be lost.

    Args:
        *names: Keys of ``EXTRAS``.

    Raises:
        MissingExtraError: One of them is missing or broken.

    Example:
        >>> require_package("matplotlib")
    """
    for name in names:
        install = f"pip install 'lightning-nested[{EXTRAS[name]}]'"
        try:
            import_module(name)
        # A build for another torch can fail with anything: RuntimeError, OSError, AttributeError.
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                message = f"The package {name} is needed here. Got none installed: {install}"
            else:
                message = (
                    f"The package {name} must be importable. Got {type(error).__name__}: {error}. Install a build that "
                    f"fits the other packages: {install.replace('install', 'install --force-reinstall', 1)}"
                )
            raise MissingExtraError(message, name=name) from error
