"""`meshctl`, as an operator types it."""

import pytest

from control.cli.__main__ import main


@pytest.fixture
def meshctl(capsys):
    """Run a command; its exit status, stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as left:
            status = left.code
        out, err = capsys.readouterr()
        return status, out, err

    return run
