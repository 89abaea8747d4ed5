"""Raw documents to clean ones: repair, filter, deduplicate, decontaminate.

`deepcloze clean`, top-down:

- config: the file of the user
- run: the cleaning; passes: its passes over the collection; parts: the files between them
- step: the interface of steps; arrays: their observations; steps: one file for each step, found by its name
- datatrove_step: steps that are filters of datatrove; words: how they and n-grams divide text into words
- near_duplicates: which documents are kept; minhash: candidates, also for the inspection of a corpus
- reading: sources to documents; readers: one file for each format that `deepcloze corpus` does not read; markup: text
  out of HTML and wiki markup
- tally: counts and examples; report: clean.json and the page
"""
