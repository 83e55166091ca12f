"""From a batch to new weights: packing, learner, optimizer, supervised batches, checkpoints."""
