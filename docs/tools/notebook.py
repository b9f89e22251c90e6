"""Runs the tutorial and keeps its outputs: ``python docs/tools/notebook.py [--write]``.

Without ``--write`` the stored texts are compared with those of the run. Pictures are kept but not
compared, since they depend on the version of matplotlib.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "tutorial.ipynb"


def run(path: Path = PATH) -> nbformat.NotebookNode:
    """The notebook after a run in an empty folder, without what differs from run to run.

    Raises:
        CellExecutionError: a cell raised an error.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        old = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": folder}})
            client.execute()
        finally:
            if old is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = old
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = _reproducible(cell.outputs)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    return notebook


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What the code cells printed, one text each."""
    return [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def _reproducible(outputs: list[Any]) -> list[Any]:
    """Outputs without warnings, printed lines as one text, pictures without their description."""
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    kept = [nbformat.v4.new_output("stream", text=printed)] if printed else []
    for output in outputs:
        if "image/png" in output.get("data", {}):
            image = {"image/png": output["data"]["image/png"]}
            kept.append(nbformat.v4.new_output("display_data", image))
    return kept


if __name__ == "__main__":
    new = run()
    if "--write" in sys.argv:
        nbformat.write(new, PATH)
    elif texts(new) != texts(nbformat.read(PATH, as_version=4)):
        sys.exit("the tutorial prints something else now: python docs/tools/notebook.py --write")
