"""The documentation of Python and the installed packages, as text to train on.

It needs no network, and its vocabulary and style differ from package to package, so it makes a good first corpus.

- collect: find the files, read them in worker processes, drop duplicates; `deepcloze python_docs`
- docstrings: extract prose from one source file or documentation page
"""
