"""``python -m svdlib run|sweep|collect|lab|refresh|readme``; each tells its options with ``--help``."""

import sys

if __name__ == "__main__":
    try:
        from svdlib.study.running.runner import main
    except ModuleNotFoundError as error:
        sys.exit(f"svdlib: {error}; the notebooks need: pip install 'svdlib[study]'")
    sys.exit(main())
