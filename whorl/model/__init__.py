"""The network: configuration, transformer, lightning and softmax attention, experts, state, tokenizers."""
