"""`deepcloze compare`: initializations × tasks × seeds."""
