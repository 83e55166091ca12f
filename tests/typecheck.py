"""The type checker that jaxtyping's import hook applies to `whorl` under pytest."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
