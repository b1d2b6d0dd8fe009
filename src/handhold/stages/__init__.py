"""The stages of the pipeline; the contract they keep is written in `handhold.pipeline`."""
