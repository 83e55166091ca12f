"""Tasks, one file each, and adapters for reasoning-gym and data files."""
