"""Generative priors for what no frame has seen. None is needed, none is downloaded."""
