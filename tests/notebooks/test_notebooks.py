"""Every notebook runs from top to bottom, and its two files say the same."""

import pathlib

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'notebooks'
SCRIPTS = sorted(FOLDER.glob('*.py'))


def sources(notebook) -> list[tuple[str, str]]:
  return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_pair_agrees_and_stores_no_outputs(script):
  stored = nbformat.read(script.with_suffix('.ipynb'), as_version=4)
  assert sources(stored) == sources(jupytext.read(script))
  assert not any(cell.get('outputs') for cell in stored.cells)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
# The kernel's machinery opens sockets and loops that it leaves to the garbage collector.
@pytest.mark.filterwarnings('ignore::ResourceWarning', 'ignore::DeprecationWarning',
                            'ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.timeout(300)
def test_runs(script, monkeypatch):
  monkeypatch.delenv('MPLBACKEND', raising=False)  # pictures are shown in the notebook
  notebook = jupytext.read(script)
  NotebookClient(notebook, timeout=240, kernel_name='python3',
                 resources={'metadata': {'path': str(FOLDER)}}).execute()
  pictures = [output for cell in notebook.cells for output in cell.get('outputs', ())
              if 'image/png' in output.get('data', {})]
  assert len(pictures) >= 5
