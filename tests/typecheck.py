"""The checker that pytest puts on every signature of the package: beartype, in which an int is a float."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
