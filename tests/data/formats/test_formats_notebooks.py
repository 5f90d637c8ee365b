"""Jupyter notebooks become Markdown without outputs; what is no notebook is quarantined with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepseek_v3.data.content import content_of
from deepseek_v3.data.preliminary_cleaning import PreliminaryCleaner
from helpers.formats import read, write

# As Jupyter writes it (nbformat 4.5).
CELLS: list[dict[str, Any]] = [
    {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Title\n", "\n", "Some *text*, x < y."]},
    {
        "cell_type": "code",
        "execution_count": 1,
        "id": "b",
        "metadata": {},
        "outputs": [
            {"name": "stdout", "output_type": "stream", "text": ["SECRET OUTPUT\n"]},
            {"data": {"image/png": "iVBORw0KGgo="}, "metadata": {}, "output_type": "display_data"},
        ],
        "source": ["def f(x):\n", "    return x\n", "\n", "\n", "f(1)"],
    },
    {"cell_type": "code", "execution_count": None, "id": "c", "metadata": {}, "outputs": [], "source": []},
    {"cell_type": "raw", "id": "d", "metadata": {}, "source": ["\\newpage"]},
    {
        "attachments": {"x.png": {"image/png": "iVBORw0KGgo="}},
        "cell_type": "markdown",
        "id": "e",
        "metadata": {},
        "source": "![a plot](data:image/png;base64,iVBORw0KGgo=) and ![other](attachment:x.png)",
    },
]
TEXT = """\
# Title

Some *text*, x < y.

```python
def f(x):
    return x


f(1)
```

a plot and ![other](attachment:x.png)
"""


def notebook(**changes: Any) -> str:
    metadata = {"kernelspec": {"name": "python3", "language": "python"}, "language_info": {"name": "python"}}
    return json.dumps(
        {"cells": CELLS, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5, **changes}, indent=1
    )


def test_cells_become_markdown_without_outputs(tmp_path):
    ((record,), quarantined) = read(write(tmp_path / "a.ipynb", "\ufeff" + notebook()))
    assert quarantined == []
    assert record["text"] == TEXT
    assert (record["id"], record["place"]) == ("a.ipynb", 0)
    assert json.loads(record["metadata"]) == {"content_type": "text/markdown", "code_language": "python"}


def test_cleaning_treats_it_as_prose_with_code_in_it(tmp_path):
    ((record,), _) = read(write(tmp_path / "a.ipynb", notebook()))
    content = content_of(record["source"], record["metadata"])
    assert content == "prose"
    assert PreliminaryCleaner().clean(record["text"], content) == TEXT.rstrip("\n")
    assert content_of("a.jsonl", '{"path":"a.ipynb"}') == "code"  # a record with the notebook's JSON


def test_notebooks_of_old_versions_are_read(tmp_path):
    cells = [
        {"cell_type": "heading", "level": 2, "metadata": {}, "source": ["Old"]},
        {"cell_type": "code", "collapsed": False, "input": ["print 1"], "language": "python", "outputs": []},
        {"cell_type": "markdown", "source": "End."},
    ]
    data = {"metadata": {"name": ""}, "nbformat": 3, "nbformat_minor": 0, "worksheets": [{"cells": cells}]}
    ((record,), _) = read(write(tmp_path / "a.ipynb", json.dumps(data)))
    assert record["text"] == "## Old\n\n```\nprint 1\n```\n\nEnd.\n"


def test_fences_in_code_do_not_end_its_fence(tmp_path):
    cells = [{"cell_type": "code", "source": 'x = """\n````\n"""'}]
    ((record,), _) = read(write(tmp_path / "a.ipynb", notebook(cells=cells, metadata={})))
    assert record["text"] == '`````\nx = """\n````\n"""\n`````\n'


def test_an_empty_notebook_is_an_empty_document(tmp_path):
    ((record,), _) = read(write(tmp_path / "a.ipynb", notebook(cells=[])))
    assert record["text"] == ""


@pytest.mark.parametrize(
    ("data", "reason", "error"),
    [
        ("", "empty", "holds no bytes"),
        (notebook()[:-9], "not_json", "is not JSON"),
        ("[]", "not_notebook", "holds a list, expected an object with a list `cells`"),
        ("{}", "not_notebook", "`cells` is null, expected a list of cells"),
        (notebook(cells={}), "not_notebook", "`cells` is an object, expected a list of cells"),
        (notebook(worksheets=[1]), "not_notebook", "`cells` is null, expected a list of cells"),
        (notebook(cells=[*CELLS, 1]), "not_notebook", "cell 6 has no `cell_type`"),
        (notebook(cells=[{"cell_type": "code"}]), "not_notebook", "cell 1: `source` is null, expected a string"),
        (notebook(cells=[{"cell_type": "code", "source": [1]}]), "not_notebook", "cell 1: `source` is a list"),
        (b'{"cells": "caf\xe9"}', "not_utf8", "byte 0xe9 at offset 14 is not UTF-8"),
    ],
)
def test_what_is_no_notebook_is_quarantined(tmp_path, data, reason, error):
    records, (entry,) = read(write(tmp_path / "a.ipynb", data))
    assert (records, entry["reason"]) == ([], reason)
    assert error in entry["error"]


@pytest.mark.parametrize("metadata", [None, [], {"language_info": 1}, {"kernelspec": {"language": "a b"}}])
def test_odd_metadata_names_no_language(tmp_path, metadata):
    ((record,), _) = read(write(tmp_path / "a.ipynb", notebook(metadata=metadata)))
    assert "```\ndef f(x):" in record["text"]
