"""What `whorl check` measures: promises of the library, each with its figure, its limit and a verdict."""
