import sys

import pytest

import ddp
import make_lt


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The embedded set, composed once."""
    root = tmp_path_factory.mktemp("digits") / "set"
    make_lt.make_digits(root)
    return root


@pytest.fixture
def script(monkeypatch):
    """script(train_rep, "--loss", "kcl", ...): run a script's main in this process as its command line would.
    Bad input arrives as SystemExit with its sentence."""
    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        ddp.run(module.main)
    return run
