"""``python -m lightning_nested`` is the ``lightning-nested`` command."""

from lightning_nested.cli import main

if __name__ == "__main__":
    main()
