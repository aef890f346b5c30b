"""Run the notebooks anew and keep what they show.

python notebooks/execute.py [NOTEBOOK]...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm misses widgets that nobody would see
}


def execute(path: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of running it where it lies.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    # Times in the metadata and versions of the kernel would change with every run.
    client = NotebookClient(
        notebook, timeout=300, record_timing=False, resources={"metadata": {"path": str(HERE)}}
    )
    client.execute(env={**SETTINGS, **os.environ})
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/jpeg", None)  # the PNG of the same picture is there
    return notebook


def main() -> None:
    for path in [Path(each) for each in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(execute(path), path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
