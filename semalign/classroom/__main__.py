"""``python -m semalign.classroom [NAME ...]``: retrain Pico from nothing, resuming whatever a kill left."""

import sys

from semalign.classroom.make import main

if __name__ == "__main__":
    main(sys.argv[1:])
