"""``python -m qkit`` is the ``qkit`` command."""

from qkit.cli import run

if __name__ == "__main__":
    run()
