"""`deepcloze export`: a model for other programs. Read it from `command.py`; docs/exporting.md is for users."""
