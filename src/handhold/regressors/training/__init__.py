"""Training of the networks in `handhold.regressors`: a stream of batches, tasks that learn from it, one loop."""
