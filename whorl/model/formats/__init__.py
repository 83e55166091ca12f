"""The layouts in which released models lie on disk: one module per family, each a few settings and names."""
