"""The operations that decide speed, in plain PyTorch; every faster version must equal these."""
