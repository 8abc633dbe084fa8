"""The ``avd`` command line, one file per command."""
