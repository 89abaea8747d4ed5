"""`deepcloze serve`: a model behind HTTP. Read it from `app.py`; docs/serving.md is for users."""
