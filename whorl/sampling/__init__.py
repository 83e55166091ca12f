"""The rollout engine: continuous batching, drawing tokens, conversations."""
