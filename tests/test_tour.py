"""The notebook extras/tour.ipynb runs in a fresh clone, and is committed with its pictures."""

import subprocess

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
TOUR = ROOT / "extras" / "tour.ipynb"


def pictures(notebook) -> int:
    """Number of pictures among the outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/jpeg" in output.get("data", {}) for output in outputs)


def test_the_tour_has_its_pictures():
    """Each cell was run, in order, and none failed."""
    assert TOUR.stat().st_size < 2_000_000
    notebook = nbformat.read(TOUR, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) == 6
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)


@pytest.mark.long
def test_the_tour_runs_in_a_fresh_clone(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    folder = tmp_path / "clone" / "extras"
    notebook = nbformat.read(folder / "tour.ipynb", as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    assert pictures(notebook) == 6
