"""What README.md promises of an installed package, tried in the environment of the Python that runs this.

    python tests/installed.py

Needs the extra `sim`, no compiler, and none of this folder's other files.
"""

import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import fedss_kernels

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    where = Path(fedss_kernels.__file__).resolve()
    assert where.is_relative_to(Path(sysconfig.get_path("platlib")).resolve()), f"{where} is not installed"
    subprocess.run([Path(sysconfig.get_path("scripts")) / "fedss", "doctor"], check=True)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for example in examples:
        exec(example.replace("rounds=20", "rounds=1, cohort=2"), names)
    assert names["loss"].isfinite() and names["best"].indices.shape == (4, 5)
    print(f"fedss-kernels {fedss_kernels.__version__}, Python {platform.python_version()}:", end=" ")
    print(f"fedss doctor and README.md's {len(examples)} examples ran")


if __name__ == "__main__":
    sys.exit(main())
