"""Raw text to token ids on disk.

`deepcloze corpus` (build.py) makes a build plan from the options, reads documents, encodes them in worker processes and
writes Arrow shards:

    options.py → build_plan.py → sources.py, formats.py → pipeline.py: encoding.py, words.py → shards.py → manifest.py

sampling.py draws the held-out documents. reader.py opens a finished corpus for training. train_tokenizer.py and
added_tokens.py are `deepcloze tokenizer`; python_docs/ is a source of text that needs no network.
"""
