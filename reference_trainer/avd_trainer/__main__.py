"""The ``avd`` command, also as ``python -m avd_trainer``."""

import sys


def main() -> None:
    """Run the command line, or say what to install."""
    from avd_trainer.runtime.threads import spin_briefly

    spin_briefly()
    try:
        from avd_trainer.commands.app import app
    except ModuleNotFoundError as error:
        sys.exit(f'avd needs {error.name}: pip install "avd-core[trainer]"')
    app()


if __name__ == "__main__":
    main()
