"""Documentation of Python and the installed packages, as text to train on."""
