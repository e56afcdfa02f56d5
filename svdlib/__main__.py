"""``python -m svdlib run [NOTEBOOK …] [-p NAME VALUE …] [--jobs N] [--out runs]``."""

import sys

from svdlib.study.runner import main

if __name__ == "__main__":
    sys.exit(main())
