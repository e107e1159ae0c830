"""Evidence networks of STRING and GO annotation to ego networks of radius 1, in the layout that metapt opens.

    python data_scripts/string_graphs.py FROM TO [--cap 64] [--species 4932]

FROM is a folder with the files that `prepare_string` in metapt.py lists; `download ppi --source string-yeast --from FROM`
does the same with the defaults below, into data/ppi/string-yeast.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import metapt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", type=Path, metavar="FROM")
parser.add_argument("folder", type=Path, metavar="TO")
parser.add_argument("--cap", type=int, default=64, help="nodes of a graph at most; the centre is always kept")
parser.add_argument("--species", type=int, default=4932, help="NCBI taxon")
given = parser.parse_args()
try:
    about = metapt.prepare_string(given.source, given.folder, given.cap, given.species)
except metapt.BadInput as error:
    print(f"string_graphs: {error}", file=sys.stderr)
    sys.exit(2)
print(f"{about['graphs']} graphs, {about['nodes']} nodes, {about['edges']} directed edges, {about['tasks']} GO terms")
