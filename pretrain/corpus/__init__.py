"""Raw text to token ids on disk.

`deepcloze corpus`, top-down:

- options: the flags; build: the build; build_plan: what it reads and writes
- sources, documents, formats: names of sources to documents
- pipeline: documents to worker processes to shard writers; workers: these processes
- tokenization: text to token ids; word_cache: each word once
- words: where words begin
- shards, manifest: the files of a corpus
- reader: opens a finished corpus for training; verification: checks its files; cache: copies
  on local disks

Besides:

- train_tokenizer, added_tokens: `deepcloze tokenizer`
- python_docs: text that needs no network
"""
