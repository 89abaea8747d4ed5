"""Look at a corpus before it is used: `deepcloze corpus --inspect`. See docs/corpus.md.

- command: reads the corpus, writes the page and prints the summary
- sample: the shards and documents that are read
- contents: lengths of documents, frequencies of tokens, scripts of letters
- near_duplicates: sampled documents that occur again, slightly changed
- packing_efficiency: tokens per computed slot at several sequence lengths
- masked_documents: documents as the model sees them
- page: the page and the summary
"""
