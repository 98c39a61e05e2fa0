"""`python .../pixels SIZE`: a process that decodes images of SIZE pixels on a side, see `serving`."""

import importlib
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for a package of this name alone, without what it is in
    serving = importlib.import_module("pixels.serving")
    del sys.path[0]  # whose modules are of the package
    try:
        serving.serve(int(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:  # who asked is gone
        os._exit(0)
