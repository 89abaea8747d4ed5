"""Raw text to token ids on disk.

`deepcloze corpus`, top-down:

- options.py: the flags; build.py: the build; build_plan.py: what it reads and writes
- sources.py, documents.py, formats.py, compression.py: names of sources to documents
- pipeline.py: documents to worker processes (workers.py, tokenization.py, words.py) to shard writers
- sampling.py: --holdout and --limit
- shards.py, manifest.py: the files of a corpus; reader.py: opens a finished corpus for training

train_tokenizer.py and added_tokens.py are `deepcloze tokenizer`; python_docs/ is text that needs no network.
"""
