"""``python -m semalign.classroom [NAME ...]``: retrain Pico from nothing, resuming whatever a kill left."""

import sys

from semalign.classroom.make import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"semalign: {error}")
