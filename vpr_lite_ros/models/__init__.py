"""The networks of the paper, one file each. Imports torch; running a model does not need it."""
