"""python -m fedss_kernels is the command fedss."""

from .federated.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
