"""Fail on an import circle among our modules; imports inside functions and under TYPE_CHECKING count, too."""

import graphlib
import sys

import grimp


def main() -> int:
    graph = grimp.build_graph("sacflow_robot", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        print(f"import circle: {' <- '.join(circle)}; move what they share to a module below both", file=sys.stderr)
        return 1
    print(f"No import circle among {len(imports)} modules.")
    return 0


sys.exit(main())
