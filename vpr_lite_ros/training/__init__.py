"""Learning the networks' weights. Imports torch; running a model does not need it."""
