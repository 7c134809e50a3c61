import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("package", "heavy"),
    [
        ("lossworks.tracking", "mlflow"),
        ("lossworks.tracking", "torch"),
        ("lossworks.reporting", "matplotlib"),
    ],
)
def test_import_does_not_load_what_workers_do_not_need(package, heavy):
    code = f"import sys, {package}; sys.exit({heavy!r} in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
