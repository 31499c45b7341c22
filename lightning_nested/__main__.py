"""``python -m lightning_nested`` is the ``lightning-nested`` command."""

from lightning_nested.cli.main import main

if __name__ == "__main__":
    main()
