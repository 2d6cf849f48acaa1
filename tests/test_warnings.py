"""A deprecation that a line of ours is warned of fails its test; others' are not looked at."""

import subprocess
import sys
import types
import warnings

import jax
import pytest

from dgr_jax.partitioning import Mesh, make_mesh
from tests import toy
from tests.conftest import ROOT, strict_warnings


def warn_from(module):
    """Runs a line of a module of that name that calls something deprecated."""

    def deprecated():
        warnings.warn("gone soon", DeprecationWarning, stacklevel=2)

    namespace = types.ModuleType(module).__dict__ | {"deprecated": deprecated}
    exec("deprecated()", namespace)


@pytest.mark.parametrize("module", ["dgr_jax.training.step", "dgr_jax.config.cli", "tests.toy"])
def test_ours(module):
    with pytest.raises(DeprecationWarning, match="gone soon"):
        warn_from(module)


@pytest.mark.parametrize("module", ["flax.linen.spmd", "numpy"])
def test_others(module):
    warn_from(module)


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 1), reason="deprecated since JAX 0.10.1")
def test_the_older_way_to_enter_a_mesh():
    with pytest.raises(DeprecationWarning, match="with mesh"):
        with make_mesh(Mesh(1), toy.devices(1)):
            pass


def test_in_commands():
    names = strict_warnings()
    assert "error::DeprecationWarning:dgr_jax.training.step" in names.split(",")
    code = (
        "import warnings\n"
        "def deprecated(): warnings.warn('gone soon', DeprecationWarning, stacklevel=2)\n"
        "exec('deprecated()', {'__name__': 'other', 'deprecated': deprecated})\n"
        "exec('deprecated()', {'__name__': 'dgr_jax.training.step', 'deprecated': deprecated})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={"PYTHONWARNINGS": names}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "DeprecationWarning: gone soon"
