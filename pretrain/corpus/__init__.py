"""Raw text to token ids on disk.

`deepcloze corpus`, top-down:

- options: the flags; build: the build; job_array: a share of it; build_plan, announcement: its input and output
- sources, splits: names of sources to parts that a task reads
- passes, tasks, records: count and tokenize all splits, one split; records of finished ones
- task_runners, workers: who runs the tasks
- documents, formats, compression: a split to documents; source_digest: identifies them
- tokenization: text to token ids; word_cache: each word once
- word_boundaries, segmenter: where words begin
- shards, manifest: the files of a corpus; origins: shares of its sources, and how they were cleaned
- reader: opens a finished corpus for training; verification: checks its files; cache: copies
  on local disks

Besides:

- train_tokenizer, added_tokens: `deepcloze tokenizer`
- python_docs: text that needs no network
"""
