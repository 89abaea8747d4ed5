"""Models and tokenizers of transformers: by name, in folders, and as modules that compute faster or more accurately."""
