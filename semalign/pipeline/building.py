"""``python -m semalign.pipeline.building STAGE``: what ``jupyter-book build -W -n --keep-going -q`` does, as a module.

So it can be a fork of a run, which need not import anew what the reference documents: a quarter of the time.
"""

import gc
import sys
from pathlib import Path

from jupyter_book.sphinx import build_sphinx


def main(stage: Path) -> int:
    """Build the book of a staged folder into its ``_build/html``; 0 where Sphinx neither warned nor failed.

    Its documents stay until the end, so that a collection which walks through all of them finds next to nothing.
    """
    gc.set_threshold(*gc.get_threshold()[:2], 1000)
    toc = (stage / "_toc.yml").as_posix()
    settings = {"external_toc_path": toc, "nitpicky": True, "latex_individualpages": False}
    result = build_sphinx(
        stage, stage / "_build" / "html", noconfig=True, path_config=stage / "_config.yml", confoverrides=settings,
        warningiserror=True, keep_going=True, quiet=True,
    )  # fmt: skip
    if isinstance(result, Exception):
        raise result
    return result


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
