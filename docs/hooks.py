"""Files beside docs/ that its pages link to are part of the site.

On the pages a link is the path in the repository, "../bench/results/x.png", which works wherever the files
are read as they lie. mkdocs knows nothing outside its folder: it gets the files as if they lay in it.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BESIDE = ("bench/results", "examples")


def on_files(files, config):
    for folder in BESIDE:
        for path in sorted((ROOT / folder).iterdir()):
            if path.is_file():
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    return re.sub(rf"\]\((\.\./)((?:\.\./)*(?:{'|'.join(BESIDE)})/)", r"](\2", markdown)
